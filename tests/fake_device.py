"""A device whose K and V are fingerprints of prefixes, and a loop that drives a scheduler with it.

The "model" draws a token from a hash of the whole prefix, so that a token tells whether everything before it was
read right; the device also checks each slot that a step reads, and says which was wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt

from pippin.attention.solo import Solo
from pippin.cache.canary import KVCanary
from pippin.cache.radix import Node, RadixCache
from pippin.cache.slots import FreedPages, SlotAllocator
from pippin.cache.snapshots import NONE, Snapshots
from pippin.cache.windows import WindowPages, WindowTable, span
from pippin.scheduler import Scheduler, Update
from pippin.types import Batch, Finish, Pooling, Request, RowResult, SamplingParams, TokenLogprob, Work

VOCAB = 16
EOS = 0
_MASK = 2**61 - 1


def draw(fingerprint: int) -> int:
    """The token that follows a prefix."""
    return (fingerprint >> 7) % VOCAB


def fingerprints(tokens: Sequence[int]) -> list[int]:
    """For each token, the fingerprint of the prefix that ends with it."""
    found, last = [], 1
    for token in tokens:
        last = (last * 1_000_003 + token * 7919 + 12345) * 2_654_435_761 & _MASK
        found.append(last)
    return found


@dataclass
class Story:
    """What a request's sequence is, however long it gets."""

    tokens: list[int]
    prints: list[int] = field(default_factory=list)

    def upto(self, end: int) -> None:
        """Extends it by what the model draws."""
        if not self.prints:
            self.prints = fingerprints(self.tokens)
        while len(self.tokens) < end:
            self.tokens.append(draw(self.prints[-1]))
            self.prints.append(((self.prints[-1] * 1_000_003 + self.tokens[-1] * 7919 + 12345) * 2_654_435_761) & _MASK)


def alone(tokens: Sequence[int], num_prompt: int, params: SamplingParams, limit: int) -> tuple[list[int], Finish]:
    """What a request must come to: generated token by token, with no scheduler, no cache and no one else."""
    story = Story(list(tokens))
    end = len(tokens)
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else {EOS})
    while end < limit:
        end += 1
        story.upto(end)
        token = story.tokens[end - 1]
        if token in stops and end - num_prompt >= params.min_new_tokens:
            return story.tokens[:end], Finish("stop", token)
    return story.tokens[:end], Finish("length")


def endless(n: int = 8, **more: Any) -> SamplingParams:
    """Params of an answer of exactly n tokens."""
    return SamplingParams(max_new_tokens=n, ignore_eos=True, **more)


def vector(positions: range) -> npt.NDArray[np.float32]:
    """What tokens at these positions give to a vector: how many they are, and the sum of their squares."""
    return np.array([len(positions), sum(p * p for p in positions)], np.float32)


class StepFailed(Exception):
    """The device gave up on a step."""


State = tuple[int, int]  # how many tokens it has seen, and their fingerprint
_SOLO = Solo("solo", padded=False)


