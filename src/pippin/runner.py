"""Runs batches on MLX: the only place where requests become arrays."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, count

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from pippin import kernels
from pippin.attention import AttentionBackend
from pippin.cache.disk import BLOCK
from pippin.cache.pool import KVPool
from pippin.flight import (
    InFlight,
    Masks,
    PromptRows,
    check_range,
    check_slots,
    prompt_rows,
    score_prompts,
    wait_for_masks,
)
from pippin.graph import Compiler, StepGraphs
from pippin.graph_inputs import StepShape
from pippin.inputs import LEAST_INPUT, Step
from pippin.kernels import storage
from pippin.landing import Landing
from pippin.mask_table import MaskTable
from pippin.models.deferred import Fusions
from pippin.models.early import LEAST_TOKENS, EarlyQueue
from pippin.models.lora import AdapterRows, adapter_rows
from pippin.models.seam import NO_FUSIONS, Seam, active
from pippin.penalties import TokenCounts
from pippin.pooling import PooledRows, pool, pooled_rows, rows_of_tokens
from pippin.profile.timeline import Lap, no_lap
from pippin.replay import Replays
from pippin.sampler import Sampled, SamplingInputs, SamplingPlan, allow, sample, sampling_inputs
from pippin.sampler_graphs import SamplerGraphs
from pippin.types import Batch, Work
from pippin.uploads import upload, upload_together
from pippin.warmup import eager_steps, lent_windows, warm_attention

log = logging.getLogger(__name__)

# The last tokens of prompts in a forward of their own read all weights again: what that saves must be worth it.
_LEAST_AHEAD = 32


# K and V as numpy can hold them, by bytes an element: it has no bfloat16.
_BITS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}


class MlxModelRunner:
    """Queues batches for one model on one device.

    ``_last_token`` [max_running + 1] int32 holds each row's newest token, perhaps not computed yet: step n+1 reads it
    there, and so is built before the host has seen step n. Row 0 is scratch. Where writes are in place, every step's
    table hangs on all that the step reads, so whatever takes it waits for that; elsewhere a step that draws nothing
    evaluates its writes only, and nothing behind the last layer's. ``graph_rows``: most single tokens of a step that is
    compiled, ``extend_rows``: most tokens of any other; ``fusions`` what a forward defers (``models.deferred``);
    ``open_replays`` where compiled steps are recorded.
    """

    def __init__(
        self,
        model: nn.Module,
        backend: AttentionBackend,
        pool: KVPool,
        *,
        max_running: int,
        vocab_size: int,
        graph_rows: int = 0,
        extend_rows: int = 0,
        fusions: Fusions = NO_FUSIONS,
        open_replays: Callable[[], Replays | None] = lambda: None,
    ) -> None:
        self.model = model
        self._open_replays = open_replays
        self.fusions = fusions
        self.backend = backend
        self.pool = pool
        self._vocab_size = vocab_size
        self._token_counts = TokenCounts()
        self._masks = MaskTable(vocab_size)
        self._graph_rows = graph_rows
        self._extend_rows = extend_rows
        self._max_running = max_running
        self._compiler = Compiler()
        self._warmed = 0
        self._replayed = 0
        self._unqueued: list[mx.array] = []
        self._landing: Landing | None = None
        self._queued = True
        self.lap: Lap = no_lap
        self.graphs = self._make_graphs()
        self._sampler = SamplerGraphs(vocab_size, self._compiler) if self.graphs else None
        self._last_token = mx.zeros((max(max_running + 1, LEAST_INPUT),), dtype=mx.int32)
        mx.eval(self._last_token)

    def _make_graphs(self) -> StepGraphs | None:
        if not self.pool.in_place or not self._graph_rows or self.pool.states:
            return None
        return StepGraphs(
            self.model,
            self.backend,
            self.pool,
            most_decodes=min(self._graph_rows, self._max_running),
            most_rows=self._extend_rows,
            most_works=self._max_running,
            fusions=self.fusions,
            compiler=self._compiler,
            replays=self._open_replays(),
        )

    def warm_up(self, context_length: int, tell: Callable[[int, int], None]) -> None:
        """Compiles the steps that will come, in an empty pool; ``tell`` (done, all). ``traces`` counts the others."""
        if self.graphs is None or self._sampler is None:
            return
        known: set[int] = set()
        decodes = self.graphs.decodes(context_length)
        first, length = decodes[0]
        tell(0, 1)
        self.graphs.warm(first, length, self._last_token)  # after this, what other steps are cut into is known
        shapes = [*decodes, *self.graphs.extends(context_length)]
        batches = eager_steps(self.pool, max(self._extend_rows, _LEAST_AHEAD))
        done, total = count(1), 1 + len(batches) + len(shapes)
        lengths = sorted({length for _, length in decodes})
        warm_attention(self.pool, [shape.rows for shape, at in decodes if at == length], lengths)
        tell(next(done), total)
        self._masks.warm()
        with lent_windows(self.pool):
            for batch in batches:
                self.launch(batch).read()
                tell(next(done), total)
        for shape, length in shapes:
            made = self.graphs.warm(shape, length, self._last_token)
            if shape.works not in known:
                known.add(shape.works)
                self._sampler.warm(made, self._last_token)
            tell(next(done), total)
        self._warmed = self._compiler.traces
        if replays := self.graphs.replays:
            log.info("%d of %d compiled steps are recorded, in %.2f GB", len(replays), len(shapes), replays.held / 1e9)

    def traces(self) -> int:
        """How many functions were compiled while serving: none, once all shapes have come up."""
        return self._compiler.traces - self._warmed

    def replayed(self) -> int:
        """How many steps were launched as recorded, those of a start aside."""
        replays = self.graphs.replays if self.graphs is not None else None
        return self._replayed + (replays.launches if replays is not None else 0)

    def launch(self, batch: Batch) -> InFlight:
        """Queues a step; returns before it has run.

        Where our kernel writes the pool in place, the step waits on the device for the one before. Where MLX's own
        indexed update does, it is in place only if no step in flight still holds the pool: then the step before is
        queued now, and this one, built while that runs, by the next launch or by whoever reads it first.
        """
        if self.graphs is not None:
            shape = self.graphs.shape(batch.works)
            if shape is not None:
                return self._launch_graph(self.graphs, shape, batch)
            self.graphs.forget()
        works = list(batch.works)
        if not self.pool.in_place:
            self._queue()
            works = self._write_ahead(works)
        self._queued = False
        forwards = self.backend.forwards(works)
        ordered = tuple(chain.from_iterable(forwards))
        samples = [i for i, w in enumerate(ordered) if w.samples]
        prompts, pools = tuple(prompt_rows(ordered)), tuple(pooled_rows(ordered))
        logits, step_tokens, hidden = self._forward(forwards, samples, prompts, pools)
        self.lap("forward")
        sampled, values, draws = None, None, None
        if samples:
            sampling = [ordered[i] for i in samples]
            draws = self._draws(sampling, logits, step_tokens)
            if not wait_for_masks(sampling):
                sampled, draws = draws(None), None
        elif self.pool.in_place:
            self._last_token = self._last_token + 0 * logits[0, :1].astype(mx.int32)
        scored = len(samples) + sum(p.count for p in prompts)
        if prompts:
            values = score_prompts(ordered, prompts, logits[len(samples) : scored], self._vocab_size)
        vectors = pool(pools, hidden, logits[scored:], self._vocab_size) if pools else None
        self.lap("sampling")
        self._unqueued = [*_arrays(sampled), *_arrays(values), *([logits] if draws else [])]
        self._unqueued += vectors.arrays if vectors else []
        if self.pool.in_place:
            self._queue()
        asked = {id(work): whole for work, whole in zip(works, batch.works, strict=True)}
        return InFlight(batch, tuple(asked[id(work)] for work in ordered), sampled, prompts, values, draws, vectors)

    def _draws(
        self, works: Sequence[Work], logits: mx.array, tokens: mx.array, rows: mx.array | None = None
    ) -> Callable[[Masks | None], Sampled]:
        """What draws for works that sample, whose ``logits`` and input ``tokens`` come first.

        ``rows`` [n] int32 are the works' lines of the device table, with logits and tokens padded alike, from a graph.
        """
        sampler, size = self._sampler, len(works) if rows is None else len(logits)
        if rows is None and self.graphs is not None:
            found = self.graphs.padded_works(size)
            sampler, size = (sampler, found) if found else (None, size)
        spare = size - len(works)
        plan, inputs = sampling_inputs(
            works, self._vocab_size, pad_to=size, counts=self._token_counts, compiled=sampler is not None
        )
        if rows is None:  # as they are now: who ends before the draws are queued has none any more
            drawing = [w.request.row for w in works], [*range(len(works))]
            rows, some = upload_together([np.array(values + [0] * spare, np.int32) for values in drawing])
            logits, tokens = (logits[some], tokens[some]) if spare else (logits[:size], tokens)
        return partial(self._draw, sampler, works, plan, inputs, logits, tokens, rows)

    def _draw(
        self,
        sampler: SamplerGraphs | None,
        works: Sequence[Work],
        plan: SamplingPlan,
        inputs: SamplingInputs,
        logits: mx.array,
        tokens: mx.array,
        rows: mx.array,
        masks: Masks | None,
    ) -> Sampled:
        """Draws for each row of logits, the first of which are the works', and puts the tokens into the device table.

        With ``masks`` it queues the step, which they are made beside, and then the draws.
        """
        if masks is not None:
            made = masks(works)
            self._queue()
            plan, inputs = allow(plan, inputs, self._masks.rows(made(), len(logits)))
        if sampler is not None:
            self._last_token, sampled = sampler.draw(logits, plan, inputs, tokens, self._last_token, rows)
        else:
            sampled = sample(logits, plan, inputs, tokens)
            self._last_token[rows] = sampled.tokens
        if masks is not None:
            mx.async_eval(self._last_token, _arrays(sampled))  # type: ignore[no-untyped-call]
        return sampled

    def _write_ahead(self, works: list[Work]) -> list[Work]:
        """Runs prompts up to their last token, for their K and V alone; returns the works that are left to run.

        MLX computes only what is asked for, so of the last layer's attention and MLP nothing is, but for the tokens
        that draw. Where a row reads what another's last token writes, all stay in one forward.
        """
        if self.pool.states:
            return works
        cut = [w.samples and w.logprobs_from is None and w.end - w.start > 1 for w in works]
        ahead = [w._replace(end=w.end - 1, samples=False) for w, c in zip(works, cut, strict=True) if c]
        if sum(w.end - w.start for w in ahead) < _LEAST_AHEAD * len(works):
            return works
        late = {w.request.slots[w.end - 1] for w, c in zip(works, cut, strict=True) if c}
        if any(not late.isdisjoint(w.request.slots[: w.start]) for w in works):
            return works
        self._forward(self.backend.forwards(ahead), (), (), ())
        self.lap("build ahead")
        mx.synchronize()
        self.lap("wait")
        mx.eval(self.pool.arrays)
        self.lap("ahead")
        return [w._replace(start=w.end - 1) if c else w for w, c in zip(works, cut, strict=True)]

    def _queue(self) -> None:
        """Queues what is built and not queued yet, writes to the pool too: those nobody evaluates would pile up."""
        if self._queued:
            return
        self._queued = True
        if not self.pool.in_place:
            mx.synchronize()
        mx.async_eval(self._last_token, self._written(), self._unqueued)  # type: ignore[no-untyped-call]
        self._unqueued = []
        self.lap("queue")

    def _launch_graph(self, graphs: StepGraphs, shape: StepShape, batch: Batch) -> InFlight:
        works = batch.works
        for work in works:
            check_slots(work, self.pool.num_slots)
        logits, tokens, rows = graphs.run(works, shape, self._last_token)
        self.lap("forward")
        sampling = [w for w in works if w.samples]
        draws = self._draws(sampling, logits, tokens, rows)
        sampled = None
        if not sampling:
            self._last_token = self._last_token + 0 * logits[0, :1].astype(mx.int32)
        elif not wait_for_masks(sampling):
            sampled = draws(None)
        self.lap("sampling")
        waits = sampled is None and len(sampling) > 0
        mx.async_eval(self._last_token, _arrays(sampled), *([logits, tokens] if waits else []))  # type: ignore[no-untyped-call]
        self.lap("queue")
        return InFlight(batch, works, sampled, (), None, draws if waits else None)

    def logits(self, batch: Batch) -> mx.array:
        """Runs a batch to the logits of its sampling works, [n, vocab] float32, and draws nothing."""
        forwards = self.backend.forwards(batch.works)
        works = list(chain.from_iterable(forwards))
        samples = [i for i, w in enumerate(works) if w.samples]
        logits, _, _ = self._forward(forwards, samples, (), ())
        at = {id(works[i]): row for row, i in enumerate(samples)}
        logits = logits[mx.array([at[id(w)] for w in batch.works if w.samples], mx.int32)].astype(mx.float32)
        mx.eval(logits, self._written())
        return logits

    def read_slots(self, slots: Sequence[int], windowed: bool = False) -> list[mx.array]:
        """Queues a copy of whole pages as they are after all steps so far: K and V [n, kv_heads, dim] a layer, as bits.

        ``slots`` are of the layers that see everything, or of ``windowed`` ones. The next step's writes wait for it
        where they are in place; elsewhere it is done when this returns.
        """
        if not self.pool.stored(windowed):
            return []
        if not self.pool.in_place:
            self._queue()
            mx.synchronize()
        lines = self.pool.read_slots(slots, self._last_token, windowed)
        rows = [mx.contiguous(r).view(_BITS[r.dtype.size]) for r in lines]
        if self.pool.in_place:
            self._hang_on([r.reshape(-1)[:1].astype(mx.int32) for r in rows])
            mx.async_eval(self._last_token, rows)  # type: ignore[no-untyped-call]
        else:
            mx.eval(rows)
        return rows

    def write_slots(
        self, slots: Sequence[int], rows: Sequence[npt.NDArray[np.generic]], windowed: bool = False
    ) -> None:
        """Queues writes of what ``read_slots`` gave into ``slots``, behind all steps so far and before the next."""
        layers = self.pool.stored(windowed)
        dtypes = [k.dtype for k, v in map(self.pool.layer, layers) for _ in range(2)]
        self._write_slots(slots, [mx.array(r).view(d) for r, d in zip(rows, dtypes, strict=True)], windowed)

    def landing(self, count: int) -> npt.NDArray[np.uint8]:
        """Memory that the device reads, [count, bytes]: for so many blocks of the layers that see everything.

        They lie there as ``read_slots`` gives them, one array after the other.
        """
        arrays = [array for layer in self.pool.stored(windowed=False) for array in self.pool.layer(layer)]
        self._landing = Landing(count, BLOCK, [(array.shape[1:], array.dtype) for array in arrays])
        return self._landing.memory

    def write_landed(self, slots: Sequence[int], places: Sequence[int], skip: int = 0) -> None:
        """``write_slots`` of what lies in ``places``, but for the first ``skip`` tokens; they are free afterwards."""
        landing = self._landing
        assert landing is not None
        if not self.pool.stored(windowed=False):
            return
        if kernels.backend() is None:
            self._copy_landed(slots, landing, places, skip)
        else:
            self._queue_landed(slots, landing, places, skip)

    def _queue_landed(self, slots: Sequence[int], landing: Landing, places: Sequence[int], skip: int) -> None:
        """Where memory is a device's: waits for one copy of what landed, which all layers' writes take theirs from."""
        blocks, rows = landing.rows(places, skip)
        mx.async_eval(blocks)  # type: ignore[no-untyped-call]
        self._write_slots(slots, rows)
        mx.eval(blocks)

    def _copy_landed(self, slots: Sequence[int], landing: Landing, places: Sequence[int], skip: int) -> None:
        """Where memory is the host's."""
        layers = self.pool.stored(windowed=False)
        check_range(slots, self.pool.slots_of(layers[0]), "K and V were restored")
        self._queue()
        mx.synchronize()
        landing.copy(places, slots, [storage(part) for layer in layers for part in self.pool.layer(layer)], skip)

    def _write_slots(self, slots: Sequence[int], rows: Sequence[mx.array], windowed: bool = False) -> None:
        layers = self.pool.stored(windowed)
        if not layers:
            return
        check_range(slots, self.pool.slots_of(layers[0]), "K and V were restored")
        if not self.pool.in_place:
            self._queue()
            mx.synchronize()
        done = self.pool.write_slots(slots, rows, self._last_token, windowed)
        if self.pool.in_place:
            self._hang_on([token[:1] for token in done])
            mx.async_eval(self._last_token)  # type: ignore[no-untyped-call]
        else:
            mx.eval(self.pool.arrays)

    def _hang_on(self, values: Sequence[mx.array]) -> None:
        """Whoever takes the table from now on waits for ``values`` [1] int32 too."""
        self._last_token = self._last_token + 0 * mx.concatenate([*values]).sum()

    def reset(self) -> None:
        """Starts over with an empty pool and no tokens in flight."""
        shape = self.pool.shapes, self.pool.num_slots, self.pool.page_size, self.pool.layout
        self._unqueued = []
        self._queued = True
        self._masks.reset()
        self._last_token = mx.zeros(self._last_token.shape, dtype=mx.int32)
        mx.eval(self._last_token)
        states, windows = self.pool.states, self.pool.windows
        self._replayed = self.replayed()
        if self.graphs is not None:
            self.graphs.close()
        del self.pool, self.graphs  # before the next is made: there may not be memory for two
        if states is not None:
            states.reset()
        self.pool = KVPool(*shape, states, windows)
        self.graphs = self._make_graphs()

    def _forward(
        self,
        forwards: Sequence[Sequence[Work]],
        samples: Sequence[int],
        prompts: Sequence[PromptRows],
        pools: Sequence[PooledRows],
    ) -> tuple[mx.array, mx.array, mx.array | None]:
        """Lazy: logits [samples + prompt rows + labelled rows, vocab], the input token [samples] int32 of each sampling
        row, and the hidden states [n, hidden] of the tokens that go into vectors as they are.

        At least one row of logits comes back, whether anyone wants it or not: the step's outcome hangs on it.
        """
        for work in chain.from_iterable(forwards):
            check_slots(work, self.pool.num_slots)
        heads: list[mx.array] = []
        tails: list[mx.array] = []
        labelled: list[mx.array] = []
        states: list[mx.array] = []
        tokens: list[mx.array] = []
        first, after = 0, self._last_token
        for part in forwards:
            step = replace(self.backend.step(part, self._last_token, self.pool), after=after)
            mine = [i - first for i in samples if first <= i < first + len(part)]
            rows = [step.lasts[i] for i in mine]
            more = _rows_of(step, part, [p for p in prompts if first <= p.work < first + len(part)], first)
            last, kept = rows_of_tokens(step, part, pools, first)
            logits, hidden = self._run(step, rows + more + last, kept, adapter_rows(step, part))
            heads.append(logits[: len(rows)])
            tails.append(logits[len(rows) : len(rows) + len(more)])
            labelled.append(logits[len(rows) + len(more) :][: len(last)])
            states += [hidden] if hidden is not None else []
            tokens.append(step.tokens.reshape(-1)[upload(np.array(rows, np.int32))])
            first += len(part)
            if len(forwards) > 1 and self.pool.in_place:
                after = after + 0 * logits[0, :1].astype(mx.int32)  # the next forward writes when this one has read
                mx.async_eval(after, self._written())  # type: ignore[no-untyped-call]
            elif len(forwards) > 1:
                # A pool array that is written twice in one graph would be copied, or while a step in flight holds it.
                mx.synchronize()
                mx.eval([logits] if rows or more or last else [], states, self._written())
        wanted = [*heads, *tails, *labelled]
        found = mx.concatenate(wanted if any(map(len, wanted)) else [logits])
        return found, mx.concatenate(tokens), mx.concatenate(states) if states else None

    def _run(
        self, step: Step, rows: Sequence[int], kept: Sequence[int], adapted: AdapterRows | None
    ) -> tuple[mx.array, mx.array | None]:
        """Logits [rows, vocab] of flattened rows, or of the first if there are none; hidden states of ``kept`` rows."""
        pooled = mx.array([*kept], dtype=mx.int32) if kept else None
        early = EarlyQueue(step.tokens.size) if self.pool.in_place and step.tokens.size >= LEAST_TOKENS else None
        seam = Seam(upload(np.array([*rows] or [0], np.int32)), self.fusions, pooled, adapted, early)
        with active(seam):
            logits: mx.array = self.model(step.tokens, cache=self.backend.layers(step, self.pool, seam))
        if step.states is not None and self.pool.states is not None:
            self.pool.states.close(step.states)
        return logits.reshape(-1, logits.shape[-1]), seam.hidden

    def _written(self) -> list[mx.array]:
        """What steps leave behind, to be queued with them."""
        return self.pool.arrays + (self.pool.states.take_new() if self.pool.states else [])


def _rows_of(step: Step, works: Sequence[Work], prompts: Sequence[PromptRows], first: int) -> list[int]:
    """Flattened rows that predict the prompt tokens: token t of a work is predicted at t - 1."""
    rows: list[int] = []
    for p in prompts:
        work, last = works[p.work - first], step.lasts[p.work - first]
        rows += [last - (work.end - t) for t in range(p.first, p.first + p.count)]
    return rows


def _arrays(values: Sequence[mx.array | None] | None) -> list[mx.array]:
    return [v for v in values or () if isinstance(v, mx.array)]
