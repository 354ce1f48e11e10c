"""Timelines: what is recorded is well formed, names never collide, captures go to the right files, sums are right."""

from __future__ import annotations

import time
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pippin.errors import RequestError
from pippin.profile.control import ProfileOptions, of_stage, shifted
from pippin.profile.files import STAGES, Stage, capture_path, default_directory, reserve, trace_path
from pippin.profile.marks import AHEAD, DRAW, DRAWN, FORWARD, OTHER, QUEUE, READ, STEP, WAIT, Label
from pippin.profile.replay import replay
from pippin.profile.steps import Labels, Window
from pippin.profile.summary import Document, Event, summarize
from pippin.profile.timeline import (
    BUILDING,
    DEVICE,
    ENGINE_LANES,
    HTTP,
    HTTP_LANES,
    QUEUEING,
    SAMPLING,
    SCHEDULER,
    Span,
    Timeline,
)
from pippin.profile.trace import rows_of, trace_events
from pippin.types import Batch, Request, SamplingParams, Work
from tests.trace_checks import check_events

times = st.tuples(st.integers(0, 500), st.integers(0, 60)).map(lambda t: (t[0], t[0] + t[1]))
groups = st.sampled_from(["", "", "a", "b", "c", "d"])


@st.composite
def spans(draw: st.DrawFn) -> list[Span]:
    lanes = st.sampled_from([*HTTP_LANES, *ENGINE_LANES])
    found: list[Span] = []
    for lane, (start, end), group in draw(st.lists(st.tuples(lanes, times, groups), max_size=25)):
        inside = group and any(s.group == group for s in found)
        found.append(Span(HTTP if group else lane, f"{lane} {start}", start, end, group="" if inside else group))
    return found


@given(spans(), st.integers(-50, 50))
def test_every_row_of_a_file_nests_and_nothing_is_lost(drawn: list[Span], origin: int) -> None:
    events = list(trace_events(drawn, origin))
    check_events(events)
    written = [e for e in events if e["ph"] == "X"]
    assert sorted((e["cat"], e["name"]) for e in written) == sorted((s.lane, s.name) for s in drawn)
    by_name = {e["name"]: e for e in written}
    for span in drawn:
        assert by_name[span.name]["ts"] == (span.start - origin) / 1000


@given(st.lists(times.filter(lambda t: t[0] < t[1]), max_size=20))
def test_as_few_rows_as_ever_overlap(drawn: list[tuple[int, int]]) -> None:
    made = [Span(HTTP, str(i), start, end, group=str(i + 1)) for i, (start, end) in enumerate(drawn)]
    most = max((sum(s <= t < e for s, e in drawn) for t, _ in drawn), default=0)
    assert len(rows_of(made)) == most


def test_what_belongs_together_shares_a_row_and_with_nobody_else() -> None:
    made = [Span(HTTP, "one", 0, 100, group="1"), Span(HTTP, "two", 10, 20, group="2")]
    made += [Span(HTTP, "first byte", 0, 50, group="1"), Span(HTTP, "three", 100, 110, group="3")]
    assert [[s.name for s in row] for row in rows_of(made)] == [["one", "first byte", "three"], ["two"]]


def test_a_timeline_takes_cuts_and_measures() -> None:
    ticks = iter(range(0, 1000, 10))
    timeline = Timeline(lambda: next(ticks))
    group = timeline.begin(HTTP, "GET /", 0)
    with pytest.raises(ZeroDivisionError):
        timeline.timed(SCHEDULER, "schedule", lambda: 1 // 0)
    assert timeline.timed(SCHEDULER, "schedule", max, 1, 2) == 2
    assert timeline.take() == [Span(SCHEDULER, "schedule", 0, 10), Span(SCHEDULER, "schedule", 20, 30)]
    assert timeline.close() == [Span(HTTP, "GET /", 0, 40, group=group, args={"unfinished": True})]
    assert not timeline.end(group)
    assert timeline.take() == []


def _clock(pipe: Any) -> None:
    while pipe.recv():
        pipe.send(time.perf_counter_ns())


def test_processes_share_the_clock() -> None:
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_clock, args=(theirs,))
    child.start()
    for _ in range(20):
        before = time.perf_counter_ns()
        ours.send(True)
        assert before <= ours.recv() <= time.perf_counter_ns()
    ours.send(False)
    child.join()


