"""``pippin bench report``: what it reads, what it draws, and how the page looks in a browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pippin.bench.report import render, run
from pippin.bench.report_charts import Chart, number, svg
from pippin.bench.report_groups import make_groups
from pippin.bench.report_read import read_any, read_line
from pippin.bench.results import BenchResult, Value, append, to_line
from pippin.bench.serving_api import Answer
from pippin.bench.serving_figures import figures
from pippin.cli import run_command
from pippin.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: scripts/setup.sh browser")


def answer(seconds: float, warm: bool) -> Answer:
    found = Answer(sent=1.0, warm=warm, prompt_tokens=10, output_tokens=3, cached_tokens=4)
    for i in range(3):
        found.arrive(1.0 + seconds * (i + 1), "x")
    found.end = found.arrivals[-1]
    return found


def serving(side: str, bound: int | None, seconds: float, **others: Any) -> BenchResult:
    answers = [answer(seconds * (1 + i / 10), warm=i > 4) for i in range(10)]
    settings: dict[str, Value] = {"dataset_name": "random", "num_prompts": 10, "max_concurrency": bound}
    return made("serving", side, settings | {"request_rate": "inf"}, figures(answers, seconds, {"ttft": 1.0}), **others)


def made(kind: str, side: str, settings: dict[str, Value], found: dict[str, Value], **others: Any) -> BenchResult:
    plain: dict[str, Any] = {
        "run_name": "default",
        "model": "some/demo",
        "device": "cpu",
        "when": "2026-11-21T01:02:03Z",
    }
    return BenchResult(
        kind=kind,
        side=side,
        settings=settings,
        figures=found,
        versions={"mlx": "0.32.4"},
        commit="abc",
        **(plain | others),
    )


def one_batch(side: str, size: int, tokens: float) -> BenchResult:
    found: dict[str, Value] = {"prefill_throughput": 10 * tokens, "median_decode_throughput": tokens}
    return made("one-batch", side, {"batch_size": size, "input_len": 8, "output_len": 4}, found)


RESULTS = [
    *(serving(side, n, 0.1 * n * k) for side, k in (("mlx-lm", 3), ("pippin", 1)) for n in (1, 4, 16)),
    *(one_batch(side, n, n * k) for side, k in (("pippin", 200.0), ("mlx-lm", 100.0)) for n in (1, 8)),
    made("offline", "pippin", {}, {"output_throughput": 123.0, "prompts": 7}),
    made("something new", "pippin", {}, {"speed": 7.0}),
]
GPU = ROOT / "benchmarks" / "h200.jsonl"
SGLANG = {
    "backend": "sglang", "dataset_name": "random", "request_rate": float("inf"), "max_concurrency": 4, "completed": 10,
    "request_throughput": 2.0, "output_throughput": 50.0, "mean_ttft_ms": 30.0, "median_ttft_ms": 29.0,
    "p99_ttft_ms": 40.0,
}  # fmt: skip


def charts() -> dict[str, Chart]:
    return {f"{group.title}: {chart.title}": chart for group in make_groups(RESULTS) for chart in group.charts}


def test_what_is_drawn_is_what_was_measured() -> None:
    found = charts()
    throughput = found["Servers under load: Throughput against concurrency"]
    assert list(throughput.series) == ["pippin", "mlx-lm"]  # ours first, whoever comes first in the files
    assert list(throughput.labels) == ["1", "4", "16"]
    assert throughput.series["pippin"] == pytest.approx([300, 75, 18.75])
    versus = found["Servers under load: Ours against peers: tokens a second"]
    assert versus.series == {"pippin / mlx-lm": pytest.approx([3.0, 3.0, 3.0])}
    decode = found["One batch, without a server: Decode against batch size"]
    assert decode.series == {"pippin": [200.0, 1600.0], "mlx-lm": [100.0, 800.0]}
    cold = found["Servers under load: Cold against warm: time to first token"]
    assert list(cold.labels) == ["pippin", "mlx-lm"]
    assert cold.series["cold"] == pytest.approx([120, 360])
    assert cold.series["warm"] == pytest.approx([170, 510])
    percentiles = found["Servers under load: Time to first token, percentiles"]
    assert percentiles.note == "At the largest load: 16."
    assert percentiles.series["pippin"][0] == pytest.approx(1600 * 1.45)
    assert found["The engine alone: Output throughput"].series == {"pippin": [123.0]}


def test_long_contexts_on_a_gpu_stand_apart() -> None:
    line = {"side": "pippin", "shape": "8b", "streams": 32, "decode": 9.0, "device": "H200"}
    more = {"side": "pippin", "shape": "8b", "prompt_16k": 5.0, "device": "H200", "longest_wait_ms": 3.0}
    groups = make_groups(
        [read_line(json.dumps(x).encode()) for x in (line, line | {"context": 8192, "decode": 4.0}, more)]
    )
    assert [g.charts[0].series for g in groups] == [{"pippin": [4.0]}, {"pippin": [9.0]}]
    assert groups[0].subtitle.endswith("contexts of 8192 tokens")
    assert "longest wait ms" in groups[1].columns
    assert [c.title for c in groups[1].charts][1:] == ["A prompt of 16384 tokens"]


def test_other_workloads_and_models_are_other_plots() -> None:
    longer = serving("pippin", 1, 0.1)
    longer.settings["num_prompts"] = 99
    groups = make_groups([serving("pippin", 1, 0.1), longer, serving("pippin", 1, 0.1, model="other")])
    assert len(groups) == 3
    assert len({group.subtitle for group in groups}) == 2 + 1


def test_runs_of_one_side_keep_their_names_apart() -> None:
    (group,) = make_groups([serving("pippin", 1, 0.1, run_name="a"), serving("pippin", 1, 0.2, run_name="b")])
    assert {row[0] for row in group.rows} == {"pippin, a", "pippin, b"}


def test_repeated_runs_count_by_their_median() -> None:
    (group,) = make_groups([one_batch("pippin", 1, tokens) for tokens in (1.0, 50.0, 3.0)])
    assert group.charts[0].series == {"pippin": [3.0]}
    assert len(group.rows) == 3


# --- files ---


def test_files_of_each_kind_are_read(tmp_path: Path) -> None:
    append(tmp_path / "ours.jsonl", RESULTS)
    (tmp_path / "sglang.jsonl").write_text(json.dumps(SGLANG) + "\n\n")
    found = read_any([tmp_path / "ours.jsonl", GPU, tmp_path / "sglang.jsonl"])
    assert found[: len(RESULTS)] == RESULTS
    assert {r.kind for r in found[len(RESULTS) : -1]} == {"gpu"}
    assert (found[-1].kind, found[-1].side, found[-1].settings["request_rate"]) == ("serving", "sglang", "inf")
    page = render(found, "All")
    assert "On a GPU, without a server" in page
    assert "sglang" in page


@pytest.mark.parametrize("content", ["{", "[]", "7", '{"kind": "x"}', '{"side": "pippin"}', "\xff", '{"shape": 1}'])
def test_a_line_that_is_no_result_is_named(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(to_line(RESULTS[0]).encode() + b"\n" + content.encode("latin-1") + b"\n")
    assert run_command(["bench", "report", str(path), "-o", str(tmp_path / "out.html")]) == 2
    assert "bad.jsonl, line 2" in capsys.readouterr().err
    assert not (tmp_path / "out.html").exists()


def test_files_that_are_not_there_or_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    for name in ("none.jsonl", "empty.jsonl"):
        assert run_command(["bench", "report", str(tmp_path / name)]) == 2
        assert name in capsys.readouterr().err
    append(tmp_path / "one.jsonl", RESULTS[:1])
    with pytest.raises(ConfigError, match="--output"):
        run([tmp_path / "one.jsonl"], tmp_path / "one.jsonl" / "below.html", "T")


values = (
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.integers(-9, 9) | st.text() | st.lists(st.integers())
)
names = st.sampled_from(
    ["output_throughput", "median_ttft_ms", "p99_ttft_ms", "median_ttft_warm_ms", "prefill_throughput", "decode", "x"]
)
settings_of = st.dictionaries(
    st.sampled_from(["max_concurrency", "request_rate", "batch_size", "dataset_name"]), values
)
anything = st.builds(
    made,
    st.sampled_from(["serving", "one-batch", "offline", "gpu", "new"]),
    st.text(),
    settings_of,
    st.dictionaries(names, values),
    model=st.text(),
    run_name=st.text(),
)


@given(st.lists(anything, min_size=1, max_size=3), st.text())
@settings(max_examples=25)
def test_any_results_make_a_page_without_markup_of_theirs(results: list[BenchResult], title: str) -> None:
    read_back = [read_line(to_line(r).encode()) for r in results]
    page = render(read_back, title)
    drawn = re.findall(r"<svg .*?</svg>", page, re.S)
    assert len(drawn) == sum(len(g.charts) for g in make_groups(read_back))
    for plot in drawn:
        ET.fromstring(plot)


def test_text_of_files_is_never_markup() -> None:
    evil = "<script>alert(1)</script>\"'&"
    results = [serving(side, n, 0.1, model=evil, run_name=evil) for side in (evil, "b") for n in (1, 2)]
    page = render(results, evil)
    assert "<script" not in page
    assert html.escape(evil, quote=False).partition('"')[0] in page


def test_nothing_is_fetched() -> None:
    page = render([*RESULTS, *read_any([GPU])], "T")
    assert set(re.findall(r"https?://[^\s\"'<>]*", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert not re.search(r"<(script|link|img|iframe)\b|@import|url\(", page)


@given(st.floats(1e-3, 1e12).flatmap(lambda x: st.sampled_from([x, -x, 0.0])))
def test_numbers_keep_three_digits(value: float) -> None:
    text = number(value)
    assert len(text) <= 9
    scale = {"k": 1e3, "M": 1e6, "G": 1e9}.get(text[-1:], 1.0)
    shown = float(text.rstrip(" kMG")) * scale
    assert shown == pytest.approx(value, rel=0.006, abs=1e-9)


def test_a_plot_says_its_values_without_scripts() -> None:
    plot = svg(Chart("T", "ms", ["a", "b"], {"x": [1.5, None], "y": [2.0, 3.0]}), lambda name: 0)
    assert {t.text for t in ET.fromstring(plot).iter("{http://www.w3.org/2000/svg}title")} >= {"1.5", "2", "3"}
    assert 'aria-label="T"' in plot


# --- in a browser ---

# Put into a copy of the page; what it finds stands in the document's title.
LOOK = """<script>addEventListener("load", () => {
  const figures = [...document.querySelectorAll("figure")];
  const boxes = figures.map(f => f.getBoundingClientRect());
  const outside = figures.filter((f, i) => [...f.querySelectorAll("text")].some(t => {
    const b = t.getBoundingClientRect();
    return b.width > 0 && (b.left < boxes[i].left - 1 || b.right > boxes[i].right + 1
      || b.bottom > boxes[i].bottom + 1);
  }));
  const overlapping = boxes.some((a, i) => boxes.some((b, j) => i < j && a.left < b.right - 1 && b.left < a.right - 1
    && a.top < b.bottom - 1 && b.top < a.bottom - 1));
  const color = (e, name) => getComputedStyle(e)[name];
  const shape = document.querySelector(".series .reactive");
  document.title = "FOUND" + JSON.stringify({
    figures: figures.length, smallest: Math.min(...boxes.map(b => Math.min(b.width, b.height))),
    outside: outside.map(f => f.querySelector("h3").textContent), overlapping,
    wide: document.documentElement.scrollWidth - innerWidth, fetched: performance.getEntriesByType("resource").length,
    page: color(document.body, "backgroundColor"), text: color(document.body, "color"),
    labels: [...new Set([...document.querySelectorAll("figure svg text")].filter(t => t.getBoundingClientRect().width)
      .map(t => color(t, "fill")))], series: color(shape, "stroke"),
  }) + "END";
})</script>"""


def chromium(page: Path, profile: Path, *arguments: str) -> str:
    assert CHROMIUM is not None
    common = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
    command = [CHROMIUM, *common, *arguments, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def looked(page: Path, profile: Path, *arguments: str) -> dict[str, Any]:
    """What a script finds of the page's layout and colours."""
    copy = page.with_name("looked.html")
    copy.write_text(page.read_text().replace("</head>", LOOK + "</head>"))
    found = re.search(r"FOUND(.*?)END", chromium(copy, profile, "--dump-dom", *arguments))
    assert found
    facts: dict[str, Any] = json.loads(html.unescape(found[1]))
    return facts