class FakeDevice:
    """Slots and ``last_token`` rows. A step runs when it is queued, but is read when the loop chooses.

    It keeps nothing of a Request but what ``launch`` may read: what the scheduler does later is not seen.
    """

    def __init__(
        self,
        num_slots: int,
        page: int,
        states: bool = False,
        watched: bool = True,
        window: WindowTable | None = None,
    ) -> None:
        self.num_slots = num_slots
        self.window = window
        self.windowed: dict[int, int] = {}  # slots of the layers that look back only so far
        self.watched = watched
        self.page = page
        self.has_states = states
        self.states: dict[int, State] = {}  # by row
        self.snapshots: dict[int, State] = {}  # by id
        self.slots: dict[int, int] = {}
        self.last_token: dict[int, int] = {}
        self.stories: dict[int, Story] = {}

    def launch(self, batch: Batch, broken: bool = False) -> list[RowResult]:
        """Runs a step: all writes, then all reads, as each layer does. ``broken``: writes garbage and raises."""
        written = [slot for work in batch.works for slot in work.request.slots[work.start : work.end]]
        assert len(written) == len(set(written)) or not self.watched, "a slot is written twice in a step"
        assert all(self.page <= slot < self.num_slots for slot in written), "a write outside of the pool"
        if self.window is not None:
            also = self.window.slots(np.array(written, np.int32)).tolist()
            assert len(also) == len(set(also)), "a slot of windowed layers is written twice in a step"
            assert all(self.page <= slot < self.window.num_slots for slot in also), "a write outside of their pool"
        results: dict[int, RowResult] = {}
        for works in _SOLO.forwards(batch.works) if self.has_states else [batch.works]:
            for work in works:
                self._write(work, broken)
                if self.has_states and not broken:
                    self._advance(work)
            if not broken:
                results |= {id(work): self._read(work) for work in works}
        if broken:
            raise StepFailed
        return [results[id(work)] for work in batch.works]

    def keep(self, row: int, id: int) -> None:
        """A ``StateKeeper``'s methods."""
        assert id not in self.snapshots
        self.snapshots[id] = self.states[row]

    def drop(self, id: int) -> None:
        self.snapshots.pop(id, None)

    def release(self, row: int) -> None:
        self.states.pop(row, None)

    def _advance(self, work: Work) -> None:
        """A state must be that of exactly the tokens before."""
        request, story = work.request, self.stories[work.request.seq]
        state = self.snapshots[work.restore] if work.restore is not None else self.states.get(request.row)
        if work.start:
            assert state == (work.start, story.prints[work.start - 1]), f"{request.id}: wrong state at {work.start}"
        else:
            assert work.restore is None
        self.states[request.row] = work.end, story.prints[work.end - 1]
        if work.save is not None:
            assert work.save not in self.snapshots
            self.snapshots[work.save] = self.states[request.row]

    def _story(self, work: Work) -> Story:
        story = self.stories.setdefault(work.request.seq, Story(list(work.request.tokens)))
        story.upto(work.end + 1)
        return story

    def _write(self, work: Work, broken: bool) -> None:
        request, story = work.request, self._story(work)
        assert request.row > 0, "a work without a row"
        inputs = request.tokens[work.start : work.end]
        if work.end > len(request.tokens):
            assert work.end == len(request.tokens) + 1, "a token that no step has drawn"
            inputs = [*inputs, self.last_token[request.row]]
        assert inputs == story.tokens[work.start : work.end], f"{request.id}: wrong input tokens"
        for position in range(work.start, work.end):
            self.slots[request.slots[position]] = -1 if broken else story.prints[position]
        for position, slot in self._windowed(work, work.start):
            self.windowed[slot] = -1 if broken else story.prints[position]

    def _windowed(self, work: Work, begin: int) -> list[tuple[int, int]]:
        """Position and slot, in windowed layers, of a work's tokens from ``begin`` on."""
        if self.window is None:
            return []
        slots = self.window.slots(np.array(work.request.slots[begin : work.end], np.int32))
        return list(enumerate(slots.tolist(), begin))

    def _read(self, work: Work) -> RowResult:
        request, story = work.request, self.stories[work.request.seq]
        for position, slot in enumerate(request.slots[: work.end] if self.watched else ()):
            assert self.slots.get(slot) == story.prints[position], f"{request.id}: slot of token {position} is wrong"
        begin = self.window.first(work.start) if self.window is not None else 0
        for position, slot in self._windowed(work, begin):
            assert self.windowed.get(slot) == story.prints[position], f"{request.id}: window slot {position} is wrong"
        result = RowResult()
        if work.samples:
            result.token = self.last_token[request.row] = story.tokens[work.end]
        if work.pools_from is not None:
            result.pooled = vector(range(work.pools_from, work.end))
        if work.logprobs_from is not None:
            last = min(work.end, request.num_prompt - 1)
            tokens = request.tokens[max(work.start + 1, work.logprobs_from) : last + 1]
            result.prompt_logprobs = [TokenLogprob(token, -1.0) for token in tokens]
        return result


class WatchedAllocator(SlotAllocator):
    """Also tells which slots were handed out since ``handed`` was last cleared."""

    def __init__(self, num_pages: int, page_size: int, told: FreedPages | None = None) -> None:
        super().__init__(num_pages, page_size, told)
        self.handed: set[int] = set()

    def allocate(self, n: int) -> list[int] | None:
        pages = super().allocate(n)
        self.handed.update(self.slots_of(pages or ()))
        return pages


