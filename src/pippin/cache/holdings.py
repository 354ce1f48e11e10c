"""What requests hold of the cache: slots, windows, pins of the tree, snapshots of recurrent state. Plain Python.

A request's ``slots`` are its own but for the first ``shared`` tokens', which are the tree's and held by its ``pin``.
Prompt pages are in the tree as soon as the Work that fills them is scheduled: whoever reads them runs after it.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence, Set

from pippin.cache.radix import Match, Node, RadixCache
from pippin.cache.slots import SlotAllocator
from pippin.types import Request, Token


class Holdings:
    """``suspects`` are requests that neither read the tree nor add to it until they end: it may be what was wrong."""

    def __init__(self, allocator: SlotAllocator, radix: RadixCache, suspects: Set[Request]) -> None:
        self._allocator, self._radix, self._snapshots = allocator, radix, radix.snapshots
        self._windows = radix.windows
        self._suspects = suspects
        self._saves: dict[Request, int] = {}  # snapshots that the Works being planned are to make
        self._known: dict[Request, int] = {}  # of waiting requests, since the tree changed
        self._known_at = 0
        self.cached_tokens = 0
        self.misses: Counter[str] = Counter()

    @property
    def room(self) -> int:
        """Pages that can be had without taking them from a running request."""
        return self._allocator.num_free + self._radix.num_evictable

    def pages(self, tokens: int) -> int:
        """How many pages so many tokens fill."""
        return -(-tokens // self._allocator.page_size)

    def flush(self) -> int:
        """Empties the tree of what no running request holds; returns the slots freed."""
        return self._radix.flush() * self._allocator.page_size

    # --- a request's run ---

    def find(self, request: Request) -> Match:
        """The cached prefix of a waiting request, held: to be given to ``enter`` or ``give_back``."""
        return self._radix.match(request.tokens, self.reusable(request), self._root(request))

    def give_back(self, found: Match) -> None:
        self._radix.release(found.pin)

    def enter(self, request: Request, found: Match) -> None:
        """Begins a request's run with a cached prefix."""
        request.pin = found.pin
        self._explain(request)
        self._reuse(request, found)
        if self._windows is not None:
            parts = request.shared + self._radix.known(request.tokens, self.reusable(request), request.pin)
            self._windows.enter(request, parts, request.num_prompt)

    def reach(self, request: Request, end: int) -> int:
        """Gives a request slots up to ``end``, or as far as pages go; returns how far."""
        missing = self.pages(end) - self.pages(len(request.slots))
        if missing > 0:
            missing = min(missing, self.room, *([self._windows.room] if self._windows is not None else []))
            self._radix.evict(missing - self._allocator.num_free)
            pages = self._allocator.allocate(missing) or []
            if self._windows is not None:
                self._windows.attach(pages)
            request.slots.extend(self._allocator.slots_of(pages))
        return min(end, len(request.slots))

    def plan(self, running: Sequence[Request]) -> None:
        """Another step is being planned, for those that run."""
        self._saves.clear()
        if self._windows is not None:
            self._windows.advance(running)

    def planned(self, request: Request) -> tuple[int | None, int | None]:
        """The snapshots that the request's Work begins with and makes at its end, if any."""
        restore, save = request.restore, self._saves.get(request)
        if restore is save is None:
            return None, None
        self._restore(request, None)
        return restore, save if save in self._snapshots else None  # it may have been given up meanwhile

    def leave(self, request: Request, keep: bool) -> None:
        """Ends a run: what was computed goes to the tree, unpinned; the rest is free.

        ``keep`` False: its recurrent state is not to be trusted.
        """
        end = min(len(request.tokens), request.computed)
        if self._windows is not None:
            self._windows.leave(request, end)
        self._insert(request, end)
        if keep:
            self._keep(request)
        self._let_go(request)
        self._radix.release(request.pin)
        self._allocator.free(self._allocator.pages_of(request.slots[request.shared :]))
        self._empty(request)

    def reset(self, running: Iterable[Request]) -> None:
        """Ends the runs of all requests at once. Every page is free again, whoever had it, and the tree is empty."""
        for request in running:
            self._let_go(request)
            self._empty(request)
        self._radix.reset()
        self._allocator.reset()

    def _let_go(self, request: Request) -> None:
        self._restore(request, None)
        self._snapshots.keeper.release(request.row)

    def _empty(self, request: Request) -> None:
        request.pin = None
        request.slots = request.slots[:0]
        request.shared = request.computed = 0

    # --- the tree ---

    def reusable(self, request: Request) -> int:
        """How many tokens may come from the cache: the last is needed for its logits, and scored ones for theirs.

        Of a suspect none: what is cached may be what was wrong.
        """
        if request in self._suspects:
            return 0
        limit = request.length - 1
        return min(limit, request.scored) if request.params.prompt_logprobs or request.pools_all else limit

    @property
    def changes(self) -> int:
        """Goes up with whatever may change what a waiting request finds."""
        return self._radix.changes

    def known(self, request: Request) -> int:
        """How many of a waiting request's tokens are cached; looked up again only after the tree has changed."""
        if self._known_at != self.changes:
            self._known.clear()
            self._known_at = self.changes
        if request not in self._known:
            self._known[request] = self._radix.peek(request.tokens, self.reusable(request), self._root(request))
        return self._known[request]

    def _root(self, request: Request) -> Node:
        """Where its prefixes begin: K and V of one adapter are no other's."""
        return self._radix.root_of(request.adapter.key if request.adapter is not None else None)

    def _explain(self, request: Request) -> None:
        """Notes why a newcomer finds no more of its prompt."""
        if self._radix.enabled and not request.retractions:
            request.miss = self._radix.miss(request.tokens, self.reusable(request), self._root(request))
            if request.miss is not None:
                self.misses[request.miss.reason] += 1

    def is_known(self, request: Request) -> bool:
        """Whether others have planned to compute what comes next of its prompt."""
        find = self._radix.known if self._windows is None else self._radix.peek
        return find(request.tokens, self.reusable(request), request.pin) > 0

    def rematch(self, request: Request) -> None:
        """Skips what others have computed of this prompt since its last chunk."""
        found = self._radix.match(request.tokens, self.reusable(request), request.pin)
        request.pin = found.pin
        if not found.slots:
            return
        if self._windows is None:
            self._take_over(request, found)
        else:
            self._windows.turn(request, lambda: self._take_over(request, found))

    def _take_over(self, request: Request, found: Match) -> None:
        """Frees a request's own pages of what the tree has, and goes on behind that."""
        own = request.slots[request.shared : request.shared + len(found.slots)]
        self._allocator.free(self._allocator.pages_of(own))
        self._reuse(request, found)

    def _reuse(self, request: Request, found: Match) -> None:
        """Puts the tree's slots after those that are shared already, and skips what they hold."""
        self._share(request, found.slots)
        if request.shared > request.computed:
            self._restore(request, found.snapshot or None)
            skipped = min(request.shared, request.num_prompt) - min(request.computed, request.num_prompt)
            request.computed = request.shared
            if not request.retractions:
                request.num_cached += skipped
                self.cached_tokens += skipped

    def publish(self, request: Request) -> None:
        """Gives the tree the prompt pages that this step fills.

        Pages that it has already stay private until the end: the step writes them, and must not write the tree's. So do
        a suspect's. But pages of the tree that lack slots in windowed layers get them here, and others can go on there.
        """
        if request in self._suspects:
            return
        end = request.computed
        if not self._radix.known(request.tokens, end, request.pin):
            self._insert(request, end)
        elif self._windows is not None:
            self._radix.lend(request.tokens, request.slots, end, request.pin)
        id = self._radix.mark(request.tokens, end, request.pin)
        if id is not None:
            self._snapshots.recede(request.saved)
            request.saved = self._saves[request] = id

    def _insert(self, request: Request, end: int) -> None:
        found = self._radix.insert(request.tokens, request.slots, end, request.pin)
        request.pin = found.pin
        self._share(request, found.slots)

    def _share(self, request: Request, slots: array[int]) -> None:
        end = request.shared + len(slots)
        request.slots[request.shared : end] = slots
        request.shared = end

    # --- recurrent states ---

    def boundary(self, request: Request, begin: int, end: int) -> int:
        """Where a chunk is to stop short of ``end``, so that the state after it will be of use.

        That is where a cached prompt parts from this one: a third may well do so too, if they have more in common than
        a template's first words. And the end of a page, since the tree holds whole pages: for the last chunk the last
        one before the prompt's end, where the next turn goes on.
        """
        if not self._snapshots.most:
            return end
        known = request.shared + self._radix.known(request.tokens, self.reusable(request), request.pin)
        if begin + self._snapshots.least_cut <= known < end:
            return known
        last = min(end, request.length - 1) if self._allocator.page_size > 1 else end
        aligned = last - last % self._allocator.page_size
        return aligned if aligned > begin else end

    def unsave(self, request: Request) -> bool:
        """Takes back the snapshot at the end of a Work that is to be longer; False if another starts from it."""
        id = self._saves.get(request, 0)
        if self._snapshots.is_held(id):
            return False
        if id in self._snapshots:
            self._snapshots.drop(id)
        return True

    def _restore(self, request: Request, id: int | None) -> None:
        """Makes a snapshot what the request's next Work begins with, and holds it until that is planned."""
        if request.restore is not None:
            self._snapshots.unhold(request.restore)
        if id is not None:
            self._snapshots.hold(id)
        request.restore = id

    def _keep(self, request: Request) -> None:
        """Keeps the state of a request that leaves, if all its tokens so far are in the tree."""
        end = request.computed
        if request.shared == end:  # one that has yet to start from a snapshot is where that already is
            id = self._radix.mark(request.tokens, end, request.pin)
            if id is not None:
                self._snapshots.keeper.keep(request.row, id)

    # --- prefixes that come from elsewhere ---

    def cached_slots(self, tokens: Sequence[Token], end: int) -> array[int]:
        """The slots of tokens[:end], as far as they are cached; good until the next step is scheduled."""
        return self._radix.slots(tokens, end)

    def adopt(self, tokens: Sequence[Token], begin: int, end: int) -> array[int] | None:
        """Slots of tokens[:end], all of them in the cache now: the caller writes those that were not there.

        They are the last ones, from where ``cached_slots`` ended before, and are to be written before the next step is
        queued. None if tokens[:begin] are not all cached, or there is no room but by taking it from those who run.
        """
        found = self._radix.hold(tokens, end)
        pin, slots = found.pin, found.slots
        missing = self.pages(end) - self.pages(len(slots))
        room = len(slots) >= begin and missing <= self.room
        if room and missing:
            self._radix.evict(missing - self._allocator.num_free)
            slots = slots + self._allocator.slots_of(self._allocator.allocate(missing) or ())
            pin = self._radix.insert(tokens, slots, end, pin).pin
        self._radix.release(pin)
        return slots if room else None
