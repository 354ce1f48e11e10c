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
import numpy.typing as npt

from pippin.attention import AttentionBackend
from pippin.cache.pool import KVPool
from pippin.inputs import Group, Step
from pippin.models.deferred import Fusions
from pippin.models.seam import NO_FUSIONS, Seam, active
from pippin.sampler import Sampled, SamplingInputs, SamplingPlan, power_of_two, sample
from pippin.types import Request, Work

_LEAST_WIDTH = 256
_FINE_WIDTH = 4096


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


_LINES = 5


def _unpacked(packed: mx.array, size: int) -> DecodeInputs:
    """The inputs as they lie in one array, which is one copy to the device in place of six."""
    known, unseen, rows, positions, slots = (packed[i * size : (i + 1) * size] for i in range(_LINES))
    return DecodeInputs(known, unseen, rows, positions, slots, packed[_LINES * size :].reshape(size, -1))


def padded_length(tokens: int) -> int:
    """The context that a step is compiled for: a power of two, of four where it is long, so that there are few."""
    length = power_of_two(max(tokens, _LEAST_WIDTH))
    return length if length <= _FINE_WIDTH or length.bit_length() % 2 else 2 * length


def padded_lengths(most: int) -> list[int]:
    """All of them, for contexts of up to ``most`` tokens."""
    found = [padded_length(1)]
    while found[-1] < most:
        found.append(padded_length(found[-1] + 1))
    return found


class DecodeTable:
    """Lays steps of single tokens out, by what has changed since the step before: mostly, a new page now and then."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._requests: list[Request] = []
        self._starts: list[int] = []
        self._pages = np.zeros((0, 0), np.int32)

    def forget(self) -> None:
        """To be called when a step that isn't laid out here has run: slots may be others."""
        self._requests = []

    def inputs(self, works: Sequence[Work], size: int) -> npt.NDArray[np.int32]:
        """The arrays of ``DecodeInputs``, padded to ``size`` rows and ``padded_length``, one after the other."""
        requests, starts = [w.request for w in works], [w.start for w in works]
        width = self._width(max(starts) + 1)
        packed = np.zeros(size * (_LINES + width), np.int32)
        lines = packed[: _LINES * size].reshape(_LINES, size)
        n = len(works)
        lengths = [len(r.tokens) for r in requests]
        lines[0, :n] = [r.tokens[at] if at < m else 0 for r, at, m in zip(requests, starts, lengths, strict=True)]
        lines[1, :n] = [at >= m for at, m in zip(starts, lengths, strict=True)]
        lines[2, :n] = [r.row for r in requests]
        lines[3, :n] = starts
        lines[4, :n] = [r.slots[at] for r, at in zip(requests, starts, strict=True)]
        self._turn(requests, starts, lines[4], (size, width))
        packed[_LINES * size :] = self._pages.reshape(-1)
        return packed

    def _width(self, longest: int) -> int:
        return -(-padded_length(longest) // self._page_size)

    def _turn(
        self, requests: list[Request], starts: list[int], slots: npt.NDArray[np.int32], shape: tuple[int, int]
    ) -> None:
        """Brings the page table up to this step."""
        at = np.array(starts)
        goes_on = self._requests == requests and self._pages.shape == shape
        if goes_on and self._starts == [start - 1 for start in starts]:
            begun = np.flatnonzero(at % self._page_size == 0)
            self._pages[begun, at[begun] // self._page_size] = slots[begun] // self._page_size
        else:
            self._pages = np.zeros(shape, np.int32)
            for i, (request, start) in enumerate(zip(requests, starts, strict=True)):
                first = np.frombuffer(request.slots, np.int32)[: start + 1 : self._page_size]
                self._pages[i, : len(first)] = first // self._page_size
        self._requests, self._starts = requests, starts


DecodeFunction = Callable[[mx.array, mx.array, SamplingInputs], tuple[mx.array, ...]]
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
        self._functions: dict[tuple[SamplingPlan | None, int], DecodeFunction] = {}
        self._table = DecodeTable(pool.page_size)

    def takes(self, works: Sequence[Work]) -> bool:
        """Whether a step can go through a graph: decodes of the model as it is only, and few enough."""
        return len(works) <= self.most_rows and all(w.decodes and w.request.adapter is None for w in works)

    def size(self, works: Sequence[Work]) -> int:
        """The rows that the step is padded to."""
        return min(power_of_two(len(works)), self.most_rows)

    def step(
        self, works: Sequence[Work], plan: SamplingPlan, sampling: SamplingInputs, last_token: mx.array
    ) -> tuple[mx.array, Sampled]:
        """Lazy: the device table after the step, and what was drawn [T]. ``sampling`` is padded to ``size(works)``."""
        table, *drawn = self._call(works, last_token, plan, sampling)
        return table, Sampled(**dict(zip(_outputs_of(plan), drawn, strict=True)))

    def logits(self, works: Sequence[Work], last_token: mx.array) -> tuple[mx.array, mx.array]:
        """Lazy: the logits [T, vocab] of a step whose draws are to come, and its input tokens [T]."""
        logits, tokens = self._call(works, last_token, None, SamplingInputs())
        return logits, tokens

    def forget(self) -> None:
        """To be called when any other step has run."""
        self._table.forget()

    def warm(self, plan: SamplingPlan, sampling: SamplingInputs, last_token: mx.array, size: int, length: int) -> None:
        """Compiles the step of ``size`` rows that see up to ``length`` tokens, by running it on padding alone."""
        packed = mx.zeros(size * (_LINES + -(-length // self._pool.page_size)), mx.int32)
        mx.eval(self._compiled(plan, size)(last_token, packed, sampling))

    def _call(
        self, works: Sequence[Work], last_token: mx.array, plan: SamplingPlan | None, sampling: SamplingInputs
    ) -> tuple[mx.array, ...]:
        size = self.size(works)
        packed = mx.array(self._table.inputs(works, size))
        return self._compiled(plan, size)(last_token, packed, sampling)

    def _compiled(self, plan: SamplingPlan | None, size: int) -> DecodeFunction:
        if (plan, size) not in self._functions:
            self._functions[plan, size] = self._compile(self._function(plan, size))
        return self._functions[plan, size]

    def _function(self, plan: SamplingPlan | None, size: int) -> DecodeFunction:
        """A step of ``size`` rows up to what it draws, or without a plan up to its logits."""

        def run(last_token: mx.array, packed: mx.array, sampling: SamplingInputs) -> tuple[mx.array, ...]:
            self.num_traced += 1  # only tracing runs this
            inputs = _unpacked(packed, size)
            tokens = mx.where(inputs.unseen > 0, last_token[inputs.rows], inputs.known)
            logits = self._logits(tokens, inputs, last_token)
            if plan is None:
                return logits, tokens
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
