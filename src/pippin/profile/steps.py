"""The engine's side of a profile: which steps are recorded, when each was built, queued, and read.

``TimedRunner`` stands in front of a runner while a profile runs, so that an engine without one does nothing for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable
from weakref import WeakKeyDictionary

from pippin.profile.files import STAGES, Stage
from pippin.profile.gpu import Tracer
from pippin.profile.timeline import (
    BUILDING,
    DEVICE,
    QUEUEING,
    SAMPLING,
    SCHEDULER,
    WAITING,
    Lap,
    Timeline,
    Value,
    no_lap,
)
from pippin.types import Batch, Request, RowResult, Span

log = logging.getLogger(__name__)

T = TypeVar("T")

SPANS_A_MESSAGE = 256


class Flight(Protocol):
    """A queued step; ``runner.Flight``."""

    @property
    def batch(self) -> Batch: ...

    def draw(self, masks: Any) -> None: ...

    def read(self) -> list[RowResult]: ...


class Runner(Protocol):
    """``runner.ModelRunner``."""

    def launch(self, batch: Batch) -> Flight: ...

    def reset(self) -> None: ...


@runtime_checkable
class TellsLaps(Protocol):
    """A runner that says which part of building a step is done."""

    lap: Lap


LANE_OF = {
    "build ahead": BUILDING,
    "sampling": SAMPLING,
    "queue": QUEUEING,
    "ahead": QUEUEING,
    "wait": WAITING,
}
"""Where a lap is shown; ``forward`` is a step's ``build``."""


@dataclass(frozen=True, slots=True)
class Label:
    """What a step computes: works, tokens of prompts and of answers, and prompt tokens that the cache spared it."""

    rows: int
    prefill: int
    decode: int
    cached: int

    def __str__(self) -> str:
        parts = [f"prefill {self.prefill}"] if self.prefill else []
        parts += [f"decode {self.decode}"] if self.decode else []
        return " + ".join(parts) + (f" (cached {self.cached})" if self.cached else "")

    @property
    def stage(self) -> Stage:
        """A step that computes any prompt tokens is a prefill."""
        return "EXTEND" if self.prefill else "DECODE"

    @property
    def args(self) -> dict[str, Value]:
        return {
            "batch": str(self),
            "stage": self.stage,
            "rows": self.rows,
            "prefill_tokens": self.prefill,
            "decode_tokens": self.decode,
            "cached_tokens": self.cached,
        }


class Labels:
    """Labels of successive batches: the cached tokens of a step are those that its requests had not reported before."""

    def __init__(self) -> None:
        self._cached: WeakKeyDictionary[Request, int] = WeakKeyDictionary()

    def of(self, batch: Batch) -> Label:
        prefills = [work for work in batch.works if not work.decodes]
        cached = sum(self._new(work.request, work.start) for work in prefills)
        tokens = sum(work.end - work.start for work in prefills)
        return Label(len(batch.works), tokens, len(batch.works) - len(prefills), cached)

    def _new(self, request: Request, start: int) -> int:
        """What the cache spared a request since it was seen last; what was before the profile is not known."""
        known = self._cached.get(request, 0 if start <= request.num_cached else request.num_cached)
        self._cached[request] = request.num_cached
        return request.num_cached - known


class Window:
    """Which steps a profile records: ``num_steps`` from ``start_step`` on, or so many of each stage."""

    def __init__(self, num_steps: int | None, start_step: int | None, by_stage: bool) -> None:
        self._most, self._first, self._by_stage = num_steps, start_step or 0, by_stage
        self._taken: dict[Stage, int] = dict.fromkeys(STAGES, 0)

    def takes(self, number: int, stage: Stage) -> bool:
        """Whether the engine's step of this number is recorded; it counts if it is. Ask once a step, in order."""
        taken = self._taken[stage] if self._by_stage else sum(self._taken.values())
        if number < self._first or (self._most is not None and taken >= self._most):
            return False
        self._taken[stage] += 1
        return True

    @property
    def full(self) -> bool:
        if self._most is None:
            return False
        counts = self._taken.values()
        return min(counts) >= self._most if self._by_stage else sum(counts) >= self._most


