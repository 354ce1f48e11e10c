"""The free list of KV pages.

A slot is one token's place in the pool; page p is the run of slots from p * page_size on. Page 0 is scratch:
padding writes there, so it is never handed out.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np


class FreedPages(Protocol):
    """Who is told of pages that are free again."""

    def drop(self, pages: Iterable[int]) -> None: ...

    def reset(self) -> None:
        """All of them are."""
        ...


class SlotAllocator:
    """Hands out pages 1 to num_pages - 1 and takes them back, each exactly once; ``told`` hears what comes back.

    Raises ValueError if there would be no page to hand out.
    """

    def __init__(self, num_pages: int, page_size: int, told: FreedPages | None = None) -> None:
        if num_pages < 2 or page_size < 1:
            raise ValueError(f"need 2 pages (one is scratch) of 1 slot or more, not {num_pages} of {page_size}")
        self.num_pages = num_pages
        self.page_size = page_size
        self._told = told
        self._free = array("i", range(num_pages - 1, 0, -1))  # a stack: the last is handed out next
        self._used = bytearray(num_pages)

    @property
    def num_free(self) -> int:
        """Pages that can be handed out now."""
        return len(self._free)

    @property
    def capacity(self) -> int:
        """Slots of all pages but the scratch page."""
        return (self.num_pages - 1) * self.page_size

    def allocate(self, n: int) -> list[int] | None:
        """``n`` pages, or None (and nothing is taken) if fewer are free."""
        if n > len(self._free):
            return None
        begin = len(self._free) - n
        pages = self._free[begin:].tolist()
        del self._free[begin:]
        pages.reverse()
        for page in pages:
            self._used[page] = 1
        return pages

    def free(self, pages: Sequence[int]) -> None:
        """Takes pages back; they are handed out next, in this order.

        Raises ValueError, and changes nothing, if one of them is not out: a page freed twice would soon belong
        to two requests.
        """
        used = self._used
        if len(set(pages)) < len(pages) or not all(0 < p < self.num_pages and used[p] for p in pages):
            bad = [p for p in pages if not (0 < p < self.num_pages and used[p])] or "one of them twice"
            raise ValueError(f"pages freed that are not allocated: {bad}")
        for page in pages:
            used[page] = 0
        self._free.extend(reversed(pages))
        if self._told is not None:
            self._told.drop(pages)

    def reset(self) -> None:
        """Every page is free again, whoever had it."""
        self._free = array("i", range(self.num_pages - 1, 0, -1))
        self._used = bytearray(self.num_pages)
        if self._told is not None:
            self._told.reset()

    def sort(self) -> None:
        """Hand out the lowest pages first again, so that new requests get runs of neighbours."""
        self._free = array("i", sorted(self._free, reverse=True))

    def slots_of(self, pages: Iterable[int]) -> array[int]:
        """The slots of pages, in order."""
        size = self.page_size
        if size == 1:
            return array("i", pages)
        first = np.fromiter(pages, np.int32)[:, None] * size
        slots: array[int] = array("i")
        slots.frombytes((first + np.arange(size, dtype=np.int32)).tobytes())
        return slots

    def pages_of(self, slots: array[int]) -> list[int]:
        """The pages of slots; inverse of ``slots_of``."""
        size = self.page_size
        return slots.tolist() if size == 1 else [slot // size for slot in slots[::size]]
