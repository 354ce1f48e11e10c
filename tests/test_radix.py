"""The radix tree against a dict from prefixes to pages, with its own idea of who is held and who goes first."""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator
from random import Random

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pippin.cache.radix import Node, RadixCache
from pippin.cache.slots import SlotAllocator

Prefix = tuple[int, ...]

sequences = st.lists(st.integers(0, 2), max_size=14)


def nodes(radix: RadixCache) -> Iterator[Node]:
    """Every node but the root."""
    stack = list(radix.root.children.values())
    while stack:
        node = stack.pop()
        yield node
        stack += node.children.values()


def check_shape(radix: RadixCache, page: int) -> None:
    """Whole pages, right keys, ends and parents; counts that fall along each path; every loose leaf is a candidate."""
    queue = [node for _, _, node in radix._heap]
    assert len(queue) == len(set(queue))
    assert radix.root.refs == 0
    for node in nodes(radix):
        assert node.parent is not None
        assert node.end == node.parent.end + len(node.tokens)
        assert len(node.tokens) == len(node.slots) > 0
        assert len(node.tokens) % page == 0
        assert node.parent.children[tuple(node.tokens[:page])] is node
        assert node.parent is radix.root or node.parent.refs >= sum(c.refs for c in node.parent.children.values())
        assert node.parent is radix.root or node.parent.used >= node.used or node.parent.refs
        if not node.refs and not node.children:
            assert node in queue


