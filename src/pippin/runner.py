"""Runs batches on MLX: the only place where requests become arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from pippin.attention import AttentionBackend
from pippin.cache.pool import KVPool
from pippin.graph import DecodeGraphs, padded_lengths
from pippin.inputs import Step
from pippin.models.deferred import Fusions
from pippin.models.lora import AdapterRows, adapter_rows
from pippin.models.seam import NO_FUSIONS, Seam, active
from pippin.penalties import TokenCounts
from pippin.pooling import PooledRows, Vectors, pool, pooled_rows, read_vectors, rows_of_tokens
from pippin.profile.timeline import Lap, no_lap
from pippin.sampler import Sampled, SamplingInputs, SamplingPlan, allow, prompt_logprobs, sample, sampling_inputs
from pippin.types import Batch, Request, RowResult, SamplingParams, TokenLogprob, Work

# Inputs of fewer elements are of another address space in a Metal kernel.
_LEAST_TABLE = 8
# The last tokens of prompts in a forward of their own read all weights again: what that saves must be worth it.
_LEAST_AHEAD = 32


# K and V as numpy can hold them, by bytes an element: it has no bfloat16.
_BITS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}


Masks = Callable[[Sequence[Work]], Callable[[], npt.NDArray[np.uint32]]]
"""Begins, for works that sample, and then gives which tokens each may draw, as ``sampler.allow`` takes them."""


class Flight(Protocol):
    """A step that is queued on the device."""

    @property
    def batch(self) -> Batch: ...

    def draw(self, masks: Masks) -> None:
        """Queues the draws of a step whose requests have grammars; nothing is left to queue of any other.

        ``masks`` needs the step before to have been read, and works while the device runs this one.
        """
        ...

    def read(self) -> list[RowResult]:
        """Waits for the step; a result for each work, in order. Call once."""
        ...


class ModelRunner(Protocol):
    """What the engine needs of a model: queue a batch now, read it later."""

    def launch(self, batch: Batch) -> Flight: ...

    def reset(self) -> None:
        """After a step that failed: forget what is stored and what is queued."""
        ...


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Prompt tokens ``first`` … ``first + count - 1`` of the batch's ``work``-th work, whose logprobs are asked for."""

    work: int
    first: int
    count: int


@dataclass(slots=True)
class InFlight:
    """A queued step of MlxModelRunner. Holds only small arrays: a reference to the pool would force its copy.

    ``works`` are the batch's, in the order in which the backend runs them. ``draws`` is what is left to do if the draws
    wait for masks.
    """

    batch: Batch
    works: tuple[Work, ...]
    sampled: Sampled | None
    prompts: tuple[PromptRows, ...]
    prompt_values: tuple[mx.array, mx.array | None, mx.array | None] | None
    draws: Callable[[Masks], Sampled] | None = None
    vectors: Vectors | None = None

    def draw(self, masks: Masks) -> None:
        if self.draws is not None:
            self.sampled, self.draws = self.draws(masks), None

    def read(self) -> list[RowResult]:
        results = [RowResult() for _ in self.works]
        if self.sampled is not None:
            self._read_samples(self.sampled, [i for i, w in enumerate(self.works) if w.samples], results)
        if self.prompt_values is not None:
            self._read_prompts(self.prompt_values, results)
        if self.vectors is not None:
            read_vectors(self.vectors, results)
        for work, result in zip(self.works, results, strict=True):
            if work.logprobs_from is not None and work.start == 0 and work.logprobs_from <= 1:
                nothing_before = TokenLogprob(work.request.tokens[0], None)
                result.prompt_logprobs = [nothing_before, *result.prompt_logprobs]
        at = {id(work): i for i, work in enumerate(self.works)}
        return [results[at[id(work)]] for work in self.batch.works]

    def _read_samples(self, sampled: Sampled, works: Sequence[int], results: list[RowResult]) -> None:
        tokens = _list(sampled.tokens)
        finite = _list(sampled.finite)
        logprobs = _list(sampled.logprob) if sampled.logprob is not None else None
        tops = _tops(sampled.top_ids, sampled.top_logprobs)
        for row, i in enumerate(works):
            results[i].token = tokens[row]
            results[i].finite = finite[row]
            params = self.works[i].request.params
            if logprobs is not None and params.logprobs:
                top = tops[row][: params.top_logprobs] if tops else []
                results[i].logprob = TokenLogprob(tokens[row], logprobs[row], top)

    def _read_prompts(
        self, values: tuple[mx.array, mx.array | None, mx.array | None], results: list[RowResult]
    ) -> None:
        logprobs, tops = _list(values[0]), _tops(values[1], values[2])
        at = 0
        for rows in self.prompts:
            request = self.works[rows.work].request
            found = []
            for i in range(rows.count):
                top = tops[at + i][: request.params.top_logprobs] if tops else []
                found.append(TokenLogprob(request.tokens[rows.first + i], logprobs[at + i], top))
            results[rows.work].prompt_logprobs = found
            at += rows.count


