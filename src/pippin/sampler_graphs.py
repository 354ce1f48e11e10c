"""Drawing tokens by compiled functions: a few for each number of rows, warmed at start, whatever requests ask for.

A draw is done in stages, each compiled by itself: edits of logits, a grammar's mask (which a kernel that draws takes
itself), the draw, log probabilities. So what requests may combine adds up to a dozen functions. Options that would only
multiply them are always on, with values that change nothing, and lists of edits are padded to few lengths. The tokens
are ``sampler.sample``'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from pippin import kernels
from pippin.graph import Compiler
from pippin.penalties import LogitEdits, UnseenEdits, edit_logits
from pippin.sampler import (
    EDIT_PLACES,
    FEW_TOPS,
    Sampled,
    SamplingInputs,
    SamplingPlan,
    draw,
    existing,
    mask_logits,
    token_logprobs,
)


class SamplerGraphs:
    """The compiled functions for logits of a model; ``vocab_size`` as in ``SamplingPlan``."""

    def __init__(self, vocab_size: int, compiler: Compiler) -> None:
        self._vocab_size = vocab_size
        self._compiler = compiler
        self._functions: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def draw(
        self,
        logits: mx.array,
        plan: SamplingPlan,
        inputs: SamplingInputs,
        tokens: mx.array,
        table: mx.array,
        rows: mx.array,
    ) -> tuple[mx.array, Sampled]:
        """Lazy: the device table with what was drawn for its lines ``rows`` [S] int32, and that.

        ``logits`` [S, V], ``tokens`` [S] int32 what each row last read; the plan's arrays are of S rows too. Several
        rows of padding may share line 0.
        """
        scores = None
        if inputs.edits is not None:
            scores = self._stage(_edited)(logits, inputs.edits, tokens)
        by_kernel = kernels.draws(logits, self._vocab_size)
        if inputs.allowed is not None and not by_kernel:
            scores = self._stage(_masked)(logits if scores is None else scores, inputs.allowed)
        kind = replace(plan, edits=False, unseen=False, logprobs=False, tops=0, masked=False)
        arrays = inputs._replace(edits=None, allowed=inputs.allowed if by_kernel else None)
        drawn = self._stage(_drawn, kind)
        table, sampled, finite = drawn(table, rows, logits, scores, arrays)
        if not plan.logprobs:
            return table, Sampled(sampled, finite)
        found = self._stage(_logprobs, plan.tops)(logits, sampled)
        return table, Sampled(sampled, finite, *found)

    def warm(
        self, logits: mx.array, table: mx.array, tops: Sequence[int] = (0, FEW_TOPS), part: slice = slice(None)
    ) -> None:
        """Compiles every stage for logits [S, V] like these, by running it; ``part`` of the ways to draw, or all."""
        by_kernel = kernels.draws(logits, self._vocab_size)  # decided before a trace asks
        if not by_kernel:
            kernels.verify(mx.float32, "limits")
        nobody = mx.zeros(logits.shape[0], mx.int32)
        for plan, inputs in self._ways(logits.shape[0], tops, by_kernel)[part]:
            mx.eval(self.draw(logits, plan, inputs, nobody, table, nobody))

    def _ways(self, size: int, tops: Sequence[int], by_kernel: bool) -> list[tuple[SamplingPlan, SamplingInputs]]:
        """What draws for ``size`` rows that between them go through every stage.

        A mask is a stage that ends as edits do; a kernel takes it as one array more, so edits are traced by themselves.
        """
        mask = mx.array(np.full((size, -(-self._vocab_size // 32)), 2**32 - 1, np.uint32))
        plan = SamplingPlan(self._vocab_size)
        open_ways = [
            *_kinds(self._vocab_size, size),
            *((plan, SamplingInputs(edits=_no_edits(places, size))) for places in EDIT_PLACES),
        ]
        if by_kernel:
            edits = _no_edits(EDIT_PLACES[0], size)
            open_ways += [(kind, inputs._replace(edits=edits)) for kind, inputs in _kinds(self._vocab_size, size)][1:]
        asked = [replace(plan, logprobs=True, tops=min(count, self._vocab_size)) for count in tops]
        return [  # what has most operations of its own first, for processes that share them
            *((plan, SamplingInputs()) for plan in asked),
            *open_ways,
            *((plan, inputs._replace(allowed=mask)) for plan, inputs in open_ways),
        ]

    def _stage(self, run: Callable[..., Any], *settings: Any) -> Callable[..., Any]:
        """``run`` of the vocabulary's size and ``settings``, compiled."""
        if (run, settings) not in self._functions:
            self._functions[run, settings] = self._compiler.compile(partial(run, self._vocab_size, *settings))
        return self._functions[run, settings]


def _edited(vocab_size: int, logits: mx.array, edits: LogitEdits, tokens: mx.array) -> mx.array:
    return edit_logits(existing(logits, vocab_size), edits, tokens)


def _masked(vocab_size: int, logits: mx.array, allowed: mx.array) -> mx.array:
    return mask_logits(existing(logits, vocab_size), allowed)


def _drawn(
    _: int,
    plan: SamplingPlan,
    table: mx.array,
    rows: mx.array,
    logits: mx.array,
    scores: mx.array | None,
    inputs: SamplingInputs,
) -> tuple[mx.array, mx.array, mx.array]:
    tokens, finite = draw(logits, scores, plan, inputs)
    return mx.put_along_axis(table, rows, tokens, axis=0), tokens, finite


def _logprobs(vocab_size: int, tops: int, logits: mx.array, tokens: mx.array) -> tuple[mx.array, ...]:
    found = token_logprobs(logits, vocab_size, tokens, tops)
    return tuple(a for a in found if a is not None)


def _kinds(vocab_size: int, size: int) -> Iterator[tuple[SamplingPlan, SamplingInputs]]:
    """Every way to draw, with arrays of ``size`` rows that all are greedy."""
    yield SamplingPlan(vocab_size), SamplingInputs()
    zeros, endless = mx.zeros(size), mx.full(size, np.inf)
    hot = SamplingInputs(temperature=zeros, keys=mx.zeros((size, 2), mx.uint32), log_min_p=-endless)
    for top_k in (False, True):
        for top_p in (False, True):
            plan = SamplingPlan(vocab_size, random=True, top_k=top_k, top_p=top_p, min_p=True)
            most = mx.full(size, 2**31 - 1, mx.int32) if top_k else None
            yield plan, hot._replace(top_k=most, top_p=endless if top_p else None)


def _no_edits(places: int, size: int) -> LogitEdits:
    """Edits that change nothing."""
    nowhere, one, nothing = mx.zeros(places, mx.int32), mx.ones(places), mx.zeros(places)
    unseen = UnseenEdits(one, nothing, mx.ones(size), mx.zeros(size))
    return LogitEdits(nowhere, nowhere, one, nothing, unseen)
