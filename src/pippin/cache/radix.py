"""The radix tree of prefixes whose K and V are in the pool.

Each node is an edge of whole pages: its tokens, their slots, and children keyed by the tokens of their first
page. A pin is a node: it holds the path from the root to it, by a count in each node of the path. A node's
count is never below a child's, so what no one holds are whole subtrees, and they can be evicted leaf by leaf.

The recency of a node is the time of its last release: until then it can't be evicted anyway.

For models with a recurrent state (``snapshots``), a prefix is reused only up to a node at whose end a snapshot of it
is kept. For models with windowed layers (``windows``), up to where the last pages have their slots in those too. A
node's ``gone`` are the beginnings of what was evicted behind it, to tell why a prompt finds no more.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt

from pippin.cache.slots import SlotAllocator
from pippin.cache.snapshots import NONE, Snapshots
from pippin.cache.windows import WindowPages
from pippin.types import CacheMiss

_GONE = 16  # tokens of an evicted edge that are remembered, and edges a node
_BLOCK = 1024  # tokens compared at a time: bounds what a long edge with a short match costs


def _tokens(values: Sequence[int] = ()) -> array[int]:
    return array("i", values)


@dataclass(slots=True, eq=False, weakref_slot=True)
class Node:
    """``tokens[i]`` has its K and V in ``slots[i]``; ``end`` is the length of the path down to here."""

    parent: Node | None = None
    end: int = 0
    tokens: array[int] = field(default_factory=_tokens)
    slots: array[int] = field(default_factory=_tokens)
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)
    refs: int = 0
    used: int = 0
    queued: bool = False
    snapshot: int = 0
    gone: dict[tuple[int, ...], None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Match:
    """Slots that follow the pin which was given, and the pin that holds them now instead of it.

    ``snapshot`` is the id of the recurrent state at their end, 0 if there are none or the model keeps no such state.
    """

    slots: array[int]
    pin: Node
    snapshot: int = 0


class RadixCache:
    """Owns pages whose tokens are known. ``enabled`` False finds and keeps nothing.

    ``tokens`` are always a request's whole sequence, and ``pin`` says how much of it is held already (None:
    nothing), so that going on with a long prompt costs what is new.
    """

    def __init__(
        self,
        allocator: SlotAllocator,
        enabled: bool = True,
        snapshots: Snapshots = NONE,
        windows: WindowPages | None = None,
    ) -> None:
        self.num_cached = 0
        """Pages in the tree."""
        self.num_evictable = 0
        """Pages in the tree that no pin holds."""
        self.changes = 0
        """Goes up with whatever may change what a prompt finds here."""
        self.enabled = enabled
        self.snapshots = snapshots
        self.windows = windows
        self.root = Node()
        self._roots: WeakValueDictionary[str, Node] = WeakValueDictionary()  # gone with all that is below
        self._allocator = allocator
        self._page = allocator.page_size
        self._heap: list[tuple[int, int, Node]] = []  # candidates, by recency; checked when popped
        self._clock = count(1)
        self._ties = count()

    def root_of(self, key: str | None) -> Node:
        """The pin to begin with for tokens that others of another ``key`` must not share; None is everyone's."""
        return self.root if key is None else self._roots.setdefault(key, Node())

    def peek(self, tokens: Sequence[int], end: int | None = None, pin: object | None = None) -> int:
        """How many tokens ``match`` would find; holds nothing and leaves the order of eviction alone."""
        node = self._node(pin)
        return sum(same for _, same in self._usable(node, self._path(node, tokens, end)))

    def known(self, tokens: Sequence[int], end: int | None = None, pin: object | None = None) -> int:
        """How many tokens after the pin have their K and V here, whether they can be reused or not."""
        return sum(same for _, same in self._path(self._node(pin), tokens, end))

    def match(self, tokens: Sequence[int], end: int | None = None, pin: object | None = None) -> Match:
        """The longest run of tokens[:end] after the pin that can be reused, in whole pages; the pin moves there."""
        node = self._node(pin)
        found = self._hold(node, self._usable(node, self._path(node, tokens, end)))
        if self.snapshots is NONE or not found.slots:
            return found
        self.snapshots.touch(found.pin.snapshot)
        return Match(found.slots, found.pin, found.pin.snapshot)

    def slots(self, tokens: Sequence[int], end: int) -> array[int]:
        """The slots of tokens[:end], as far as they are here; held by nobody: good until the next eviction."""
        found = _tokens()
        for node, same in self._path(self.root, tokens, end):
            found += node.slots[:same]
        return found

    def hold(self, tokens: Sequence[int], end: int) -> Match:
        """Pins tokens[:end] as far as their K and V are here, whether they can be reused or not."""
        return self._hold(self.root, self._path(self.root, tokens, end))

    def mark(self, tokens: Sequence[int], end: int, pin: object | None = None) -> int | None:
        """An id for a snapshot after tokens[:end]; None if there is one, or no K and V, or no room."""
        if not self.snapshots.most:
            return None
        node = self._node(pin)
        for child, same in self._path(node, tokens, end):
            node = child if same == len(child.tokens) else self._split(child, same)
        if node.end != end or node.snapshot or node.parent is None:
            return None
        self.changes += 1
        return self.snapshots.add(node)

    def miss(self, tokens: Sequence[int], end: int, root: Node | None = None) -> CacheMiss | None:
        """Why no more of tokens[:end] can be reused; None if what is cached ends where it has been found."""
        root = self._node(root)
        path = self._path(root, tokens, end)
        at, usable = (sum(same for _, same in part) for part in (path, self._usable(root, path)))
        node, same = path[-1] if path else (root, 0)
        ended, full = same == len(node.tokens), end - at < self._page
        if ended and not full and any(key == tuple(tokens[at : at + len(key)]) for key in node.gone):
            return CacheMiss("evicted", at)
        if usable < at:
            return CacheMiss("no_window" if self.snapshots is NONE else "no_snapshot", at)
        if full:
            return None
        if node.children or not ended:
            return CacheMiss("diverged", at)
        return None if path else CacheMiss("cold")

    def insert(self, tokens: Sequence[int], slots: array[int], end: int, pin: object | None = None) -> Match:
        """Takes tokens[:end] in slots[:end] from the pin on, in whole pages; the pin moves there.

        The caller's pages of tokens that the tree already has are freed; the tree's slots come back in their
        place. Nothing is taken, and none come back, if the cache is disabled.
        """
        node = self._node(pin)
        begin, end = node.end, end - end % self._page
        if not self.enabled or end <= begin:
            return Match(_tokens(), node)
        found = self._hold(node, self._path(node, tokens, end))
        done = begin + len(found.slots)
        own = self._allocator.pages_of(slots[begin:done])
        if self.windows is not None:
            self.windows.share(own, self._allocator.pages_of(found.slots))
        self._allocator.free(own)
        if done == end:
            return found
        grown = self._append(found.pin, _tokens(tokens[done:end]), slots[done:end])
        return Match(found.slots + slots[done:end], grown)

    def lend(self, tokens: Sequence[int], slots: array[int], end: int, pin: object | None = None) -> None:
        """Gives pages of tokens[:end] after the pin, if they have no slots in windowed layers, those of their twins.

        Those are ``slots``, which the caller is about to fill; they stay his own, and his pin where it is.
        """
        assert self.windows is not None
        node = self._node(pin)
        at = node.end
        for child, same in self._path(node, tokens, end):
            own = self._allocator.pages_of(slots[at : at + same])
            self.windows.share(own, self._allocator.pages_of(child.slots[:same]))
            at += same

    def release(self, pin: object | None) -> None:
        """Gives up a pin. Raises ValueError if it is not held."""
        leaf = node = self._node(pin)
        now = next(self._clock)
        while node.parent is not None:
            if node.refs < 1:
                raise ValueError("a pin was released twice")
            node.refs -= 1
            node.used = now
            if not node.refs:
                self.num_evictable += len(node.slots) // self._page
            node = node.parent
        self._enqueue(leaf)

    def evict(self, num_pages: int) -> int:
        """Frees up to ``num_pages`` pages that no one holds, longest unused first; says how many.

        A leaf gives its last pages first, so a long prompt shrinks before it vanishes.
        """
        if num_pages <= 0:
            return 0
        freed: list[int] = []
        while len(freed) < num_pages and self._heap:
            used, _, node = heappop(self._heap)
            node.queued = False
            if node.refs or node.children:
                continue  # comes back when it is released, or its last child is evicted
            if node.used == used:
                freed += self._trim(node, num_pages - len(freed))
            self._enqueue(node)
        self._allocator.free(freed)
        self.num_cached -= len(freed)
        self.num_evictable -= len(freed)
        return len(freed)

    def flush(self) -> int:
        """Frees every page that no one holds; says how many."""
        freed = self.evict(self.num_evictable)
        self._allocator.sort()
        return freed

    def reset(self) -> None:
        """Forgets all there is, held or not, without giving pages back: for when slots are not to be trusted."""
        self.changes += 1
        self.snapshots.reset()
        self.root = Node()
        self._roots.clear()
        self._heap.clear()
        self.num_cached = self.num_evictable = 0

    def _node(self, pin: object | None) -> Node:
        if pin is None:
            return self.root
        if not isinstance(pin, Node):
            raise TypeError(f"not a pin: {pin!r}")
        return pin

    def _path(self, node: Node, tokens: Sequence[int], end: int | None) -> list[tuple[Node, int]]:
        """The nodes below ``node`` that go on spelling tokens[:end], each with how many tokens it shares."""
        end = len(tokens) if end is None else min(end, len(tokens))
        at, path = node.end, []
        while end - at >= self._page:
            child = node.children.get(tuple(tokens[at : at + self._page]))
            if child is None:
                break
            same = self._common(child.tokens, tokens, at, end)
            path.append((child, same))
            if same < len(child.tokens):
                break
            at, node = at + same, child
        return path

    def _usable(self, node: Node, path: list[tuple[Node, int]]) -> list[tuple[Node, int]]:
        """As much of a path below ``node`` as can be reused.

        With windowed layers that is up to where a window's last pages have slots in them too, with recurrent states up
        to the last snapshot.
        """
        if not path or (self.snapshots is NONE and self.windows is None):
            return path
        if self.windows is None:
            ends = _snapshot_ends(path)
        else:
            ends = self._open_ends(self.windows, node, path)
            if self.snapshots is not NONE:
                ends = np.intersect1d(ends, _snapshot_ends(path))
        return _cut(path, node.end, int(ends[-1]) if len(ends) else node.end)

    def _open_ends(self, windows: WindowPages, node: Node, path: list[tuple[Node, int]]) -> npt.NDArray[np.int64]:
        """Tokens after which a window's last pages have their slots, on a path below ``node``: rising, int64 [n]."""
        slots, above, left = _tokens(), node, windows.before * self._page
        while left > len(slots) and above.parent is not None:
            slots, above = above.slots[len(slots) - left :] + slots, above.parent
        begin = node.end - len(slots)
        for child, same in path:
            slots += child.slots[:same]
        ends = begin + self._page * (1 + windows.ends(slots, begin // self._page).nonzero()[0])
        return ends[ends > node.end]

    def _hold(self, node: Node, path: list[tuple[Node, int]]) -> Match:
        """Moves a pin along a path that begins at it, and holds that."""
        slots = _tokens()
        for child, same in path:
            node = child if same == len(child.tokens) else self._split(child, same)
            if not node.refs:
                self.num_evictable -= len(node.slots) // self._page
            node.refs += 1
            slots.extend(node.slots)
        return Match(slots, node)

    def _common(self, edge: array[int], tokens: Sequence[int], at: int, end: int) -> int:
        """How long ``edge`` and tokens[at:end] agree, in whole pages; arrays compare at the speed of memory."""
        size = min(len(edge), end - at)
        for low in range(0, size, _BLOCK):
            high = min(low + _BLOCK, size)
            mine, theirs = edge[low:high], _tokens(tokens[at + low : at + high])
            if mine != theirs:
                size = low + next(i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b)
                break
        return size - size % self._page

    def _split(self, node: Node, at: int) -> Node:
        """Cuts an edge; returns the new upper half. The node stays the lower one, so pins on it hold both."""
        assert node.parent is not None
        upper = Node(node.parent, node.end - len(node.tokens) + at, node.tokens[:at], node.slots[:at])
        upper.refs, upper.used = node.refs, node.used
        node.parent.children[self._key(node)] = upper
        del node.tokens[:at], node.slots[:at]
        node.parent = upper
        upper.children[self._key(node)] = node
        return upper

    def _append(self, node: Node, tokens: array[int], slots: array[int]) -> Node:
        """Adds an edge below a pin and moves the pin to its end."""
        self.changes += 1
        self.num_cached += len(slots) // self._page
        if node.refs == 1 and not (node.children or node.snapshot):  # held by this pin alone: a longer edge, not two
            node.gone.clear()
            node.tokens.extend(tokens)
            node.slots.extend(slots)
            node.end += len(slots)
            return node
        child = Node(node, node.end + len(slots), tokens, slots, refs=1)
        node.children[self._key(child)] = child
        return child

    def _trim(self, node: Node, num_pages: int) -> list[int]:
        """Cuts up to ``num_pages`` pages off a leaf's end, and the leaf off the tree if none are left."""
        size = min(num_pages * self._page, len(node.slots))
        keep = len(node.slots) - size
        pages = self._allocator.pages_of(node.slots[keep:])
        self.changes += 1
        self.snapshots.drop(node.snapshot)
        assert node.parent is not None
        self._remember(node if keep else node.parent, node.tokens[keep : keep + _GONE])
        if not keep:
            del node.parent.children[self._key(node)]
            self._enqueue(node.parent)
        del node.tokens[keep:], node.slots[keep:]
        node.end -= size
        return pages

    def _remember(self, node: Node, tokens: array[int]) -> None:
        """Notes at ``node`` that what went on so was evicted; the oldest notes go."""
        if not node.children:
            node.gone.clear()  # what was noted of a longer edge
        node.gone[tuple(tokens)] = None
        if len(node.gone) > _GONE:
            del node.gone[next(iter(node.gone))]

    def _enqueue(self, node: Node) -> None:
        """Makes a node a candidate for eviction, if it is an unheld leaf and not one already."""
        if node.slots and not (node.refs or node.children or node.queued):
            node.queued = True
            heappush(self._heap, (node.used, next(self._ties), node))

    def _key(self, node: Node) -> tuple[int, ...]:
        return tuple(node.tokens[: self._page])


def _snapshot_ends(path: list[tuple[Node, int]]) -> npt.NDArray[np.int64]:
    return np.array([node.end for node, same in path if node.snapshot and same == len(node.tokens)], np.int64)


def _cut(path: list[tuple[Node, int]], begin: int, end: int) -> list[tuple[Node, int]]:
    """The path from ``begin`` on, of whole nodes but the last, as far as ``end``."""
    found = []
    for node, same in path:
        if begin >= end:
            break
        found.append((node, min(same, end - begin)))
        begin += same
    return found
