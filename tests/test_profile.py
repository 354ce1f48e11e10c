"""Timelines: what is recorded is well formed, names never collide, captures go to the right files, sums are right."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Sequence
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pippin.errors import RequestError
from pippin.profile.control import ProfileOptions, of_stage, shifted
from pippin.profile.files import STAGES, Stage, capture_path, default_directory, reserve, trace_path
from pippin.profile.gpu import MetalCapture, StepRanges, Tracer, nvtx_ranges, open_tracer
from pippin.profile.marks import AHEAD, DRAW, DRAWN, FORWARD, OTHER, QUEUE, READ, STEP, WAIT, Label
from pippin.profile.replay import each, replay
from pippin.profile.report import show_summary
from pippin.profile.steps import MARKS_A_MESSAGE, Labels, Outcome, StepProfile, TimedRunner, Window
from pippin.profile.summary import Document, Event, busy_time, outermost, read_trace, summarize
from pippin.profile.timeline import (
    BUILDING,
    DEVICE,
    ENGINE_LANES,
    HTTP,
    HTTP_LANES,
    QUEUEING,
    SAMPLING,
    SCHEDULER,
    Timeline,
)
from pippin.profile.trace import rows_of, trace_events, write_trace
from pippin.types import Batch, Request, RowResult, SamplingParams, Span, Work
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


# --- captures, against a recorded Metal ---


class RecordedMetal:
    """``mlx.core.metal``'s functions, refusing what Metal refuses: two captures at once, a file that is there."""

    def __init__(self, available: bool = True, fails: bool = False) -> None:
        self.available, self.fails = available, fails
        self.calls: list[str] = []
        self.running: Path | None = None

    def is_available(self) -> bool:
        return self.available

    def start_capture(self, path: str) -> None:
        if self.fails or self.running is not None or Path(path).exists():
            raise RuntimeError("[metal::start_capture] Failed to start")
        self.running = Path(path)
        self.calls.append(f"start {self.running.name}")

    def stop_capture(self) -> None:
        assert self.running is not None
        self.running.mkdir()
        self.calls.append(f"stop {self.running.name}")
        self.running = None


class EmptyFlight:
    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def draw(self, masks: Any) -> None:
        """Nothing waits for masks."""

    def read(self) -> list[RowResult]:
        return [RowResult(1) for _ in self.batch.works]


class EmptyRunner:
    """Computes nothing, and tells no laps."""

    def __init__(self) -> None:
        self.resets = 0

    def launch(self, batch: Batch) -> EmptyFlight:
        if not batch.works:
            raise MemoryError("planted")
        return EmptyFlight(batch)

    def reset(self) -> None:
        self.resets += 1


def batch_of(stage: Stage, rows: int = 1) -> Batch:
    requests = [Request(f"r{i}", [1] * 5, 4, SamplingParams()) for i in range(rows)]
    bounds = (0, 4) if stage == "EXTEND" else (4, 5)
    return Batch(tuple(Work(r, *bounds, True) for r in requests))


class Recorded:
    """A profile of an EmptyRunner, and what it reported."""

    def __init__(self, window: Window, tracer: Tracer | None = None) -> None:
        self.marks: list[int] = []
        self.messages = 0
        self.outcome: Outcome | None = None
        self.ends = 0
        self.behind = EmptyRunner()
        self.profile = StepProfile(window, self.hear, tracer, on_end=self.end)
        self.runner = TimedRunner(self.behind, self.profile)

    def hear(self, marks: list[int], outcome: Outcome | None) -> None:
        assert self.outcome is None, "nothing comes after the end"
        assert len(marks) < MARKS_A_MESSAGE + 100
        self.marks += marks
        self.messages += 1
        self.outcome = outcome

    def end(self) -> None:
        self.ends += 1


