"""Logits to tokens, inside MLX's lazy graph: nothing here waits for the device.

``sampling_inputs`` reads requests on the host, ``sample`` builds the graph. Order per row, as in SGLang:
repetition penalty, frequency and presence penalties, logit_bias, forbidden stop tokens, grammar; then temperature;
then top_k, top_p and min_p, each judged on the temperature-scaled distribution over the whole vocabulary and
applied together. Among equal probabilities the lower id counts as the likelier token.

Randomness is the Gumbel-max trick: token = argmax(log p + G). The noise G of a row is a function of
(seed, index of the token being drawn) and covers the whole vocabulary, so a stream does not depend on its
batch, on padding, on retraction, or on how a filter was computed.

Filters need no sort. With d = (max logit - logit) / temperature >= 0, whose float bits order like the floats,
the kept set is {d < boundary} and the first few of {d == boundary}; the boundary is found by bisecting 31 bits
with one masked sum each, or, where every filtered row has a modest top_k, by a partition. Probabilities are
summed as integers (multiples of 2**-31), so that no order of summation, batch or path can change a decision.
The likeliest tokens that logprobs report are found by the same bisection where MLX's partition would sort.

On a GPU one launch of a kernel of ours draws, from the logits as the model gave them, whatever the rows ask for, and
another finds log probabilities (``kernels.draw``, ``kernels.top_logprobs``); the noise is the same. What follows here
is for where they don't run; there, a launch takes the place of either bisection (``kernels.boundary``).

16 rows of 152 000 logits on one x86-64 core take MLX 171 ms to sort, 75 ms to bisect for top_p, 20 ms for top_k, and
16 ms to partition (``python -m benchmarks.sampling``).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from pippin import kernels
from pippin.kernels.drawing import Filters
from pippin.kernels.reference import gumbel
from pippin.kernels.select import Limits, tokens_up_to
from pippin.penalties import LogitEdits, TokenCounts, edit_logits, logit_edits
from pippin.types import Work
from pippin.uploads import upload_together

GREEDY_BELOW = 1e-5  # a temperature under this is 0: dividing by it could only overflow
SMALLEST_TOP_P = 1e-9  # less would be 0 in float32, and keep nothing
LARGEST_PARTITION = 1024  # above this top_k, bisecting is as fast as a partition and its sort
PROBABILITY_1 = float(2**31)  # in the integers that top_p sums
INTEGER_MAX = 2**31 - 1  # top_k: off
MINUS_INFINITY = 0xFF800000  # its bits
UNLIKELY = -1e30  # logit of a token that is drawn if nothing else may be
NO_BOUNDARY = 2**31 - 1  # bits above those of every float
FEW_TOPS = 32  # alternatives that compiled draws report if any are: requests read their own share
EDIT_PLACES = (256, 4096, 65536)  # lengths of lists of edits that draws are compiled for


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """What a step's sampling has to compute; hashable, so that compiled steps can be kept by it.

    ``vocab_size``: ids from here on do not exist (padding of the embedding). ``tops``: how many alternatives
    to report, a power of two. ``partition``: length of the partition that finds boundaries, 0 to bisect.
    """

    vocab_size: int
    random: bool = False
    top_k: bool = False
    top_p: bool = False
    min_p: bool = False
    edits: bool = False
    unseen: bool = False
    logprobs: bool = False
    tops: int = 0
    partition: int = 0
    masked: bool = False


class SamplingInputs(NamedTuple):
    """The plan's arrays, one line per row; None where the plan has no use for them.

    ``temperature`` float32 [S], 0 for greedy. ``keys`` uint32 [S, 2]: the noise of this row at this position.
    ``top_k`` int32 [S], ``top_p`` float32 [S] (infinite: off), ``log_min_p`` float32 [S] (-infinite: off).
    ``allowed`` uint32 [S, ceil(vocab_size / 32)]: bit t % 32 of word t // 32 says whether token t may be drawn.
    """

    temperature: mx.array | None = None
    keys: mx.array | None = None
    top_k: mx.array | None = None
    top_p: mx.array | None = None
    log_min_p: mx.array | None = None
    edits: LogitEdits | None = None
    allowed: mx.array | None = None


class Sampled(NamedTuple):
    """``tokens`` int32 [S]; ``finite`` bool [S]: the row's largest logit was a number, so the token means something.

    Log probabilities, float32, are the model's own (before edits and temperature), over the ids that exist:
    ``logprob`` [S] of the token drawn, ``top_logprobs`` [S, tops] and ``top_ids`` int32 [S, tops] best first.
    """

    tokens: mx.array
    finite: mx.array
    logprob: mx.array | None = None
    top_ids: mx.array | None = None
    top_logprobs: mx.array | None = None


# --- host side ---


def sampling_inputs(
    works: Sequence[Work],
    vocab_size: int,
    pad_to: int = 0,
    counts: TokenCounts | None = None,
    partition: bool | None = None,
    compiled: bool = False,
) -> tuple[SamplingPlan, SamplingInputs]:
    """The plan and arrays for the rows of those works that sample, in order; padding rows are greedy.

    ``vocab_size`` must not exceed the width of the logits. A row's token ``end - 1`` may be one that the host
    has not seen; ``sample`` gets it as ``input_tokens``. ``counts``, kept by the caller, spares penalised requests
    the counting of their prompts in every step. ``partition`` allows partitions in place of bisection
    (None: on the CPU, where that is faster, and not on a GPU, where MLX's partition is a full sort). ``compiled``: of
    few shapes and plans, as ``sampler_graphs`` takes them.
    """
    rows = [w for w in works if w.samples]
    size = max(len(rows), pad_to)
    params = [w.request.params for w in rows]
    edits = logit_edits(rows, vocab_size, size, counts or TokenCounts(), EDIT_PLACES if compiled else ())
    tops = max((p.top_logprobs for p in params if p.logprobs), default=0)
    if compiled and tops:
        tops = max(tops, FEW_TOPS)
    plan = SamplingPlan(
        vocab_size,
        edits=edits is not None,
        unseen=edits is not None and edits.unseen is not None,
        logprobs=any(p.logprobs for p in params),
        tops=min(power_of_two(tops), vocab_size) if tops else 0,
    )
    inputs = SamplingInputs(edits=edits)
    if all(p.temperature < GREEDY_BELOW for p in params):
        return plan, inputs
    if partition is None:
        partition = mx.default_device() == mx.Device(mx.cpu)
    return _random_inputs(rows, size, plan, inputs, partition and not compiled, min_p=compiled)


def _random_inputs(
    rows: Sequence[Work], size: int, plan: SamplingPlan, inputs: SamplingInputs, partition: bool, min_p: bool
) -> tuple[SamplingPlan, SamplingInputs]:
    """Adds what rows with a temperature need; greedy and padding rows get filters that are off. ``min_p``: anyway."""
    n = plan.vocab_size
    temperature, log_min_p = np.zeros(size, np.float32), np.full(size, -np.inf, np.float32)
    top_k, top_p = np.full(size, INTEGER_MAX, np.int32), np.full(size, np.inf, np.float32)
    for i, p in enumerate(w.request.params for w in rows):
        if p.temperature < GREEDY_BELOW:
            continue
        temperature[i] = p.temperature
        if 0 < p.top_k < n:
            top_k[i] = p.top_k
        if p.top_p < 1:
            top_p[i] = max(p.top_p, SMALLEST_TOP_P)
        if p.min_p > 0:
            log_min_p[i] = math.log(p.min_p)
    has_k, has_p, has_min = top_k < INTEGER_MAX, np.isfinite(top_p), np.isfinite(log_min_p)
    length = power_of_two(int(top_k[has_k].max())) if has_k.any() else 0
    partition = partition and length <= LARGEST_PARTITION and not (has_p & ~has_k).any()
    spare = size - len(rows)
    keys = noise_keys([seed_of(w) for w in rows] + [0] * spare, [w.end for w in rows] + [0] * spare)
    plan = replace(
        plan,
        random=True,
        top_k=bool(has_k.any()),
        top_p=bool(has_p.any()),
        min_p=min_p or bool(has_min.any()),
        partition=min(length, n) if partition else 0,
    )
    filters = [(plan.top_k, top_k), (plan.top_p, top_p), (plan.min_p, log_min_p)]
    sent = iter(upload_together([temperature, keys, *(array for on, array in filters if on)]))
    return plan, inputs._replace(
        temperature=next(sent),
        keys=next(sent),
        top_k=next(sent) if plan.top_k else None,
        top_p=next(sent) if plan.top_p else None,
        log_min_p=next(sent) if plan.min_p else None,
    )


def allow(plan: SamplingPlan, inputs: SamplingInputs, allowed: mx.array) -> tuple[SamplingPlan, SamplingInputs]:
    """The plan and arrays with masks, as ``SamplingInputs.allowed``."""
    return replace(plan, masked=True), inputs._replace(allowed=allowed)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n (n >= 1)."""
    return 1 << (n - 1).bit_length()


def seed_of(work: Work) -> int:
    """The request's seed; where it has none, one made of its id, so that a resubmitted request goes on alike."""
    seed = work.request.params.seed
    if seed is None:
        return int.from_bytes(hashlib.blake2b(work.request.id.encode(), digest_size=8).digest(), "little")
    return seed


def noise_keys(seeds: Sequence[int], positions: Sequence[int]) -> npt.NDArray[np.uint32]:
    """Keys for mx.random, uint32 [S, 2], of 64-bit seeds and token indices.

    Element ``position`` of a SplitMix64 sequence (Steele, Lea and Flood, OOPSLA 2014) started at the mixed seed:
    neighbouring seeds and positions give unrelated keys.
    """
    start = _mix(np.array([s % 2**64 for s in seeds], np.uint64))
    z = _mix(start + np.array(positions, np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return np.stack([z >> np.uint64(32), z & np.uint64(0xFFFFFFFF)], axis=-1).astype(np.uint32)


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


# --- device side ---


def sample(logits: mx.array, plan: SamplingPlan, inputs: SamplingInputs, input_tokens: mx.array) -> Sampled:
    """Draws one token a row: ``logits`` [S, V] of any float type, ``input_tokens`` int [S] what the row last read.

    Raises ValueError if the plan's vocabulary is larger than V.
    """
    if plan.vocab_size > logits.shape[-1]:
        raise ValueError(f"a vocabulary of {plan.vocab_size} ids, but logits of {logits.shape[-1]}")
    scores = None
    if inputs.edits is not None:
        scores = edit_logits(existing(logits, plan.vocab_size), inputs.edits, input_tokens)
    sampled = Sampled(*draw(logits, scores, plan, inputs))
    if not plan.logprobs:
        return sampled
    logprob, ids, logprobs = token_logprobs(logits, plan.vocab_size, sampled.tokens, plan.tops)
    return sampled._replace(logprob=logprob, top_ids=ids, top_logprobs=logprobs)


def draw(
    logits: mx.array, scores: mx.array | None, plan: SamplingPlan, inputs: SamplingInputs
) -> tuple[mx.array, mx.array]:
    """``Sampled.tokens`` and ``Sampled.finite`` of logits [S, V]; ``scores`` float32 [S, n] are those after edits.

    On a GPU one launch of a kernel does it all, whatever the row asks for.
    """
    n = plan.vocab_size
    if kernels.draws(logits, n):
        temperature, keys, top_k, top_p, log_min_p, _, allowed = inputs
        asked = Filters(temperature, keys, top_k, top_p, log_min_p, allowed)
        if scores is None:
            return kernels.draw(logits, n, asked)
        return kernels.draw(scores, n, asked)[0], kernels.draw(logits, n, Filters())[1]
    return plain_draw(logits, scores, plan, inputs)


def plain_draw(
    logits: mx.array, scores: mx.array | None, plan: SamplingPlan, inputs: SamplingInputs
) -> tuple[mx.array, mx.array]:
    """The same where no kernel does."""
    raw = existing(logits, plan.vocab_size)
    edited = raw if scores is None else scores
    if inputs.allowed is not None:
        edited = mask_logits(edited, inputs.allowed)
    return choose(edited, plan, inputs), mx.isfinite(raw.max(axis=-1))


def existing(logits: mx.array, vocab_size: int) -> mx.array:
    """Of logits [S, V] of any float type, those of ids that exist: float32 [S, vocab_size]."""
    return logits[:, :vocab_size].astype(mx.float32)


def choose(logits: mx.array, plan: SamplingPlan, inputs: SamplingInputs) -> mx.array:
    """A token a row, int32 [S], of logits float32 [S, n] that nothing else changes any more."""
    tokens = mx.argmax(logits, axis=-1)
    if plan.random:
        assert inputs.temperature is not None
        tokens = mx.where(inputs.temperature > 0, _draw(logits, plan, inputs), tokens)
    return tokens.astype(mx.int32)


def mask_logits(logits: mx.array, allowed: mx.array) -> mx.array:
    """float32 [S, n] with minus infinity where the mask has 0. Of what it allows, edits forbid nothing for good."""
    rows, n = logits.shape
    bits = (allowed[:, :, None] >> mx.arange(32, dtype=mx.uint32)) & 1
    refused = bits.reshape(rows, -1)[:, :n] - 1  # all ones where the mask has 0
    # In the floats' own bits: on a CPU ``where`` takes three times as long as all of this.
    kept = mx.maximum(logits, UNLIKELY).view(mx.uint32)
    return ((kept & ~refused) | (refused & mx.array(MINUS_INFINITY, mx.uint32))).view(mx.float32)


def prompt_logprobs(
    logits: mx.array, targets: mx.array, tops: int, vocab_size: int | None = None
) -> tuple[mx.array, mx.array | None, mx.array | None]:
    """Log probabilities of prompt tokens: ``logits`` [R, V], ``targets`` int [R], the token that followed each row.

    Returns logprob float32 [R] and, if tops > 0, ids int32 [R, tops] and log probabilities [R, tops], best first.
    A target that is no id of the vocabulary has NaN.
    """
    vocab_size = vocab_size or logits.shape[-1]
    known = (targets >= 0) & (targets < vocab_size)
    targets = mx.where(known, targets, 0)
    logprob, ids, values = token_logprobs(logits, vocab_size, targets, min(tops, vocab_size))
    return mx.where(known, logprob, mx.nan), ids, values


def token_logprobs(
    logits: mx.array, vocab_size: int, tokens: mx.array, tops: int
) -> tuple[mx.array, mx.array | None, mx.array | None]:
    """Log probabilities of one token a row and of the ``tops`` likeliest: logits [R, V], tokens int [R]."""
    if kernels.draws(logits, vocab_size) and tops <= kernels.MOST_TOPS:
        found = kernels.top_logprobs(logits, vocab_size, tokens, tops)
        return found if tops else (found[0], None, None)
    return plain_logprobs(logits, vocab_size, tokens, tops)


def plain_logprobs(
    logits: mx.array, vocab_size: int, tokens: mx.array, tops: int
) -> tuple[mx.array, mx.array | None, mx.array | None]:
    """The same where no kernel does."""
    raw = existing(logits, vocab_size)
    norm = mx.logsumexp(raw, axis=-1, keepdims=True)
    logprob = (mx.take_along_axis(raw, tokens[:, None], axis=-1) - norm)[:, 0]
    if not tops:
        return logprob, None, None
    ids = top_ids(raw, tops)
    return logprob, ids, mx.take_along_axis(raw, ids, axis=-1) - norm


def top_ids(values: mx.array, count: int, partition: bool | None = None) -> mx.array:
    """The ``count`` largest of each row of float32 [R, n], as int32 [R, count]: largest first, then lower ids.

    ``partition`` as in ``sampling_inputs``: a boundary is found by a partition, or bisected.
    """
    if partition is None:
        partition = mx.default_device() == mx.Device(mx.cpu)
    bits = (-values).view(mx.int32)
    order = mx.where(bits < 0, bits ^ INTEGER_MAX, bits)  # like the floats, as integers
    ids = mx.broadcast_to(mx.arange(values.shape[-1]), values.shape)
    if count < values.shape[-1] and not partition:
        ids = _smallest(order, count)
        order = mx.take_along_axis(order, ids, axis=-1)
    keys = order.astype(mx.int64) * 2**32 + ids  # distinct, so a partition has one outcome
    if count < keys.shape[-1]:
        keys = mx.partition(keys, count - 1, axis=-1)[:, :count]
    return (mx.sort(keys, axis=-1) & (2**32 - 1)).astype(mx.int32)


def _smallest(order: mx.array, count: int) -> mx.array:
    """Where the ``count`` smallest of each row of int32 [R, n] lie, of equals the first: int32 [R, count] in order."""
    bits = order.view(mx.uint32) ^ (1 << 31)
    near = _limited(bits, None, Limits(mx.full((order.shape[0], 1), count, mx.int32), None), signed=True)
    places = mx.where(near, mx.cumsum(near.astype(mx.int32), axis=-1) - 1, count)
    ids = mx.broadcast_to(mx.arange(order.shape[-1], dtype=mx.int32), order.shape)
    found = mx.zeros((order.shape[0], count + 1), mx.int32)
    return mx.put_along_axis(found, places, ids, axis=-1)[:, :count]


def _draw(logits: mx.array, plan: SamplingPlan, inputs: SamplingInputs) -> mx.array:
    """A token of each row's filtered distribution; rows with temperature 0 get some id."""
    assert inputs.temperature is not None
    assert inputs.keys is not None
    temperature = mx.where(inputs.temperature > 0, inputs.temperature, 1.0)[:, None]
    largest = logits.max(axis=-1, keepdims=True)
    # A row without any allowed token has every distance infinite; one with a NaN has no number that could be
    # ordered against others, which a partition might not survive.
    distance = (mx.where(largest == -math.inf, 0.0, largest) - logits) / temperature
    scores = gumbel(inputs.keys, logits.shape[-1]) - distance
    if plan.top_k or plan.top_p:
        scores = mx.where(kept_tokens(distance, plan, inputs), scores, -math.inf)
    if inputs.log_min_p is not None:
        scores = mx.where(-distance >= inputs.log_min_p[:, None], scores, -math.inf)
    return mx.argmax(scores, axis=-1)


def kept_tokens(distance: mx.array, plan: SamplingPlan, inputs: SamplingInputs) -> mx.array:
    """Which tokens top_k and top_p leave, bool [S, n], of distances float32 [S, n]."""
    scale = mass = target = None
    if inputs.top_p is not None:
        weights = mx.exp(-distance)
        scale = PROBABILITY_1 / weights.sum(axis=-1, keepdims=True)
        mass = _integers(weights, scale)
        target = inputs.top_p[:, None] * mass.sum(axis=-1, keepdims=True).astype(mx.float32)
    limits = Limits(None if inputs.top_k is None else inputs.top_k[:, None], target)
    bits = distance.view(mx.uint32)
    if plan.partition:
        return _nearest(bits, mass, limits, _partition(distance, scale, plan.partition, limits))
    return _limited(bits, mass, limits)


def _limited(bits: mx.array, mass: mx.array | None, limits: Limits, signed: bool = False) -> mx.array:
    """What limits leave, bool [S, n], in order of (bits, id); bits from 2**31 on are no tokens unless ``signed``."""
    last = kernels.boundary(bits, mass, limits, signed)
    if last is not None:
        return tokens_up_to(bits, *last)
    return _nearest(bits, mass, limits, _bisect(bits, mass, limits, 31 if signed else 30))


def _nearest(bits: mx.array, mass: mx.array | None, limits: Limits, boundary: mx.array) -> mx.array:
    """The same with the boundary known: what is nearer, and of what is on it the first that fit."""
    tied = bits == boundary
    count, mass_before = _before(bits, mass, boundary)
    count = count + mx.cumsum(tied.astype(mx.int32), axis=-1, inclusive=False)
    if mass is not None and mass_before is not None:
        mass_before = mass_before + mx.cumsum(tied * mass, axis=-1, inclusive=False)
    return (bits < boundary) | (tied & limits.allow(count, mass_before))


def _integers(weights: mx.array, scale: mx.array) -> mx.array:
    """Probabilities as uint32 multiples of 2**-31; a row's sum stays far under 2**32."""
    return (weights * scale + 0.5).astype(mx.uint32)


def _before(bits: mx.array, mass: mx.array | None, boundary: mx.array) -> tuple[mx.array, mx.array | None]:
    """How many tokens, and how much mass, are nearer than the boundary uint32 [S, 1]; each [S, 1]."""
    nearer = bits < boundary
    count = nearer.sum(axis=-1, keepdims=True)
    return count, None if mass is None else (nearer * mass).sum(axis=-1, keepdims=True)


def _bisect(bits: mx.array, mass: mx.array | None, limits: Limits, highest: int = 30) -> mx.array:
    """The largest boundary, uint32 [S, 1], with no more before it than the limits allow; NO_BOUNDARY where all fits.

    Bits above the ``highest`` are 0, as floats' are that are not negative. Compiled, every round is the same kernels:
    MLX compiles a number into a kernel, and the slices of an array it does not.
    """
    steps = mx.array([1 << bit for bit in range(highest, -1, -1)], mx.uint32)
    boundary = mx.zeros((bits.shape[0], 1), mx.uint32)
    for step in steps.split(highest + 1):
        farther = boundary | step
        boundary = mx.where(limits.allow(*_before(bits, mass, farther)), farther, boundary)
    return boundary


def _partition(distance: mx.array, scale: mx.array | None, length: int, limits: Limits) -> mx.array:
    """The same boundary from each row's ``length`` nearest tokens, which is at least its top_k."""
    assert limits.tokens is not None
    near = distance if length >= distance.shape[-1] else mx.partition(distance, length - 1, axis=-1)[:, :length]
    near = mx.sort(near, axis=-1)
    mass = None if scale is None else mx.cumsum(_integers(mx.exp(-near), scale), axis=-1, inclusive=False)
    kept = limits.allow(mx.arange(length), mass).sum(axis=-1, keepdims=True)
    boundary = mx.take_along_axis(near, mx.maximum(kept - 1, 0), axis=-1).view(mx.uint32)
    return mx.where(limits.tokens < INTEGER_MAX, boundary, NO_BOUNDARY)
