"""How bursts become steps: full ones, and nobody waits for one to fill."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.fake_device import Loop, endless, is_prefill

CHUNK, LONGEST = 256, 60

lengths = st.lists(st.integers(1, LONGEST), min_size=1, max_size=64)


def prompt(number: int, length: int) -> list[int]:
    """Of which another has no beginning."""
    return [number, *range(1, length)]


def loop_of(running: int) -> Loop:
    return Loop(num_pages=64 * (LONGEST + 40), chunk=CHUNK, max_running=running, watched=False)


@given(lengths)
def test_a_burst_takes_no_more_steps_than_its_tokens_fill(lengths: list[int]) -> None:
    """No step with prompts has room for a whole one that waits, so each but the last is full but for less than that."""
    loop = loop_of(64)
    for i, length in enumerate(lengths):
        loop.add(prompt(i, length), endless(20))
    loop.run()
    with_prompts = [batch for batch in loop.batches if any(map(is_prefill, batch.works))]
    assert len(with_prompts) <= -(-sum(lengths) // (CHUNK - LONGEST))


@given(st.lists(lengths, min_size=1, max_size=5), st.booleans())
def test_who_comes_is_in_the_next_step_that_has_room(arrivals: list[list[int]], overlap: bool) -> None:
    loop, number = loop_of(512), 0
    loop.overlap = overlap
    for some in arrivals:
        waiting = sum(len(r.tokens) - r.computed for r in loop.scheduler.runs.running if r.computed < r.num_prompt)
        waiting += sum(len(r.tokens) for r in loop.scheduler.runs.waiting)
        added = []
        for length in some:
            added.append(loop.add(prompt(number, length), endless(20)))
            number += 1
        batch = loop.step()
        assert batch is not None
        if waiting + sum(some) <= CHUNK // 2:
            assert {*added} <= {work.request for work in batch.works}
    loop.run()