class AgainstADict(RuleBasedStateMachine):
    """Requests come and go over a small alphabet, so that prefixes meet, part, and crowd each other out."""

    @initialize(page=st.integers(1, 3), num_pages=st.integers(2, 30))
    def start(self, page: int, num_pages: int) -> None:
        self.page = page
        self.allocator = SlotAllocator(num_pages, page)
        self.radix = RadixCache(self.allocator)
        self.cached: dict[Prefix, int] = {}  # prefix in whole pages -> the page of its last tokens
        self.used: dict[Prefix, int] = {}
        self.held: list[tuple[Node, Prefix]] = []
        self.time = 0

    def prefixes(self, tokens: Prefix) -> list[Prefix]:
        return [tokens[:end] for end in range(self.page, len(tokens) + 1, self.page)]

    def expected(self, tokens: Prefix) -> list[Prefix]:
        """The cached prefixes of tokens: those up to the first that is missing."""
        found = []
        for prefix in self.prefixes(tokens):
            if prefix not in self.cached:
                break
            found.append(prefix)
        return found

    def pages(self, slots: array[int]) -> list[int]:
        assert slots.tolist() == self.allocator.slots_of(self.allocator.pages_of(slots)).tolist()
        return self.allocator.pages_of(slots)

    def loose(self) -> list[Prefix]:
        """Pages that can go now: held by no one, and no longer prefix is cached; longest unused first."""
        held = {p for _, tokens in self.held for p in self.prefixes(tokens)}
        inner = {prefix[: -self.page] for prefix in self.cached}
        return sorted((p for p in self.cached if p not in held and p not in inner), key=self.used.__getitem__)

    def match_now(self, tokens: Prefix) -> tuple[array[int], Node, Prefix]:
        found = self.radix.match(tokens)
        want = self.expected(tokens)
        assert self.pages(found.slots) == [self.cached[p] for p in want]
        return found.slots, found.pin, want[-1] if want else ()

    @rule(tokens=sequences, cut=st.integers(0, 14))
    def peek(self, tokens: list[int], cut: int) -> None:
        want = self.expected(tuple(tokens)[:cut])
        assert self.radix.peek(tokens, cut) == len(want) * self.page

    @rule(tokens=sequences)
    def match_and_hold(self, tokens: list[int]) -> None:
        _, pin, prefix = self.match_now(tuple(tokens))
        self.held.append((pin, prefix))

    @rule(tokens=sequences, ahead=st.booleans())
    def match_and_insert(self, tokens: list[int], ahead: bool) -> None:
        """A request's prompt. ``ahead``: another inserts the same while this one computes."""
        whole = tuple(tokens[: len(tokens) - len(tokens) % self.page])
        slots, pin, prefix = self.match_now(tuple(tokens))
        self.held.append((pin, prefix))
        got = self.allocator.allocate((len(whole) - len(prefix)) // self.page)
        if got is None:
            return
        if ahead:
            self.match_and_insert(tokens, ahead=False)
            if len(self.expected(whole)) * self.page < len(whole):
                self.allocator.free(got)
                return
        slots = slots + self.allocator.slots_of(got)
        self.held.remove((pin, prefix))
        found = self.radix.insert(tokens, slots, len(tokens), pin)
        new = self.prefixes(whole)[len(prefix) // self.page :]
        for p, page in zip(new, got, strict=True):
            self.cached.setdefault(p, page)
        assert self.pages(found.slots) == [self.cached[p] for p in new]
        self.held.append((found.pin, whole))

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 1000), more=sequences)
    def hold_further(self, which: int, more: list[int]) -> None:
        """A pin moves on along a longer sequence, as at a prompt's next chunk."""
        pin, prefix = self.held.pop(which % len(self.held))
        tokens = prefix + tuple(more)
        found = self.radix.match(tokens, None, pin)
        want = self.expected(tokens)
        assert self.pages(found.slots) == [self.cached[p] for p in want[len(prefix) // self.page :]]
        self.held.append((found.pin, want[-1] if want else ()))

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 1000))
    def release(self, which: int) -> None:
        pin, prefix = self.held.pop(which % len(self.held))
        self.radix.release(pin)
        self.time += 1
        self.used.update(dict.fromkeys(self.prefixes(prefix), self.time))

    @rule(n=st.integers(0, 8))
    def evict(self, n: int) -> None:
        gone = 0
        while gone < n and (loose := self.loose()):
            del self.cached[loose[0]]
            gone += 1
        assert self.radix.evict(n) == gone

    @rule()
    def flush(self) -> None:
        held = {p for _, tokens in self.held for p in self.prefixes(tokens)}
        assert self.radix.flush() == len(self.cached) - len(held)
        self.cached = {p: page for p, page in self.cached.items() if p in held}

    @invariant()
    def tree_is_the_dict(self) -> None:
        if not hasattr(self, "radix"):
            return
        check_shape(self.radix, self.page)
        held = {p for _, tokens in self.held for p in self.prefixes(tokens)}
        assert self.radix.num_cached == len(self.cached) == sum(len(n.slots) for n in nodes(self.radix)) // self.page
        assert self.radix.num_evictable == len(self.cached) - len(held)
        assert self.radix.num_cached + self.allocator.num_free == self.allocator.num_pages - 1
        for pin, prefix in self.held:
            assert path(pin) == prefix

    def teardown(self) -> None:
        if not hasattr(self, "radix"):
            return
        for pin, _ in self.held:
            self.radix.release(pin)
        self.radix.flush()
        assert self.radix.num_cached == self.radix.num_evictable == 0
        assert not self.radix.root.children
        assert self.allocator.num_free == self.allocator.num_pages - 1


TestAgainstADict = AgainstADict.TestCase


def path(pin: Node) -> Prefix:
    """The tokens from the root to a pin."""
    tokens: Prefix = ()
    node: Node | None = pin
    while node is not None:
        tokens = (*node.tokens, *tokens)
        node = node.parent
    return tokens


