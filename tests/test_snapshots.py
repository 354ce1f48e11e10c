"""Which snapshots are kept, which go first, and how far a prompt with recurrent state is reused."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pippin.cache.radix import RadixCache
from pippin.cache.slots import SlotAllocator
from pippin.cache.snapshots import LEAST_CUT, Snapshots
from pippin.types import CacheMiss, Request
from tests.fake_device import Loop, endless


@dataclass
class Keeper:
    dropped: list[int] = field(default_factory=list)

    def keep(self, row: int, id: int) -> None: ...

    def drop(self, id: int) -> None:
        self.dropped.append(id)

    def release(self, row: int) -> None: ...


@dataclass
class Spot:
    snapshot: int = 0


def kept(snapshots: Snapshots, spots: list[Spot]) -> list[int]:
    """Which of the spots have one; the two must agree."""
    found = [i for i, spot in enumerate(spots) if spot.snapshot]
    assert len(found) == len(snapshots)
    assert all(spots[i].snapshot in snapshots for i in found)
    return found


def test_the_longest_unused_goes_first_but_none_that_is_held() -> None:
    keeper = Keeper()
    snapshots, spots = Snapshots(keeper, 3), [Spot() for _ in range(7)]
    for spot in spots[:3]:
        snapshots.add(spot)
    snapshots.touch(spots[0].snapshot)
    snapshots.add(spots[3])
    assert kept(snapshots, spots) == [0, 2, 3]
    snapshots.hold(spots[2].snapshot)
    snapshots.hold(spots[2].snapshot)
    snapshots.add(spots[4])
    assert kept(snapshots, spots) == [2, 3, 4], "0 was the longest unused of those that may go"
    snapshots.unhold(spots[2].snapshot)
    assert snapshots.is_held(spots[2].snapshot), "twice is not once"
    for i in (3, 4):
        snapshots.hold(spots[i].snapshot)
    assert snapshots.add(spots[5]) is None, "all are held"
    snapshots.unhold(spots[2].snapshot)
    assert snapshots.add(spots[5]) is not None
    assert kept(snapshots, spots) == [3, 4, 5]
    assert (len(keeper.dropped), snapshots.num_evicted) == (3, 3)


def test_an_intermediate_one_goes_before_others_unless_it_was_of_use() -> None:
    snapshots, spots = Snapshots(Keeper(), 3), [Spot() for _ in range(6)]
    for spot in spots[:3]:
        snapshots.add(spot)
    snapshots.recede(spots[2].snapshot)
    snapshots.add(spots[3])
    assert kept(snapshots, spots) == [0, 1, 3]
    snapshots.touch(spots[3].snapshot)
    snapshots.recede(spots[3].snapshot)
    snapshots.recede(12345)
    snapshots.add(spots[4])
    assert kept(snapshots, spots) == [1, 3, 4]


def tree(most: int = 10, pages: int = 100) -> RadixCache:
    allocator = SlotAllocator(pages, 1)
    return RadixCache(allocator, snapshots=Snapshots(Keeper(), most))


def insert(radix: RadixCache, tokens: list[int], *marks: int) -> None:
    """Caches tokens, with snapshots after so many of them."""
    got = radix._allocator.allocate(len(tokens))
    assert got is not None
    pin = radix.insert(tokens, radix._allocator.slots_of(got), len(tokens)).pin
    for mark in marks:
        assert radix.mark(tokens, mark, None) is not None
    radix.release(pin)


@given(st.lists(st.integers(0, 1), min_size=1, max_size=12), st.sets(st.integers(1, 12)), st.integers(0, 12))
def test_a_prompt_is_reused_up_to_the_last_snapshot_that_it_shares(
    tokens: list[int], marks: set[int], cut: int
) -> None:
    radix = tree()
    insert(radix, tokens, *(m for m in marks if m <= len(tokens)))
    other = tokens[:cut] + [7] * 3
    want = max((m for m in marks if m <= min(cut, len(tokens))), default=0)
    assert radix.peek(other) == want
    assert radix.known(other) == min(cut, len(tokens))
    found = radix.match(other)
    assert (len(found.slots), found.pin.end, bool(found.snapshot)) == (want, want, want > 0)


def test_a_snapshot_goes_with_the_last_page_before_it() -> None:
    radix = tree()
    insert(radix, [1, 2, 3, 4, 5], 2, 5)
    assert len(radix.snapshots) == 2
    radix.evict(1)
    assert (len(radix.snapshots), radix.peek([1, 2, 3, 4, 5])) == (1, 2)
    radix.flush()
    assert len(radix.snapshots) == 0


def test_a_snapshot_does_not_move_when_its_prompt_grows() -> None:
    radix = tree()
    got = radix._allocator.allocate(4)
    assert got is not None
    slots = radix._allocator.slots_of(got)
    pin = radix.insert([1, 2, 3, 4], slots, 2).pin
    assert radix.mark([1, 2], 2, pin) is not None
    pin = radix.insert([1, 2, 3, 4], slots, 4, pin).pin
    assert pin.end == 4
    assert (radix.peek([1, 2, 3, 4]), radix.known([1, 2, 3, 4])) == (2, 4)


@pytest.mark.parametrize("states", [None, 50])
def test_a_miss_says_why(states: int | None) -> None:
    loop = Loop(num_pages=60, states=states)

    def ask(tokens: list[int]) -> Request:
        request = loop.add(tokens, endless(2))
        loop.run()
        return request

    head = [1, 2, 3, 4, 5, 6]
    assert ask(head).miss == CacheMiss("cold")
    assert ask([*ask([*head, 7, 7]).tokens, 9]).miss is None, "a chat goes on"
    assert ask([9, 9, 9]).miss == CacheMiss("diverged", 0)
    parted = ask([1, 2, 3, 9, 9]).miss
    assert parted == CacheMiss("no_snapshot" if states else "diverged", 3)
    assert ask([1, 2, 3, 8, 8]).miss == CacheMiss("diverged", 3)
    ask([15] * 59)  # takes all pages
    assert ask([1, 2, 3, 8, 8]).miss == CacheMiss("evicted", 0)


def test_a_chat_computes_only_what_is_new_and_the_same_prompt_its_last_token() -> None:
    loop = Loop(num_pages=800, chunk=64, states=50)
    history: list[int] = [1] * 70
    for turn in range(6):
        request = loop.add(history, endless(8))
        loop.run()
        if turn:
            assert request.num_cached == len(history) - 6
        history = [*request.tokens, *([turn] * 5)]
    cached = []
    for _ in range(3):
        request = loop.add(history, endless(8))
        loop.run()
        cached.append(request.num_cached)
    assert cached[1:] == [len(history) - 6, len(history) - 1] or cached[2] == len(history) - 1


def test_a_third_prompt_of_one_beginning_starts_where_the_first_two_parted() -> None:
    loop = Loop(num_pages=800, chunk=64, states=50)
    trunk, cached = [2] * 40, []
    for i in range(3):
        request = loop.add([*trunk, 3 + i, 9, 9], endless(2))
        loop.run()
        cached.append(request.num_cached)
    assert cached == [0, 0, 40]


@pytest.mark.parametrize(("common", "cut"), [(LEAST_CUT - 1, False), (LEAST_CUT, True)])
def test_a_chunk_is_not_cut_for_a_few_words_in_common(common: int, cut: bool) -> None:
    loop = Loop(num_pages=800, chunk=64, states=50, least_cut=LEAST_CUT)
    for i in range(3):
        request = loop.add([*[2] * common, *[3 + i] * 20], endless(2))
        loop.run()
    assert [w.end for b in loop.batches for w in b.works if w.start == 0] == (
        [common + 20, common] if cut else [common + 20] * 3
    )
    assert request.num_cached == (common if cut else 0)


def test_without_room_for_snapshots_nothing_is_reused_and_nothing_cut() -> None:
    loop = Loop(num_pages=800, chunk=64, states=0)
    for _ in range(3):
        request = loop.add([4] * 30, endless(2))
        loop.run()
        assert request.num_cached == 0
    assert [w.end for b in loop.batches for w in b.works if w.start == 0] == [30] * 3