# --- files ---


def test_names_follow_the_trace(tmp_path: Path) -> None:
    stem, paths = reserve(tmp_path, "x.y", True)
    assert [p.name for p in paths] == ["x.y-EXTEND.trace.json.gz", "x.y-DECODE.trace.json.gz"]
    assert [capture_path(p).name for p in paths] == ["x.y-EXTEND.gputrace", "x.y-DECODE.gputrace"]
    assert capture_path(trace_path(stem)).name == "x.y.gputrace"
    assert all(p.stat().st_size == 0 for p in paths)


def _reserve_many(directory: str) -> list[str]:
    return [reserve(Path(directory), "same", by_stage)[0] for by_stage in (False, True) for _ in range(10)]


def test_engines_in_one_directory_never_share_a_name(tmp_path: Path) -> None:
    with get_context("spawn").Pool(2) as pool:
        stems = [s for many in pool.map(_reserve_many, [str(tmp_path)] * 4) for s in many]
    plain = [s for s in stems if trace_path(s).exists()]
    assert len(list(tmp_path.iterdir())) == 40 + 80
    assert len(set(plain)) == 40


def test_a_capture_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "x.gputrace").mkdir()
    assert Path(reserve(tmp_path, "x", False)[0]).name == "x-1"
    assert Path(reserve(tmp_path, "x", True)[0]).name == "x"


def test_what_cannot_be_written_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for directory in (tmp_path / "file", tmp_path / "file" / "under", tmp_path / ("n" * 300)):
        with pytest.raises(RequestError, match="nothing can be written") as caught:
            reserve(directory, "x", False)
        assert caught.value.field == "output_dir"
    for name in ("../x", "a/b", "-x/", "x\0", "n" * 300):
        with pytest.raises(RequestError) as caught:
            reserve(tmp_path, name, False)
        assert caught.value.field == "profile_id"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_directory_is_sglangs_variable_or_the_temporary_one() -> None:
    assert default_directory({"SGLANG_TORCH_PROFILER_DIR": "/some/where"}) == Path("/some/where")
    assert default_directory({}).is_dir()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"num_steps": 0}, "num_steps"),
        ({"num_steps": -3}, "num_steps"),
        ({"start_step": -1}, "start_step"),
        ({"activities": ["CPU", "MEM"]}, "activities"),
    ],
)
def test_options_that_make_no_sense_are_named(options: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError, match=field) as caught:
        ProfileOptions(**options)
    assert caught.value.field == field


# --- which steps ---


@given(
    st.lists(st.sampled_from(STAGES), max_size=30),
    st.none() | st.integers(1, 5),
    st.none() | st.integers(0, 20),
    st.booleans(),
)
def test_a_window_takes_the_first_steps_from_its_start(
    stages: list[Stage], most: int | None, first: int | None, by_stage: bool
) -> None:
    window = Window(most, first, by_stage)
    taken = [i for i, stage in enumerate(stages, 1) if window.takes(i, stage)]
    candidates = [i for i in range(1, len(stages) + 1) if i >= (first or 0)]
    if by_stage:
        expected = sorted(i for s in STAGES for i in [c for c in candidates if stages[c - 1] == s][:most])
    else:
        expected = candidates[:most]
    assert taken == expected
    counts = [sum(stages[i - 1] == s for i in taken) for s in STAGES]
    assert window.full == (most is not None and (min(counts) if by_stage else sum(counts)) >= most)


# --- what a step is said to be ---