def test_stages_are_captured_apart_under_the_traces_names(tmp_path: Path) -> None:
    metal = RecordedMetal()
    stem, paths = reserve(tmp_path, "run", True)
    recorded = Recorded(Window(2, None, True), MetalCapture(metal, stem, True))
    for stage in ("EXTEND", "EXTEND", "EXTEND", "DECODE", "DECODE", "EXTEND"):
        recorded.runner.launch(batch_of(stage)).read()
    assert metal.calls == [
        "start run-EXTEND.gputrace",
        "stop run-EXTEND.gputrace",
        "start run-DECODE.gputrace",
        "stop run-DECODE.gputrace",
    ]
    assert recorded.outcome == Outcome([capture_path(p) for p in paths])
    assert recorded.ends == 1


def test_a_stage_that_comes_again_is_not_captured_again(tmp_path: Path) -> None:
    metal = RecordedMetal()
    recorded = Recorded(Window(None, None, True), MetalCapture(metal, str(tmp_path / "x"), True))
    for stage in ("EXTEND", "DECODE", "EXTEND", "DECODE"):
        recorded.runner.launch(batch_of(stage)).read()
    recorded.profile.end()
    assert metal.calls == [f"{do} x-{stage}.gputrace" for stage in STAGES for do in ("start", "stop")]


def test_without_stages_there_is_one_capture_of_all(tmp_path: Path) -> None:
    metal = RecordedMetal()
    recorded = Recorded(Window(None, None, False), MetalCapture(metal, str(tmp_path / "x"), False))
    for stage in STAGES:
        recorded.runner.launch(batch_of(stage)).read()
    assert metal.calls == ["start x.gputrace"]
    recorded.profile.end()
    assert metal.calls == ["start x.gputrace", "stop x.gputrace"]


def test_a_capture_that_metal_refuses_fails_no_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorded = Recorded(Window(1, None, False), MetalCapture(RecordedMetal(fails=True), str(tmp_path / "x"), False))
    with caplog.at_level("CRITICAL", "pippin.profile.steps"):
        assert recorded.runner.launch(batch_of("DECODE")).read()[0].token == 1
    assert recorded.outcome == Outcome([], "[metal::start_capture] Failed to start")


def test_two_captures_in_one_directory_have_names_of_their_own(tmp_path: Path) -> None:
    metals = [RecordedMetal() for _ in range(3)]
    made = [Recorded(Window(1, None, False), MetalCapture(m, reserve(tmp_path, "x", False)[0], False)) for m in metals]
    for recorded in made:
        recorded.runner.launch(batch_of("DECODE")).read()
    assert sorted(p.name for p in tmp_path.glob("*.gputrace")) == ["x-1.gputrace", "x-2.gputrace", "x.gputrace"]


NO_RANGES: Any = {"find_ranges": lambda: None}


def test_where_metal_cannot_capture_the_error_names_the_mend() -> None:
    on = {"MTL_CAPTURE_ENABLED": "1"}
    with pytest.raises(RequestError, match="MTL_CAPTURE_ENABLED=1 pippin serve") as caught:
        open_tracer(True, "x", False, metal=RecordedMetal(), cuda=False, environ={})
    assert caught.value.field == "activities"
    with pytest.raises(RequestError, match="no Mac"):
        open_tracer(True, "x", False, metal=RecordedMetal(available=False), cuda=False, environ=on)
    found = open_tracer(True, "x", False, metal=RecordedMetal(), cuda=False, environ=on)
    assert isinstance(found, MetalCapture)
    assert found.alone
    for environ in ({}, on):
        assert open_tracer(False, "x", False, metal=RecordedMetal(), cuda=False, environ=environ) is None


def test_a_mac_that_may_capture_does_and_one_that_may_not_says_so(caplog: pytest.LogCaptureFixture) -> None:
    on = {"MTL_CAPTURE_ENABLED": "1"}
    assert isinstance(open_tracer(None, "x", False, metal=RecordedMetal(), cuda=False, environ=on), MetalCapture)
    assert "MTL_CAPTURE_ENABLED" not in caplog.text
    assert open_tracer(None, "x", False, metal=RecordedMetal(), cuda=False, environ={}) is None
    assert "MTL_CAPTURE_ENABLED=1 pippin" in caplog.text