@dataclass
class Loop:
    """An engine without a model: schedules, launches, and reads a step at once or one step late."""

    page: int = 1
    num_pages: int = 64
    chunk: int = 16
    max_running: int = 4
    policy: str = "fcfs"
    context_length: int = 100_000
    overlap: bool = True
    cache: bool = True
    forcing: Random | None = None  # now and then, tokens of a queued step are forced before it is read
    states: int | None = None
    """For a model with recurrent states: how many snapshots there may be."""
    least_cut: int = 1
    window: tuple[int, int] | None = None
    """For a model with windowed layers: how far they look, and pages of their pool beyond the fewest."""
    sings: bool = False
    """Whether a canary looks at every step."""
    watched: bool = True
    """Whether every slot and page is checked by us; not where the canary alone is to find what is wrong."""

    def __post_init__(self) -> None:
        self.windows = self._windows()
        self.allocator = WatchedAllocator(self.num_pages, self.page, self.windows)
        table = self.windows.table if self.windows else None
        self.canary = KVCanary(self.num_pages * self.page, table) if self.sings else None
        self.device = FakeDevice(self.num_pages * self.page, self.page, self.states is not None, self.watched, table)
        self.snapshots = NONE if self.states is None else Snapshots(self.device, self.states, self.least_cut)
        self.radix = RadixCache(self.allocator, self.cache, self.snapshots, self.windows)
        self.scheduler = Scheduler(
            self.allocator,
            self.radix,
            max_running=self.max_running,
            chunk=self.chunk,
            policy=self.policy,
            context_length=self.context_length,
        )
        self.flight: tuple[Batch, list[RowResult]] | None = None
        self.batches: list[Batch] = []
        self.forced = 0
        self.scored: dict[str, list[int]] = {}
        self.added = 0

    def _windows(self) -> WindowPages | None:
        if self.window is None:
            return None
        reach, more = self.window
        pages = 1 + span(reach, self.page) + more
        return WindowPages(WindowTable.empty(reach, pages * self.page, self.num_pages, self.page))

    def add(
        self,
        tokens: Sequence[int],
        params: SamplingParams | None = None,
        *,
        num_prompt: int | None = None,
        priority: int = 0,
        id: str | None = None,
        pooling: Pooling | None = None,
    ) -> Request:
        self.added += 1
        request = Request(
            id or f"r{self.added}",
            list(tokens),
            num_prompt or len(tokens),
            params or SamplingParams(max_new_tokens=8, ignore_eos=True),
            priority,
            eos=frozenset({EOS}),
            pooling=pooling,
        )
        self.scheduler.add(request)
        return request

    def limit(self, request: Request) -> int:
        """Tokens at which a request ends, by the rules on the box."""
        return min(request.num_prompt + request.params.max_new_tokens, self.context_length, self.allocator.capacity + 1)

    def step(self, fails: str = "", gone: Request | None = None) -> Batch | None:
        """One turn. ``gone`` is aborted between the queuing and the reading.

        ``fails``: 'launch', 'read', 'nan' where what one request reads is no number, or nothing.
        """
        alone = self.scheduler.has_suspects
        if alone and self.flight is not None:
            (read, results), self.flight = self.flight, None
            self._finish(read, spoilt(read, results) if fails == "nan" else results)
            fails = "" if fails == "nan" else fails
        overlap = self.overlap and not alone
        before = {slot for node in nodes(self.radix) for slot in node.slots}
        running = {r: r.retractions for r in self.scheduler.runs.running}
        self.allocator.handed.clear()
        batch = self.scheduler.schedule()
        check(self, launched=False)
        assert all(r.row < 0 for r, n in running.items() if r.retractions > n), "retracted and admitted in one step"
        launched = None
        if batch is not None:
            batch = self._sing(batch)
        if batch is not None:
            self._check_batch(batch, before)
            self.batches.append(batch)
            try:
                launched = batch, self.device.launch(batch, fails == "launch")
            except StepFailed:
                self._drop([batch])
                return batch
        if gone is not None:
            self.abort(gone)
        previous, self.flight = (self.flight, launched) if overlap else (launched, None)
        if not overlap and launched is not None:
            self._force(launched[0])
        if previous is not None:
            if fails == "read":
                self._drop([previous[0]])
            elif fails == "nan":
                self._finish(previous[0], spoilt(*previous))
            else:
                self._finish(*previous)
        if self.overlap and self.flight is not None:
            self._force(self.flight[0])
        moved = batch is not None or previous is not None or not self.scheduler.has_work
        assert moved or not self.watched, "nothing moves"
        return batch

    def _sing(self, batch: Batch) -> Batch | None:
        """As the engine does: what the canary has to say against a batch."""
        mismatches = self.canary.check(batch) if self.canary else []
        if not mismatches:
            return batch
        assert self.canary is not None
        self.canary.reset()
        self.scheduler.start_over(batch, {m.request: Finish("error", None, str(m)) for m in mismatches})
        assert self.allocator.num_free == self.num_pages - 1
        check(self)
        return None

    def run(self, most: int = 5000) -> None:
        """Steps until all requests have ended."""
        for _ in range(most):
            if not (self.scheduler.has_work or self.flight):
                break
            self.step()
        assert not self.scheduler.has_work, f"not done after {most} steps"
        check_idle(self)

    def abort(self, request: Request) -> None:
        live = request.finish is None
        assert self.scheduler.abort(request.id) is (request if live else None)
        if live:
            assert request.finish == Finish("abort")
            assert (request.row, len(request.slots)) == (-1, 0)
        check(self)

    def _force(self, batch: Batch) -> None:
        """Appends, for some requests, what the model would draw in this step and the next few anyway."""
        for work in batch.works:
            request = work.request
            if self.forcing is None or not work.samples or request.finish or self.forcing.random() < 0.6:
                continue
            if request.params.prompt_logprobs:  # they are still to be read
                continue
            count = self.forcing.choice([1, 1, 2, 5, 20])
            story = self.device.stories[request.seq]
            story.upto(work.end + count)
            tokens = self.scheduler.force(request, story.tokens[work.end : work.end + count], None)
            assert tokens == story.tokens[work.end : work.end + len(tokens)]
            assert len(tokens) == count or request.finish is not None
            self.forced += len(tokens)
            check(self)

    def _finish(self, batch: Batch, results: list[RowResult]) -> list[Update]:
        done = {w.request.id for w in batch.works if w.request.finish is not None}
        updates = self.scheduler.finish(batch, results)
        check(self)
        assert not done & {u.request.id for u in updates}, "an update for a request that had ended"
        for update in updates:
            self.scored.setdefault(update.request.id, []).extend(t.token for t in update.result.prompt_logprobs)
        return updates

    def _drop(self, batches: list[Batch]) -> None:
        """As the engine does: every step in flight goes, and the device starts over."""
        if self.flight is not None:
            batches, self.flight = [*batches, self.flight[0]], None
        live = {w.request for batch in batches for w in batch.works if w.request.finish is None}
        again = live & self.scheduler._suspects
        guilty = self.scheduler.drop(batches, Finish("error"))
        assert guilty is None or again == live == {guilty}, "it ran alone, and again"
        assert guilty is not None or len(live) != 1 or not again
        assert {r for r in live if r.finish is not None} == ({guilty} if guilty else set())
        assert all(r.length == len(r.tokens) for r in live)
        assert self.scheduler.stats().num_running == self.radix.num_cached == 0
        self.device.slots.clear()
        self.device.windowed.clear()
        self.device.last_token.clear()
        if self.canary:
            self.canary.reset()
        assert not self.device.states
        check(self)

    def _check_batch(self, batch: Batch, before: set[int]) -> None:
        works = batch.works
        assert works
        assert len({w.request for w in works}) == len(works)
        ones = [w.end - w.start == 1 for w in works]
        assert ones == sorted(ones, reverse=True), "decodes come first"
        assert sum(min(w.end, w.request.num_prompt) - w.start for w in works if is_prefill(w)) <= self.chunk
        for work in works:
            assert 0 <= work.start < work.end < work.request.length + (work.request.pooling is not None)
            assert not work.samples or work.request.length == work.end + 1
            assert not (work.samples and work.request.pooling)
            if work.request.params.prompt_logprobs:
                assert work.end - work.start <= 256
            if not self.watched:
                continue
            written = set(work.request.slots[work.start : work.end])
            assert not before & written - self.allocator.handed, "a step writes what the tree had"