def brightness(color: str) -> float:
    return sum(map(float, re.findall(r"[\d.]+", color)[:3])) / 3


@browser
@pytest.mark.parametrize("width", [420, 1200])
def test_in_a_browser_light_and_dark(tmp_path: Path, width: int) -> None:
    """Plots that are there, beside each other, with all of their text inside; readable by day and by night."""
    append(tmp_path / "ours.jsonl", RESULTS)
    page = tmp_path / "report.html"
    assert run([tmp_path / "ours.jsonl", GPU], page, "Benchmarks") > 0
    found = {}
    for scheme, number_of in (("dark", 0), ("light", 1)):
        arguments = [f"--window-size={width},900", f"--blink-settings=preferredColorScheme={number_of}"]
        found[scheme] = looked(page, tmp_path / "profile", *arguments)
    for facts in found.values():
        assert facts["figures"] == page.read_text().count("<figure>") > 10
        assert facts["smallest"] > 180
        assert facts["outside"] == []
        assert not facts["overlapping"]
        assert facts["wide"] <= 0
        assert facts["fetched"] == 0
    light, dark = found["light"], found["dark"]
    assert brightness(light["page"]) > 200 > 100 > brightness(light["text"])
    assert brightness(dark["page"]) < 60 < 180 < brightness(dark["text"])
    assert light["labels"] == [light["text"]]
    assert dark["labels"] == [dark["text"]]
    assert light["series"] != dark["series"]


@browser
def test_a_screenshot_is_a_picture(tmp_path: Path) -> None:
    append(tmp_path / "ours.jsonl", RESULTS)
    run([tmp_path / "ours.jsonl"], tmp_path / "report.html", "Benchmarks")
    shot = tmp_path / "shot.png"
    chromium(tmp_path / "report.html", tmp_path / "profile", "--window-size=900,900", f"--screenshot={shot}")
    content = shot.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(content[16:20], "big") == 900
    assert len(content) > 20_000  # an empty page of this size has 3 kB
