"""Whether memory is short, while the engine runs: what it holds and what the machine has left, against two marks each.

The budget is a promise made before the first request (``memory.py``); this looks whether it is kept, and whether
other programs have taken what was there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

log = logging.getLogger(__name__)

Level = Literal["ok", "soft", "hard"]

LOOK_SECONDS = 0.25
"""How often memory is looked at."""

PROCESS_BYTES = 512 << 20
"""What the interpreter, libraries and kernels may take beside the budget, which counts arrays."""

SOFT_FREE, HARD_FREE = 0.06, 0.03
"""Shares of the machine's memory that should be free at least."""


class Reading(NamedTuple):
    """Bytes: what the engine holds (MLX's cache of free buffers not counted), and what is free (None: unknown)."""

    held: int
    free: int | None


@dataclass(frozen=True, slots=True)
class Watermarks:
    """Bytes. Above ``soft_held`` or below ``soft_free`` memory is short, beyond the hard ones very short."""

    soft_held: int
    hard_held: int
    soft_free: int
    hard_free: int

    @classmethod
    def of(cls, budget: int, device: int, machine: int) -> Watermarks:
        """``budget`` is what was planned with of the ``device``, ``machine`` all memory that the host has."""
        soft = budget + PROCESS_BYTES
        hard = max(soft, budget + (device - budget) // 2)
        return cls(soft, hard, int(machine * SOFT_FREE), int(machine * HARD_FREE))

    def level(self, now: Reading) -> Level:
        free = self.soft_free if now.free is None else now.free
        if now.held > self.hard_held or free < self.hard_free:
            return "hard"
        return "soft" if now.held > self.soft_held or free < self.soft_free else "ok"


class MemoryWatch:
    """Looks at memory now and then. ``shrink`` gives the system what can be spared at once: MLX's free buffers."""

    def __init__(
        self,
        marks: Watermarks,
        read: Callable[[], Reading],
        shrink: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._marks, self._read, self.shrink, self._clock = marks, read, shrink, clock
        self._next = clock()
        self.level: Level = "ok"
        self.latest = Reading(0, None)

    def look(self) -> bool:
        """Looks, if it is time to; whether it did."""
        now = self._clock()
        if now < self._next:
            return False
        self._next = now + LOOK_SECONDS
        self.latest = self._read()
        before, self.level = self.level, self._marks.level(self.latest)
        if self.level != "ok":
            self.shrink()
        if self.level != before:
            self._tell()
        return True

    def _tell(self) -> None:
        held, free = self.latest
        left = "" if free is None else f", the machine has {free / 1e9:.2f} GB left"
        means = {
            "ok": "memory is no longer short",
            "soft": "memory is short: nothing new is begun while requests run",
            "hard": "memory is very short: running requests are put back, and new ones refused",
        }
        level = logging.INFO if self.level == "ok" else logging.WARNING
        log.log(level, "%s; the engine holds %.2f GB%s", means[self.level], held / 1e9, left)