def spoilt(batch: Batch, results: list[RowResult]) -> list[RowResult]:
    """The results, of which one that matters is not finite: that of the lowest in rank."""
    found = [i for i, w in enumerate(batch.works) if w.samples or results[i].pooled is not None]
    return [replace(r, finite=i not in found[-1:]) for i, r in enumerate(results)]


def is_prefill(work: Work) -> bool:
    """Whether a work computes prompt tokens."""
    return work.start < work.request.num_prompt


def nodes(radix: RadixCache) -> Iterator[Node]:
    """Every node of the tree but the root."""
    stack = list(radix.root.children.values())
    while stack:
        node = stack.pop()
        yield node
        stack += node.children.values()


def check(loop: Loop, launched: bool = True) -> None:
    """Each page is free, in the tree, or one running request's own; pins are those of the running requests."""
    if not loop.watched:
        return
    running, waiting = loop.scheduler.runs.running, loop.scheduler.runs.waiting
    pages = loop.allocator.pages_of
    tree = [page for node in nodes(loop.radix) for page in pages(node.slots)]
    own = [page for r in running for page in pages(r.slots[r.shared :])]
    free = list(loop.allocator._free)
    assert sorted(free + tree + own) == list(range(1, loop.num_pages)), "free + cached + own pages are all pages"
    assert loop.radix.num_cached == len(tree)
    holders: dict[Node, int] = {}
    for request in running:
        check_running(loop, request, holders)
    assert all(node.refs == holders.get(node, 0) for node in nodes(loop.radix))
    loose = [len(pages(node.slots)) for node in nodes(loop.radix) if not node.refs]
    assert loop.radix.num_evictable == sum(loose)
    rows = [r.row for r in running] + loop.scheduler.runs.rows
    assert sorted(rows) == list(range(1, loop.max_running + 1))
    for request in waiting:
        assert (request.row, request.computed, request.shared, len(request.slots)) == (-1, 0, 0, 0)
        assert request.pin is None
    stats = loop.scheduler.stats()
    assert (stats.num_running, stats.num_waiting) == (len(running), len(waiting))
    assert stats.slots_free == len(free) * loop.page
    check_snapshots(loop, launched)
    if loop.windows is not None:
        check_windows(loop, loop.windows)


