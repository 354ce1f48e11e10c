"""Compiled steps: one function a shape for steps of decodes.

Tracing a model's layers in Python takes longer than a small model's step on a GPU. Shapes are padded to a few sizes, so
that a trace is used again; what changes from step to step lies in arrays. The pool is captured: only where kernels
write it in place does it stay the same arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from pippin.attention import AttentionBackend
from pippin.cache.pool import KVPool
from pippin.inputs import Group, Step
from pippin.models.deferred import Fusions
from pippin.models.seam import NO_FUSIONS, Seam, active
from pippin.sampler import Sampled, SamplingInputs, SamplingPlan, power_of_two, sample
from pippin.types import Work

_LEAST_WIDTH = 256


class DecodeInputs(NamedTuple):
    """A step of n single tokens, padded to T: int32 [T], but for ``pages`` [T, P]; padding is all zeros.

    ``known`` are the tokens, 0 where ``unseen`` is 1: those are in the device table's line ``rows``.
    """

    known: mx.array
    unseen: mx.array
    rows: mx.array
    positions: mx.array
    write_slots: mx.array
    pages: mx.array


DecodeFunction = Callable[[mx.array, DecodeInputs, SamplingInputs], tuple[mx.array, ...]]
Compile = Callable[[DecodeFunction], DecodeFunction]


class DecodeGraphs:
    """The compiled functions of one model and pool, made as shapes come up."""

    def __init__(
        self,
        model: nn.Module,
        backend: AttentionBackend,
        pool: KVPool,
        *,
        most_rows: int,
        fusions: Fusions = NO_FUSIONS,
        compile: Compile = mx.compile,
    ) -> None:
        self.most_rows = most_rows
        self.num_traced = 0
        self._model = model
        self._backend = backend
        self._pool = pool
        self._fusions = fusions
        self._compile = compile
        self._functions: dict[SamplingPlan, DecodeFunction] = {}
        self._forward = compile(self._run)

    def takes(self, works: Sequence[Work]) -> bool:
        """Whether a step can go through a graph: decodes only, and few enough."""
        return len(works) <= self.most_rows and all(w.decodes for w in works)

    def size(self, works: Sequence[Work]) -> int:
        """The rows that the step is padded to."""
        return min(power_of_two(len(works)), self.most_rows)

    def step(
        self, works: Sequence[Work], plan: SamplingPlan, sampling: SamplingInputs, last_token: mx.array
    ) -> tuple[mx.array, Sampled]:
        """Lazy: the device table after the step, and what was drawn [T]. ``sampling`` is padded to ``size(works)``."""
        inputs = decode_inputs(works, self._pool.page_size, self.size(works))
        if plan not in self._functions:
            self._functions[plan] = self._compile(self._function(plan))
        table, *drawn = self._functions[plan](last_token, inputs, sampling)
        return table, Sampled(**dict(zip(_outputs_of(plan), drawn, strict=True)))

    def logits(self, works: Sequence[Work], last_token: mx.array) -> tuple[mx.array, mx.array]:
        """Lazy: the logits [T, vocab] of a step whose draws are to come, and its input tokens [T]."""
        inputs = decode_inputs(works, self._pool.page_size, self.size(works))
        logits, tokens = self._forward(last_token, inputs, SamplingInputs())
        return logits, tokens

    def _run(self, last_token: mx.array, inputs: DecodeInputs, _: SamplingInputs) -> tuple[mx.array, ...]:
        self.num_traced += 1  # only tracing runs this
        tokens = mx.where(inputs.unseen > 0, last_token[inputs.rows], inputs.known)
        return self._logits(tokens, inputs, last_token), tokens

    def _function(self, plan: SamplingPlan) -> DecodeFunction:
        def run(last_token: mx.array, inputs: DecodeInputs, sampling: SamplingInputs) -> tuple[mx.array, ...]:
            logits, tokens = self._run(last_token, inputs, sampling)
            sampled = sample(logits, plan, sampling, tokens)
            table = mx.put_along_axis(last_token, inputs.rows, sampled.tokens, axis=0)
            return table, *(array for array in sampled if array is not None)

        return run

    def _logits(self, tokens: mx.array, inputs: DecodeInputs, after: mx.array) -> mx.array:
        """Logits [T, vocab] of every row; a row of padding attends to nothing and writes to scratch."""
        size, width = inputs.pages.shape
        group = Group(
            first=0,
            count=size,
            rows=1,
            context=width * self._pool.page_size,
            ragged=True,
            slots=None,
            starts=mx.where(inputs.rows > 0, inputs.positions, -1),
            pages=inputs.pages,
        )
        lasts = tuple(range(size))
        step = Step(tokens[:, None], inputs.positions, inputs.write_slots, (group,), lasts, after, decodes=True)
        seam = Seam(None, self._fusions)
        with active(seam):
            logits: mx.array = self._model(step.tokens, cache=self._backend.layers(step, self._pool, seam))
        return logits.reshape(size, -1)


def _outputs_of(plan: SamplingPlan) -> tuple[str, ...]:
    """Which fields of ``Sampled`` a plan fills, in their order."""
    return ("tokens", "finite", *(["logprob"] * plan.logprobs), *(["top_ids", "top_logprobs"] * bool(plan.tops)))


def decode_inputs(works: Sequence[Work], page_size: int, size: int) -> DecodeInputs:
    """The arrays of a step of single tokens, padded to ``size`` rows and to a power of two of pages."""
    longest = -(-max(w.end for w in works) // page_size)
    width = power_of_two(max(longest, -(-_LEAST_WIDTH // page_size)))
    lines = np.zeros((5, size), np.int32)
    pages = np.zeros((size, width), np.int32)
    for i, work in enumerate(works):
        request, at = work.request, work.start
        seen = at < len(request.tokens)
        slots = np.frombuffer(request.slots, np.int32)[: work.end]
        lines[:, i] = request.tokens[at] if seen else 0, not seen, request.row, at, slots[at]
        first = slots[::page_size]
        pages[i, : len(first)] = first // page_size
    known, unseen, rows, positions, write_slots = (mx.array(line) for line in lines)
    return DecodeInputs(known, unseen, rows, positions, write_slots, mx.array(pages))
