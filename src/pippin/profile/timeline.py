"""Records spans of one process. There is one only while a profile runs: whoever could record asks for None first."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import TypeVar

import msgspec

T = TypeVar("T")

Value = str | int | float | bool

HTTP = "http"
DETOKENIZING = "detokenizing"
SCHEDULER = "scheduler"
BUILDING = "graph building"
SAMPLING = "sampling"
QUEUEING = "queueing"
DEVICE = "device steps"
WAITING = "waiting for the device"

HTTP_LANES = (DETOKENIZING, HTTP)
ENGINE_LANES = (SCHEDULER, BUILDING, SAMPLING, QUEUEING, DEVICE, WAITING)

Lap = Callable[[str], None]
"""Told when a part of launching a step is done.

``forward``, ``sampling``: its graph is built. ``queue``: it is handed to the device, or before its ``forward``, the
step before is. Where part of a prompt is computed while the step is built: ``build ahead`` its graph, ``wait`` the
step before is done, ``ahead`` that part is.
"""


def no_lap(part: str) -> None:
    """The Lap of a runner that nobody profiles."""


class Span(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Something that took from ``start`` to ``end``, nanoseconds of ``time.perf_counter_ns``, shown in a lane.

    ``step`` is the number of the engine's step that it belongs to, ``group`` keeps spans of one thing in one row.
    """

    lane: str
    name: str
    start: int
    end: int
    step: int | None = None
    group: str = ""
    args: dict[str, str | int | float | bool] | None = None


class Timeline:
    """Spans in the order in which they ended, on a clock that all processes of a machine share.

    ``time.perf_counter_ns`` is CLOCK_MONOTONIC on Linux and mach_absolute_time on macOS.
    """

    def __init__(self, clock: Callable[[], int] = time.perf_counter_ns) -> None:
        self.now = clock
        self._spans: list[Span] = []
        self._open: dict[str, tuple[str, str, int]] = {}
        self._count = itertools.count(1)

    def __len__(self) -> int:
        return len(self._spans)

    def add(
        self,
        lane: str,
        name: str,
        start: int,
        end: int | None = None,
        *,
        step: int | None = None,
        group: str = "",
        args: dict[str, Value] | None = None,
    ) -> None:
        """Records a span that ends now, or at ``end``."""
        self._spans.append(Span(lane, name, start, self.now() if end is None else end, step, group, args))

    def timed(self, lane: str, name: str, function: Callable[..., T], *arguments: object) -> T:
        """The function's result, with a span from its call to its end, even by an exception."""
        start = self.now()
        try:
            return function(*arguments)
        finally:
            self.add(lane, name, start)

    def begin(self, lane: str, name: str, start: int) -> str:
        """Begins a span among others of its lane; returns its group, for ``end`` and for spans inside of it."""
        group = f"{lane}-{next(self._count)}"
        self._open[group] = lane, name, start
        return group

    def end(self, group: str, args: dict[str, Value] | None = None) -> bool:
        """Ends what ``begin`` began; False if ``close`` has."""
        if group not in self._open:
            return False
        lane, name, start = self._open.pop(group)
        self.add(lane, name, start, group=group, args=args)
        return True

    def take(self) -> list[Span]:
        """What has ended since the last call."""
        spans, self._spans = self._spans, []
        return spans

    def close(self) -> list[Span]:
        """As ``take``; what has begun and not ended is cut now, and says so."""
        for group in list(self._open):
            self.end(group, {"unfinished": True})
        return self.take()
