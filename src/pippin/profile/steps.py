"""The engine's side of a profile: which steps are recorded, when each was built, queued, and read.

``TimedRunner`` stands in front of a runner while a profile runs, so that an engine without one does nothing for it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar, runtime_checkable
from weakref import WeakKeyDictionary

from pippin.profile.files import STAGES, Stage
from pippin.profile.gpu import Tracer
from pippin.profile.marks import BUILT, DRAW, DRAWN, FINISHED, LAPS, OTHER, READ, RESET, STEP, Label
from pippin.profile.timeline import Lap, no_lap
from pippin.types import Batch, Request, RowResult, Token, Work

log = logging.getLogger(__name__)

T = TypeVar("T")
P = ParamSpec("P")

MARKS_A_MESSAGE = 2048
"""Integers; some 70 steps."""


class Flight(Protocol):
    """A queued step; ``runner.Flight``."""

    @property
    def batch(self) -> Batch: ...

    def draw(self, masks: Any) -> None: ...

    def drawn(self) -> list[tuple[Work, Token]]: ...

    def read(self) -> list[RowResult]: ...


class Runner(Protocol):
    """``runner.ModelRunner``."""

    def launch(self, batch: Batch) -> Flight: ...

    def reset(self) -> None: ...


@runtime_checkable
class TellsLaps(Protocol):
    """A runner that says which part of building a step is done."""

    lap: Lap


class Labels:
    """Labels of successive batches: the cached tokens of a step are those that its requests had not reported before."""

    def __init__(self) -> None:
        self._cached: WeakKeyDictionary[Request, int] = WeakKeyDictionary()

    def of(self, batch: Batch) -> Label:
        works = batch.works
        # Work.decodes, without a call for each of what may be hundreds.
        prefills = [w for w in works if w.start < w.request.num_prompt or w.end - w.start > 1 or not w.samples]
        if not prefills:
            return Label._make((len(works), 0, len(works), 0))
        cached = sum(self._new(work.request, work.start) for work in prefills)
        tokens = sum(work.end - work.start for work in prefills)
        return Label(len(works), tokens, len(works) - len(prefills), cached)

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
        if number < self._first:
            return False
        if self._most is None:
            return True
        if (self._taken[stage] if self._by_stage else sum(self._taken.values())) >= self._most:
            return False
        self._taken[stage] += 1
        return True

    @property
    def full(self) -> bool:
        if self._most is None:
            return False
        counts = self._taken.values()
        return min(counts) >= self._most if self._by_stage else sum(counts) >= self._most


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a profile of steps ended: captures that are complete, and what went wrong with them."""

    files: Sequence[Path] = ()
    error: str = ""


def forget(mark: tuple[int, ...]) -> None:
    """Takes what is noted while no step is recorded."""


Report = Callable[[list[int], Outcome | None], None]
"""Told of new marks; with the last ones, how it ended."""


