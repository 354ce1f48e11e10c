"""Sparse edits of logits: penalties, logit_bias, and stop tokens that may not come yet.

Only ids that a row edits are listed, so a row pays for what it uses. Per listed id, in this order:
repetition penalty (Keskar et al. 2019, arXiv:1909.05858: positive logits are divided, others multiplied; ids of
prompt and answer), frequency and presence penalties (OpenAI's; ids of the answer), bias, prohibition.

The newest token of a row may not have reached the host. Its id is on the device, so every listed id
also carries the values that hold if it is that token, and a row has values for a token that is not listed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from pippin.types import Work

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


class UnseenEdits(NamedTuple):
    """Edits that hang on each row's newest token: float32 [E] if a listed id is it, [S] if no listed id is."""

    scale: mx.array
    add: mx.array
    row_scale: mx.array
    row_add: mx.array


class LogitEdits(NamedTuple):
    """Edits of E places, E a power of two; ``rows`` and ``ids`` int32 [E], ``scale`` and ``add`` float32 [E].

    logit = (logit / scale if logit > 0 else logit * scale) + add. Filler repeats the first place, with equal values.
    """

    rows: mx.array
    ids: mx.array
    scale: mx.array
    add: mx.array
    unseen: UnseenEdits | None


class _RowEdits(NamedTuple):
    """One row's edits on the host; ``*_again`` hold for an id that turns out to be the unseen token."""

    ids: Ints
    scale: Floats
    add: Floats
    scale_again: Floats
    add_again: Floats
    unseen: tuple[float, float] | None  # scale, add


def logit_edits(works: Sequence[Work], vocab_size: int, size: int) -> LogitEdits | None:
    """What rows 0 … len(works)-1 of ``size`` change, or None if nothing. Ids of no token are left out."""
    found = [(row, _row_edits(work, vocab_size)) for row, work in enumerate(works) if _edits_anything(work)]
    found = [(row, edits) for row, edits in found if edits.ids.size]
    if not found:
        return None
    rows = np.concatenate([np.full(edits.ids.size, row) for row, edits in found])
    filler = (1 << (rows.size - 1).bit_length()) - rows.size

    def places(values: list[npt.NDArray[np.generic]], dtype: npt.DTypeLike) -> mx.array:
        joined = np.concatenate(values).astype(dtype)
        return mx.array(np.concatenate([joined, np.repeat(joined[:1], filler)]))

    unseen = None
    if any(edits.unseen for _, edits in found):
        row_values = np.tile(np.array([[1.0], [0.0]], np.float32), size)
        for row, edits in found:
            if edits.unseen:
                row_values[:, row] = edits.unseen
        unseen = UnseenEdits(
            places([e.scale_again for _, e in found], np.float32),
            places([e.add_again for _, e in found], np.float32),
            *map(mx.array, row_values),
        )
    return LogitEdits(
        places([rows], np.int32),
        places([e.ids for _, e in found], np.int32),
        places([e.scale for _, e in found], np.float32),
        places([e.add for _, e in found], np.float32),
        unseen,
    )


def edit_logits(logits: mx.array, edits: LogitEdits, input_tokens: mx.array) -> mx.array:
    """Edited copy of float32 [S, n]; ``input_tokens`` int [S] is each row's newest token."""
    edited = mx.array(logits)
    scale, add = edits.scale, edits.add
    unseen = edits.unseen
    if unseen is not None:
        newest = input_tokens.astype(mx.int32)
        match = edits.ids == newest[edits.rows]
        scale, add = mx.where(match, unseen.scale, scale), mx.where(match, unseen.add, add)
    edited[edits.rows, edits.ids] = _edit(edited[edits.rows, edits.ids], scale, add)
    if unseen is not None:
        listed = mx.zeros(newest.shape, mx.int32).at[edits.rows].maximum(match.astype(mx.int32)) > 0
        every = mx.arange(newest.size)
        newest = mx.clip(newest, 0, logits.shape[-1] - 1)  # rows without penalties may have read any id
        old = edited[every, newest]
        edited[every, newest] = mx.where(listed, old, _edit(old, unseen.row_scale, unseen.row_add))
    return edited


def _edit(logits: mx.array, scale: mx.array, add: mx.array) -> mx.array:
    return mx.where(logits > 0, logits / scale, logits * scale) + add


def _edits_anything(work: Work) -> bool:
    p = work.request.params
    return bool(
        p.logit_bias
        or p.frequency_penalty
        or p.presence_penalty
        or p.repetition_penalty != 1
        or work.end - work.request.num_prompt < p.min_new_tokens
    )


def _row_edits(work: Work, vocab_size: int) -> _RowEdits:
    request, p = work.request, work.request.params
    repetition, often, once = p.repetition_penalty, p.frequency_penalty, p.presence_penalty
    unseen = work.end > len(request.tokens) and bool(often or once or repetition != 1)
    prompt = _unique(request.tokens[: request.num_prompt] if repetition != 1 else (), vocab_size)[0]
    penalised = often or once or repetition != 1
    answer, times = _unique(request.tokens[request.num_prompt : work.end] if penalised else (), vocab_size)
    bias = {i: b for i, b in p.logit_bias.items() if 0 <= i < vocab_size}
    forbidden, _ = _unique(tuple(_stops(work)), vocab_size)
    ids = np.unique(np.concatenate([prompt, answer, np.array(list(bias), np.int64), forbidden]))
    if unseen and not ids.size:
        ids = np.zeros(1, np.int64)  # any id may be listed, and an array of places must not be empty
    counts = np.zeros(ids.size)
    counts[np.searchsorted(ids, answer)] = times
    repeated = np.isin(ids, prompt, assume_unique=True) | (counts > 0)
    scale = np.where(repeated, repetition, 1.0)
    add = -often * counts - once * (counts > 0)
    add[np.searchsorted(ids, np.array(list(bias), np.int64))] += list(bias.values())
    add[np.searchsorted(ids, forbidden)] = -math.inf
    if not unseen:
        return _RowEdits(ids, scale, add, scale, add, None)
    again = np.full(ids.size, repetition), add - often - once * (counts == 0)
    return _RowEdits(ids, scale, add, *again, (repetition, -often - once))


def _stops(work: Work) -> set[int]:
    """Ids that would end the answer before it has min_new_tokens."""
    request, p = work.request, work.request.params
    if work.end - request.num_prompt >= p.min_new_tokens:
        return set()
    return set(p.stop_token_ids) | (set() if p.ignore_eos else request.eos)


def _unique(tokens: Sequence[int], vocab_size: int) -> tuple[Ints, Ints]:
    """The distinct ids that exist, ascending, and how often each occurs."""
    ids, counts = np.unique(np.array(tokens, np.int64), return_counts=True)
    exists = (ids >= 0) & (ids < vocab_size)
    return ids[exists], counts[exists]
