"""Batches that kernels are timed and checked on: shapes of real models, in a shuffled pool."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


@dataclass(frozen=True, slots=True)
class BatchShape:
    """A batch of decodes: ``rows`` contexts of ``context`` tokens, the first of them ``longest`` if that is more."""

    name: str
    rows: int
    context: int
    kv_heads: int = 8
    group: int = 4
    dim: int = 128
    value_dim: int = 128
    dtype: str = "bfloat16"
    page_size: int = 1
    longest: int = 0

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def lengths(self) -> list[int]:
        return [max(self.longest, self.context)] + [self.context] * (self.rows - 1)

    @property
    def kv_bytes(self) -> int:
        """Of the K and V that attention reads."""
        per_token = self.kv_heads * (self.dim + self.value_dim) * DTYPES[self.dtype].size
        return sum(self.lengths) * per_token


@dataclass(slots=True)
class Batch:
    """``k`` and ``v`` are pools, whose objects writes may rebind; the rest is as ``kernels.paged_decode`` takes it."""

    k: mx.array
    v: mx.array
    table: mx.array
    lengths: mx.array
    q: mx.array


GPU_SHAPES = (
    BatchShape("8B, 128 rows of 306", 128, 306),
    BatchShape("8B, 1 row of 306", 1, 306),
    BatchShape("0.6B, 128 rows of 306", 128, 306, group=2),
    BatchShape("8B, 32 rows of 8k", 32, 8192),
    BatchShape("8B, 32 rows of 8k, pages of 16", 32, 8192, page_size=16),
    BatchShape("8B, 1 row of 8k", 1, 8192),
    BatchShape("8B, 1 row of 32k among 32 of 500", 32, 500, longest=32768),
    BatchShape("30B-A3B, 32 rows of 1k", 32, 1024, kv_heads=4, group=8),
    BatchShape("dim 256, 32 rows of 2k", 32, 2048, kv_heads=4, group=2, dim=256, value_dim=256),
    BatchShape("MHA, 32 rows of 2k", 32, 2048, kv_heads=16, group=1, dim=64, value_dim=64),
)
CPU_SHAPES = (
    BatchShape("16 rows of 512", 16, 512, kv_heads=2, dim=64, value_dim=64, dtype="float32"),
    BatchShape("1 row of 2k", 1, 2048, kv_heads=2, dim=64, value_dim=64, dtype="float32"),
)


def make_batch(shape: BatchShape, seed: int = 0) -> Batch:
    """Every sequence's pages lie anywhere in the pool; page 0 is scratch."""
    counts = [-(-n // shape.page_size) for n in shape.lengths]
    pages = np.random.default_rng(seed).permutation(sum(counts)) + 1
    table = np.zeros((shape.rows, max(counts)), np.int32)
    for line, count, start in zip(table, counts, np.cumsum([0, *counts]), strict=False):
        line[:count] = pages[start : start + count]
    slots, dtype = (sum(counts) + 1) * shape.page_size, DTYPES[shape.dtype]
    keys = mx.random.split(mx.random.key(seed), 3)
    made = Batch(
        k=mx.random.normal((slots, shape.kv_heads, shape.dim), key=keys[0], dtype=dtype),
        v=mx.random.normal((slots, shape.kv_heads, shape.value_dim), key=keys[1], dtype=dtype),
        table=mx.array(table),
        lengths=mx.array(np.array(shape.lengths, np.int32)),
        q=mx.random.normal((shape.rows, shape.heads, shape.dim), key=keys[2], dtype=dtype),
    )
    mx.eval(made.k, made.v, made.table, made.lengths, made.q)
    return made