class MlxModelRunner:
    """Queues batches for one model on one device.

    ``_last_token`` [max_running + 1] int32 holds each row's newest token, perhaps not computed yet: step n+1 reads it
    there, and so is built before the host has seen step n. Row 0 is scratch. Where writes are in place, every step's
    table hangs on all that the step reads, so whatever takes it waits for that; elsewhere a step that draws nothing
    evaluates its writes only, and nothing behind the last layer's. ``graph_rows``: most single tokens of a step that is
    compiled, ``fusions`` what a forward defers (``models.deferred``).
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
        fusions: Fusions = NO_FUSIONS,
    ) -> None:
        self.model = model
        self.fusions = fusions
        self.backend = backend
        self.pool = pool
        self._vocab_size = vocab_size
        self._token_counts = TokenCounts()
        self._graph_rows = graph_rows
        self._max_running = max_running
        self._warmed = 0
        self._unqueued: list[mx.array] = []
        self._queued = True
        self.lap: Lap = no_lap
        self.graphs = self._make_graphs()
        self._last_token = mx.zeros((max(max_running + 1, _LEAST_TABLE),), dtype=mx.int32)
        mx.eval(self._last_token)

    def _make_graphs(self) -> DecodeGraphs | None:
        if not self.pool.in_place or not self._graph_rows or self.pool.states:
            return None
        return DecodeGraphs(self.model, self.backend, self.pool, most_rows=self._graph_rows, fusions=self.fusions)

    def warm_up(self, context_length: int, tell: Callable[[int, int], None]) -> None:
        """Compiles the steps of single tokens that will come, greedy and with a temperature; ``tell`` (done, all).

        Everything but prompts is then compiled: ``traces`` counts what is not.
        """
        if self.graphs is None:
            return
        rows = min(self._graph_rows, self._max_running)
        sizes = sorted({min(1 << i, rows) for i in range(rows.bit_length() + 1)})
        shapes = [(size, length) for length in padded_lengths(context_length) for size in sizes]
        for done, (size, length) in enumerate(shapes):
            tell(done, len(shapes))
            for temperature in (0.0, 1.0):
                nobody = Request("warm-up", [0], 1, SamplingParams(temperature=temperature, seed=0))
                works = [Work(nobody, 0, 1, True)]
                plan, inputs = sampling_inputs(works, self._vocab_size, pad_to=size, counts=self._token_counts)
                self.graphs.warm(plan, inputs, self._last_token, size, length)
        tell(len(shapes), len(shapes))
        self._warmed = self.graphs.num_traced

    def traces(self) -> int:
        """How many steps were compiled while serving: none, once all shapes have come up."""
        return self.graphs.num_traced - self._warmed if self.graphs is not None else 0

    def launch(self, batch: Batch) -> InFlight:
        """Queues a step; returns before it has run.

        Where our kernel writes the pool in place, the step waits on the device for the one before. Where MLX's own
        indexed update does, it is in place only if no step in flight still holds the pool: then the step before is
        queued now, and this one, built while that runs, by the next launch or by whoever reads it first.
        """
        if self.graphs is not None and self.graphs.takes(batch.works):
            return self._launch_graph(self.graphs, batch)
        if self.graphs is not None:
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
            plan, inputs = sampling_inputs(sampling, self._vocab_size, counts=self._token_counts)
            draws = partial(self._draw, sampling, plan, inputs, logits[: len(samples)], step_tokens)
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

    def _draw(
        self,
        works: Sequence[Work],
        plan: SamplingPlan,
        inputs: SamplingInputs,
        logits: mx.array,
        step_tokens: mx.array,
        masks: Masks | None,
    ) -> Sampled:
        """Draws for the first rows of logits, one a work, and puts the tokens into the device table.

        With ``masks`` it queues the step, which they are made beside, and then the draws.
        """
        if masks is not None:
            made = masks(works)
            self._queue()
            plan, inputs = allow(plan, inputs, made(), len(logits))
        sampled = sample(logits, plan, inputs, step_tokens)
        rows = mx.array([w.request.row for w in works], dtype=mx.int32)
        self._last_token[rows] = sampled.tokens[: len(works)]
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
        ahead = [replace(w, end=w.end - 1, samples=False) for w, c in zip(works, cut, strict=True) if c]
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
        return [replace(w, start=w.end - 1) if c else w for w, c in zip(works, cut, strict=True)]

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

    def _launch_graph(self, graphs: DecodeGraphs, batch: Batch) -> InFlight:
        works = batch.works
        for work in works:
            check_slots(work, self.pool.num_slots)
        size = graphs.size(works)
        plan, inputs = sampling_inputs(works, self._vocab_size, pad_to=size, counts=self._token_counts)
        self.lap("sampling")
        if wait_for_masks(works):
            logits, tokens = graphs.logits(works, self._last_token)
            self.lap("forward")
            mx.async_eval(logits, tokens)  # type: ignore[no-untyped-call]
            self.lap("queue")
            return InFlight(batch, works, None, (), None, partial(self._draw, works, plan, inputs, logits, tokens))
        self._last_token, sampled = graphs.step(works, plan, inputs, self._last_token)
        self.lap("forward")
        mx.async_eval(self._last_token, _arrays(sampled))  # type: ignore[no-untyped-call]
        self.lap("queue")
        return InFlight(batch, works, sampled, (), None)

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

    def read_slots(self, slots: Sequence[int]) -> list[mx.array]:
        """Queues a copy of whole pages as they are after all steps so far: K and V [n, kv_heads, dim] a layer, as bits.

        The next step's writes wait for it where they are in place; elsewhere it is done when this returns.
        """
        if not self.pool.in_place:
            self._queue()
            mx.synchronize()
        rows = [mx.contiguous(r).view(_BITS[r.dtype.size]) for r in self.pool.read_slots(slots, self._last_token)]
        if self.pool.in_place:
            self._hang_on([r.reshape(-1)[:1].astype(mx.int32) for r in rows])
            mx.async_eval(self._last_token, rows)  # type: ignore[no-untyped-call]
        else:
            mx.eval(rows)
        return rows

    def write_slots(self, slots: Sequence[int], rows: Sequence[npt.NDArray[np.generic]]) -> None:
        """Queues writes of what ``read_slots`` gave into ``slots``, behind all steps so far and before the next."""
        check_range(slots, self.pool.num_slots, "K and V were restored")
        dtypes = [s.dtype for s in self.pool.shapes if s for _ in range(2)]
        arrays = [mx.array(r).view(dtype) for r, dtype in zip(rows, dtypes, strict=True)]
        if not self.pool.in_place:
            self._queue()
            mx.synchronize()
        done = self.pool.write_slots(slots, arrays, self._last_token)
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
        self._last_token = mx.zeros(self._last_token.shape, dtype=mx.int32)
        mx.eval(self._last_token)
        states = self.pool.states
        del self.pool, self.graphs  # before the next is made: there may not be memory for two
        if states is not None:
            states.reset()
        self.pool = KVPool(*shape, states)
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
            tokens.append(step.tokens.reshape(-1)[mx.array(rows, dtype=mx.int32)])
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
        """Logits [rows, vocab] of flattened rows, or of the first if there are none; hidden states of ``kept`` rows.

        Where adapters change some rows, nothing is put together: joined projections know nothing of adapters.
        """
        pooled = mx.array([*kept], dtype=mx.int32) if kept else None
        fusions = self.fusions if adapted is None else NO_FUSIONS
        seam = Seam(mx.array([*rows] or [0], dtype=mx.int32), fusions, pooled, adapted)
        with active(seam):
            logits: mx.array = self.model(step.tokens, cache=self.backend.layers(step, self.pool, seam))
        if step.states is not None and self.pool.states is not None:
            self.pool.states.close(step.states)
        return logits.reshape(-1, logits.shape[-1]), seam.hidden

    def _written(self) -> list[mx.array]:
        """What steps leave behind, to be queued with them."""
        return self.pool.arrays + (self.pool.states.take_new() if self.pool.states else [])


def score_prompts(
    works: Sequence[Work], prompts: Sequence[PromptRows], logits: mx.array, vocab_size: int
) -> tuple[mx.array, mx.array | None, mx.array | None]:
    """Log probabilities of the prompts' tokens, one after the other, from the rows of ``logits`` that predict them."""
    targets: list[int] = []
    for p in prompts:
        targets += works[p.work].request.tokens[p.first : p.first + p.count]
    top = max(works[p.work].request.params.top_logprobs for p in prompts)
    return prompt_logprobs(logits, mx.array(targets, dtype=mx.int32), top, vocab_size)


