"""The page allocator against a set."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pippin.cache.slots import SlotAllocator


class AgainstASet(RuleBasedStateMachine):
    """Whatever is taken and given back, in any order: each page is free or out, never both, page 0 neither."""

    def __init__(self) -> None:
        super().__init__()
        self.pages = SlotAllocator(12, 4)
        self.out: list[int] = []

    @rule(n=st.integers(0, 13))
    def allocate(self, n: int) -> None:
        room = self.pages.num_free
        got = self.pages.allocate(n)
        if n > room:
            assert got is None
            return
        assert got is not None
        assert len(got) == n
        assert not set(got) & set(self.out)
        assert all(1 <= page < 12 for page in got)
        self.out += got

    @rule(choice=st.randoms(use_true_random=False))
    def free(self, choice: Random) -> None:
        some = choice.sample(self.out, choice.randint(0, len(self.out)))
        self.pages.free(some)
        self.out = [page for page in self.out if page not in some]

    @rule(page=st.integers(-2, 14))
    def free_what_is_not_out(self, page: int) -> None:
        if page not in self.out:
            with pytest.raises(ValueError, match="not allocated"):
                self.pages.free([*self.out, page])

    @precondition(lambda self: self.out)
    @rule()
    def free_twice_at_once(self) -> None:
        with pytest.raises(ValueError, match="not allocated"):
            self.pages.free([self.out[0], self.out[0]])

    @rule()
    def sort(self) -> None:
        self.pages.sort()

    @invariant()
    def counts_add_up(self) -> None:
        assert self.pages.num_free + len(self.out) == 11
        assert len(set(self.out)) == len(self.out)


TestAgainstASet = AgainstASet.TestCase


@given(st.lists(st.integers(1, 1000), unique=True), st.integers(1, 64))
def test_slots_of_pages_and_back(pages: list[int], size: int) -> None:
    allocator = SlotAllocator(2, size)
    slots = allocator.slots_of(pages)
    assert slots.tolist() == [page * size + i for page in pages for i in range(size)]
    assert allocator.pages_of(slots) == pages


def test_fresh_and_sorted_pages_are_a_run() -> None:
    pages = SlotAllocator(9, 1)
    assert pages.allocate(3) == [1, 2, 3]
    assert pages.allocate(5) == [4, 5, 6, 7, 8]
    pages.free([6, 2])
    pages.free([4])
    pages.sort()
    assert pages.allocate(3) == [2, 4, 6]


def test_a_run_that_is_freed_is_handed_out_as_a_run() -> None:
    pages = SlotAllocator(9, 1)
    run = pages.allocate(5)
    assert run is not None
    pages.free(run)
    assert pages.allocate(5) == run


@pytest.mark.parametrize(("pages", "size"), [(1, 1), (8, 0)])
def test_a_pool_without_pages_is_refused(pages: int, size: int) -> None:
    with pytest.raises(ValueError, match="scratch"):
        SlotAllocator(pages, size)
