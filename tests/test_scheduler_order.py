"""Who goes next: priority, policy, and how a step's budget is shared."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pippin.types import Request
from tests.fake_device import VOCAB, Loop, endless


def test_priority_then_arrival() -> None:
    loop = Loop(max_running=1)
    requests = [loop.add([i], endless(2), priority=p) for i, p in enumerate([0, 1, 0, 2, 1])]
    order: list[Request] = []
    while loop.scheduler.has_work:
        loop.step()
        order += [r for r in requests if r.row > 0 and r not in order]
    assert order == [requests[i] for i in (3, 1, 4, 0, 2)]


def test_longest_prefix_first_unless_fcfs() -> None:
    for policy, want in (("lpm", [2, 0, 1]), ("fcfs", [0, 1, 2])):
        loop = Loop(max_running=1, policy=policy)
        loop.add([7] * 10)
        loop.run()
        requests = [loop.add(tokens, endless(2)) for tokens in ([6] * 8, [5] * 8, [7] * 8)]
        order: list[int] = []
        while loop.scheduler.has_work:
            loop.step()
            order += [i for i, r in enumerate(requests) if r.row > 0 and i not in order]
        assert order == want


def test_a_retracted_request_goes_before_older_ones_that_it_overtook() -> None:
    loop = Loop(num_pages=80, max_running=2, policy="lpm")
    loop.add([7] * 10)
    loop.run()
    loop.add([1] * 10, endless(60))
    loop.step()
    overtaken, lucky = loop.add([5] * 8), loop.add([7] * 9, endless(60))
    while not lucky.retractions:
        loop.step()
        assert overtaken.row < 0
    assert loop.scheduler.runs.waiting == [lucky, overtaken]
    loop.run()


def test_longest_prefix_first_starves_no_one() -> None:
    loop = Loop(max_running=1, policy="lpm", num_pages=200)
    loop.add([7] * 10)
    loop.run()
    unlucky = [loop.add([i] * 8, endless(2)) for i in range(3)]
    for _ in range(100):
        loop.add([7] * 10, endless(2))
        loop.step()
    assert all(r.finish for r in unlucky)


@given(chunk=st.sampled_from([2, 3, 16, 64]), seed=st.integers(0, 2**32), overlap=st.booleans())
def test_a_stream_of_short_prompts_and_a_long_one_share_the_budget(chunk: int, seed: int, overlap: bool) -> None:
    """The long prompt gets half a budget every step; each short one starts within two steps."""
    rng = Random(seed)
    loop = Loop(num_pages=4000, chunk=chunk, max_running=30, overlap=overlap)
    long = loop.add([rng.randrange(VOCAB) for _ in range(20 * chunk)], endless(4))
    loop.step()
    came: dict[Request, int] = {}
    started: dict[Request, int] = {}
    for step in range(60):
        if step < 40:
            short = loop.add([rng.randrange(VOCAB) for _ in range(rng.randrange(1, chunk // 2 + 1))], endless(3))
            came[short] = step
        before = long.computed
        loop.step()
        if long.finish is None and before < 20 * chunk:
            assert long.computed - before >= min((chunk + 1) // 2, 20 * chunk - before)
        started.update({r: step for r in came if r not in started and (r.computed or r.finish)})
    assert all(started[r] - came[r] <= 1 for r in came)
    loop.run()


def test_a_short_prompt_behind_a_very_long_one_starts_at_once() -> None:
    loop = Loop(num_pages=40_000, chunk=2048, context_length=40_000)
    loop.add([1] * 32_000)
    loop.step()
    short = loop.add([2] * 100, endless(2))
    loop.step()
    assert short.length == 101
    work = loop.batches[-1].works[0]
    assert (work.request.num_prompt, work.end - work.start) == (32_000, 2048 - 100)  # and nothing was left over


def test_budget_that_newcomers_leave_goes_back() -> None:
    loop = Loop(num_pages=1000, chunk=100, max_running=3)
    loop.add([1] * 500)
    loop.step()
    loop.add([2] * 10)
    loop.step()
    assert loop.batches[-1].num_tokens == 100


def test_a_newcomer_is_not_cut_short_where_it_would_then_wait_behind_a_long_prompt() -> None:
    loop = Loop(num_pages=4000, chunk=100, max_running=30)
    long = loop.add([1] * 2000)
    shorts = []
    for i in range(10):
        loop.step()
        shorts.append(loop.add([2 + i] * 30, endless(2)))
        shorts.append(loop.add([20 + i] * 30, endless(2)))
    loop.run()
    works = [w for batch in loop.batches for w in batch.works if w.request is not long and w.start == 0]
    assert len(works) == len(shorts)
    assert all(w.end == 30 for w in works)


@pytest.mark.parametrize("policy", ["fcfs", "lpm"])
def test_a_prompt_that_needs_much_room_is_not_passed_over_for_ever(policy: str) -> None:
    loop = Loop(num_pages=101, max_running=4, policy=policy)
    for _ in range(2):
        loop.add([7] * 10, endless(20))
    loop.step()
    large = loop.add([5] * 80, endless(20))
    for step in range(200):
        if step % 10 == 0:
            loop.add([7] * 10, endless(20))
        loop.step()
    assert large.finish is not None
