"""Restoring or computing a prefix: what is faster by a clock that tests turn, tried now and then, without flapping."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pippin.restore_choice import AGAIN, GAIN, TRIAL, TRIAL_READ, WORTH_TRYING, RestoreChoice
from pippin.types import Batch, Request, SamplingParams, Work

LONG = WORTH_TRYING * TRIAL
SHORT = LONG - 64


class Engine:
    """What computes and restores at given paces, seconds a token; ``clock`` is its time."""

    def __init__(self, computes: float, restores: float, always: bool = False) -> None:
        self.now, self.computes, self.restores = 0.0, computes, restores
        self.choice = RestoreChoice(always, lambda: self.now)

    def step(self, start: int, end: int, decodes: int = 0) -> None:
        request = Request("r", [0] * (end + 1), end, SamplingParams())
        works = [Work(request, end, end + 1, samples=True)] * decodes
        batch = Batch((*works, Work(request, start, end, samples=True)))
        self.choice.launched(batch)
        self.now += (end - start) * self.computes
        self.choice.finished(batch)

    def ask(self, length: int, begin: int = 0) -> int:
        """A request whose prefix is on disk: how many tokens were restored; the rest is computed."""
        end = self.choice.end(begin, begin + length)
        self.now += (end - begin) * self.restores
        self.choice.restored(end - begin, (end - begin) * self.restores)
        for start in range(end, begin + length, 2048):
            self.step(start, min(start + 2048, begin + length))
        return end - begin


def test_all_is_restored_where_computing_is_slow() -> None:
    """But for a trial's tokens now and then, without which nobody would know."""
    engine = Engine(computes=1e-3, restores=1e-5)
    seen = [engine.ask(LONG) for _ in range(3 * AGAIN)]
    assert seen[0] == LONG
    assert {LONG, LONG - TRIAL} == set(seen)
    assert seen.count(LONG - TRIAL) == 3
    assert engine.choice.computed_prefixes == 0


def test_trials_that_say_nothing_are_as_rare() -> None:
    """As where steps are shorter than a trial."""
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


def test_one_step_that_was_compiled_first_says_nothing() -> None:
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
    assert [pace.seconds for pace in engine.choice._computing.values()] == [pytest.approx(0.004), pytest.approx(0.002)]


def test_steps_of_few_prompt_tokens_say_nothing() -> None:
    engine = Engine(computes=1.0, restores=1.0)
    engine.step(0, TRIAL - 1)
    engine.step(0, TRIAL, decodes=TRIAL + 1)
    assert engine.choice.rates() == (0.0, 0.0)
    engine.step(0, TRIAL, decodes=TRIAL - 1)
    assert engine.choice.rates()[1] > 0


def test_always_is_always() -> None:
    engine = Engine(computes=1e-6, restores=1.0, always=True)
    assert {engine.ask(LONG) for _ in range(3 * AGAIN)} == {LONG}
    assert engine.choice.computed_prefixes == 0