def filled(prompts: list[list[int]], num_pages: int, page: int = 1) -> tuple[RadixCache, SlotAllocator]:
    """A tree that holds prompts, unpinned, released in order."""
    allocator = SlotAllocator(num_pages, page)
    radix = RadixCache(allocator)
    for prompt in prompts:
        found = radix.match(prompt)
        pages = allocator.allocate((len(prompt) - len(found.slots)) // page)
        assert pages is not None
        radix.release(radix.insert(prompt, found.slots + allocator.slots_of(pages), len(prompt), found.pin).pin)
    return radix, allocator


def test_peek_leaves_the_order_of_eviction_alone_and_match_does_not() -> None:
    for look, gone in ((False, [1, 1]), (True, [2, 2])):
        radix, _ = filled([[1, 1], [2, 2]], 8)
        if look:
            radix.release(radix.match([1, 1]).pin)
        assert radix.peek([1, 1]) == 2
        radix.evict(2)
        assert radix.peek(gone) == 0
        assert radix.num_cached == 2


def test_eviction_takes_the_end_of_a_long_prompt_first() -> None:
    radix, _ = filled([list(range(12))], 20, page=2)
    assert radix.evict(2) == 2
    assert radix.peek(list(range(12))) == 8


def test_a_prompt_grown_in_chunks_is_one_edge() -> None:
    allocator = SlotAllocator(100, 1)
    radix = RadixCache(allocator)
    pages = allocator.allocate(90)
    assert pages is not None
    pin: Node | None = None
    for end in (10, 30, 90):
        pin = radix.insert(range(90), allocator.slots_of(pages), end, pin).pin
    assert [len(node.tokens) for node in nodes(radix)] == [90]


def test_disabled_finds_and_keeps_nothing() -> None:
    allocator = SlotAllocator(10, 1)
    radix = RadixCache(allocator, enabled=False)
    pages = allocator.allocate(3)
    assert pages is not None
    found = radix.insert([1, 2, 3], allocator.slots_of(pages), 3)
    assert (len(found.slots), radix.num_cached, radix.peek([1, 2, 3])) == (0, 0, 0)
    radix.release(found.pin)
    allocator.free(pages)


def test_a_pin_released_twice_and_a_pin_that_is_none_are_refused() -> None:
    radix, _ = filled([[1, 2]], 8)
    pin = radix.match([1, 2]).pin
    radix.release(pin)
    with pytest.raises(ValueError, match="twice"):
        radix.release(pin)
    with pytest.raises(TypeError, match="not a pin"):
        radix.match([1], None, "pin")


def test_paths_of_many_nodes_need_no_recursion() -> None:
    prompt = list(range(1500))
    branches = [[*prompt[:end], -1] for end in range(1, 1500)]
    radix, allocator = filled([prompt, *branches], 3001)
    assert sum(1 for _ in nodes(radix)) == 2 * 1499 + 1
    assert radix.peek(prompt) == 1500
    assert radix.flush() == 1500 + 1499
    assert allocator.num_free == 3000


def test_work_does_not_grow_with_the_tree() -> None:
    """Evicting page by page from a tree of 200 thousand tokens; matching in it. Generous: machines are shared."""
    rng = Random(0)
    prompts = [[i, *(rng.randrange(1000) for _ in range(199))] for i in range(1000)]
    radix, _ = filled(prompts, 200_001)
    began = time.process_time()
    for _ in range(2000):
        assert radix.evict(1) == 1
    assert time.process_time() - began < 1.0  # 4 ms where it was written; a scan of the tree each would be 20 s
    assert [radix.peek(prompt) for prompt in prompts] == [0] * 10 + [200] * 990


def test_nothing_is_left_of_adapters_that_are_long_gone() -> None:
    """Each time one is loaded it has a key of its own, and so a root."""
    radix, allocator = filled([[1, 2]], 8)
    for i in range(50):
        root = radix.root_of(f"a{i}")
        pages = allocator.allocate(3)
        assert pages is not None
        radix.release(radix.insert([1, 2, 3], allocator.slots_of(pages), 3, root).pin)
        assert radix.peek([1, 2, 3], pin=root) == 3
        assert radix.root_of(f"a{i}") is root
        radix.evict(3)
    del root
    assert len(radix._roots) <= 1
