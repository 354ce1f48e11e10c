"""Which of several ways to compute the same is fastest on this machine: measured once, and kept beside the verdicts.

What is measured is the GPU's time for a few launches that are queued together. The first way is the one to take where
nobody knows better: another must win by ``_MARGIN``. A process measures for at most ``SECONDS``, and lets first runs,
which may compile, take ``FIRST_RUNS`` in all; for what is left it takes the first way, and the next process goes on.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import mlx.core as mx

from pippin.kernels.build import store

log = logging.getLogger(__name__)

Way = Callable[[], mx.array]
Run = Callable[[Way, int], None]

SECONDS = 4.0
FIRST_RUNS = 20.0
_MARGIN = 0.95
# Queuing takes its time too, which is the same for all ways: of many launches it is a small part.
_LAUNCHES, _ROUNDS = 16, 4
# What one round of a way should not take longer than: then fewer launches have to do.
_LONG = 0.02


def queued(way: Way, launches: int) -> None:
    """Queues the way so often, and waits for all of it."""
    mx.eval([way() for _ in range(launches)])
    mx.synchronize()


class Contests:
    """The winners known here, by what was asked; ``path`` keeps them, None: nothing does."""

    def __init__(
        self,
        path: Path | None,
        seconds: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
        run: Run = queued,
    ) -> None:
        self._path = path
        self._left = SECONDS if seconds is None else seconds
        self._first_runs = FIRST_RUNS
        self._open: set[str] = set()
        self._changed = False
        self._clock = clock
        self._run = run
        self._winners = _read(path)

    def known(self, key: str) -> str | None:
        """Who won, where it has been held."""
        return self._winners.get(key)

    def hold(self, key: str, ways: Mapping[str, Way]) -> str:
        """The winner among ``ways``, the first if there is no time left to find out. A way that raises has lost."""
        found = self._winners.get(key)
        if found is not None and found in ways:
            return found
        first = next(iter(ways))
        if len(ways) == 1:
            return first
        if self._left <= 0 or self._first_runs <= 0:
            self._open.add(key)
            return first
        able = {name: way for name, way in ways.items() if self._runs(way)}
        begin = self._clock()
        times = {name: self._time(way) if name in able else float("inf") for name, way in ways.items()}
        self._left -= self._clock() - begin
        best = min(times, key=lambda name: times[name])
        winner = best if times[best] < _MARGIN * times[first] else first
        log.info("%s: %s (%s)", key, winner, ", ".join(f"{n} {s * 1e6:.0f} µs" for n, s in times.items()))
        self._winners[key] = winner
        self._changed = True
        return winner

    def keep(self) -> None:
        """Writes down what was found; a folder that can't be written is no fault."""
        if self._open:
            log.info("there was no time to find out what is fastest in %d cases; the next start does", len(self._open))
            self._open.clear()
        if self._path is None or not self._changed:
            return
        try:
            store.write(self._path, json.dumps(self._winners, indent=0, sort_keys=True).encode())
        except OSError as error:
            log.info("what is fastest here is not kept: %s", error)

    def _runs(self, way: Way) -> bool:
        """Runs a way once, which may compile it."""
        begin = self._clock()
        try:
            self._run(way, 1)
        except (RuntimeError, ValueError) as error:
            log.info("it loses: %s", error)
            return False
        finally:
            self._first_runs -= self._clock() - begin
        return True

    def _time(self, way: Way) -> float:
        """Seconds of one launch; infinite for a way that raises."""
        try:
            launches, best = 1, float("inf")
            for _ in range(_ROUNDS):
                begin = self._clock()
                self._run(way, launches)
                best = min(best, (self._clock() - begin) / launches)
                launches = max(1, min(_LAUNCHES, int(_LONG / max(best, 1e-9))))
        except (RuntimeError, ValueError) as error:
            log.info("it loses: %s", error)
            return float("inf")
        return best


def _read(path: Path | None) -> dict[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError):
        return {}
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}
