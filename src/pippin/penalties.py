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
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from pippin.types import Request, Work
from pippin.uploads import upload_together

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
NO_IDS: Ints = np.zeros(0, np.int64)
LEAST_ROOM = 16  # for ids that come, beside as many as there are


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


def logit_edits(
    works: Sequence[Work], vocab_size: int, size: int, counts: TokenCounts, places: Sequence[int] = ()
) -> LogitEdits | None:
    """What rows 0 … len(works)-1 of ``size`` change, or None if nothing. Ids of no token are left out.

    ``places``: numbers of places to pad to where one is enough, so that there are few; ``unseen`` is there then too.
    """
    found = [(row, _row_edits(work, vocab_size, counts)) for row, work in enumerate(works) if _edits_anything(work)]
    found = [(row, edits) for row, edits in found if edits.ids.size]
    if not found:
        return None
    rows = np.concatenate([np.full(edits.ids.size, row) for row, edits in found])
    filler = next((n for n in places if n >= rows.size), 1 << (rows.size - 1).bit_length()) - rows.size

    def padded(values: list[npt.NDArray[np.generic]], dtype: npt.DTypeLike) -> npt.NDArray[np.generic]:
        joined = np.concatenate(values).astype(dtype)
        return np.concatenate([joined, np.repeat(joined[:1], filler)])

    arrays = [
        padded([rows], np.int32),
        padded([e.ids for _, e in found], np.int32),
        padded([e.scale for _, e in found], np.float32),
        padded([e.add for _, e in found], np.float32),
    ]
    if not places and not any(edits.unseen for _, edits in found):
        at, ids, scale, add = upload_together(arrays)
        return LogitEdits(at, ids, scale, add, None)
    row_values = np.tile(np.array([[1.0], [0.0]], np.float32), size)
    for row, edits in found:
        if edits.unseen:
            row_values[:, row] = edits.unseen
    again = [
        padded([e.scale_again for _, e in found], np.float32),
        padded([e.add_again for _, e in found], np.float32),
        *row_values,
    ]
    at, ids, scale, add, *unseen = upload_together([*arrays, *again])
    return LogitEdits(at, ids, scale, add, UnseenEdits(*unseen))


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


def _row_edits(work: Work, vocab_size: int, counts: TokenCounts) -> _RowEdits:
    request, p = work.request, work.request.params
    repetition, often, once = p.repetition_penalty, p.frequency_penalty, p.presence_penalty
    penalised = bool(often or once or repetition != 1)
    listed, times = counts.of(work, vocab_size) if penalised else (NO_IDS, NO_IDS)
    if repetition == 1:  # the prompt does not matter
        listed, times = listed[times > 0], times[times > 0]
    unseen = penalised and work.end > len(request.tokens)
    ids, count, scale = listed, times.astype(np.float64), np.full(listed.size, repetition)
    bias = [i for i in p.logit_bias if 0 <= i < vocab_size] if p.logit_bias else []
    forbidden = _stops(work, vocab_size)
    more = [*bias, *forbidden]
    if unseen and not (more or listed.size):
        more = [0]  # any id may be listed, and an array of places must not be empty
    if more:
        ids = np.union1d(listed, more) if listed.size else np.array(sorted({*more}), np.int64)
        at = np.searchsorted(ids, listed)
        count, scale = np.zeros(ids.size), np.ones(ids.size)
        count[at], scale[at] = times, repetition
    add = -often * count - once * (count > 0)
    if bias:
        add[np.searchsorted(ids, bias)] += [p.logit_bias[i] for i in bias]
    if forbidden:
        add[np.searchsorted(ids, forbidden)] = -math.inf
    if not unseen:
        return _RowEdits(ids, scale, add, scale, add, None)
    again = add - often - once * (count == 0) if often or once else add
    return _RowEdits(ids, scale, add, np.full(ids.size, repetition), again, (repetition, -often - once))


def _stops(work: Work, vocab_size: int) -> list[int]:
    """Ids that would end the answer before it has min_new_tokens."""
    request, p = work.request, work.request.params
    if work.end - request.num_prompt >= p.min_new_tokens:
        return []
    stops = set(p.stop_token_ids) | (set() if p.ignore_eos else request.eos)
    return [i for i in stops if 0 <= i < vocab_size]


@dataclass(slots=True)
class _Counted:
    """Tokens [0, seen) of a request: the distinct ids, in any order, and how often each is in the answer.

    The first ``size`` of the arrays count; ``places`` says where each id is. So one more token costs no copy.
    """

    ids: Ints
    times: Ints
    size: int
    places: dict[int, int]
    seen: int

    def add(self, token: int) -> None:
        """One more of the answer."""
        at = self.places.setdefault(token, self.size)
        if at == self.size:
            if at == self.ids.size:
                self.ids, self.times = (np.resize(a, 2 * at + LEAST_ROOM) for a in (self.ids, self.times))
            self.ids[at], self.times[at], self.size = token, 0, at + 1
        self.times[at] += 1


def _count(request: Request, end: int, vocab_size: int) -> _Counted:
    ids, at = np.unique(np.array(request.tokens[:end], np.int64), return_inverse=True)
    times = np.bincount(at[request.num_prompt :], minlength=ids.size)
    exists = (ids >= 0) & (ids < vocab_size)
    ids, times = ids[exists], times[exists]
    return _Counted(ids, times, ids.size, {id: place for place, id in enumerate(ids.tolist())}, end)


class TokenCounts:
    """What the penalised requests' prompts and answers hold, kept from step to step: a prompt is counted once."""

    def __init__(self) -> None:
        self._counted: WeakKeyDictionary[Request, _Counted] = WeakKeyDictionary()

    def of(self, work: Work, vocab_size: int) -> tuple[Ints, Ints]:
        """The distinct ids under ``vocab_size`` of the tokens before ``work.end``; each one's count in the answer.

        Good until this is asked again.
        """
        request = work.request
        end = min(work.end, len(request.tokens))
        counted = self._counted.get(request)
        if counted is None or counted.seen > end:
            counted = self._counted[request] = _count(request, end, vocab_size)
        for token in request.tokens[counted.seen : end]:
            if 0 <= token < vocab_size:
                counted.add(token)
        counted.seen = end
        return counted.ids[: counted.size], counted.times[: counted.size]
