"""Summaries of a timeline: what they add up, and what is no timeline."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pippin.errors import RequestError
from pippin.profile.files import STAGES
from pippin.profile.report import show_summary
from pippin.profile.summary import Document, Event, busy_time, outermost, read_trace, summarize
from pippin.profile.timeline import (
    DEVICE,
    SCHEDULER,
    Span,
)
from pippin.profile.trace import rows_of, write_trace

times = st.tuples(st.integers(0, 500), st.integers(0, 60)).map(lambda t: (t[0], t[0] + t[1]))


@given(st.lists(times, max_size=20))
def test_busy_time_counts_each_moment_once(drawn: list[tuple[int, int]]) -> None:
    assert busy_time(drawn) == sum(any(s <= t < e for s, e in drawn) for t in range(600))


@given(st.lists(times, max_size=12))
def test_outermost_spans_lie_in_no_other(drawn: list[tuple[int, int]]) -> None:
    row = max(rows_of([Span("x", "", s, e) for s, e in drawn]), key=len, default=[])
    bounds = [(s.start, s.end) for s in row]
    tops = outermost(bounds)
    assert busy_time(tops) == busy_time(bounds)
    assert busy_time(tops) == sum(e - s for s, e in tops)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 50), st.integers(0, 3)), min_size=1, max_size=15))
def test_a_summary_adds_up_what_the_file_holds(tmp_path_factory: pytest.TempPathFactory, drawn: Any) -> None:
    at, made, gaps = 0, [], 0
    for number, (gap, length, prefill) in enumerate(drawn, 1):
        gaps += gap if number > 1 else 0
        args = {"stage": STAGES[not prefill], "prefill_tokens": prefill, "decode_tokens": 1, "cached_tokens": 2}
        made.append(Span(DEVICE, f"{number}", at + gap, at + gap + length, number, args=args))
        at += gap + length
    path = tmp_path_factory.getbasetemp() / "drawn.trace.json.gz"
    write_trace(path, [Span(SCHEDULER, "schedule", 0, 1), *made], 0, {}, {"model": "m"})
    summary = summarize(read_trace(path))
    lanes = {lane.lane: lane for lane in summary.lanes}
    near = pytest.approx
    assert summary.wall == near(at / 1e6)
    assert lanes[DEVICE].busy == lanes[DEVICE].total == near(sum(length for _, length, _ in drawn) / 1e6)
    assert (lanes[DEVICE].count, lanes[SCHEDULER].count) == (len(drawn), 1)
    assert sum(gap.length for gap in summary.gaps) == near(gaps / 1e6)
    assert [s.length for s in summary.steps] == near(sorted((length / 1e6 for _, length, _ in drawn), reverse=True))
    assert sum(stage.prefill_tokens for stage in summary.stages) == sum(prefill for *_, prefill in drawn)
    assert sum(stage.decode_tokens for stage in summary.stages) == len(drawn)
    assert summary.about == {"model": "m"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "still runs"),
        (b"not json", "no timeline"),
        (b'{"a": 1}', "traceEvents"),
        (b'{"traceEvents": [{"ph": 1}]}', "no timeline"),
        (b'{"traceEvents": []}', "no span"),
        (gzip.compress(b'{"traceEvents": []}', mtime=0)[:-9], "cut off"),
        (b"\x1f\x8b\x08broken.......", "damaged"),
        (gzip.compress(b"\xff\xfe", mtime=0), "no timeline"),
    ],
)
def test_a_file_that_is_no_timeline_is_said_to_be_none(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(RequestError, match=message):
        summarize(read_trace(tmp_path / "x"))
    with pytest.raises(RequestError, match="can't be read"):
        read_trace(tmp_path / "nothing")


def test_a_bare_list_of_events_and_an_unpacked_file_are_read(tmp_path: Path) -> None:
    event = {"ph": "X", "name": "a", "pid": 1, "tid": 1, "ts": 5, "dur": 7}
    for content in ([event], {"traceEvents": [event], "other": 1}):
        (tmp_path / "x").write_text(json.dumps(content))
        assert summarize(read_trace(tmp_path / "x")).wall == pytest.approx(0.007)


def test_the_terminal_shows_markup_as_text() -> None:
    event = Event("X", "prefill [bold]5", DEVICE, 1, 1, 0, 10, {"step": 3, "stage": "EXTEND"})
    later = msgspec.structs.replace(event, ts=30.0)
    summary = summarize(Document([event, later], {"model": "[red]m", "error": "[x] failed"}))
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    show_summary(summary, console, 1)
    text = console.export_text()
    console.file.close()
    assert "[red]m" in text
    assert "prefill [bold]5" in text
    assert "[x] failed" in text
    assert "1 gaps" in text
