"""Restoring or computing a prefix: what is faster by a clock that tests turn, tried now and then, without flapping."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pippin.restore_choice import AGAIN, CREDIT, GAIN, LEAST, SHARE, TRIAL, TRIAL_READ, WORTH_TRYING, RestoreChoice
from pippin.types import Batch, Request, SamplingParams, Work

LONG = WORTH_TRYING
SHORT = LONG - 64
CHUNK = 2048


class Engine:
    """What computes and restores at given paces, seconds a token; ``clock`` is its time.

    A step takes ``step`` seconds besides, and the first one of each number of tokens ``first`` more. ``tail`` tokens
    of each prompt are not on disk. ``lost`` is what requests waited longer than by restoring.
    """

    def __init__(
        self, computes: float, restores: float, always: bool = False, step: float = 0, first: float = 0, tail: int = 0
    ) -> None:
        self.now, self.computes, self.restores, self.each, self.first, self.tail = (
            0.0,
            computes,
            restores,
            step,
            first,
            tail,
        )
        self.lost, self.worst, self.known = 0.0, 0.0, set[int]()
        self.choice = RestoreChoice(always, lambda: self.now, CHUNK)

    def step(self, start: int, end: int, decodes: int = 0, traces: int = 0) -> None:
        request = Request("r", [0] * (end + 1), end, SamplingParams())
        works = [Work(request, end, end + 1, samples=True)] * decodes
        batch = Batch((*works, Work(request, start, end, samples=True)))
        self.choice.launched(batch)
        self.now += self.each + (end - start) * self.computes + (self.first if end - start not in self.known else 0)
        self.known.add(end - start)
        self.choice.finished(batch, traces)

    def ask(self, length: int, begin: int = 0) -> int:
        """A request whose prefix is on disk: how many tokens were restored; the rest is computed."""
        began, whole = self.now, begin + length + self.tail
        end = self.choice.end(begin, begin + length)
        self.now += (end - begin) * self.restores
        self.choice.restored(end - begin, (end - begin) * self.restores)
        for start in range(end, whole, CHUNK):
            self.step(start, min(start + CHUNK, whole))
        plain = length * self.restores + (self.each + self.tail * self.computes if self.tail else 0)
        self.lost += self.now - began - plain
        self.worst = max(self.worst, self.now - began - plain)
        return end - begin


@pytest.mark.parametrize("first", [0.0, 0.08])
def test_a_gpu_ends_up_computing(first: float) -> None:
    """As an H200 with an 8B: 29 000 tokens a second from disk; 10 ms a step and 26 us a token; kernels that load."""
    engine = Engine(computes=26e-6, restores=1 / 29000, step=0.01, first=first, tail=64)
    seen = [engine.ask(4032) for _ in range(100)]
    few = 4 if not first else 10
    assert set(seen[few:]) == {0, TRIAL_READ}, seen[:20]
    assert seen.count(TRIAL_READ) == (100 - seen.index(0)) // AGAIN
    assert engine.worst < 0.25 + first
    assert engine.choice.rates() == pytest.approx((29000, CHUNK / (0.01 + CHUNK * 26e-6)), rel=0.01)


@pytest.mark.parametrize("tail", [0, 40, 400])
def test_trials_on_a_cpu_cost_little(tail: int) -> None:
    """100 tokens a second; the least step is half a second, which is spent once, or never where tails tell."""
    engine = Engine(computes=0.01, restores=1e-4, tail=tail)
    engine.ask(LONG)
    seen = [engine.ask(4 * LONG) for _ in range(10 * AGAIN)]
    assert min(seen) >= 4 * LONG - TRIAL
    assert engine.worst <= TRIAL * engine.computes
    assert engine.lost <= (0 if tail else TRIAL * engine.computes) + 1e-6


@given(
    st.floats(1e-5, 1e-2),
    st.floats(1e-5, 1e-3),
    st.floats(0, 0.02),
    st.sampled_from([0, 20, 64, 900]),
    st.integers(1, 9),
)
def test_trials_never_cost_more_than_their_credit(
    computes: float, restores: float, step: float, tail: int, length: int
) -> None:
    """Whatever the machine: the first, of which nothing is known, what there is at first, and a share after that."""
    engine, lost, trials = Engine(computes, restores, step=step, tail=tail), 0.0, 0
    for _ in range(5 * AGAIN):
        before = engine.lost
        if engine.ask(length * 1024) not in (0, TRIAL_READ, length * 1024):
            lost, trials = lost + engine.lost - before, trials + 1
    blind, read = step + TRIAL * computes, 5 * AGAIN * length * 1024 * restores
    assert lost <= blind + CREDIT + SHARE * read + trials * step


def test_the_largest_steps_tell_what_prefixes_take() -> None:
    """Prompts that nobody has on disk are computed anyway."""
    engine = Engine(computes=26e-6, restores=1 / 29000, step=0.01)
    for _ in range(2):
        engine.step(0, 64)
        engine.step(0, CHUNK)
    engine.choice.restored(4096, 4096 / 29000)
    assert engine.choice.end(0, 4096) == 0
    assert engine.choice.end(0, 64) == 64, "a step of its own takes longer"


def test_all_is_restored_where_computing_is_slow() -> None:
    """But for a trial's tokens now and then, without which nobody would know."""
    engine = Engine(computes=1e-3, restores=1e-5)
    seen = [engine.ask(LONG) for _ in range(3 * AGAIN)]
    assert seen[0] == LONG
    assert 3 <= sum(n < LONG for n in seen) <= 7
    assert min(seen) >= LONG - 4 * TRIAL
    for _ in range(20 * AGAIN):
        engine.ask(LONG)
    assert engine.choice.computed_prefixes == 0
    assert engine.lost <= CREDIT + SHARE * engine.now + TRIAL * engine.computes


