"""When an engine that has nothing to do gives freed memory back."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from pippin import footprint

AFTER = 2.0
"""Seconds without work until memory goes back: more than lies between the requests of a program."""


class Rest:
    """Gives memory back once in each pause of the engine that lasts, and never while there is work.

    While requests come and go glibc may keep what they freed: they will want it again. The first pause begins with the
    end of loading. Giving back took 0.4 to 3 ms of a CPU with the shipped model.
    """

    def __init__(
        self, give_back: Callable[[], None] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._give_back, self._clock = give_back or footprint.trim, clock
        self._due: float | None = None  # when the pause will have lasted; None while there is work
        self._owed = True

    def patience(self, busy: bool) -> float:
        """Seconds for which the next command may be waited for: 0 while ``busy``, infinity once memory is given back.

        To be asked before each wait.
        """
        if busy:
            self._due, self._owed = None, True
            return 0.0
        if not self._owed:
            return math.inf
        now = self._clock()
        if self._due is None:
            self._due = now + AFTER
        if now < self._due:
            return self._due - now
        self._give_back()
        self._owed = False
        return math.inf
