"""Which prefixes have the recurrent state after them kept, within a budget. Plain Python: the arrays are elsewhere.

K and V of a prefix can be used up to any token; a recurrent state stands for exactly the tokens that made it. So a
prefix can be reused as far as somebody kept the state: at the ends of chunks, where cached prompts part, and where an
answer ended. (Pan et al., Marconi, 2024, keep states at such places too.)
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from itertools import count
from typing import Protocol


class StateKeeper(Protocol):
    """Who has the arrays: the device's store of states, one for each running request's row, and snapshots by id."""

    def keep(self, row: int, id: int) -> None:
        """Keeps the state that ``row`` has after all steps launched so far."""
        ...

    def drop(self, id: int) -> None:
        """Forgets a snapshot; one that was never made is no error."""
        ...

    def release(self, row: int) -> None:
        """The row's request has left: its state is of no use any more."""
        ...


class Place(Protocol):
    """Where a snapshot belongs: a node of the tree. ``snapshot`` is its id, 0 for none."""

    snapshot: int


LEAST_CUT = 16
"""Tokens that two prompts must have in common for a chunk to end there: that costs a forward more, which reads all
weights again, and a template's first words are soon computed."""


class Snapshots:
    """At most ``most`` snapshots; the longest unused goes first, but none that a request is about to start from.

    ``least_cut``: a chunk is cut short for one only behind so many tokens.
    """

    def __init__(self, keeper: StateKeeper, most: int, least_cut: int = LEAST_CUT) -> None:
        self.keeper = keeper
        self.most = most
        self.least_cut = least_cut
        self.num_evicted = 0
        self._places: OrderedDict[int, Place] = OrderedDict()  # longest unused first
        self._used: set[int] = set()
        self._held: Counter[int] = Counter()
        self._ids = count(1)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, id: int | None) -> bool:
        return id in self._places

    def add(self, place: Place) -> int | None:
        """An id for the state at ``place``, which has none; None if there is no room for it."""
        while len(self._places) >= self.most:
            oldest = next((id for id in self._places if id not in self._held), None)
            if oldest is None:
                return None
            self.drop(oldest)
            self.num_evicted += 1
        place.snapshot = next(self._ids)
        self._places[place.snapshot] = place
        return place.snapshot

    def drop(self, id: int) -> None:
        """Forgets one; 0 is none."""
        if id:
            self._places.pop(id).snapshot = 0
            self._used.discard(id)
            self.keeper.drop(id)

    def reset(self) -> None:
        """Forgets all of them."""
        for id in [*self._places]:
            self.drop(id)

    def touch(self, id: int) -> None:
        """It was of use."""
        self._places.move_to_end(id)
        self._used.add(id)

    def recede(self, id: int) -> None:
        """A later one of the same prompt is better: it goes first, if it was of no use yet. It may be gone."""
        if id in self._places and id not in self._used:
            self._places.move_to_end(id, last=False)

    def hold(self, id: int) -> None:
        """Somebody is about to start from it."""
        self._held[id] += 1

    def unhold(self, id: int) -> None:
        self._held[id] -= 1
        if not self._held[id]:
            del self._held[id]

    def is_held(self, id: int) -> bool:
        return id in self._held


class _Nobody:
    """The keeper for models without recurrent state."""

    def keep(self, row: int, id: int) -> None:
        raise AssertionError("a snapshot was asked for, and nobody keeps any")

    def drop(self, id: int) -> None:
        """There are none."""

    def release(self, row: int) -> None:
        """There is nothing to release."""


NONE = Snapshots(_Nobody(), 0)
"""For models that keep K and V only: every prefix can be reused as it is."""
