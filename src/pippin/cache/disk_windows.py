"""Files of windowed layers, beside those of all others: which blocks have them, and how far a prefix can be restored.

In windowed layers a prefix needs the K and V of its last few tokens only, and those of older ones are mostly gone when
its request ends. So a block has a file of its own for them, if they were there when it was copied; a prefix is
restored up to the last place before which enough blocks have one. Plain Python and numpy.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from pippin.cache.disk import BLOCK, Rows
from pippin.cache.windows import WindowPages
from pippin.types import Slot, Token

Has = Callable[[bytes], bool]


def window_key(key: bytes) -> bytes:
    """The name of a block's file of windowed layers; ``key`` is that of its other file."""
    return blake2b(key + b"windows", digest_size=32).digest()


class WindowBlocks:
    """Blocks of ``pages`` that have slots in windowed layers."""

    def __init__(self, pages: WindowPages) -> None:
        self._pages = pages
        self._size = pages.table.page_size

    def first(self, end: int) -> Token:
        """The first token of the page in which the window begins that a prefix of ``end`` tokens needs."""
        first = self._pages.table.first(end)
        return first - first % self._size

    def open(self, slots: array[int]) -> npt.NDArray[np.bool_]:
        """Of which whole blocks every token has slots in windowed layers: bool [blocks], for the slots of a prefix."""
        pages = BLOCK // self._size
        there = self._pages.has(slots)
        return np.asarray(there[: len(there) // pages * pages].reshape(-1, pages).all(axis=1))

    def end(self, keys: Sequence[bytes], slots: array[int], has: Has) -> int:
        """How many blocks can be restored and used: of ``keys``, the first of which are cached in ``slots``."""
        here, stop = self.open(slots), len(slots) // BLOCK
        while stop < len(keys) and has(keys[stop]):
            stop += 1
        known: dict[int, bool] = {}

        def there(block: int) -> bool:
            if block not in known:
                known[block] = (block < len(here) and bool(here[block])) or has(window_key(keys[block]))
            return known[block]

        while stop and not all(map(there, range(stop - 1, self.first(stop * BLOCK) // BLOCK - 1, -1))):
            stop -= 1
        return stop

    def ready(self, slots: array[int], end: int) -> int:
        """How many blocks of a prefix that is to have ``end`` tokens have all that they are to have."""
        count, first = min(len(slots), end) // BLOCK, self.first(end)
        if count * BLOCK <= first:
            return count
        gaps = np.flatnonzero(~self._pages.has(slots[first:]))
        return min(count, (first + int(gaps[0]) * self._size) // BLOCK) if len(gaps) else count

    def slots(self, slots: Sequence[Slot]) -> list[Slot]:
        """The slots in windowed layers of tokens that have some."""
        found: list[Slot] = self._pages.table.slots(np.array(slots, np.int32)).tolist()
        return found

    def restore(self, slots: array[int], rows: Sequence[Rows]) -> tuple[dict[int, Slot], list[Rows]] | None:
        """Gives whole pages that lack them their slots, held by nobody; None without room.

        ``slots`` are of the tokens whose ``rows`` [n, …] are given. Returns where those that were lacking go, by their
        index, and their rows.
        """
        lacking = ~self._pages.has(slots)
        firsts = np.array(slots, np.int32)[:: self._size]
        if not self._pages.restore((firsts[lacking] // self._size).tolist()):
            return None
        at = np.flatnonzero(np.repeat(lacking, self._size))
        places = self.slots([slots[i] for i in at])
        return dict(zip(at.tolist(), places, strict=True)), [part[at] for part in rows]