def test_the_cache_is_counted_once_for_each_request() -> None:
    labels, request = Labels(), Request("r", [1] * 40, 40, SamplingParams())
    request.num_cached = 10
    assert labels.of(Batch((Work(request, 10, 20, False),))).cached == 10
    assert labels.of(Batch((Work(request, 20, 25, False),))).cached == 0
    request.num_cached = 15  # another request has computed five more meanwhile
    assert labels.of(Batch((Work(request, 30, 40, True),))) == Label(1, 10, 0, 5)
    late = Request("s", [1] * 40, 40, SamplingParams())
    late.num_cached = 8
    assert Labels().of(Batch((Work(late, 20, 40, True),))).cached == 0, "that was before the profile"


def test_a_device_runs_one_step_at_a_time_and_not_beyond_what_is_known() -> None:
    """The second step is queued at 5 and the first is surely done at 7, as its build ahead finds."""
    noted = [STEP, 0, 0, 0, 1, *Label(1, 0, 1, 0), AHEAD, 1]
    noted += [STEP, 3, 4, 5, 2, *Label(1, 0, 1, 0), WAIT, 7, AHEAD, 8, READ, 1, 8, 9, READ, 2, 9, 10]
    spans = replay(noted)
    assert [(s.step, s.start, s.end) for s in spans if s.lane == DEVICE] == [(1, 0, 7), (2, 7, 10)]
    assert [(s.step, s.start, s.end) for s in spans if s.lane == SCHEDULER] == [(2, 3, 4)]


def test_a_step_that_is_queued_by_the_next_launch_is_said_to_be_that_step() -> None:
    label = Label(1, 0, 1, 0)
    noted = [STEP, 0, 0, 0, 1, *label, FORWARD, 1, STEP, 0, 0, 10, 2, *label, QUEUE, 13, FORWARD, 17]
    noted += [OTHER, 20, QUEUE, 21, FORWARD, 25, READ, 1, 30, 31, DRAW, 32, QUEUE, 33, DRAWN, 2, 36, READ, 2, 40, 41]
    spans = replay(noted)
    found = [(s.lane, s.name, s.step, s.start, s.end) for s in spans if s.lane in (BUILDING, QUEUEING, SAMPLING)]
    assert found == [
        (BUILDING, "build decode 1", 1, 0, 1),
        (QUEUEING, "queue", 1, 10, 13),
        (BUILDING, "build decode 1", 2, 13, 17),
        (QUEUEING, "queue", 2, 20, 21),
        (SAMPLING, "masks and draws", 2, 32, 36),
    ]


def test_sums_of_floats_neither_hide_a_span_nor_make_a_gap() -> None:
    ends = [1, *(1 + 0.1 * i for i in range(1, 60))]
    spans = [Event("X", "s", DEVICE, 1, 1, a, b - a) for a, b in pairwise(ends)]
    summary = summarize(Document(spans))
    assert (summary.lanes[0].count, summary.gaps) == (59, ())


# --- joining ---


def test_a_stages_file_has_its_steps_and_what_went_on_around_them() -> None:
    made = [
        Span(DEVICE, "a", 0, 10, 1, args={"stage": "EXTEND"}),
        Span(DEVICE, "b", 10, 20, 2, args={"stage": "DECODE"}),
        Span("waiting", "b", 12, 20, 2),
        Span(DEVICE, "c", 20, 30, 3, args={"stage": "EXTEND"}),
        Span(SCHEDULER, "schedule", 5, 7),
        Span(SCHEDULER, "schedule", 40, 41),
    ]
    assert of_stage(made, "EXTEND") == [made[0], made[3], made[4]]
    assert of_stage(made, "DECODE") == [made[1], made[2]]
    assert of_stage(made[:1], "DECODE") == []
    assert shifted(made[0], 5) == Span(DEVICE, "a", 5, 15, 1, args={"stage": "EXTEND"})
