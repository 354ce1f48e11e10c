"""Sampling against its definition in float64, statistically, and as a stream that nothing around it may change."""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pippin.kernels.reference import gumbel
from pippin.penalties import TokenCounts, edit_logits, logit_edits
from pippin.sampler import (
    GREEDY_BELOW,
    Sampled,
    SamplingPlan,
    allow,
    kept_tokens,
    noise_keys,
    prompt_logprobs,
    sample,
    sampling_inputs,
    top_ids,
)
from pippin.types import Request, SamplingParams, Work
from tests import sampling_reference as reference

Floats = npt.NDArray[np.float64]


def work(params: SamplingParams, tokens: Sequence[int] = (0,), num_prompt: int = 1, unseen: int = 0) -> Work:
    """Work that draws the token after ``tokens``; the last ``unseen`` (0 or 1) of which the host has not seen."""
    seen = list(tokens[: len(tokens) - unseen])
    request = Request("r", seen, num_prompt, params, eos=frozenset({1}))
    return Work(request, len(tokens) - 1, len(tokens), True)


def draw(logits: Floats, works: Sequence[Work], vocab: int, newest: Sequence[int], partition: bool = True) -> Sampled:
    plan, inputs = sampling_inputs(works, vocab, pad_to=len(logits), partition=partition)
    padded = list(newest) + [0] * (len(logits) - len(newest))
    return sample(mx.array(logits.astype(np.float32)), plan, inputs, mx.array(padded, dtype=mx.int32))


def ints(values: mx.array | None) -> list[Any]:
    """Whole numbers, nested as the array is."""
    found: list[Any] = np.asarray(values).tolist()
    return found


# --- what one row may be ---

NICE = st.sampled_from([-math.inf, *(x / 4 for x in range(-24, 25))])  # differences are exact in float32, ties common


@st.composite
def parameters(draw: st.DrawFn, vocab: int) -> SamplingParams:
    ids = st.integers(0, vocab + 1)
    return SamplingParams(
        temperature=draw(st.sampled_from([0.0, 1e-9, 0.1, 0.7, 1.0, 3.0])),
        top_k=draw(st.sampled_from([-1, 1, 2, 3, 7, vocab, 10**9])),
        top_p=draw(st.sampled_from([1e-12, 0.03, 0.37, 0.9, 0.99999, 1.0])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.013, 0.31, 1.0])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, 0.7, -1.0])),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, 1.5])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.3, 0.5])),
        logit_bias=draw(st.dictionaries(ids, st.sampled_from([-100.0, -1.0, 0.5, 100.0]), max_size=3)),
        min_new_tokens=draw(st.integers(0, 4)),
        stop_token_ids=tuple(draw(st.lists(ids, max_size=2))),
        ignore_eos=draw(st.booleans()),
        seed=draw(st.integers(-(2**63), 2**64 - 1)),
        max_new_tokens=8,
    )


@st.composite
def rows(draw: st.DrawFn) -> tuple[Floats, list[Work], list[int], int]:
    """Logits [S, V] of some works, each row's newest token, and how many ids exist (at most V)."""
    width = draw(st.integers(1, 24))
    vocab = draw(st.integers(1, width))
    works, newest, logits = [], [], []
    for _ in range(draw(st.integers(1, 4))):
        tokens = draw(st.lists(st.integers(0, vocab - 1), min_size=1, max_size=8))
        num_prompt = draw(st.integers(1, len(tokens)))
        unseen = int(num_prompt < len(tokens) and draw(st.booleans()))
        works.append(work(draw(parameters(vocab)), tokens, num_prompt, unseen))
        newest.append(tokens[-1])
        logits.append(draw(st.lists(NICE, min_size=width, max_size=width)))
    return np.array(logits), works, newest, vocab


def edited(logits: Floats, w: Work, newest: int, vocab: int) -> Floats:
    tokens = [*w.request.tokens, newest][: w.end]
    return reference.edited_logits(logits, w.request, tokens, vocab)


# --- against the reference ---


@given(rows())
def test_edits_are_those_of_the_definition(case: tuple[Floats, list[Work], list[int], int]) -> None:
    logits, works, newest, vocab = case
    edits = logit_edits(works, vocab, len(works), TokenCounts())
    raw = mx.array(logits[:, :vocab].astype(np.float32))
    found = raw if edits is None else edit_logits(raw, edits, mx.array(newest))
    expected = [edited(row, w, new, vocab) for row, w, new in zip(logits, works, newest, strict=True)]
    np.testing.assert_allclose(np.asarray(found), np.array(expected), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(raw), logits[:, :vocab].astype(np.float32))  # edits a copy


