"""When an engine counts as hung, when it may start again, and which requests it is then given. Plain Python, no clock.

Times are seconds of whatever clock the caller reads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

BACK_OFF = (0.0, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
"""Seconds before each restart of a window; the first is at once, since streams wait for it."""

PROOF = 4
"""Tokens after which a request counts as one that an engine survives."""

MOST_DEATHS = 4
"""Crashes of which a request may be suspected while it still gets on, each time, by a token or more."""

PARTS = 4
"""Groups that those suspected of a crash are given out in: a killer among 64 is alone after three crashes."""

MOST_LAPSE = 3.0
"""Of the intervals at which a watchdog looks. More between two looks is time in which nobody here was awake."""


@dataclass(frozen=True, slots=True)
class Supervision:
    """How an engine is watched: the fields of ``ServerConfig``, in seconds. ``back_off``: before each restart."""

    watchdog_timeout: float = 300.0
    max_restarts: int = 5
    restart_window: float = 600.0
    back_off: tuple[float, ...] = BACK_OFF


class Restarts:
    """Counts restarts within a window."""

    def __init__(self, limit: int, window: float, back_off: Sequence[float] = BACK_OFF) -> None:
        self._limit, self._window, self._back_off = limit, window, back_off
        self._times: deque[float] = deque()

    def next(self, now: float) -> float | None:
        """Seconds to wait before the restart that is counted with this; None if there were too many already."""
        self._forget(now)
        if len(self._times) >= self._limit:
            return None
        self._times.append(now)
        return self._back_off[min(len(self._times), len(self._back_off)) - 1]

    def wait(self, now: float) -> float:
        """Seconds until ``next`` gives another."""
        self._forget(now)
        if len(self._times) < self._limit:
            return 0.0
        return self._window - (now - self._times[0]) if self._limit else self._window

    def _forget(self, now: float) -> None:
        while self._times and now - self._times[0] >= self._window:
            self._times.popleft()


class Watchdog:
    """Says when an engine has been silent for longer than ``timeout``. Look every ``interval`` seconds.

    Only time in which the watcher itself was awake counts: a process that was stopped, or a lid that was closed, is no
    reason to kill what was stopped with it.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.interval = min(5.0, timeout / 8)
        self._silent = 0.0
        self._stuck = 0.0
        self._last: float | None = None

    def start(self) -> None:
        """Another engine is watched from here on."""
        self._silent = self._stuck = 0.0
        self._last = None

    def heard(self, step: bool) -> None:
        """Something came from it; ``step``: it was a step."""
        self._silent = 0.0
        if step:
            self._stuck = 0.0

    def look(self, now: float, waiting: bool) -> str | None:
        """Why it counts as hung, or None. ``waiting``: requests are waiting for its next step."""
        lapse = 0.0 if self._last is None else min(now - self._last, MOST_LAPSE * self.interval)
        self._last = now
        self._silent += lapse
        self._stuck = self._stuck + lapse if waiting else 0.0
        if self._stuck > self.timeout:
            return f"the engine made no step for {self.timeout:g} seconds while requests waited"
        return f"the engine gave no sign of life for {self.timeout:g} seconds" if self._silent > self.timeout else None


@dataclass(slots=True)
class Record:
    """What a docket knows of a request: tokens since it was last given out, and crashes that it is suspected of.

    ``alone``: those of these that no one else is suspected of.
    """

    given: bool = False
    tokens: int = 0
    deaths: int = 0
    alone: int = 0

    @property
    def proven(self) -> bool:
        return self.tokens >= PROOF

    @property
    def guilty(self) -> bool:
        """Of a crash that it alone is suspected of: one that its content causes comes again at the same token.

        Not before the second one of these: somebody outside may have killed the engine just as this one was tried.
        """
        return self.alone > 1 and (self.deaths > MOST_DEATHS or self.tokens == 0)


@dataclass(frozen=True, slots=True)
class Line:
    """Requests that are given to the engine together; the next line follows when those in ``guard`` have proven it."""

    ids: list[str]
    guard: frozenset[str]


class Docket:
    """Who is given to the engine when, so that a request whose content kills it is found and the others go on.

    Suspected of a crash are those in the crashing step that had not had ``PROOF`` tokens yet, if there are any; of
    these, those that were suspected before. After it, all others go first; once those that had run before run again,
    the suspects follow in groups, each when the one before has proven itself. A group under which the engine dies again
    is cut further. Who dies alone for the second time is guilty if it got no further than the last time, or if it was
    suspected often: somebody else may be killing the engine. Newcomers wait meanwhile.
    """

    def __init__(self) -> None:
        self._records: dict[str, Record] = {}
        self._lines: deque[Line] = deque()
        self._newcomers: list[str] = []
        self._watched: set[str] = set()

    def add(self, id: str) -> None:
        """A new request; ``next`` says when it may go."""
        self._records[id] = Record()
        self._newcomers.append(id)

    @property
    def trying(self) -> bool:
        """Whether requests that are suspected of a crash, or others because of them, wait to have proven themselves."""
        return bool(self._lines or self._watched)

    def next(self) -> list[str]:
        """Requests to be given to the engine now, in order."""
        found: list[str] = []
        while self._lines and not self._watched:
            line = self._lines.popleft()
            found += [id for id in line.ids if id in self._records]
            self._watched = {id for id in line.guard if id in self._records}
        if not self._lines and not self._watched:
            found += [id for id in self._newcomers if id in self._records]
            self._newcomers.clear()
        for id in found:
            self._records[id].given = True
        return found

    def heard(self, id: str, tokens: int) -> None:
        """A request has had more tokens."""
        record = self._records.get(id)
        if record is None:
            return
        record.tokens += tokens
        if record.proven:
            record.deaths = record.alone = 0
            self._watched.discard(id)

    def ended(self, id: str) -> None:
        self._records.pop(id, None)
        self._watched.discard(id)

    def crashed(self, step: Collection[str] | None) -> str | None:
        """The engine died; ``step`` are the requests of the steps that it worked on, if that is known.

        Returns the one that is guilty, to be ``ended``. All others are to be given out again.
        """
        given = [id for id, record in self._records.items() if record.given]
        blamed = self._blamed(given, step)
        for id in blamed:
            self._records[id].deaths += 1
            self._records[id].alone += len(blamed) == 1
        guilty = blamed[0] if len(blamed) == 1 and self._records[blamed[0]].guilty else None
        self._line_up(given, blamed)
        return guilty

    def _blamed(self, given: Sequence[str], step: Collection[str] | None) -> list[str]:
        inside = given if step is None else [id for id in given if id in step]
        unproven = [id for id in inside if not self._records[id].proven] or inside
        most = max((self._records[id].deaths for id in unproven), default=0)
        return [id for id in unproven if self._records[id].deaths == most]

    def _line_up(self, given: Sequence[str], blamed: Sequence[str]) -> None:
        again = frozenset(blamed)
        size = -(-len(blamed) // PARTS)
        groups = [blamed[i : i + size] for i in range(0, len(blamed), size or 1)]
        earlier = [[id] for id in given if id not in again and self._records[id].deaths]
        trusted = [id for id in given if id not in again and not self._records[id].deaths]
        # Until those that ran do so again, a crash may be theirs.
        ran = [id for id in trusted if self._records[id].proven] if groups else []
        suspects = [Line([*group], frozenset(group)) for group in (*groups, *earlier)]
        left = (line for line in self._lines if line.ids)
        self._lines = deque([Line(trusted, frozenset(ran)), *suspects, *left])
        self._watched.clear()
        for id in given:
            self._records[id].given, self._records[id].tokens = False, 0
