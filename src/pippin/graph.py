"""Compiled steps: one function a shape, for steps of decodes and for those with short prompts or chunks.

Tracing a model's layers in Python takes longer than a small model's step on a GPU. Shapes are padded to a few sizes, so
that a trace is used again; what changes from step to step lies in arrays. The pool is captured: only where kernels
write it in place does it stay the same arrays. Functions end at the logits: what is drawn from them is compiled by
itself (``sampler_graphs``), so that the shapes of a model and the ways to draw add up and don't multiply.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from pippin.attention import AttentionBackend
from pippin.attention.rows import Rows
from pippin.cache.pool import KVPool
from pippin.graph_inputs import (
    StepInputs,
    StepShape,
    StepTable,
    WindowInputs,
    decode_sizes,
    example,
    extend_sizes,
    least_length,
    packed_size,
    padded_lengths,
    unpacked,
)
from pippin.inputs import Group, Places, Step
from pippin.models.deferred import Fusions
from pippin.models.seam import NO_FUSIONS, Seam, active
from pippin.replay import Replays, StepFunction
from pippin.types import Work
from pippin.uploads import upload


class Compiler:
    """Compiles functions; ``traces`` counts how often one was traced: once for each shapes of its arrays."""

    def __init__(self) -> None:
        self.traces = 0

    def compile(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """``run``, traced at its first call for each shapes, and after that not run any more."""

        def traced(*arguments: Any) -> Any:
            self.traces += 1
            return run(*arguments)

        compiled: Callable[..., Any] = mx.compile(traced)
        return compiled


class StepGraphs:
    """The compiled functions of one model and pool, made as shapes come up.

    ``most_decodes``: most rows of a step of decodes, ``most_rows`` of any other (0: none is compiled). ``most_works``
    is how many may run at once. Where there are ``replays``, functions are recorded as they are first called.
    """

    def __init__(
        self,
        model: nn.Module,
        backend: AttentionBackend,
        pool: KVPool,
        *,
        most_decodes: int,
        most_rows: int = 0,
        most_works: int = 1,
        fusions: Fusions = NO_FUSIONS,
        compiler: Compiler,
        replays: Replays | None = None,
    ) -> None:
        self.replays = replays
        self._model = model
        self._backend = backend
        self._pool = pool
        self._fusions = fusions
        self._compiler = compiler
        self._functions: dict[StepShape, StepFunction] = {}
        self._table = StepTable(pool.page_size, pool.windows)
        self._decodes = decode_sizes(most_decodes)
        # Other backends' models see their works as lines of one length.
        self._extends = extend_sizes(most_rows, most_works) if isinstance(backend, Rows) else []

    def close(self) -> None:
        """Lets go of the pool, which compiled functions hold: what holds them is a cycle, and nobody may collect it."""
        if self.replays is not None:
            self.replays.close()
        self._functions.clear()
        del self._pool

    def padded_works(self, count: int) -> int | None:
        """How many rows of logits draws for ``count`` are padded to: as many as some step has. None if none has."""
        known = {*self._decodes, *(works for _, works in self._extends)}
        return min((n for n in known if n >= count), default=None)

    def shape(self, works: Sequence[Work]) -> StepShape | None:
        """What the step is padded to; None if it can't go through a graph.

        It can if it runs the model as it is and wants nothing but draws.
        """
        if any(w.request.adapter is not None for w in works):
            return None
        if all(w.decodes for w in works):
            found = next((n for n in self._decodes if n >= len(works)), None)
            return None if found is None else StepShape(found, found)
        if self._pool.tile_rows is None or any(w.logprobs_from is not None or w.pools_from is not None for w in works):
            return None
        rows = sum(w.end - w.start for w in works)
        fits = ((r, n) for r, n in self._extends if rows <= r and len(works) <= n)
        return next((self._extend_shape(r, n, self._pool.tile_rows) for r, n in fits), None)

    def decodes(self, context_length: int) -> list[tuple[StepShape, int]]:
        """Every shape that steps of decodes may be padded to, with the lengths of their contexts."""
        return [(StepShape(n, n), length) for length in padded_lengths(context_length) for n in self._decodes]

    def extends(self, context_length: int) -> list[tuple[StepShape, int]]:
        """The same for all other steps; none before some step has run."""
        if self._pool.tile_rows is None:
            return []
        shapes = [self._extend_shape(rows, works, self._pool.tile_rows) for rows, works in self._extends]
        return [(shape, at) for at in padded_lengths(context_length, extended=True) for shape in shapes]

    def run(self, works: Sequence[Work], shape: StepShape, last_token: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Lazy: of each work that samples, in order, the logits [n, vocab], the token that it read [n] and its line of
        the device table [n], padded to ``shape.works``.

        Recorded ones are queued already, and what they return is to be read before the next step is.
        """
        if shape.tiles:
            assert self._pool.tile_rows is not None
            packed = self._table.extends(works, shape, self._pool.tile_rows)
        else:
            packed = self._table.decodes(works, shape)
        given = upload(packed)
        if self.replays is not None:
            self._record(shape, packed.size, last_token)
            made = self.replays.run((shape, packed.size), last_token, given)
            if made is not None:
                return made
        return self._compiled(shape)(last_token, given)

    def forget(self) -> None:
        """To be called when any other step has run."""
        self._table.forget()

    def warm(self, shape: StepShape, length: int, last_token: mx.array) -> mx.array:
        """Compiles the step of a shape whose works see up to ``length`` tokens, by running it on padding alone: its
        logits [works, vocab]."""
        packed = mx.zeros(packed_size(shape, -(-length // self._pool.page_size), self._pool.windows), mx.int32)
        made = self._compiled(shape)(last_token, packed)
        mx.eval(made)
        self._record(shape, packed.size, last_token)
        return made[0]

    def _record(self, shape: StepShape, size: int, last_token: mx.array) -> None:
        """Records steps of a shape with ``size`` inputs, if it can be and has not been done."""
        if self.replays is not None:
            run = self._compiled(shape)
            self.replays.record((shape, size), shape.rows, run, lambda: self._examples(shape, size), last_token)

    def _examples(self, shape: StepShape, size: int) -> list[mx.array]:
        width = (size - packed_size(shape, 0, self._pool.windows)) // shape.works
        at = least_length(width * self._pool.page_size, extended=shape.tiles > 0) - 1
        tiles = self._pool.tile_rows or 0
        given = [example(token, at, shape, width, self._pool.page_size, self._pool.windows, tiles) for token in (1, 2)]
        assert all(each.size == size for each in given)
        return [*map(mx.array, given)]

    def _extend_shape(self, rows: int, works: int, tile_rows: int) -> StepShape:
        return StepShape(rows, works, works + rows // tile_rows)

    def _compiled(self, shape: StepShape) -> StepFunction:
        if shape not in self._functions:
            self._functions[shape] = self._compiler.compile(self._function(shape))
        return self._functions[shape]

    def _function(self, shape: StepShape) -> StepFunction:
        def run(last_token: mx.array, packed: mx.array) -> tuple[mx.array, mx.array, mx.array]:
            inputs = unpacked(packed, shape, self._pool.windows)
            tokens = mx.where(inputs.unseen > 0, last_token[inputs.rows], inputs.known)
            logits = self._logits(tokens, inputs, last_token)
            return logits, tokens if inputs.lasts is None else tokens[inputs.lasts], inputs.drawn

        return run

    def _logits(self, tokens: mx.array, inputs: StepInputs, after: mx.array) -> mx.array:
        """Logits [works, vocab]; a row of padding attends to nothing and writes to scratch."""
        decodes, own = inputs.tiles is None, self._windowed(inputs)
        step = Step(
            tokens[:, None],
            inputs.positions,
            inputs.slots,
            (self._group(inputs, inputs.positions, inputs.pages),),
            lasts=tuple(range(tokens.shape[0])) if decodes else (),
            after=after,
            decodes=decodes,
            windowed=Places(own.slots, (self._group(inputs, own.positions, own.pages),)) if own is not None else None,
        )
        seam = Seam(inputs.lasts, self._fusions)
        with active(seam):
            logits: mx.array = self._model(step.tokens, cache=self._backend.layers(step, self._pool, seam))
        return logits.reshape(-1, logits.shape[-1])

    def _windowed(self, inputs: StepInputs) -> WindowInputs | None:
        """What windowed layers read; as wide as all others where models hand one mask to layers of both kinds."""
        own = inputs.windowed
        if own is None or isinstance(self._backend, Rows):
            return own
        first = (inputs.positions - own.positions) // self._pool.page_size
        at = mx.arange(inputs.pages.shape[1], dtype=mx.int32) - first[:, None]
        last = own.pages.shape[1] - 1
        pages = mx.take_along_axis(own.pages, mx.clip(at, 0, last), axis=1)
        return WindowInputs(inputs.positions, own.slots, mx.where((at >= 0) & (at <= last), pages, 0))

    def _group(self, inputs: StepInputs, positions: mx.array, pages: mx.array) -> Group:
        """All rows, which read ``pages`` [works, n]; ``positions`` [rows] count from the first of these."""
        return Group(
            first=0,
            count=positions.shape[0],
            rows=1,
            context=pages.shape[1] * self._pool.page_size,
            ragged=True,
            slots=None,
            starts=mx.where(inputs.rows > 0, positions, -1),
            pages=pages,
            tiles=inputs.tiles,
        )
