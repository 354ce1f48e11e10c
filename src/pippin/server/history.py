"""Who was served lately, and how long each phase took: what the web page's dashboard shows.

Numbers only: no text of anybody is kept.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgspec

from pippin.completion import Delta

KEPT = 100
"""Requests remembered once they have ended."""


class Entry(msgspec.Struct, kw_only=True):
    """One request. Times are seconds: ``at`` since the epoch, the others since then; None where it isn't there yet.

    It waits in the queue for ``queue``, then its prompt is read until ``first`` (its first token), then it is answered
    until ``end``. ``outcome`` is how its answers ended, ``disconnect`` if the client went away before. ``prompt``,
    ``cached`` and ``generated`` count tokens, the last of all its ``answers``.
    """

    id: str
    at: float
    prompt: int
    answers: int = 1
    cached: int = 0
    generated: int = 0
    queue: float | None = None
    first: float | None = None
    end: float | None = None
    outcome: str | None = None


@dataclass
class History:
    """Requests that run, and the last that ended. ``clock`` is seconds, monotonic; ``wall`` since the epoch."""

    clock: Callable[[], float] = time.perf_counter
    wall: Callable[[], float] = time.time
    running: dict[int, Entry] = field(default_factory=dict)
    ended: deque[Entry] = field(default_factory=lambda: deque(maxlen=KEPT))
    generated: int = 0
    on_end: Callable[[Entry], None] = lambda entry: None
    _count: int = 0

    @contextmanager
    def track(self, rid: str, prompt: int, n: int) -> Iterator[Callable[[Delta], None]]:
        """Gives what takes the deltas of a request's ``n`` answers, and notes what they tell."""
        began, number = self.clock(), self._count
        self._count += 1
        entry = self.running[number] = Entry(id=rid, at=self.wall(), prompt=prompt, answers=n)

        def note(delta: Delta) -> None:
            nonlocal n
            self._note(entry, delta, self.clock() - began)
            n -= delta.finish is not None

        try:
            yield note
        except Exception:
            entry.outcome = "error"
            raise
        finally:
            if n and entry.outcome != "error":
                entry.outcome = "disconnect"
            entry.end = self.clock() - began
            self.ended.append(self.running.pop(number))
            self.on_end(entry)

    def _note(self, entry: Entry, delta: Delta, now: float) -> None:
        entry.cached = max(entry.cached, delta.num_cached)
        entry.generated += len(delta.tokens)
        self.generated += len(delta.tokens)
        if delta.tokens and entry.first is None:
            entry.first, entry.queue = now, min(delta.waited, now)
        if delta.finish is not None:
            entry.outcome = delta.finish.reason

    def latest(self) -> list[Entry]:
        """Those that run and the last that ended, newest first."""
        return [*reversed(self.running.values()), *reversed(self.ended)]


def quantiles(values: Iterable[float | None]) -> dict[str, float | None]:
    """The median and the 95th percentile (nearest rank) of those that are there; None without any."""
    ordered = sorted(value for value in values if value is not None)

    def rank(share: float) -> float | None:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None

    return {"p50": rank(0.5), "p95": rank(0.95)}