class RecordedRanges:
    def __init__(self) -> None:
        self.open: list[str] = []
        self.seen: list[str] = []

    def push(self, label: str) -> None:
        self.open.append(label)
        self.seen.append(label)

    def pop(self) -> None:
        self.open.pop()


def test_cuda_gets_a_range_a_step_even_for_one_that_fails() -> None:
    ranges = RecordedRanges()
    options: Any = {"metal": RecordedMetal(False), "cuda": True, "find_ranges": lambda: ranges}
    tracer = open_tracer(True, "x", False, **options, environ={})
    assert open_tracer(None, "x", False, **options, environ={}) is None, "ranges cost, and nobody would see them"
    assert open_tracer(None, "x", False, **options, environ={"NVTX_INJECTION64_PATH": "/x"}) is not None
    assert isinstance(tracer, StepRanges)
    recorded = Recorded(Window(None, None, False), tracer)
    recorded.runner.launch(batch_of("EXTEND", 2))
    with pytest.raises(MemoryError):
        recorded.runner.launch(Batch(()))
    recorded.runner.launch(batch_of("DECODE", 3))
    assert ranges.seen == ["EXTEND: prefill 8", "DECODE: ", "DECODE: decode 3"]
    assert ranges.open == []
    assert open_tracer(True, "x", False, metal=RecordedMetal(False), cuda=True, **NO_RANGES) is None


def test_nvtx_is_the_package_or_cudas_library_or_nothing() -> None:
    class Package:
        def push_range(self, message: str) -> None:
            calls.append(message)

        def pop_range(self) -> None:
            calls.append("pop")

    class Function:
        argtypes: Sequence[Any] = ()

        def __call__(self, *arguments: bytes) -> int:
            calls.append(*(a.decode() for a in arguments or (b"pop",)))
            return 0

    class Library:
        nvtxRangePushA, nvtxRangePop = Function(), Function()

    def missing(name: str) -> Any:
        raise ImportError(name)

    def no_file(name: str) -> Any:
        raise OSError(name)

    calls: list[str] = []
    opened: Any = lambda name: Library()  # noqa: E731
    for found in (nvtx_ranges(lambda name: Package(), no_file), nvtx_ranges(missing, opened)):
        assert found is not None
        found.push("step")
        found.pop()
    assert calls == ["step", "pop"] * 2
    assert nvtx_ranges(missing, no_file) is None


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


# --- steps that fail ---


@pytest.mark.parametrize("lost", ["launch", "reset"])
def test_a_profile_ends_though_its_last_step_is_lost(lost: str) -> None:
    recorded = Recorded(Window(2, None, False))
    flight = recorded.runner.launch(batch_of("DECODE"))
    if lost == "launch":
        flight.read()
        with pytest.raises(MemoryError):
            recorded.runner.launch(Batch(()))
    else:
        recorded.runner.launch(batch_of("DECODE"))
        recorded.runner.reset()
        assert recorded.behind.resets == 1
    assert recorded.outcome is not None
    recorded.profile.end()
    assert recorded.ends == 1


def test_long_profiles_are_told_in_parts() -> None:
    recorded = Recorded(Window(None, None, False))
    for _ in range(200):
        recorded.runner.launch(batch_of("DECODE")).read()
    assert recorded.messages >= 1
    assert recorded.outcome is None
    recorded.profile.end()
    assert recorded.messages >= 2
    numbers = [values[3] for kind, values in each(recorded.marks) if kind == STEP]
    assert numbers == list(range(1, 201))
    assert len([s for s in replay(recorded.marks) if s.lane == DEVICE]) == 200


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


# --- summaries ---


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
        (gzip.compress(b'{"traceEvents": []}')[:-9], "cut off"),
        (b"\x1f\x8b\x08broken.......", "damaged"),
        (gzip.compress(b"\xff\xfe"), "no timeline"),
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