@dataclass(slots=True, eq=False)
class StepTimes:
    """A recorded step: its number, what it computes; once known, when it was queued, and was surely done."""

    number: int
    label: str
    args: dict[str, Value]
    queued: int | None = None
    done: int | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a profile of steps ended: captures that are complete, and what went wrong with them."""

    files: Sequence[Path] = ()
    error: str = ""


Report = Callable[[list[Span], Outcome | None], None]
"""Told of new spans; with the last ones, how it ended."""


class StepProfile:
    """One profile of an engine's steps. Used in the engine's thread alone.

    ``steps`` counts those launched before. ``report`` hears of spans as they come, ``on_end`` before the last ones.
    It ends by itself once its window is full and the steps in it are read, or lost to a failure.
    """

    def __init__(
        self,
        window: Window,
        report: Report,
        tracer: Tracer | None = None,
        *,
        steps: int = 0,
        on_end: Callable[[], None] = lambda: None,
        timeline: Timeline | None = None,
    ) -> None:
        self.timeline = Timeline() if timeline is None else timeline
        self._window, self._report, self._tracer, self._on_end = window, report, tracer, on_end
        self._steps = steps
        self._labels = Labels()
        self._unread: set[StepTimes] = set()
        self._device_until = 0
        self._ended = False
        self._error = ""

    def scheduled(self, began: float, batch: Batch | None) -> None:
        """A batch was chosen; ``began`` is perf_counter's seconds."""
        if batch is not None:
            self.timeline.add(SCHEDULER, "schedule", round(began * 1e9))

    @property
    def alone(self) -> bool:
        """Whether steps must not overlap while it runs."""
        return self._tracer is not None and self._tracer.alone

    def step(self, batch: Batch) -> StepTimes | None:
        """The next step's record; None if it is not to be recorded. Its capture has begun."""
        self._steps += 1
        label = self._labels.of(batch)
        if self._ended or not self._window.takes(self._steps, label.stage):
            return None
        args = label.args
        times = StepTimes(self._steps, str(args["batch"]), args)
        self._unread.add(times)
        if self._tracer is not None:
            self._trace(lambda tracer: tracer.launching(label.stage, times.label))
        return times

    def built(self, times: StepTimes, start: int) -> None:
        """Its graph was."""
        self.timeline.add(BUILDING, f"build {times.label}", start, step=times.number, args=times.args)

    def launched(self) -> None:
        """A step was queued, or failed to be."""
        if self._tracer is not None:
            self._trace(lambda tracer: tracer.launched())

    def read(self, times: StepTimes, start: int) -> None:
        """The step's results are on the host; ``start`` is when they were asked for."""
        now = self.timeline.now()
        waited = {"waited_us": round((now - start) / 1000)}
        self.timeline.add(WAITING, "read", start, now, step=times.number)
        begin = max(start if times.queued is None else times.queued, self._device_until)
        end = self._device_until = max(begin, now if times.done is None else times.done)
        self.timeline.add(DEVICE, times.label, begin, end, step=times.number, args={**times.args, **waited})
        self.gone(times)

    def gone(self, *steps: StepTimes) -> None:
        """These will not be heard of again."""
        self._unread.difference_update(steps or tuple(self._unread))
        if self._window.full and not self._unread:
            self.end()
        elif len(self.timeline) >= SPANS_A_MESSAGE:
            self._report(self.timeline.take(), None)

    def end(self) -> None:
        """Reports what is left, and ends; a second call does nothing."""
        if self._ended:
            return
        self._ended = True
        files = self._trace(lambda tracer: tracer.close()) or []
        self._on_end()
        self._report(self.timeline.close(), Outcome(files, self._error))

    def _trace(self, tell: Callable[[Tracer], T]) -> T | None:
        """Tells the tracer. One that fails is left alone from then on: no request shall fail for it."""
        if self._tracer is None:
            return None
        try:
            return tell(self._tracer)
        except Exception as error:
            log.warning("the device's profiler failed: %s", error)
            self._error = str(error) or type(error).__name__
            self._tracer = None
        return None


class TimedFlight:
    """A queued step whose reading is recorded."""

    def __init__(self, flight: Flight, times: StepTimes, profile: StepProfile, runner: TimedRunner) -> None:
        self._flight, self._times, self._profile, self._runner = flight, times, profile, runner

    @property
    def batch(self) -> Batch:
        return self._flight.batch

    def draw(self, masks: Any) -> None:
        start = self._runner.mark()
        self._flight.draw(masks)
        self._profile.timeline.add(SAMPLING, "masks and draws", start, step=self._times.number)

    def read(self) -> list[RowResult]:
        start = self._profile.timeline.now()
        try:
            return self._flight.read()
        finally:
            self._profile.read(self._times, start)


class TimedRunner:
    """A runner whose steps are recorded, until ``leave`` gives back the one behind it."""

    def __init__(self, runner: Runner, profile: StepProfile) -> None:
        self._runner = runner
        self._profile = profile
        self._before: StepTimes | None = None
        self._current: StepTimes | None = None
        self._built = False
        self._lap_from = 0
        if isinstance(runner, TellsLaps):
            runner.lap = self._lap

    def leave(self) -> Runner:
        if isinstance(self._runner, TellsLaps):
            self._runner.lap = no_lap
        return self._runner

    def launch(self, batch: Batch) -> Flight:
        times = self._profile.step(batch)
        self._before, self._current, self._built = self._current, times, False
        start = self.mark()
        if times is None:
            return self._runner.launch(batch)
        try:
            flight = self._runner.launch(batch)
        except BaseException:
            self._profile.built(times, self._lap_from)
            self._profile.gone(times)
            raise
        finally:
            self._profile.launched()
        if not self._built:  # a runner that tells no laps
            self._profile.built(times, start)
        return TimedFlight(flight, times, self._profile, self)

    def mark(self) -> int:
        """Now, from when the next lap counts."""
        self._lap_from = self._profile.timeline.now()
        return self._lap_from

    def reset(self) -> None:
        """After a failure: steps that were not read never will be."""
        self._before = self._current = None
        self._profile.gone()
        self._runner.reset()

    def _lap(self, part: str) -> None:
        """A part of launching a step is done; see ``timeline.Lap``."""
        start, end = self._lap_from, self.mark()
        self._built |= part == "forward"
        before = part == "wait" or (part == "queue" and not self._built)
        step = self._before if before else self._current
        if step is None:
            return
        if part == "forward":
            self._profile.built(step, start)
            return
        if part == "wait":
            step.done = end
        elif LANE_OF[part] == QUEUEING and step.queued is None:
            step.queued = start
        self._profile.timeline.add(LANE_OF[part], part, start, end, step=step.number)
