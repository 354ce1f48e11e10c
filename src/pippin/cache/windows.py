"""The second, smaller pool of pages, for layers that look back only so far. Plain Python and numpy.

A page of the cache has its slots in the layers that see everything for as long as it is somebody's. In windowed layers
it has slots of a pool of their own, while somebody's window reaches it and for as long as nobody else needs them: what
lies behind all windows is given up only when there are no others. So the tree keeps pages, as ever, and a prefix can be
reused where its last pages still have their slots in both pools.

What goes first is what requests have left behind them on their way; then, longest unused first, the ends of what was
computed: of prompts and answers, and where prompts part. It is there that others go on.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pippin.cache.slots import SlotAllocator
from pippin.types import Request

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class WindowTable:
    """Which page of the windowed layers' pool belongs to each page of the cache; 0, their scratch page, for none.

    ``reach`` is how many tokens, itself included, the furthest looking of those layers attends to. ``num_slots`` are
    those of their pool, the scratch page included. The scheduler's side writes ``pages`` [pages of the cache] int32,
    and what lays steps out reads it as they are launched.
    """

    reach: int
    num_slots: int
    page_size: int
    pages: Ints

    @classmethod
    def empty(cls, reach: int, num_slots: int, num_pages: int, page_size: int) -> WindowTable:
        return cls(reach, num_slots, page_size, np.zeros(num_pages, np.int32))

    @property
    def span(self) -> int:
        """The most pages that one token attends to."""
        return span(self.reach, self.page_size)

    def first(self, position: int) -> int:
        """The first token that the one at ``position`` attends to."""
        return max(0, position - self.reach + 1)

    def slots(self, slots: Ints) -> Ints:
        """The slots in windowed layers of tokens whose slots in all others are given.

        Raises AssertionError if a token has none: another's would be read or written.
        """
        size = self.page_size
        pages = self.pages[slots // size]
        if len(pages) and not pages.all():
            raise AssertionError("tokens were scheduled without slots in windowed layers")
        return pages * size + slots % size


def span(reach: int, page_size: int) -> int:
    """The most pages that a window of ``reach`` tokens touches."""
    return -(-(reach - 1) // page_size) + 1


def begins_with(pages: int, reach: int, page_size: int, chunk: int) -> int:
    """Pages with which a request of so many ``pages`` begins beside others, in steps of up to ``chunk`` prompt tokens.

    That is its window and half a chunk, which is what prompts in progress get while others wait; or all of it.
    """
    return min(pages, least_pages(reach, page_size, chunk // 2))


def streams(window_slots: int, reach: int, page_size: int, chunk: int, length: int) -> int:
    """Requests of ``length`` tokens that may run at a time, by their windows: one, if no more.

    The last one begins where all others have whole windows.
    """
    pages = -(-length // page_size)
    others = window_slots // page_size - begins_with(pages, reach, page_size, chunk)
    return 1 + max(0, others) // min(pages, span(reach, page_size))


def least_pages(reach: int, page_size: int, chunk: int, streams: int = 1) -> int:
    """Pages with which ``streams`` requests run whose windows are full, and compute ``chunk`` tokens in a step."""
    return streams * span(reach, page_size) + -(-chunk // page_size) + 1


@dataclass(slots=True)
class _Span:
    """What a running request holds: its pages from the ``first``-th on. ``ends`` are the ranges to keep longest."""

    first: int
    ends: tuple[range, ...]


class WindowPages:
    """Gives pages of the cache their slots in windowed layers, and takes them back; see the module.

    A page that a running request's window reaches is *held* and keeps them. ``attach`` holds new pages, ``enter`` those
    that a request shares; ``advance`` and ``leave`` let go. ``grain``: prefixes are reused elsewhere in multiples of so
    many tokens, of whole pages each, and what such ones need is kept.
    """

    def __init__(self, table: WindowTable, grain: int = 1) -> None:
        self.table = table
        self._grain = max(grain, table.page_size)
        self.num_evicted = 0
        """Pages whose slots in windowed layers were given up for others' so far."""
        self._size = table.page_size
        self._begin()

    def _begin(self) -> None:
        pages = self.table.num_slots // self._size
        self._allocator = SlotAllocator(pages, self._size)
        self._owners: list[list[int]] = [[] for _ in range(pages)]  # the cache's pages, by page of this pool
        self._holds = array("i", [0]) * pages
        self._kept = bytearray(pages)  # whether it is at the end of something
        self._behind: OrderedDict[int, None] = OrderedDict()  # held by no one, longest ago first
        self._ends: OrderedDict[int, None] = OrderedDict()
        self._spans: dict[Request, _Span] = {}

    def reset(self) -> None:
        """No page has any, whoever it is."""
        self.table.pages[:] = 0
        self._begin()

    @property
    def num_pages(self) -> int:
        """Pages that there are, without the scratch page."""
        return self._allocator.num_pages - 1

    @property
    def num_free(self) -> int:
        """Pages that belong to none of the cache's."""
        return self._allocator.num_free

    @property
    def room(self) -> int:
        """Pages that can be had without taking them from a running request."""
        return self._allocator.num_free + len(self._behind) + len(self._ends)

    # --- how many run together, and how much they compute in a step ---

    def begins_with(self, claim: int, chunk: int) -> int:
        """Pages with which a request of ``claim`` pages may begin beside others; see the function."""
        return begins_with(claim, self.table.reach, self._size, chunk)

    def takes(self, request: Request, claim: int) -> int:
        """Pages that are a running request's, of ``claim`` in all: those it holds, or its whole window if that's more.

        So what all others take leaves, a step's prompts may have beside their windows, and no one has to make room.
        """
        held = self._held_to(request) - self._spans[request].first
        return max(min(claim, self.table.span), held)

    def ahead(self, request: Request, claim: int, spare: int) -> int:
        """Up to which token a request may compute with ``spare`` pages more than it ``takes``: always the next one."""
        return (self._spans[request].first + self.takes(request, claim) + max(0, spare)) * self._size

    # --- pages ---

    def attach(self, pages: Sequence[int]) -> None:
        """Gives new pages of the cache their slots, held once. There must be ``room``."""
        self._evict(len(pages) - self._allocator.num_free)
        got = self._allocator.allocate(len(pages))
        if got is None:
            raise AssertionError(f"no room for {len(pages)} pages in windowed layers")
        self.table.pages[list(pages)] = got
        for page, mine in zip(pages, got, strict=True):
            self._owners[mine].append(page)
            self._holds[mine] = 1

    def restore(self, pages: Sequence[int]) -> bool:
        """Gives pages of the cache that lack them their slots, as the end of something; False if there is no room."""
        if len(pages) > self.room:
            return False
        self.attach(pages)
        for page in pages:
            mine = int(self.table.pages[page])
            self._holds[mine], self._kept[mine], self._ends[mine] = 0, 1, None
        return True

    def has(self, slots: array[int]) -> npt.NDArray[np.bool_]:
        """Which of the pages whose ``slots`` are given have slots here: bool [pages]."""
        return np.asarray(self.table.pages[np.frombuffer(slots, np.int32)[:: self._size] // self._size] > 0)

    def share(self, pages: Sequence[int], others: Sequence[int]) -> None:
        """``others`` of the cache's pages are of the same tokens as ``pages``: if they have no slots they get those."""
        table = self.table.pages
        for page, other in zip(pages, others, strict=True):
            mine, theirs = int(table[page]), int(table[other])
            if not mine or mine == theirs:
                continue
            if not theirs:
                table[other] = theirs = mine
                self._owners[mine].append(other)
            elif self._kept[mine]:
                self._keep(theirs)

    def drop(self, pages: Iterable[int]) -> None:
        """Pages of the cache are free: their slots are too, but those of a twin that is not."""
        freed = []
        for page in pages:
            mine = int(self.table.pages[page])
            if not mine:
                continue
            self.table.pages[page] = 0
            self._owners[mine].remove(page)
            if not self._owners[mine]:
                if self._holds[mine]:
                    raise AssertionError("a page was freed that a running request's window reaches")
                (self._ends if self._kept[mine] else self._behind).pop(mine)
                self._kept[mine] = 0
                freed.append(mine)
        self._allocator.free(freed)

    @property
    def before(self) -> int:
        """Pages before a prefix's end that decide whether a request can go on there."""
        return self.table.span

    def ends(self, slots: array[int], begin: int) -> npt.NDArray[np.bool_]:
        """After which pages of a path a request can go on, whose ``slots`` are given from its ``begin``-th page on.

        That is where all that its next token's window reaches has slots in windowed layers; bool [pages].
        """
        there = self.has(slots)
        last = np.arange(begin, begin + len(there))
        gap = np.where(there, -1, last)
        first = np.maximum(0, (last + 1) * self._size - self.table.reach + 1) // self._size
        return np.asarray(np.maximum.accumulate(gap) < first)

    # --- running requests ---

    def enter(self, request: Request, *ends: int) -> None:
        """A request begins to run: it holds what its window reaches of the pages that it shares.

        Where it begins is worth keeping, since others may begin there too, and so are the last pages before each of
        ``ends`` (tokens).
        """
        self._begin_span(request, tuple(map(self._tail, ends)))
        for mine in self._pages(request, self._spans[request].first, request.computed // self._size):
            self._keep(mine)

    def advance(self, requests: Iterable[Request]) -> None:
        """Lets go of what lies behind the next token that each is to compute.

        Before a step is scheduled: a step that is queued may read those pages, one that is being planned may not.
        """
        for request in requests:
            held = self._spans[request]
            first = self._first(request.computed)
            if first > held.first:
                self._let_go(request, held, first)

    def leave(self, request: Request, end: int | None = None) -> None:
        """A request gives up what it holds; the last pages before ``end`` are worth keeping, if it has one."""
        held = self._spans.pop(request)
        if end is not None:
            held.ends = *held.ends, self._tail(end)
        self._let_go(request, held, self._held_to(request))

    def turn(self, request: Request, change: Callable[[], None]) -> None:
        """Runs ``change``, after which the request's pages, or what of them is computed, are others."""
        ends = self._spans[request].ends
        self.leave(request)
        change()
        self._begin_span(request, ends)

    def _begin_span(self, request: Request, ends: tuple[range, ...]) -> None:
        found = self._spans[request] = _Span(self._first(request.computed), ends)
        for mine in self._pages(request, found.first, self._held_to(request)):
            self._hold(mine)

    def _let_go(self, request: Request, held: _Span, stop: int) -> None:
        for at, mine in enumerate(self._pages(request, held.first, stop), held.first):
            if any(at in end for end in held.ends):
                self._keep(mine)
            self._holds[mine] -= 1
            if not self._holds[mine]:
                (self._ends if self._kept[mine] else self._behind)[mine] = None
        held.first = stop

    def _pages(self, request: Request, begin: int, end: int) -> list[int]:
        """This pool's pages of a request's pages ``begin`` … end - 1, which all have one."""
        slots = np.frombuffer(request.slots, np.int32)[begin * self._size : end * self._size : self._size]
        pages: list[int] = self.table.pages[slots // self._size].tolist()
        if not all(pages):
            raise AssertionError(f"{request.id} holds pages without slots in windowed layers")
        return pages

    def _held_to(self, request: Request) -> int:
        return len(request.slots) // self._size

    def _hold(self, mine: int) -> None:
        if not self._holds[mine]:
            (self._ends if self._kept[mine] else self._behind).pop(mine)
        self._holds[mine] += 1

    def _keep(self, mine: int) -> None:
        """It is at the end of something: of those that nobody holds it goes late."""
        if not self._kept[mine]:
            self._kept[mine] = 1
            if not self._holds[mine]:
                del self._behind[mine]
                self._ends[mine] = None

    def _evict(self, count: int) -> None:
        """Frees ``count`` pages that no one holds, whose owners stay in the cache without."""
        freed: list[int] = []
        while len(freed) < count and (self._behind or self._ends):
            mine, _ = (self._behind or self._ends).popitem(last=False)
            for page in self._owners[mine]:
                self.table.pages[page] = 0
            self._owners[mine].clear()
            self._kept[mine] = 0
            freed.append(mine)
        self._allocator.free(freed)
        self.num_evicted += len(freed)

    def _first(self, computed: int) -> int:
        """The first page to hold for the tokens from ``computed`` on, and for a prefix that ends with the last page."""
        return self.table.first(computed - computed % self._size) // self._size

    def _tail(self, end: int) -> range:
        """The last pages of tokens[:end], whole ones, that a prefix of them needs, or of one token less.

        Who asks the same again computes the prompt's last token.
        """
        last, grain = max(0, end - 1), self._grain
        first = self.table.first(last - last % grain)
        return range((first - first % grain) // self._size, end // self._size)
