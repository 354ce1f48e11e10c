"""Captures of the device's own profiler, against a recorded Metal and recorded ranges; steps that fail meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pippin.errors import RequestError
from pippin.profile.files import STAGES, Stage, capture_path, reserve
from pippin.profile.gpu import MetalCapture, StepRanges, Tracer, nvtx_ranges, open_tracer
from pippin.profile.marks import STEP
from pippin.profile.replay import each, replay
from pippin.profile.steps import MARKS_A_MESSAGE, Outcome, StepProfile, TimedRunner, Window
from pippin.profile.timeline import (
    DEVICE,
)
from pippin.types import Batch, Request, RowResult, SamplingParams, Work


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

    def drawn(self) -> list[tuple[Work, int]]:
        return [(work, 1) for work in self.batch.works]

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
