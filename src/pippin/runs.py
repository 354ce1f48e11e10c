"""Who waits and who runs, by rank: priority, then arrival. Plain Python."""

from __future__ import annotations

from bisect import insort

from pippin.cache.holdings import Holdings
from pippin.cache.radix import Match
from pippin.types import Request


class Runs:
    """All requests that have not ended. Those that run have a row of the device tables, and slots of ``holdings``.

    ``at`` is whose run was changed last: if that raised, it is half done.
    """

    def __init__(self, holdings: Holdings, most: int) -> None:
        self.running: list[Request] = []  # by rank
        self.waiting: list[Request] = []  # by rank, retracted ones of a priority first
        self.retractions = 0
        self.at: Request | None = None
        self._holdings = holdings
        self._most = most
        self._by_id: dict[str, Request] = {}
        self.rows = self._all_rows()  # that are free

    def __bool__(self) -> bool:
        return bool(self._by_id)

    def __contains__(self, id: str) -> bool:
        return id in self._by_id

    def get(self, id: str) -> Request | None:
        """The request of this id, if there is one."""
        return self._by_id.get(id)

    def add(self, request: Request) -> None:
        """A new one waits."""
        self._by_id[request.id] = request
        insort(self.waiting, request, key=_queue_rank)

    def enter(self, request: Request, found: Match) -> None:
        """One that waited runs from here on, behind a cached prefix."""
        self.at = request
        self.waiting.remove(request)
        insort(self.running, request, key=rank)
        request.row = self.rows.pop()
        self._holdings.enter(request, found)

    def leave(self, request: Request, keep: bool = True) -> None:
        """Ends a request's run. ``keep`` False: its recurrent state is not to be trusted."""
        self.at = request
        self._holdings.leave(request, keep)
        self.running.remove(request)
        self.rows.append(request.row)
        request.row = -1

    def retract(self, request: Request, keep: bool = True) -> None:
        """Takes a running request's slots; it waits at the front of its priority, and starts over when resumed."""
        self.leave(request, keep)
        self.retractions += 1
        request.retractions += 1
        insort(self.waiting, request, key=_queue_rank)

    def end(self, request: Request, keep: bool = True) -> None:
        """Forgets a request, wherever it is."""
        del self._by_id[request.id]
        if request.row < 0:
            self.waiting.remove(request)
        else:
            self.leave(request, keep)

    def vacate(self) -> None:
        """Ends all runs at once, unfinished ones wait. Every page is free again, and the tree is empty."""
        runs = {r for r in (*self.running, *self._by_id.values()) if r.row >= 0}
        self._holdings.reset(runs)
        for request in runs:
            request.row = -1
            request.retractions += 1
        self.retractions += len(runs)
        self.running.clear()
        self.rows = self._all_rows()
        self.waiting = sorted(self._by_id.values(), key=_queue_rank)

    def _all_rows(self) -> list[int]:
        return list(range(self._most, 0, -1))  # row 0 is scratch


def rank(request: Request) -> tuple[int, int]:
    """Who is served first: the lowest."""
    return -request.priority, request.seq


def _queue_rank(request: Request) -> tuple[int, bool, int]:
    return -request.priority, not request.retractions, request.seq
