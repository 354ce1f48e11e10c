"""An engine's marks as spans: what was built, queued, waited for and run, step by step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from pippin.profile import marks
from pippin.profile.marks import LENGTH, Label
from pippin.profile.timeline import BUILDING, DEVICE, QUEUEING, SAMPLING, SCHEDULER, WAITING, Span

LANE_OF = {
    marks.BUILD_AHEAD: (BUILDING, "build ahead"),
    marks.SAMPLING_DONE: (SAMPLING, "sampling"),
    marks.QUEUE: (QUEUEING, "queue"),
    marks.AHEAD: (QUEUEING, "ahead"),
    marks.WAIT: (WAITING, "wait"),
}
"""Where a lap is shown, and its name; ``forward`` is a step's ``build``."""


@dataclass(slots=True, eq=False)
class Step:
    """A recorded step; once known, when it was queued, and was surely done."""

    number: int
    label: Label
    queued: int | None = None
    done: int | None = None


def replay(noted: Sequence[int]) -> list[Span]:
    """The spans of a whole profile's marks, in the order in which they ended."""
    player = Player()
    for kind, values in each(noted):
        player.take(kind, values)
    return player.spans


def each(noted: Sequence[int]) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Marks one by one: kind and values."""
    values = iter(noted)
    for kind in values:
        yield kind, tuple(islice(values, LENGTH[kind]))


class Player:
    """Marks in, spans out. ``before`` is the step launched before the ``current`` one; None where it isn't recorded."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self._before: Step | None = None
        self._current: Step | None = None
        self._built = False
        self._lap_from = self._draw_from = 0
        self._device_until = 0
        self._unread: dict[int, Step] = {}

    def take(self, kind: int, values: tuple[int, ...]) -> None:
        """The next mark."""
        match kind:
            case marks.STEP:
                began, chosen, start, number, *label = values
                if chosen:
                    self.spans.append(Span(SCHEDULER, "schedule", began, chosen, number))
                self._launch(start, Step(number, Label(*label)))
            case marks.FINISHED:
                start, end = values
                self.spans.append(Span(SCHEDULER, "finish", start, end))
            case marks.OTHER:
                self._launch(values[0], None)
            case marks.BUILT:
                if self._current is not None:
                    self._build(self._current, *values)
            case marks.DRAW:
                self._draw_from = self._lap_from = values[0]
            case marks.DRAWN:
                number, end = values
                self.spans.append(Span(SAMPLING, "masks and draws", self._draw_from, end, number))
            case marks.READ:
                self._read(*values)
            case marks.RESET:
                self._before = self._current = None
            case _:
                self._lap(kind, *values)

    def _launch(self, start: int, step: Step | None) -> None:
        self._before, self._current, self._built, self._lap_from = self._current, step, False, start
        if step is not None:
            self._unread[step.number] = step

    def _lap(self, kind: int, end: int) -> None:
        """A part of launching a step is done; see ``timeline.Lap``."""
        start, self._lap_from = self._lap_from, end
        self._built |= kind == marks.FORWARD
        before = kind == marks.WAIT or (kind == marks.QUEUE and not self._built)
        step = self._before if before else self._current
        if step is None:
            return
        if kind == marks.FORWARD:
            self._build(step, end, start)
            return
        if kind == marks.WAIT:
            step.done = end
        elif kind in (marks.QUEUE, marks.AHEAD) and step.queued is None:
            step.queued = start
        lane, name = LANE_OF[kind]
        self.spans.append(Span(lane, name, start, end, step.number))

    def _build(self, step: Step, end: int, start: int | None = None) -> None:
        start = self._lap_from if start is None else start
        self.spans.append(Span(BUILDING, f"build {step.label}", start, end, step.number, args=step.label.args))

    def _read(self, number: int, start: int, end: int) -> None:
        self.spans.append(Span(WAITING, "read", start, end, number))
        step = self._unread.pop(number)
        begin = max(start if step.queued is None else step.queued, self._device_until)
        self._device_until = max(begin, end if step.done is None else step.done)
        args = {**step.label.args, "waited_us": round((end - start) / 1000)}
        self.spans.append(Span(DEVICE, str(step.label), begin, self._device_until, number, args=args))