@given(rows(), st.integers(0, 2), st.booleans())
def test_a_draw_is_the_definition_s(
    case: tuple[Floats, list[Work], list[int], int], padding: int, partition: bool
) -> None:
    logits, works, newest, vocab = case
    found = draw(np.pad(logits, ((0, padding), (0, 0))), works, vocab, newest, partition)
    for row, (w, token) in enumerate(zip(works, ints(found.tokens), strict=False)):
        scores, p = edited(logits[row], w, newest[row], vocab), w.request.params
        if np.isneginf(scores).all():
            assert token == 0
        elif p.temperature < GREEDY_BELOW:
            assert scores[token] >= scores.max() - 1e-4
        else:
            likely = reference.probabilities(scores, p.temperature)
            assert token in reference.kept(likely, p, 1e-5)
            certain = sorted(reference.kept(likely, p, -1e-5))
            assert p.seed is not None
            perturbed = np.log(likely + 1e-300) + reference.noise(p.seed, w.end, vocab)
            assert perturbed[token] >= perturbed[certain].max() - 1e-3


@given(st.lists(NICE, min_size=1, max_size=40).filter(lambda x: max(x) > -math.inf), st.data())
def test_filters_leave_the_smallest_sets_and_prefer_lower_ids(logits: list[float], data: st.DataObject) -> None:
    some = data.draw(st.lists(parameters(len(logits)), min_size=1, max_size=4))
    works = [work(p) for p in some if p.temperature > 0.01]
    distance = np.array([[max(logits) - x for x in logits]] * len(works))
    for partition in (True, False):
        plan, inputs = sampling_inputs(works, len(logits), partition=partition)
        if not plan.top_k and not plan.top_p:
            continue
        assert inputs.temperature is not None
        scaled = mx.array(distance.astype(np.float32)) / inputs.temperature[:, None]
        for row, w in zip(np.asarray(kept_tokens(scaled, plan, inputs)).tolist(), works, strict=True):
            p = w.request.params
            likely = reference.probabilities(np.array(logits), p.temperature)
            only = SamplingParams(top_k=p.top_k, top_p=p.top_p)
            left = {i for i, is_kept in enumerate(row) if is_kept and likely[i] > 0}
            assert reference.kept(likely, only, -1e-6) <= left | {i for i, q in enumerate(likely) if q == 0}
            assert left <= reference.kept(likely, only, 1e-6)


@given(st.data())
def test_partition_and_bisection_agree_to_the_bit(data: st.DataObject) -> None:
    """Even where rounding decides: both sum the same integers."""
    seed = data.draw(st.integers(0, 2**32 - 1))
    some = data.draw(st.lists(parameters(3000).filter(lambda p: p.top_k < 3000), min_size=1, max_size=4))
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, data.draw(st.sampled_from([0.0, 1e-4, 1.0, 8.0])), (len(some), 3000))
    works = [work(p) for p in some]
    plan, _ = sampling_inputs(works, 3000, partition=True)
    assume(plan.partition)
    draws = [draw(logits, works, 3000, [0] * len(works), partition) for partition in (True, False)]
    assert ints(draws[0].tokens) == ints(draws[1].tokens)


@given(st.lists(NICE, min_size=1, max_size=30), st.integers(1, 30))
def test_the_largest_come_first_and_of_equals_the_lower_id(values: list[float], count: int) -> None:
    count = min(count, len(values))
    rows = mx.array([values, values[::-1]])
    for partition in (True, False):
        found = ints(top_ids(rows, count, partition))
        for row, mine in zip((values, values[::-1]), found, strict=True):
            assert mine == sorted(range(len(row)), key=lambda i: (-row[i], i))[:count]


KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "top_k": {"top_k": 40},
    "top_k of most": {"top_k": 2000},
    "top_p": {"top_p": 0.9},
    "min_p": {"min_p": 0.05},
    "all": {"top_k": 40, "top_p": 0.9, "min_p": 0.02},
    "edits": {"top_p": 0.8, "repetition_penalty": 1.2, "logit_bias": {3: 2.0}},
    "logprobs": {"top_p": 0.8, "logprobs": True, "top_logprobs": 20},
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("partition", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_nobody_sorts_a_vocabulary(
    monkeypatch: pytest.MonkeyPatch, kind: str, compiled: bool, partition: bool, masked: bool
) -> None:
    """A GPU partitions nothing either, since MLX's partition sorts there; what is sorted has few numbers a row."""
    vocab, lengths = 3000, dict[str, list[int]]()
    for name in ("sort", "argsort", "partition", "argpartition", "topk"):
        real = getattr(mx, name)

        def seen(x: mx.array, *given: object, _name: str = name, _real: Any = real, **more: object) -> mx.array:
            lengths.setdefault(_name, []).append(x.shape[-1])
            return _real(x, *given, **more)  # type: ignore[no-any-return]

        monkeypatch.setattr(mx, name, seen)
    monkeypatch.setattr("pippin.sampler.mx.default_device", lambda: mx.Device(mx.cpu if partition else mx.gpu))
    monkeypatch.setattr("pippin.kernels.backend", lambda: None)
    params = SamplingParams(**{"temperature": 0.8, "seed": 1, **KINDS[kind]})
    works = [work(params) for _ in range(3)]
    plan, inputs = sampling_inputs(works, vocab, compiled=compiled)
    if masked:
        plan, inputs = allow(plan, inputs, mx.full((3, -(-vocab // 32)), 2**32 - 1, mx.uint32))
    logits = mx.random.normal((3, vocab), key=mx.random.key(2))
    mx.eval(sample(logits, plan, inputs, mx.zeros(3, mx.int32)).tokens)
    prompt_logprobs(logits, mx.array([1, 2, 3]), 20)
    assert not {"argsort", "argpartition", "topk"} & lengths.keys()
    assert max(lengths.get("sort", [0])) <= 1024
    if not partition:
        assert max(lengths.get("partition", [0])) <= 32


# --- edges ---


@pytest.mark.parametrize("partition", [True, False])
@pytest.mark.parametrize(
    ("logits", "params", "allowed"),
    [
        ([0.0] * 8, {"top_k": 3}, {0, 1, 2}),
        ([0.0] * 8, {"top_k": 8}, set(range(8))),
        ([0.0] * 8, {"top_p": 0.3}, {0, 1, 2}),
        ([0.0] * 8, {"top_p": 0.25}, {0, 1}),  # two have a quarter exactly; a third is not needed
        ([0.0] * 8, {"top_p": 1e-300}, {0}),
        ([0.0] * 8, {"min_p": 1.0}, set(range(8))),
        ([0.0, 1.0, 1.0, 0.9], {"min_p": 1.0}, {1, 2}),
        ([0.0, 1.0, 1.0, 0.9], {"top_k": 1}, {1}),
        ([-math.inf, 2.0, -math.inf, 1.0], {}, {1, 3}),
        ([-math.inf, 2.0, -math.inf, 1.0], {"top_k": 3}, {1, 3}),
        ([-math.inf, 2.0, -math.inf, 1.0], {"top_p": 0.999}, {1, 3}),
        ([0.0, 0.0, 0.0], {"logit_bias": {1: 100.0}}, {1}),
        ([0.0, 0.0, 0.0], {"logit_bias": {1: -100.0}}, {0, 2}),
        ([3.0], {"top_k": 5, "top_p": 0.1, "min_p": 0.5}, {0}),
        ([5.0, 4.0, 3.0, 2.0], {"temperature": 1e-4}, {0}),
        ([1.0, 1.0, 0.0], {"temperature": 1e6}, {0, 1, 2}),
        ([3e38, -3e38, 3e38], {"temperature": 0.01}, {0, 2}),
    ],
)
def test_edges(logits: list[float], params: dict[str, object], allowed: set[int], partition: bool) -> None:
    """Over many positions exactly the allowed ids come up."""
    p = SamplingParams(seed=5, **params)  # type: ignore[arg-type]
    works = [work(p, [0] * n) for n in range(1, 300)]
    found = draw(np.array([logits] * len(works)), works, len(logits), [0] * len(works), partition)
    assert set(ints(found.tokens)) == allowed


@pytest.mark.parametrize("partition", [True, False])
def test_filters_of_a_row_leave_the_rows_beside_it_alone(partition: bool) -> None:
    filtered, free = SamplingParams(seed=1, top_k=3, top_p=0.5), SamplingParams(seed=2)
    works = [work(p, [0] * n) for n in range(1, 400) for p in (filtered, free)]
    logits = np.tile(-np.arange(64) / 100, (len(works), 1))
    tokens = ints(draw(logits, works, 64, [0] * len(works), partition).tokens)
    assert set(tokens[::2]) == {0, 1, 2}
    assert len(set(tokens[1::2])) > 60


def test_greedy_takes_the_lower_of_equals_and_computes_nothing_else() -> None:
    works = [work(SamplingParams(temperature=0.0)), work(SamplingParams(temperature=1e-9, top_p=0.3))]
    plan, inputs = sampling_inputs(works, 4, pad_to=4)
    assert plan == SamplingPlan(4)
    assert all(value is None for value in inputs)
    logits = mx.array([[0.0, 7.0, 7.0, 1.0]] * 4).astype(mx.bfloat16)
    assert ints(sample(logits, plan, inputs, mx.zeros(4, mx.int32)).tokens) == [1, 1, 1, 1]


def test_ids_that_do_not_exist_are_never_drawn_nor_reported() -> None:
    logits = np.array([[0.0, 0.0, 50.0, 50.0]] * 64)
    works = [work(SamplingParams(seed=i, logprobs=True, top_logprobs=4)) for i in range(63)]
    works.append(work(SamplingParams(temperature=0, logit_bias={3: 100.0, 77: 100.0}, stop_token_ids=(99,))))
    found = draw(logits, works, 2, [3] * 64)
    assert set(ints(found.tokens)) == {0, 1}
    assert found.logprob is not None
    assert ints(found.top_ids) == [[0, 1]] * 64
    np.testing.assert_allclose(np.asarray(found.logprob), -math.log(2), rtol=1e-6)


def test_a_vocabulary_wider_than_the_logits_is_refused() -> None:
    plan, inputs = sampling_inputs([work(SamplingParams())], 5)
    with pytest.raises(ValueError, match="5 ids, but logits of 4"):
        sample(mx.zeros((1, 4)), plan, inputs, mx.zeros(1, mx.int32))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("partition", [True, False])
def test_a_row_that_is_no_number_is_told_and_leaves_its_neighbours_alone(bad: float, partition: bool) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 500))
    p = SamplingParams(seed=1, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.2)
    works = [work(p, [3, 4, 5], 1, 1), work(p), work(p, [7])]
    fine = draw(logits, works, 500, [5, 0, 7], partition)
    logits[1, ::3] = bad
    found = draw(logits, works, 500, [5, 0, 7], partition)
    assert ints(found.finite) == [True, False, True]
    assert [ints(found.tokens)[i] for i in (0, 2)] == [ints(fine.tokens)[i] for i in (0, 2)]
    assert 0 <= ints(found.tokens)[1] < 500


def test_min_new_tokens_holds_back_eos_and_stop_tokens() -> None:
    logits = np.array([[0.0, 30.0, 20.0, 10.0]])
    p = SamplingParams(temperature=0.0, min_new_tokens=3, stop_token_ids=(2,))
    drawn = [ints(draw(logits, [work(p, [0] * n)], 4, [0]).tokens)[0] for n in range(1, 6)]
    assert drawn == [3, 3, 3, 1, 1]


# --- a stream is a function of its request ---


def history(tokens: list[int], p: SamplingParams, unseen: bool) -> Work:
    return work(p, tokens, 3, int(unseen and len(tokens) > 3))


@given(st.data())
def test_a_stream_is_the_same_alone_in_any_batch_and_resumed(data: st.DataObject) -> None:
    vocab = 50
    p = data.draw(parameters(vocab))
    table = np.random.default_rng(data.draw(st.integers(0, 99))).normal(0, 2, (vocab, vocab))
    prompt, alone = [4, 8, 15], list[int]()
    for _ in range(6):
        tokens = prompt + alone
        alone += ints(draw(table[tokens[-1:]], [history(tokens, p, False)], vocab, tokens[-1:]).tokens)
    for step in data.draw(st.permutations(range(6))):  # resumed anywhere: nothing is left over from earlier steps
        tokens = prompt + alone[:step]
        others = [work(q, [1, 2, 3, 4], 2) for q in data.draw(st.lists(parameters(vocab), max_size=3))]
        at = data.draw(st.integers(0, len(others)))
        works = [*others[:at], history(tokens, p, data.draw(st.booleans())), *others[at:]]
        newest = [w.request.tokens[-1] for w in works]
        newest[at] = tokens[-1]
        logits = np.pad(table[newest], ((0, data.draw(st.integers(0, 3))), (0, 0)))
        assert ints(draw(logits, works, vocab, newest, data.draw(st.booleans())).tokens)[at] == alone[step]


def test_a_request_without_a_seed_has_one_of_its_own() -> None:
    logits = np.zeros((40, 1000))
    works = [Work(Request(f"r{i % 20}", [0], 1, SamplingParams()), 0, 1, True) for i in range(40)]
    tokens = ints(draw(logits, works, 1000, [0] * 40).tokens)
    assert tokens[:20] == tokens[20:]
    assert len(set(tokens)) > 10


@given(st.lists(st.tuples(st.integers(-(2**63), 2**64 - 1), st.integers(0, 2**20)), min_size=2, max_size=50))
def test_keys_are_as_distinct_as_seeds_and_positions(pairs: list[tuple[int, int]]) -> None:
    distinct = {(seed % 2**64, position) for seed, position in pairs}
    keys = noise_keys([s for s, _ in distinct], [p for _, p in distinct])
    assert len({tuple(key) for key in keys.tolist()}) == len(distinct)


@given(st.lists(st.integers(0, 12), min_size=3, max_size=20), st.lists(st.integers(0, 9), max_size=12), st.data())
def test_counts_kept_over_steps_equal_counts_made_anew(
    prompt: list[int], answer: list[int], data: st.DataObject
) -> None:
    kept = TokenCounts()
    requests = [Request("r", list(prompt), len(prompt), SamplingParams()) for _ in range(2)]
    for _ in range(10):
        request = data.draw(st.sampled_from(requests))
        tokens = prompt + answer[: data.draw(st.integers(0, len(answer)))]
        unseen = data.draw(st.integers(0, 1))
        request.tokens = list(tokens)
        w = Work(request, 0, len(tokens) + unseen, True)
        ids, times = kept.of(w, 11)
        assert sorted(ids.tolist()) == sorted({t for t in tokens if t < 11})
        assert times.tolist() == [tokens[len(prompt) :].count(i) for i in ids.tolist()]


# --- statistics: seeds are fixed, so these can't fail by chance ---


def chi_square(counts: Floats, expected: Floats) -> float:
    """In standard deviations from its mean: about normal for many degrees of freedom."""
    used = expected > 0
    assert counts[~used].sum() == 0
    statistic = float(((counts[used] - expected[used]) ** 2 / expected[used]).sum())
    freedom = int(used.sum()) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 2.0, "top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"temperature": 1.5, "top_k": 9, "top_p": 0.85, "min_p": 0.05},
        {"frequency_penalty": 0.8, "presence_penalty": 0.3, "repetition_penalty": 1.4, "logit_bias": {4: 1.0}},
    ],
)
@pytest.mark.parametrize("vary", ["position", "seed"])
def test_tokens_come_as_often_as_they_should(params: dict[str, object], vary: str) -> None:
    n, vocab = 8000, 12
    logits = np.random.default_rng(3).normal(0, 1.2, vocab)
    tokens = [5, 6, 6, 2, 11, 11]
    works = []
    for i in range(n):
        p = SamplingParams(seed=i if vary == "seed" else 1234, **params)  # type: ignore[arg-type]
        request = Request("r", list(tokens), 3, p)
        works.append(Work(request, 5, 6, True))
    plan, inputs = sampling_inputs(works, vocab)
    if vary == "position":  # one penalty history, many positions
        inputs = inputs._replace(keys=mx.array(noise_keys([1234] * n, range(6, 6 + n))))
    found = sample(mx.array([logits.tolist()] * n), plan, inputs, mx.array([11] * n))
    counts = np.bincount(np.asarray(found.tokens), minlength=vocab).astype(np.float64)
    request = works[0].request
    likely = reference.probabilities(
        reference.edited_logits(logits, request, tokens, vocab), request.params.temperature
    )
    assert abs(chi_square(counts, n * reference.filtered(likely, request.params))) < 4


@pytest.mark.parametrize(("seeds", "positions"), [((7, 7), (0, 1)), ((7, 8), (0, 0))])
def test_neighbouring_positions_and_seeds_are_independent(seeds: tuple[int, int], positions: tuple[int, int]) -> None:
    n, vocab = 20000, 6
    drawn = []
    for seed, position in zip(seeds, positions, strict=True):
        many = noise_keys([seed + 2 * i for i in range(n)], [position] * n)
        drawn.append(np.asarray(mx.argmax(gumbel(mx.array(many), vocab), axis=-1)).astype(np.int64))
    joint = np.bincount(drawn[0] * vocab + drawn[1], minlength=vocab**2).astype(np.float64)
    assert abs(chi_square(joint, np.full(vocab**2, n / vocab**2))) < 4


def test_noise_reaches_as_far_as_rare_tokens_need() -> None:
    """-log(-log(u)) of float32 numbers u < 1 ends at 16.6, and so would never draw tokens rarer than about 6e-8."""

    def far(noise: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return noise[noise > 15]

    keys = mx.array(noise_keys([11] * 64, range(64)))
    beyond = np.concatenate([far(np.asarray(gumbel(keys[i : i + 8], 2**20))) for i in range(0, 64, 8)])
    expected = 2**26 * math.exp(-15)
    assert abs(len(beyond) - expected) < 3 * math.sqrt(expected)
    assert np.any((beyond > 16.7) & (beyond < 22))
    assert len(set(beyond.tolist())) > 0.95 * len(beyond)


# --- log probabilities ---


@given(rows(), st.integers(0, 6))
def test_logprobs_are_the_model_s_own(case: tuple[Floats, list[Work], list[int], int], tops: int) -> None:
    logits, works, newest, vocab = case
    logits = np.maximum(logits, -50.0)
    for w in works:
        p = w.request.params
        w.request.params = SamplingParams(
            temperature=p.temperature, top_k=p.top_k, logit_bias=p.logit_bias, logprobs=True, top_logprobs=tops
        )
    found = draw(logits, works, vocab, newest)
    own = np.log([reference.probabilities(row[:vocab], 1.0) for row in logits])
    assert found.logprob is not None
    expected = own[np.arange(len(works)), ints(found.tokens)]
    np.testing.assert_allclose(np.asarray(found.logprob), expected, atol=1e-5)
    if not tops:
        assert found.top_ids is None
        return
    for row, ids, values in zip(own, ints(found.top_ids), np.asarray(found.top_logprobs), strict=True):
        assert len(ids) >= min(tops, vocab)
        assert ids == sorted(range(vocab), key=lambda i: (-row[i].round(4), i))[: len(ids)]
        np.testing.assert_allclose(values, row[ids], atol=1e-5)


def test_prompt_logprobs_of_each_next_token() -> None:
    logits = np.random.default_rng(1).normal(size=(5, 9))
    targets = [3, 0, 8, 2, 7]
    own = np.log([reference.probabilities(row, 1.0) for row in logits])
    logprob, ids, values = prompt_logprobs(mx.array(logits), mx.array(targets), 2)
    assert ids is not None
    assert values is not None
    np.testing.assert_allclose(np.asarray(logprob), own[np.arange(5), targets], atol=1e-5)
    np.testing.assert_array_equal(np.asarray(ids), np.argsort(-own, axis=-1)[:, :2])
    np.testing.assert_allclose(np.asarray(values), np.sort(own, axis=-1)[:, :-3:-1], atol=1e-5)
    logprob, ids, _ = prompt_logprobs(mx.array(logits), mx.array(targets), 0, vocab_size=8)
    assert ids is None
    assert np.isnan(np.asarray(logprob)).tolist() == [False, False, True, False, False]


# --- compiled steps ---


@pytest.mark.skipif(shutil.which("g++") is None, reason="MLX compiles for the CPU with g++")
def test_a_compiled_step_serves_other_batches_of_its_shape() -> None:
    traced = []

    @functools.partial(mx.compile)
    def step(logits: mx.array, inputs: object, newest: mx.array) -> mx.array:
        traced.append(1)
        return sample(logits, plan, inputs, newest).tokens  # type: ignore[arg-type]

    rng = np.random.default_rng(0)
    for seed in range(3):
        p = SamplingParams(seed=seed, min_p=0.01, temperature=0.5 + seed, frequency_penalty=0.5)
        works = [work(p, [0, 1 + seed], 1, unseen=1), work(SamplingParams(temperature=0.0))]
        plan, inputs = sampling_inputs(works, 30, pad_to=4)
        logits, newest = mx.array(rng.normal(size=(4, 30)).astype(np.float32)), mx.array([1 + seed, 0, 0, 0])
        assert ints(step(logits, inputs, newest)) == ints(sample(logits, plan, inputs, newest).tokens)
    assert len(traced) == 1