class StepProfile:
    """One profile of an engine's steps. Used in the engine's thread alone.

    ``steps`` counts those launched before. ``report`` hears of marks as they come, ``on_end`` before the last ones.
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
        clock: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        self.now = clock
        self._marks: list[int] = []
        self.note: Callable[[tuple[int, ...]], None] = self._marks.extend
        """Takes a mark: its kind and values."""
        self._window, self._report, self._tracer, self._on_end = window, report, tracer, on_end
        self._steps = steps
        self._chosen = 0.0, 0
        self._labels = Labels()
        self._unread: set[int] = set()
        self._ended = False
        self._error = ""

    def scheduled(self, began: float, batch: Batch | None) -> None:
        """A batch was chosen; ``began`` is perf_counter's seconds."""
        if batch is not None:
            self._chosen = began, self.now()

    def finishing(self, finish: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The function's result; it gives a step's tokens to their requests."""
        start = self.now()
        try:
            return finish(*args, **kwargs)
        finally:
            self.note((FINISHED, start, self.now()))

    @property
    def alone(self) -> bool:
        """Whether steps must not overlap while it runs."""
        return self._tracer is not None and self._tracer.alone

    def step(self, batch: Batch) -> int | None:
        """The next step's number; None if it is not to be recorded. Its capture has begun."""
        self._steps += 1
        label = self._labels.of(batch)
        if self._ended or not self._window.takes(self._steps, label.stage):
            self.note((OTHER, self.now()))
            if not self._unread:
                self.note = forget
            return None
        self.note = self._marks.extend
        self._unread.add(self._steps)
        if self._tracer is not None:
            self._trace(lambda tracer: tracer.launching(label.stage, str(label)))
        began, chosen = self._chosen
        self.note((STEP, int(began * 1e9), chosen, self.now(), self._steps, *label))
        return self._steps

    def launched(self) -> None:
        """A step was queued, or failed to be."""
        if self._tracer is not None:
            self._trace(lambda tracer: tracer.launched())

    def read(self, step: int, start: int) -> None:
        """The step's results are on the host; ``start`` is when they were asked for."""
        self.note((READ, step, start, self.now()))
        self.gone(step)

    def gone(self, step: int) -> None:
        """It will not be heard of again."""
        self._unread.discard(step)
        if not self._unread and self._window.full:
            self.end()
        elif len(self._marks) >= MARKS_A_MESSAGE:
            self._report(self._take(), None)

    def reset(self) -> None:
        """Steps that were not read never will be."""
        self.note((RESET,))
        self._unread.clear()
        if self._window.full:
            self.end()

    def end(self) -> None:
        """Reports what is left, and ends; a second call does nothing."""
        if self._ended:
            return
        self._ended = True
        files = self._trace(lambda tracer: tracer.close()) or []
        self._on_end()
        self._report(self._take(), Outcome(files, self._error))

    def _take(self) -> list[int]:
        """What was noted since the last call; ``note`` goes on to the same list."""
        noted = self._marks.copy()
        self._marks.clear()
        return noted

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

    __slots__ = ("_flight", "_profile", "_step", "batch")

    def __init__(self, flight: Flight, step: int, profile: StepProfile) -> None:
        self._flight, self._step, self._profile = flight, step, profile
        self.batch = flight.batch

    def draw(self, masks: Any) -> None:
        self._profile.note((DRAW, self._profile.now()))
        self._flight.draw(masks)
        self._profile.note((DRAWN, self._step, self._profile.now()))

    def drawn(self) -> list[tuple[Work, Token]]:
        return self._flight.drawn()

    def read(self) -> list[RowResult]:
        start = self._profile.now()
        try:
            return self._flight.read()
        finally:
            self._profile.read(self._step, start)


class TimedRunner:
    """A runner whose steps are recorded, until ``leave`` gives back the one behind it."""

    def __init__(self, runner: Runner, profile: StepProfile) -> None:
        self._runner = runner
        self._profile = profile
        self._laps = isinstance(runner, TellsLaps)
        if isinstance(runner, TellsLaps):
            runner.lap = self._lap

    def leave(self) -> Runner:
        if isinstance(self._runner, TellsLaps):
            self._runner.lap = no_lap
        return self._runner

    def launch(self, batch: Batch) -> Flight:
        profile = self._profile
        step = profile.step(batch)
        if step is None:
            return self._runner.launch(batch)
        try:
            flight = self._runner.launch(batch)
        except BaseException:
            profile.note((BUILT, profile.now()))
            profile.gone(step)
            raise
        finally:
            profile.launched()
        if not self._laps:
            profile.note((BUILT, profile.now()))
        return TimedFlight(flight, step, profile)

    def reset(self) -> None:
        """After a failure."""
        self._profile.reset()
        self._runner.reset()

    def _lap(self, part: str) -> None:
        """A part of launching a step is done; see ``timeline.Lap``."""
        self._profile.note((LAPS[part], self._profile.now()))