def test_trials_that_say_nothing_are_rare() -> None:
    """As where decodes are most of the steps."""
    choice = RestoreChoice()
    choice.restored(LONG, 1.0)
    asked = [choice.end(0, LONG) for _ in range(3 * AGAIN)]
    assert asked.count(LONG - TRIAL) == 3
    assert set(asked) == {LONG, LONG - TRIAL}


def test_short_prefixes_are_not_tried_on() -> None:
    engine = Engine(computes=1e-3, restores=1e-5)
    assert {engine.ask(SHORT) for _ in range(3 * AGAIN)} == {SHORT}


def test_all_is_computed_where_reading_is_slow() -> None:
    engine = Engine(computes=1e-5, restores=1e-4)
    seen = [engine.ask(LONG) for _ in range(3 * AGAIN)]
    assert seen[:2] == [LONG, LONG - TRIAL], "each is seen once"
    assert set(seen[2:]) == {0, TRIAL_READ}
    assert seen.count(TRIAL_READ) == 2
    assert engine.choice.computed_prefixes == 3 * AGAIN - 2
    assert engine.choice.computed_tokens == sum(LONG - n for n in seen[2:])
    assert engine.choice.rates() == pytest.approx((1e4, 1e5))


@pytest.mark.parametrize(("before", "after"), [(1e-5, 1e-3), (1e-3, 1e-5)])
def test_it_follows_what_changes(before: float, after: float) -> None:
    """Another program takes the GPU, or leaves it; a disk gets slow: the other way is still tried."""
    engine = Engine(computes=before, restores=1e-4)
    for _ in range(AGAIN):
        engine.ask(LONG)
    engine.computes = after
    for _ in range(6 * AGAIN):
        engine.ask(LONG)
    assert sum((engine.ask(LONG) == 0) == (after < 1e-4) for _ in range(4)) >= 3, "one of them may be a trial"


