"""Figures from recorded times: the arithmetic, as properties."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pippin.bench.serving_api import Answer
from pippin.bench.serving_figures import figures, gaps, is_good, latency, tokens_of, tpot, ttft
from pippin.bench.serving_load import arrivals

times = st.floats(0.0, 100.0)
steps = st.floats(0.0, 5.0)


@st.composite
def answers(draw: st.DrawFn, failed: bool | None = None) -> Answer:
    """One as a server might give it: times that grow, several tokens an event, counts or none."""
    answer = Answer(due=draw(times), warm=draw(st.booleans()))
    answer.sent = now = answer.due + draw(steps)
    fails = draw(st.booleans()) if failed is None else failed
    for _ in range(draw(st.integers(0 if fails else 1, 6))):
        now += draw(steps)
        answer.arrive(now, "x", draw(st.integers(1, 4)))
    answer.end = now + draw(steps)
    answer.prompt_tokens = draw(st.none() | st.integers(1, 50))
    answer.cached_tokens = draw(st.none() | st.integers(0, answer.prompt_tokens or 0))
    answer.output_tokens = draw(st.sampled_from([None, sum(answer.counts)]))
    if fails:
        answer.fail(draw(st.sampled_from(["HTTP 500", "timeout"])), "why")
    return answer


runs = st.lists(answers(), max_size=12)


def value(found: dict[str, Any], name: str) -> float:
    assert isinstance(found[name], int | float), name
    return float(found[name])


def test_an_answer_by_hand() -> None:
    answer = Answer(due=9.0, sent=10.0, prompt_tokens=7, output_tokens=4)
    for now, tokens in ((10.5, 1), (10.7, 2), (11.0, 1)):
        answer.arrive(now, "x", tokens)
    answer.end = 11.25
    assert (ttft(answer), latency(answer)) == (0.5, 1.25)
    assert tpot(answer) == pytest.approx(0.5 / 3)
    assert gaps(answer) == pytest.approx([0.1, 0.1, 0.3])
    found = figures([answer], 2.0, {"ttft": 0.5, "e2el": 1.25})
    assert found["output_throughput"] == 2.0
    assert found["input_throughput"] == 3.5
    assert found["concurrency"] == 0.625
    assert found["mean_start_delay_ms"] == 1000
    assert (found["good_share"], found["request_goodput"]) == (1.0, 0.5)


@given(answers(failed=False))
def test_gaps_fill_the_time_from_first_to_last_text(answer: Answer) -> None:
    found = gaps(answer)
    assert sum(found) == pytest.approx(answer.arrivals[-1] - answer.arrivals[0], abs=1e-9)
    assert len(found) == sum(answer.counts[1:])
    if (each := tpot(answer)) is not None:
        assert each * (tokens_of(answer) - 1) == pytest.approx(answer.arrivals[-1] - answer.arrivals[0])


@given(runs, st.floats(0.1, 100))
def test_rates_times_seconds_are_counts(run: list[Answer], seconds: float) -> None:
    found = figures(run, seconds, {})
    good = [a for a in run if a.error is None]
    assert found["completed"] == len(good)
    assert found["errors"] == len(run) - len(good)
    assert value(found, "request_throughput") * seconds == pytest.approx(len(good))
    assert value(found, "output_throughput") * seconds == pytest.approx(sum(map(tokens_of, good)))
    assert value(found, "concurrency") * seconds == pytest.approx(sum(map(latency, good)))
    known = bool(good) and all(a.prompt_tokens is not None for a in good)
    assert (found["total_input_tokens"] is not None) == known


@given(runs)
def test_percentiles_are_in_order_and_between_the_extremes(run: list[Answer]) -> None:
    found = figures(run, 1.0, {})
    for name in ("ttft", "e2e_latency", "itl", "tpot"):
        kinds = [found[f"{kind}_{name}_ms"] for kind in ("median", "p90", "p95", "p99", "max")]
        if None in kinds:
            assert set(kinds) == {None}
            continue
        numbers = [value(found, f"{kind}_{name}_ms") for kind in ("median", "p90", "p95", "p99", "max")]
        assert all(a <= b + 1e-9 for a, b in pairwise(numbers))
        assert value(found, f"mean_{name}_ms") <= numbers[-1] + 1e-6
    if good := [ttft(a) * 1000 for a in run if a.error is None]:
        assert value(found, "max_ttft_ms") == pytest.approx(max(good))
        assert value(found, "mean_ttft_ms") == pytest.approx(sum(good) / len(good))


@given(runs, answers(failed=True))
def test_a_failure_changes_no_latency(run: list[Answer], failure: Answer) -> None:
    before, after = figures(run, 1.0, {}), figures([*run, failure], 1.0, {})
    same = [name for name in before if "start_delay" not in name and not name.startswith("error")]
    assert {n: after[n] for n in same} == {n: before[n] for n in same}
    assert value(after, "errors") == value(before, "errors") + 1


@given(runs, st.sampled_from(["ttft", "tpot", "itl", "e2el"]), st.floats(0.001, 10), st.floats(1, 10))
def test_a_looser_bound_loses_nobody(run: list[Answer], name: str, bound: float, looser: float) -> None:
    for answer in run:
        assert is_good(answer, {name: bound * looser}) or not is_good(answer, {name: bound})
    found = figures(run, 2.0, {name: bound})
    if run:
        assert value(found, "request_goodput") * 2 == pytest.approx(value(found, "good_share") * len(run))
        assert figures(run, 2.0, {"ttft": 1e9})["good_share"] == value(found, "completed") / len(run)


@given(runs)
def test_cold_and_warm_are_all_that_was_answered(run: list[Answer]) -> None:
    found = figures(run, 1.0, {})
    assert value(found, "cold_requests") + value(found, "warm_requests") == found["completed"]
    rate = found["cache_hit_rate"]
    assert rate is None or 0 <= value(found, "cache_hit_rate") <= 1


@given(st.integers(1, 200), st.floats(0.1, 1000), st.floats(0.1, 10), st.integers())
def test_arrivals_are_seeded_and_in_order(number: int, rate: float, burstiness: float, seed: int) -> None:
    due = arrivals(number, rate, burstiness, seed)
    assert due == arrivals(number, rate, burstiness, seed)
    assert len(due) == number
    assert due[0] == 0.0
    assert due == sorted(due)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_arrivals_have_the_rate_and_the_shape(burstiness: float) -> None:
    """Gamma intervals: mean 1 / rate, squared coefficient of variation 1 / burstiness."""
    number = 20_000
    steps = [b - a for a, b in pairwise(arrivals(number, 50.0, burstiness, 7))]
    mean = sum(steps) / len(steps)
    spread = sum((s - mean) ** 2 for s in steps) / len(steps) / mean**2
    assert mean == pytest.approx(1 / 50, rel=0.05)
    assert spread == pytest.approx(1 / burstiness, rel=0.15)


def test_without_a_rate_all_are_due_at_once() -> None:
    assert arrivals(3, math.inf, 1.0, 0) == [0.0, 0.0, 0.0]