def check_slots(work: Work, num_slots: int) -> None:
    """MLX checks no bounds: a wrong slot would read or write another request's memory, or anybody's."""
    request = work.request
    slots = request.slots[work.start : work.end]
    if request.row < 0 or len(slots) < work.end - work.start:
        raise AssertionError(f"{request.id} was scheduled without a row or slots of the pool")
    check_range(slots, num_slots, f"{request.id} was scheduled")


def check_range(slots: Sequence[int], num_slots: int, what: str) -> None:
    """Raises AssertionError for slots that the pool doesn't have, or of scratch."""
    if not 0 < min(slots) <= max(slots) < num_slots:
        raise AssertionError(f"{what} without slots of the pool")


def wait_for_masks(works: Sequence[Work]) -> bool:
    """Whether what the works draw depends on tokens that the host may not have seen."""
    return any(w.request.matcher is not None for w in works)


def prompt_rows(works: Sequence[Work]) -> list[PromptRows]:
    """Which prompt tokens' logprobs each work yields: its rows predict tokens start+1 … end, if the prompt has them."""
    found = []
    for i, work in enumerate(works):
        if work.logprobs_from is not None:
            first = max(work.start + 1, work.logprobs_from)
            count = min(work.end, work.request.num_prompt - 1) - first + 1
            if count > 0:
                found.append(PromptRows(i, first, count))
    return found


def _rows_of(step: Step, works: Sequence[Work], prompts: Sequence[PromptRows], first: int) -> list[int]:
    """Flattened rows that predict the prompt tokens: token t of a work is predicted at t - 1."""
    rows: list[int] = []
    for p in prompts:
        work, last = works[p.work - first], step.lasts[p.work - first]
        rows += [last - (work.end - t) for t in range(p.first, p.first + p.count)]
    return rows


def _tops(ids: mx.array | None, logprobs: mx.array | None) -> list[list[tuple[int, float]]]:
    if ids is None or logprobs is None:
        return []
    return [list(zip(i, p, strict=True)) for i, p in zip(_list(ids), _list(logprobs), strict=True)]


def _list(values: mx.array) -> list[Any]:
    """Waits for ``values`` and returns them as Python numbers."""
    found: list[Any] = np.asarray(values).tolist()
    return found


def _arrays(values: Sequence[mx.array | None] | None) -> list[mx.array]:
    return [v for v in values or () if isinstance(v, mx.array)]