def check_windows(loop: Loop, windows: WindowPages) -> None:
    """Each page of theirs is free or some pages' of the cache; held by those whose windows reach it, or may go."""
    table, holds, running = windows.table.pages, list(windows._holds), loop.scheduler.runs.running
    owners: dict[int, list[int]] = {}
    for page, mine in enumerate(table.tolist()):
        owners.setdefault(mine, []).append(page)
    free = set(loop.allocator._free)
    assert {0} | free <= set(owners.pop(0)), "free pages have no slots in windowed layers"
    assert [sorted(o) for o in windows._owners] == [owners.get(mine, []) for mine in range(len(holds))]
    assert sorted([*windows._allocator._free, *owners]) == list(range(1, windows.num_pages + 1))
    expected = [0] * len(holds)
    assert windows._spans.keys() == set(running)
    for request in running:
        pages = [int(table[page]) for page in loop.allocator.pages_of(request.slots)]
        for mine in pages[windows._spans[request].first :]:
            expected[mine] += 1
        reached = pages[windows.table.first(request.computed) // loop.page :]
        assert all(mine and holds[mine] for mine in reached), "a running request's window has no slots"
    assert holds == expected
    loose = {mine for mine in owners if not holds[mine]}
    kept = {mine for mine in loose if windows._kept[mine]}
    assert (set(windows._ends), set(windows._behind)) == (kept, loose - kept)
    assert not any(windows._kept[mine] for mine in windows._allocator._free)


def check_snapshots(loop: Loop, launched: bool) -> None:
    """The tree's snapshots are those that are kept: within the budget, each of exactly its node's tokens."""
    ids = {node.snapshot: node for node in nodes(loop.radix) if node.snapshot}
    assert len(ids) == len(loop.snapshots) <= (loop.states or 0)
    kept = loop.device.snapshots
    assert ids.keys() == kept.keys() if launched else ids.keys() >= kept.keys()
    for id, (end, print) in kept.items():
        path: list[int] = []
        node: Node | None = ids[id]
        while node is not None:
            path[:0], node = node.tokens, node.parent
        assert (end, print) == (len(path), fingerprints(path)[-1])
    running = loop.scheduler.runs.running
    held = [r.restore for r in running if r.restore is not None]
    assert sorted(held) == sorted(loop.snapshots._held.elements())
    assert loop.device.states.keys() <= {r.row for r in running}


def check_running(loop: Loop, request: Request, holders: dict[Node, int]) -> None:
    """What a running request shares is what its pin holds, token for token and slot for slot."""
    pages = loop.allocator.pages_of
    slots: list[int] = []
    tokens: list[int] = []
    node = request.pin
    while isinstance(node, Node) and node is not loop.radix.root:
        holders[node] = holders.get(node, 0) + 1
        slots[:0], tokens[:0] = node.slots, node.tokens
        node = node.parent
    assert node is loop.radix.root
    assert slots == request.slots[: request.shared].tolist()
    assert tokens == request.tokens[: request.shared]
    assert request.slots == loop.allocator.slots_of(pages(request.slots)), "whole pages, each a run of slots"
    assert request.shared <= len(request.slots)
    assert request.computed <= len(request.slots)
    assert request.finish is None
    assert 0 <= request.length - len(request.tokens) <= 2


def check_idle(loop: Loop) -> None:
    """Nothing is held when no one runs."""
    check(loop)
    assert all(node.refs == 0 for node in nodes(loop.radix))
    assert loop.allocator.num_free + loop.radix.num_cached == loop.num_pages - 1
    if loop.windows is not None:
        assert loop.windows.room == loop.windows.num_pages
