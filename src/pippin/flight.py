"""A step that is queued: what was asked of it, what it draws, and how it is read. Whoever runs it, MLX or torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from pippin.masks import RowMasks
from pippin.pooling import Vectors, read_vectors
from pippin.sampler import Sampled, prompt_logprobs
from pippin.types import Batch, RowResult, Token, TokenLogprob, Work

Masks = Callable[[Sequence[Work]], Callable[[], RowMasks]]
"""Begins, for works that sample, and then gives which tokens each may draw."""


class Flight(Protocol):
    """A step that is queued on the device."""

    @property
    def batch(self) -> Batch: ...

    def draw(self, masks: Masks) -> None:
        """Queues the draws of a step whose requests have grammars; nothing is left to queue of any other.

        ``masks`` needs the step before to have been read, and works while the device runs this one.
        """
        ...

    def drawn(self) -> list[tuple[Work, Token]]:
        """Waits for the draws; of works that sample, and whose logits were numbers, what came. From any thread."""
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


_MANY = 64  # slots that numpy looks through sooner than Python does


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
    _lock: Lock = field(default_factory=Lock)
    _tokens: tuple[list[Token], list[bool]] | None = None

    def draw(self, masks: Masks) -> None:
        if self.draws is not None:
            self.sampled, self.draws = self.draws(masks), None

    def drawn(self) -> list[tuple[Work, Token]]:
        if self.sampled is None:
            return []
        sampling = [w for w in self.works if w.samples]
        return [(w, token) for w, token, good in zip(sampling, *self._read_tokens(self.sampled), strict=False) if good]

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
        tokens, finite = self._read_tokens(sampled)
        logprobs = _list(sampled.logprob) if sampled.logprob is not None else None
        tops = _tops(sampled.top_ids, sampled.top_logprobs)
        for row, i in enumerate(works):
            results[i].token = tokens[row]
            results[i].finite = finite[row]
            params = self.works[i].request.params
            if logprobs is not None and params.logprobs:
                top = tops[row][: params.top_logprobs] if tops else []
                results[i].logprob = TokenLogprob(tokens[row], logprobs[row], top)

    def _read_tokens(self, sampled: Sampled) -> tuple[list[Token], list[bool]]:
        """One thread at a time may have an array moved to where the host reads it."""
        with self._lock:
            if self._tokens is None:
                self._tokens = _list(sampled.tokens), _list(sampled.finite)
            return self._tokens

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


def _ends(values: npt.NDArray[np.int32]) -> tuple[int, int]:
    return int(values.min()), int(values.max())


def check_range(slots: Sequence[int], num_slots: int, what: str) -> None:
    """Raises AssertionError for slots that the pool doesn't have, or of scratch."""
    least, most = (min(slots), max(slots)) if len(slots) < _MANY else _ends(np.asarray(slots))
    if not 0 < least <= most < num_slots:
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


def _tops(ids: mx.array | None, logprobs: mx.array | None) -> list[list[tuple[int, float]]]:
    if ids is None or logprobs is None:
        return []
    return [list(zip(i, p, strict=True)) for i, p in zip(_list(ids), _list(logprobs), strict=True)]


def _list(values: mx.array) -> list[Any]:
    """Waits for ``values`` and returns them as Python numbers."""
    found: list[Any] = np.asarray(values).tolist()
    return found
