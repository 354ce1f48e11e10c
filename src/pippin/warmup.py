"""What a first load would find not compiled yet, run once before it comes: kernels' variants, and steps built anew.

A kernel is compiled for its constants, among them how a launch is cut, which hangs on rows and contexts; MLX compiles
some of its own operations when they are first asked for.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
import numpy as np

from pippin.cache.pool import Attending, KVPool
from pippin.inputs import LEAST_INPUT
from pippin.kernels import kv_gather, kv_write, paged_decode, paged_extend
from pippin.types import Batch, Request, SamplingParams, Work

_MOST_TILES = 1024
_SHORT = 20


def warm_attention(pool: KVPool, rows: Sequence[int], lengths: Sequence[int]) -> None:
    """Launches every variant of the attention kernels that steps of so many rows and contexts meet, over no tokens."""
    kinds = {kind.key: (index, kind) for index, kind in pool.attending.items()}
    for index, kind in kinds.values():
        mx.eval(list(_launches(pool, index, kind, rows, lengths)))


def _launches(
    pool: KVPool, index: int, kind: Attending, rows: Sequence[int], lengths: Sequence[int]
) -> Iterator[mx.array]:
    pools = pool.layer(index)
    _, kv_heads, dim = pools[0].shape
    zeros = mx.zeros(LEAST_INPUT, mx.int32)
    keys, values = (mx.zeros((8, kv_heads, p.shape[2]), p.dtype) for p in pools)
    yield kv_write(*pools, keys, values, zeros)
    yield from kv_gather(*pools, zeros[None], page_size=pool.page_size, after=zeros)

    def queries(count: int) -> mx.array:
        return mx.zeros((count, kind.heads, dim), pools[0].dtype)

    for longest in lengths:
        for n in rows:
            table, none = mx.zeros((n, 8), mx.int32), mx.zeros(n, mx.int32)
            yield paged_decode(queries(n), *pools, table, none, kind.form, sinks=kind.sinks, longest=longest)
        for n in (1 << i for i in range(3, _MOST_TILES.bit_length())):
            for few in (LEAST_INPUT - 1, LEAST_INPUT):
                table, none, tiles = zeros[None], zeros[:few], mx.zeros((n, 3), mx.int32)
                q = queries(few)
                yield paged_extend(q, *pools, table, none, tiles, kind.form, sinks=kind.sinks, longest=longest)


@contextmanager
def lent_windows(pool: KVPool) -> Iterator[None]:
    """Gives every page of an empty pool slots in windowed layers, some to several."""
    if pool.windows is None:
        yield
        return
    pages, last = pool.windows.pages, pool.windows.num_slots // pool.page_size - 1
    pages[1:] = 1 + np.arange(len(pages) - 1) % last
    try:
        yield
    finally:
        pages[:] = 0


def eager_steps(pool: KVPool, count: int) -> list[Batch]:
    """Steps of more than ``count`` tokens each, as they are built anew: prompts, a chunk behind a prefix beside single
    tokens and short prompts, and prompts' log probabilities. None where the pool, which must be empty, is too small."""
    each = -(-(2 * count + 3 * _SHORT) // pool.page_size) * pool.page_size
    if 4 * each + pool.page_size > pool.num_slots:
        return []

    def request(row: int, **options: object) -> Request:
        params = SamplingParams(seed=0, **options)  # type: ignore[arg-type]
        made = Request(f"warm-up-{row}", [0] * (2 * count + 3 * _SHORT), 2 * count + _SHORT, params, row=row)
        first = pool.page_size + (row - 1) * each
        made.slots = array("i", range(first, first + each))
        return made

    long, short, single = request(1, temperature=0.0), request(2, temperature=1.0), request(3, temperature=0.0)
    scored = request(4, temperature=1.0, logprobs=True, top_logprobs=5)
    end = count + _SHORT
    return [
        Batch((Work(long, 0, end, False),)),
        Batch((Work(single, 0, 1, True), Work(short, 0, _SHORT, True), Work(long, end, 2 * end, True))),
        Batch((Work(single, 1, 2, True), Work(scored, 0, end, True, logprobs_from=1))),
    ]
