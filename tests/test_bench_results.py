"""Benchmark results: lines that come back as they went, and errors that name the file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given as drawn
from hypothesis import strategies as st

from pippin.bench.cli import spread
from pippin.bench.results import BenchResult, Value, append, make_result, read, to_line
from pippin.errors import ConfigError

values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**53), 2**53),
    st.text(),
    st.lists(st.one_of(st.integers(0, 99), st.text())),
)


def made(figures: dict[str, Value]) -> BenchResult:
    return make_result(
        "one-batch", run_name="a", side="pippin", model="m", device="cpu", settings={"batch_size": 1}, figures=figures
    )


@drawn(st.lists(st.dictionaries(st.text(), values), max_size=4))
def test_lines_come_back_as_they_went(
    tmp_path_factory: pytest.TempPathFactory, figures: list[dict[str, Value]]
) -> None:
    path = tmp_path_factory.mktemp("results") / "deeper" / "out.jsonl"
    results = [made({}), *(made(f) for f in figures)]
    append(path, results[:1])
    append(path, results[1:])
    assert read([path]) == results
    assert path.read_text().split("\n") == [*(to_line(r) for r in results), ""]


def test_a_result_says_what_it_depends_on() -> None:
    result = made({})
    assert {"pippin", "python", "mlx", "mlx-lm"} <= set(result.versions)
    assert result.commit is None or re.fullmatch(r"[0-9a-f]{12}\+?", result.commit)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", result.when)


def test_a_file_that_is_none_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(to_line(made({})) + "\n{}\n")
    with pytest.raises(ConfigError, match=r"results\.jsonl, line 2"):
        read([path])
    with pytest.raises(ConfigError, match="nowhere"):
        read([tmp_path / "nowhere"])
    with pytest.raises(ConfigError, match="--result-filename") as caught:
        append(tmp_path, [made({})])
    assert str(tmp_path) in caught.value.message


words = st.lists(st.sampled_from(["--a", "--b", "1", "x", "-n"]), max_size=9)


@drawn(words)
def test_only_lists_are_spread(arguments: list[str]) -> None:
    assert spread(arguments, set()) == arguments
    found = spread(arguments, {"--a"})
    assert [w for w in found if w != "--a"] == [w for w in arguments if w != "--a"]


def test_several_values_follow_one_flag() -> None:
    given = ["--a", "1", "2", "--b", "3", "--a", "-x", "4"]
    assert spread(given, {"--a"}) == ["--a", "1", "--a", "2", "--b", "3", "--a", "-x", "4"]
