"""The canary: silent over any traffic, and loud within 100 requests of a planted bug. ``make soak`` sends 100 000."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from pippin.cache.canary import KVCanary
from pippin.cache.radix import Match
from pippin.cache.windows import WindowPages
from pippin.config import EngineConfig
from pippin.core import EngineCore
from pippin.loading import load_core
from pippin.messages import Output, Submit
from pippin.types import Batch, Finish, Request, SamplingParams, Work
from tests.checkpoints import make_checkpoint
from tests.fake_device import VOCAB, Loop, endless

SOAK = bool(os.environ.get("PIPPIN_SOAK"))
REQUESTS = 100_000 if SOAK else 1500
CAUGHT_WITHIN = 100


def fuzzed(rng: Random, watched: bool = True) -> Loop:
    """A loop with a pool of a few requests' need, so that prefixes are evicted and requests retracted all the time."""
    page = rng.choice([1, 1, 2, 4])
    num_pages = 1 + rng.choice([40, 60, 120]) // page
    return Loop(
        page=page,
        num_pages=num_pages,
        chunk=rng.choice([4, 16, 64]),
        max_running=rng.choice([2, 4, 8]),
        policy=rng.choice(["fcfs", "lpm"]),
        overlap=rng.random() < 0.8,
        forcing=Random(rng.random()) if rng.random() < 0.3 else None,
        states=rng.choice([None, None, None, 4]),
        window=rng.choice([None, (3, 12), (9, 30 // page), (20, 60 // page)]),
        sings=True,
        watched=watched,
    )


def send(loop: Loop, rng: Random, sent: list[Request]) -> None:
    """A prompt that goes on from, repeats or leaves an earlier one; some requests are aborted."""
    earlier = rng.choice(sent[-40:]).tokens if sent else []
    tokens = earlier[: rng.randrange(len(earlier) + 1)] if rng.random() < 0.8 else []
    tokens = [*tokens, *(rng.randrange(VOCAB) for _ in range(rng.randrange(1, 12)))][:30]
    sent.append(
        loop.add(tokens, SamplingParams(max_new_tokens=rng.choice([1, 2, 5, 9, 40]), ignore_eos=rng.random() < 0.5))
    )
    if rng.random() < 0.1:
        loop.abort(rng.choice(sent[-10:]))


@pytest.mark.timeout(7200)
def test_no_request_ever_reads_anothers_slots() -> None:
    """Random overlap of prefixes, aborts, evictions, retractions and failed steps, in pools of many sizes."""
    rng, total, retractions = Random(1), 0, 0
    while total < REQUESTS:
        loop, sent = fuzzed(rng), list[Request]()
        for _ in range(min(500, REQUESTS - total)):
            send(loop, rng, sent)
            for _ in range(rng.choice([0, 1, 2, 4])):
                loop.step(rng.choice(["launch", "read"]) if rng.random() < 0.002 else "")
        loop.run(100_000)
        assert loop.canary is not None
        assert loop.canary.num_mismatches == 0
        total += len(sent)
        retractions += loop.scheduler.stats().retractions
    assert retractions > total / 100


def hands_out_twice(loop: Loop, every: int) -> None:
    """The allocator gives a page away that somebody has."""
    allocate, calls, last = loop.allocator.allocate, 0, [1]

    def wrong(n: int) -> list[int] | None:
        nonlocal calls, last
        calls += 1
        pages = allocate(n)
        if pages and calls % every == 0:
            loop.allocator.free(pages[-1:])
            pages[-1] = last[0]
        last = pages or last
        return pages

    loop.allocator.allocate = wrong  # type: ignore[method-assign]


def finds_others(loop: Loop, every: int) -> None:
    """The tree gives the slots of a prefix in another order."""
    match, calls = loop.radix.match, 0

    def wrong(tokens: Sequence[int], end: int | None = None, pin: object | None = None) -> Match:
        nonlocal calls
        found = match(tokens, end, pin)
        calls += bool(len(found.slots) > 1)
        if len(found.slots) > 1 and calls % every == 0:
            return Match(array("i", reversed(found.slots)), found.pin, found.snapshot)
        return found

    loop.radix.match = wrong  # type: ignore[method-assign]


def frees_early(loop: Loop, every: int) -> None:
    """Pages that a running request shares are evicted: a release too many."""
    release, calls = loop.radix.release, 0

    def wrong(pin: object | None) -> None:
        nonlocal calls
        calls += 1
        release(pin)
        others = [r for r in loop.scheduler.runs.running if r.pin is not None and len(r.slots) and r.row > 0]
        if others and calls % every == 0:
            page = others[0].slots[0] // loop.page
            loop.allocator._used[page] = 0
            loop.allocator._free.append(page)

    loop.radix.release = wrong  # type: ignore[method-assign]


def computes_too_little(loop: Loop, every: int) -> None:
    """A request skips a token that nobody computed."""
    reuse, calls = loop.scheduler.holdings._reuse, 0

    def wrong(request: Request, found: Match) -> None:
        nonlocal calls
        calls += 1
        reuse(request, found)
        if calls % every == 0 and request.computed + 1 < len(request.tokens):
            request.slots.extend(loop.allocator.slots_of(loop.allocator.allocate(1) or ()))
            request.computed += 1

    loop.scheduler.holdings._reuse = wrong  # type: ignore[method-assign]


def forgets_a_window(loop: Loop, every: int) -> None:
    """A prefix is reused whose last window is somebody else's now."""
    windows, calls = windows_of(loop), 0
    ends = windows.ends

    def wrong(slots: array[int], begin: int) -> Any:
        nonlocal calls
        calls += 1
        found = ends(slots, begin)
        table = windows.table.pages
        if calls % every == 0:
            for slot in slots:
                table[slot] = table[slot] or 1 + slot % windows.num_pages
            return np.ones_like(found)
        return found

    windows.ends = wrong  # type: ignore[method-assign]


def shares_a_window(loop: Loop, every: int) -> None:
    """A new page gets slots that somebody's window reaches."""
    windows, calls = windows_of(loop), 0
    attach = windows.attach

    def wrong(pages: Sequence[int]) -> None:
        nonlocal calls
        attach(pages)
        calls += 1
        others = [r for r in loop.scheduler.runs.running if r.computed > 2 and r.row > 0]
        if others and pages and calls % every == 0:
            windows.table.pages[pages[-1]] = windows.table.pages[others[0].slots[others[0].computed - 1]]

    windows.attach = wrong  # type: ignore[method-assign]


def windows_of(loop: Loop) -> WindowPages:
    assert loop.windows is not None
    return loop.windows


PLANTS = [hands_out_twice, finds_others, frees_early, computes_too_little, forgets_a_window, shares_a_window]


@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.parametrize("seed", range(20 if SOAK else 5))
def test_a_slot_bug_is_caught_within_100_requests(plant: Callable[[Loop, int], None], seed: int) -> None:
    rng = Random(seed)
    shape: dict[str, Any] = {"num_pages": 60, "chunk": 16, "max_running": 4}
    if plant in (forgets_a_window, shares_a_window):
        shape |= {"window": (6, 20)}
    loop, sent = Loop(**shape, sings=True, watched=False), list[Request]()
    plant(loop, 3)
    assert loop.canary is not None
    while not loop.canary.num_mismatches and len(sent) < CAUGHT_WITHIN:
        send(loop, rng, sent)
        loop.step()
        loop.step()
    assert loop.canary.num_mismatches
    stopped = [r for r in sent if r.finish is not None and r.finish.reason == "error"]
    assert 1 <= len(stopped) <= loop.canary.num_mismatches
    assert all(r.finish and f"request {r.id}" in r.finish.message for r in stopped)


def test_a_mismatch_says_which_slot_and_who_wrote_there() -> None:
    canary = KVCanary(8)
    a, b = (Request(name, [5, 6, 7], 3, endless()) for name in "ab")
    a.slots, b.slots = array("i", [1, 2, 3]), array("i", [4, 2, 5])
    assert canary.check(Batch((Work(a, 0, 3, True),))) == []
    (found,) = canary.check(Batch((Work(b, 2, 3, True),)))
    assert (found.request, found.position, found.slot, found.writer) == (b, 0, 4, None)
    assert str(found) == "slot 4 is to hold token 0 of request b, and holds nothing"
    b.slots = array("i", [1, 3, 5])
    (found,) = canary.check(Batch((Work(b, 2, 3, True),)))
    assert str(found) == "slot 3 is to hold token 1 of request b, and holds token 2 of request a"


def test_an_unseen_token_is_known_once_it_is_seen() -> None:
    canary = KVCanary(8)
    a = Request("a", [5], 1, endless())
    a.slots = array("i", [1, 2, 3])
    assert canary.check(Batch((Work(a, 0, 1, True),))) == []
    assert canary.check(Batch((Work(a, 1, 2, True),))) == []  # token 1 is on the device alone
    a.tokens += [6, 7]
    assert canary.check(Batch((Work(a, 2, 3, True),))) == []
    b = Request("b", [5, 8, 7], 3, endless())
    b.slots = array("i", [1, 2, 4])
    (found,) = canary.check(Batch((Work(b, 2, 3, True),)))
    assert (found.position, found.writer) == (1, ("a", 1))


# --- on a real model ---

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("model")
    return make_checkpoint(path, "qwen3", head_dim=16, num_hidden_layers=2)


def answers(core: EngineCore, rows: Sequence[Sequence[int]], spoil: Callable[[], None] | None = None) -> list[Output]:
    """Each request's outputs in one, in order; ``spoil`` is called before each step."""
    found = {f"r{i}": Output(f"r{i}") for i in range(len(rows))}
    for i, row in enumerate(rows):
        core.add(Submit(f"r{i}", list(row), len(row), GREEDY))
    for _ in range(2000):
        if not core.has_work:
            return list(found.values())
        if spoil is not None:
            spoil()
        step = core.step()
        for output in step.outputs if step else ():
            before = found[output.id]
            found[output.id] = Output(output.id, before.tokens + output.tokens, finish=output.finish)
    raise AssertionError("the engine never came to rest")


@pytest.mark.parametrize("overlap", [True, False])
def test_the_request_stops_and_the_server_goes_on(checkpoint: Path, overlap: bool) -> None:
    """One slot of one request is wrong: it ends with a report, all others get their tokens, and so does the next."""
    config = EngineConfig(
        model_path=str(checkpoint), max_total_tokens=600, kv_canary="raise", disable_overlap_schedule=not overlap
    )
    core, rng = load_core(config), Random(3)
    rows = [[rng.randrange(3, 280) for _ in range(rng.randrange(4, 40))] for _ in range(6)]
    expected = [a.tokens for a in answers(core, rows)]
    core.flush()
    turns = 0

    def spoil() -> None:
        nonlocal turns
        turns += 1
        victim = next((r for r in core._scheduler.runs.running if r.id == "r2"), None)
        if turns == 6 and victim is not None:
            other = next(r for r in core._scheduler.runs.running if r.id == "r4")
            victim.slots[1] = other.slots[1]

    found = answers(core, rows, spoil)
    assert [a.id for a in found if a.finish and a.finish.reason == "error"] == ["r2"]
    assert "slot" in (found[2].finish or Finish("stop")).message
    assert [a.tokens for i, a in enumerate(found) if i != 2] == [e for i, e in enumerate(expected) if i != 2]
    assert found[2].tokens == expected[2][: len(found[2].tokens)]
    assert core.stats.slots_free + core.stats.slots_cached == core.stats.slots_total
    assert core.stats.kv_canary_mismatches == 1
    assert [a.tokens for a in answers(core, rows)] == expected


def test_off_it_is_not_there(checkpoint: Path) -> None:
    core = load_core(EngineConfig(model_path=str(checkpoint), max_total_tokens=600))
    assert core._canary is None
    assert core.stats.kv_canary_mismatches == 0
