"""Vectors of prompts: which rows a step computes for them, and what it makes of these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from pippin.inputs import Step
from pippin.types import RowResult, Work


@dataclass(frozen=True, slots=True)
class PooledRows:
    """Tokens ``first`` … ``first + count - 1`` of the batch's ``work``-th work, which go into its request's vector.

    With ``labels`` (of the last token only), what goes in are these tokens' log probabilities behind it.
    """

    work: int
    first: int
    count: int
    labels: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Vectors:
    """What a step gives to vectors, lazily, with the works that get it: hidden states summed over each work's tokens,
    float32 [n, hidden], and log probabilities of labels, float32 [m, most labels], of which each work has its first.
    """

    states_of: tuple[int, ...]
    states: mx.array | None
    labels_of: tuple[PooledRows, ...]
    labels: mx.array | None

    @property
    def arrays(self) -> list[mx.array]:
        return [a for a in (self.states, self.labels) if a is not None]


def pooled_rows(works: Sequence[Work]) -> list[PooledRows]:
    """What each work gives to its request's vector, if anything."""
    return [
        PooledRows(i, w.pools_from, w.end - w.pools_from, w.request.pooling.labels)
        for i, w in enumerate(works)
        if w.pools_from is not None and w.request.pooling is not None
    ]


def rows_of_tokens(
    step: Step, works: Sequence[Work], pools: Sequence[PooledRows], first: int
) -> tuple[list[int], list[int]]:
    """Flattened rows of the tokens in ``pools`` that are of these works, numbered from ``first`` on.

    Those whose logits are wanted, and those whose hidden states are.
    """
    labelled: list[int] = []
    kept: list[int] = []
    for p in pools:
        if first <= p.work < first + len(works):
            last = step.lasts[p.work - first]
            rows = range(last - (works[p.work - first].end - 1 - p.first), last + 1)
            (labelled if p.labels else kept).extend(rows)
    return labelled, kept


def pool(pools: Sequence[PooledRows], hidden: mx.array | None, logits: mx.array, vocab_size: int) -> Vectors:
    """Lazy: ``hidden`` [n, hidden] and ``logits`` [m, vocab] of the rows that ``rows_of_tokens`` gave, to vectors.

    Ids from ``vocab_size`` on are no tokens, and have no probability.
    """
    summed = [p for p in pools if not p.labels]
    labelled = [p for p in pools if p.labels]
    states = _sums(hidden.astype(mx.float32), [p.count for p in summed]) if hidden is not None else None
    labels = None
    if labelled:
        raw = logits[:, :vocab_size].astype(mx.float32)
        most = max(len(p.labels) for p in labelled)
        ids = mx.array([[*p.labels, *[0] * (most - len(p.labels))] for p in labelled], dtype=mx.int32)
        labels = mx.take_along_axis(raw, ids, axis=-1) - mx.logsumexp(raw, axis=-1, keepdims=True)
    return Vectors(tuple(p.work for p in summed), states, tuple(labelled), labels)


def _sums(rows: mx.array, counts: Sequence[int]) -> mx.array:
    """Sums of runs of so many rows each."""
    if all(count == 1 for count in counts):
        return rows
    sums, at = [], 0
    for count in counts:
        sums.append(rows[at : at + count].sum(axis=0, keepdims=True))
        at += count
    return mx.concatenate(sums)


def read_vectors(vectors: Vectors, results: Sequence[RowResult]) -> None:
    """Waits for a step's vectors, and puts them into the results of its works."""
    found = [(i, row) for i, row in zip(vectors.states_of, _rows(vectors.states), strict=True)]
    found += [(p.work, row[: len(p.labels)]) for p, row in zip(vectors.labels_of, _rows(vectors.labels), strict=True)]
    for work, row in found:
        results[work].pooled = row
        results[work].finite = bool(np.isfinite(row).all())


def _rows(values: mx.array | None) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.zeros((0, 0), np.float32) if values is None else np.array(values)
