"""Launches that draw a token of each row of logits, and that find the likeliest, reading logits in their own dtype."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx

from pippin.kernels.launch import Constants, Launch, Launcher, Source, nothing, ready

DRAW = Source(
    "draw",
    "draw",
    ("logits", "allowed", "temperature", "noise", "top_k", "top_p", "log_min_p", "sizes"),
    ("tokens", "finite"),
    headers=("draws",),
)
SURVEY = Source("draw_survey", "draw_survey", ("logits", "allowed", "sizes"), ("tops", "ids"), headers=("draws",))
PART = Source(
    "draw_part",
    "draw_part",
    ("logits", "allowed", "temperature", "noise", "log_min_p", "tops", "ids", "sizes"),
    ("scores", "tokens"),
    headers=("draws",),
)
PICK = Source(
    "draw_pick",
    "draw_pick",
    ("scores", "part_tokens", "tops", "ids", "sizes"),
    ("tokens", "finite"),
    headers=("draws",),
)
TOP_LOGPROBS = Source(
    "top_logprobs",
    "top_logprobs",
    ("logits", "tokens", "nobody", "sizes"),
    ("logprob", "ids", "logprobs"),
    headers=("draws",),
)

MOST_TOPS = 256
"""Of each row, so that they and what is left of a search fit into what a block shares."""

_THREADS = 512
_LEAST_TOKENS = 256  # masks of fewer have less than 8 words, which Metal puts into another address space
_MOST_TOKENS = 500_000  # so that a thread has fewer than 1024 of them, to which the kernels' sums are cut
_BLOCKS = 128  # what a GPU has room for: fewer rows are cut in parts
_MOST_PARTS = 32
_GIVEN = {"MASKED": 1, "RANDOM": 2, "TOP_K": 4, "TOP_P": 8, "MIN_P": 16}


class Filters(NamedTuple):
    """What decides a draw, one line per row; None for what no row has. See ``sampler.SamplingInputs``."""

    temperature: mx.array | None = None
    keys: mx.array | None = None
    top_k: mx.array | None = None
    top_p: mx.array | None = None
    log_min_p: mx.array | None = None
    allowed: mx.array | None = None


def takes(logits: mx.array, vocab_size: int) -> bool:
    """Whether the kernels take such rows [S, V] of logits, of which ``vocab_size`` exist."""
    floats = logits.dtype in (mx.float32, mx.float16, mx.bfloat16)
    return floats and logits.ndim == 2 and _LEAST_TOKENS <= vocab_size <= min(_MOST_TOKENS, logits.shape[1])


def draw(launch: Launcher, logits: mx.array, vocab_size: int, filters: Filters) -> tuple[mx.array, mx.array]:
    """See ``kernels.draw``."""
    logits = whole_packs(logits)
    temperature, keys, top_k, top_p, log_min_p, allowed = filters
    given = sum(
        bit
        for bit, array in zip(_GIVEN.values(), (allowed, keys, top_k, top_p, log_min_p), strict=True)
        if array is not None
    )
    masks, heat, noise = (
        _or_nothing(allowed, mx.uint32),
        _or_nothing(temperature, mx.float32),
        _or_nothing(keys, mx.uint32),
    )
    farthest, rows = _or_nothing(log_min_p, mx.float32), logits.shape[0]
    parts = parts_of(rows) if keys is not None and top_k is None and top_p is None else 1
    sizes = _sizes(vocab_size, given, parts, rows if parts > 1 else 0)
    if parts > 1:
        survey, part, pick = _part_launches(rows, parts, logits.dtype)
        tops, ids = launch(survey, [logits, masks, sizes])
        scores, tokens = launch(part, [logits, masks, heat, noise, farthest, tops, ids, sizes])
        tokens, finite = launch(pick, [scores, tokens, tops, ids, sizes])
    else:
        limits = [_or_nothing(top_k, mx.int32), _or_nothing(top_p, mx.float32)]
        what = _draw_launch(rows, logits.dtype)
        tokens, finite = launch(what, [logits, masks, heat, noise, *limits, farthest, sizes])
    return tokens, finite.view(mx.bool_)


def parts_of(rows: int) -> int:
    """In how many parts a row is cut that needs all of its noise: 1 or 4 to 32, a power of two."""
    parts = 1 << (_BLOCKS // rows).bit_length() - 1 if rows <= _BLOCKS else 1
    return 1 if parts < 4 else min(parts, _MOST_PARTS)


def top_logprobs(
    launch: Launcher, logits: mx.array, vocab_size: int, tokens: mx.array, count: int
) -> tuple[mx.array, mx.array, mx.array]:
    """See ``kernels.top_logprobs``."""
    logits = whole_packs(logits)
    what = _logprobs_launch(logits.shape[0], logits.dtype, count)
    inputs = [logits, tokens.astype(mx.int32), nothing(mx.uint32), _sizes(vocab_size, count)]
    logprob, ids, logprobs = launch(what, inputs)
    return logprob, ids, logprobs


def whole_packs(logits: mx.array) -> mx.array:
    """Rows that begin at 16 bytes, as those of most vocabularies do."""
    over = -logits.shape[1] % (16 // logits.dtype.size)
    return mx.pad(logits, [(0, 0), (0, over)]) if over else logits


def _or_nothing(array: mx.array | None, dtype: mx.Dtype) -> mx.array:
    return nothing(dtype) if array is None else array


@lru_cache(maxsize=256)
def _sizes(first: int, second: int, third: int = 0, fourth: int = 0) -> mx.array:
    """A new array costs a copy: of what an engine draws there are few."""
    return ready(mx.array([first, second, third, fourth, 0, 0, 0, 0], mx.int32))


@lru_cache(maxsize=1024)
def _draw_launch(rows: int, dtype: mx.Dtype) -> Launch:
    constants: Constants = (("T", dtype), ("THREADS", _THREADS), *_GIVEN.items())
    return Launch(DRAW, constants, (rows, 1), _THREADS, (((rows,), mx.int32), ((rows,), mx.uint8)))


@lru_cache(maxsize=1024)
def _part_launches(rows: int, parts: int, dtype: mx.Dtype) -> tuple[Launch, Launch, Launch]:
    constants: Constants = (("T", dtype), ("THREADS", _THREADS), *_GIVEN.items())
    blocks, shape = (rows, parts), (rows, parts)
    tops, whole = (((*shape, 2), mx.float32), (shape, mx.int32)), (((rows,), mx.int32), ((rows,), mx.uint8))
    return (
        Launch(SURVEY, constants, blocks, _THREADS, tops),
        Launch(PART, constants, blocks, _THREADS, ((shape, mx.float32), (shape, mx.int32))),
        Launch(PICK, (("THREADS", 32),), (-(-rows // 32), 1), 32, whole),
    )


@lru_cache(maxsize=1024)
def _logprobs_launch(rows: int, dtype: mx.Dtype, count: int) -> Launch:
    outputs = (((rows,), mx.float32), ((rows, max(count, 1)), mx.int32), ((rows, max(count, 1)), mx.float32))
    return Launch(TOP_LOGPROBS, (("T", dtype), ("THREADS", _THREADS)), (rows, 1), _THREADS, outputs)
