"""The comparison with mlx-lm runs from end to end, and its arithmetic and verdicts are right."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from benchmarks import sampling
from benchmarks.checkpoint import SMALL, make_tokenizer, text_of
from benchmarks.cpu import (
    OURS,
    QUICK,
    THEIRS,
    Overhead,
    Report,
    Result,
    main,
    overhead_lines,
    show,
    slower_lines,
)
from benchmarks.generators import generator, timed
from pippin.errors import PippinError


def test_the_whole_run_on_a_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--quick", "--json", str(tmp_path / "a" / "out.jsonl"), "--report", str(tmp_path / "out.txt")])
    lines = [json.loads(line) for line in (tmp_path / "a" / "out.jsonl").read_text().splitlines()]
    assert [line["name"].split(",")[0].split()[0] for line in lines] == ["prefill", "decode", "4", "overhead"]
    for line in lines[:3]:
        assert all(len(line["values"][name]) == QUICK.rounds for name in (OURS, THEIRS))
        assert line["ratio"] > 0
    assert lines[3]["served_step"] > 0
    text = (tmp_path / "out.txt").read_text()
    assert "8 of 8 greedy answers agree token for token." in text
    assert "requests sharing 64 tokens" in text
    assert text in capsys.readouterr().out


def test_rounds_must_be_positive(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--rounds", "0"])
    assert stopped.value.code == 2
    assert "--rounds must be at least 1" in capsys.readouterr().err


@given(st.lists(st.tuples(st.floats(1, 100), st.floats(1, 100)), min_size=1, max_size=7))
def test_a_ratio_above_one_means_ours_is_better_either_way(pairs: list[tuple[float, float]]) -> None:
    ours, theirs = [a for a, _ in pairs], [b for _, b in pairs]
    speed = Result("speed", "tok/s", 1.0, values={OURS: ours, THEIRS: theirs})
    seconds = Result("time", "s", 1.0, more_is_better=False, values={OURS: theirs, THEIRS: ours})
    assert speed.ratio == pytest.approx(seconds.ratio)
    assert speed.best_ratio == pytest.approx(max(ours) / max(theirs))
    assert seconds.best_ratio == pytest.approx(min(ours) / min(theirs))
    assert ("SLOWER" in speed.verdict) == (speed.ratio < 1)
    assert ("promised" in speed.verdict) == (speed.ratio < 1)


def test_the_report_says_what_is_slower_and_what_serving_costs() -> None:
    good = Result("decode", "tok/s", 1.0, values={OURS: [30.0, 20.0], THEIRS: [10.0, 10.0]})
    close = Result("prefill", "tok/s", 1.5, values={OURS: [12.0], THEIRS: [10.0]})
    bad = Result("prefix", "s", 4.0, more_is_better=False, values={OURS: [4.0], THEIRS: [2.0]})
    assert (good.ratio, good.verdict) == (2.5, "≥ 1: ok")
    assert close.verdict == "under the 1.5 promised"
    assert slower_lines([good, close, bad]) == ["Slower than mlx-lm: prefix, 2.00 times."]
    assert slower_lines([good, close]) == ["Nothing measured here is slower than mlx-lm."]
    cheap, dear, unknown = (Overhead(16, 0.1, 0.11, cpu) for cpu in (0.001, 0.02, None))
    assert "1.0% of a step (≤ 5%: ok); all 16 together 16%" in overhead_lines([cheap])[1]
    assert "20.0% of a step (≤ 5%: too much)" in overhead_lines([dear])[1]
    assert overhead_lines([unknown])[1] == "The HTTP process's CPU time is not known on this system."
    console = Console(record=True, width=160)
    show(Report([good, close, bad], [cheap], {"load before": "3.1"}, ["A note."]), console)
    text = console.export_text()
    assert "2.00 times SLOWER than mlx-lm; under the 4 promised" in text
    assert "A note." in text
    assert "The machine was busy" in text
    show(Report([good], [cheap], {"load before": "0.2"}, []), console)
    assert "The machine was busy" not in console.export_text()


def test_decode_counts_only_tokens_after_every_stream_s_first() -> None:
    """Stream 0 is prefilled first, and decodes while stream 1 is not there yet: those tokens are not decode's."""
    steps = iter([[(0, 7)], [(0, 7)], [(0, 7), (1, 8)], [(0, 7), (1, 8)], [(1, 8)]])
    clock = iter([100.0, 103.0, 105.0])  # one reading at the start, at stream 1's first token, and at the end
    timing = timed(lambda: next(steps), streams=2, steps=2, clock=lambda: next(clock))
    assert timing.tokens == [[7] * 4, [8] * 3]
    assert timing.prefill == 3.0
    assert timing.decode == pytest.approx(2.0 * 4 / 3)  # three tokens took 2 s; two of each stream would be four


def test_a_generator_that_can_t_load_says_why(tmp_path: Path) -> None:
    with pytest.raises(PippinError, match="nowhere"), generator("mlx-lm", tmp_path / "nowhere"):
        pass


def test_made_up_text_has_the_tokens_asked_for() -> None:
    tokenizer = make_tokenizer(SMALL.vocab)
    text = text_of(tokenizer, random.Random(0), 50)
    ids = tokenizer.encode(text).ids
    assert 50 <= len(ids) < 75
    assert tokenizer.decode(ids) == text


def test_sampling_s_cost_is_measured_for_every_case(tmp_path: Path) -> None:
    sampling.main(["--vocab", "50", "--rows", "2", "--json", str(tmp_path / "out.jsonl")])
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {line["case"] for line in lines} == {*sampling.CASES, "mlx.sort"}
    assert all(line["device_ms"] > 0 for line in lines)