@given(st.lists(st.floats(1 / GAIN + 0.01, GAIN - 0.01), min_size=10, max_size=60), st.booleans())
def test_times_that_are_alike_change_nothing(noise: list[float], computes: bool) -> None:
    engine = Engine(computes=1e-4, restores=1e-3 if computes else 1e-5)
    for _ in range(10):
        engine.ask(SHORT)
        engine.step(0, 2048)
    chosen = engine.choice.computed_prefixes
    for factor in noise:  # now both take as long, more or less
        engine.restores = 1e-4 * factor
        engine.choice.restored(LONG, LONG * engine.restores)
        engine.step(0, 2048)
        engine.choice.end(0, SHORT)
    if computes:  # the medians move to what is alike now, and stay where they were
        assert engine.choice.computed_prefixes == chosen + len(noise)
    else:
        assert engine.choice.computed_prefixes == chosen == 0


def test_a_long_context_is_computed_slower() -> None:
    """So short prefixes are computed and long ones are read, and neither has a say in the other."""
    engine = Engine(computes=1e-5, restores=1e-4)
    for start in range(0, 65536, 2048):
        engine.computes = 1e-5 * (1 + start / 1024)
        engine.step(start, start + 2048)
    engine.choice.restored(4096, 4096 * engine.restores)
    assert engine.choice.end(0, 4096) == 0
    assert engine.choice.end(0, 65536) == 65536
    assert engine.choice.end(0, 4096) == 0
    assert engine.choice.end(61440, 65536) == 65536, "what goes on behind a long prefix is long"


def test_a_step_that_was_compiled_says_nothing() -> None:
    engine = Engine(computes=1e-5, restores=1e-4)
    engine.step(0, CHUNK, traces=1)
    assert engine.choice.rates() == (0.0, 0.0)


def test_a_large_step_that_was_spoilt_is_forgotten_where_a_smaller_one_was_not() -> None:
    engine = Engine(computes=1e-2, restores=1e-4)
    engine.step(0, CHUNK)
    engine.computes = 1e-5
    engine.step(CHUNK, CHUNK + 512)
    assert engine.choice.rates()[1] == pytest.approx(1e5)


def test_one_step_that_was_spoilt_says_nothing() -> None:
    engine = Engine(computes=1e-5, restores=1e-4)
    engine.choice.restored(4096, 4096 * engine.restores)
    engine.now += 30.0
    engine.computes = 1e-2
    engine.step(0, 2048)
    engine.computes = 1e-5
    engine.step(0, 2048)
    assert engine.choice.end(0, 4096) == 0


def test_a_step_lasts_from_its_launch_or_from_the_end_of_the_one_before() -> None:
    engine = Engine(computes=0.0, restores=1.0)
    request = Request("r", [0] * 3000, 3000, SamplingParams())
    first, second = (Batch((Work(request, i, i + 1000, samples=False),)) for i in (0, 1000))
    engine.now = 100.0
    engine.choice.launched(first)
    engine.now = 101.0
    engine.choice.launched(second)  # behind the first
    engine.now = 104.0
    engine.choice.finished(first)
    engine.now = 106.0
    engine.choice.finished(second)
    assert engine.choice.rates()[1] == pytest.approx(1000 / 4)
    nearest = [engine.choice._computing.nearest(1000, middle.bit_length()) for middle in (500, 1500)]
    assert [found and found[1].seconds for found in nearest] == [pytest.approx(0.004), pytest.approx(0.002)]


def test_steps_of_few_prompt_tokens_say_nothing() -> None:
    engine = Engine(computes=1.0, restores=1.0)
    engine.step(0, LEAST - 1)
    engine.step(0, LEAST, decodes=LEAST + 1)
    assert engine.choice.rates() == (0.0, 0.0)
    engine.step(0, LEAST, decodes=LEAST - 1)
    assert engine.choice.rates()[1] > 0


def test_always_is_always() -> None:
    engine = Engine(computes=1e-6, restores=1.0, always=True)
    assert {engine.ask(LONG) for _ in range(3 * AGAIN)} == {LONG}
    assert engine.choice.computed_prefixes == 0
