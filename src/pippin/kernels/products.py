"""Launches of products with few rows: quantized weights, and experts that each take the rows routed to them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx

from pippin.kernels.launch import Launch, Launcher, Source, nothing

_INPUTS = ("x", "w", "scales", "biases", "indices")

# Rows up to which reading the weights decides, and not multiplying: beyond, MLX's own products are faster.
MOST_ROWS = 256
MOST_PAIRS = 2048
# Pairs of a row and its expert that are faster one by one.
MOST_VECTORS = 16
_FULL = 264  # blocks that fill a GPU twice over: with fewer, blocks take fewer columns


@dataclass(frozen=True, slots=True)
class Weights:
    """A matrix [experts, N, K], or [N, K]: as it is, or of 4 bits in groups of ``group`` with scales and biases."""

    w: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None
    bits: int = 16
    group: int = 0

    @property
    def rows(self) -> int:
        """N."""
        return self.w.shape[-2]

    @property
    def width(self) -> int:
        """K."""
        return self.w.shape[-1] * 32 // self.bits if self.bits < 16 else self.w.shape[-1]

    @property
    def experts(self) -> int:
        return self.w.shape[0] if self.w.ndim == 3 else 1


def takes(x: mx.array, weights: Weights) -> bool:
    """Whether the kernel computes x [.., K] by these weights."""
    if x.dtype not in (mx.float16, mx.bfloat16) or weights.width % 32 or weights.rows % 8:
        return False
    if weights.bits == 16:
        return weights.w.dtype == x.dtype
    affine = weights.scales is not None and weights.biases is not None
    return affine and weights.bits == 4 and weights.group % 32 == 0 and weights.scales.dtype == x.dtype  # type: ignore[union-attr]


def product(launch: Launcher, x: mx.array, weights: Weights, indices: mx.array | None = None, per: int = 1) -> mx.array:
    """See ``kernels.expert_product``; x is [T, K]."""
    dtype = x.dtype
    what = _launch(
        x.shape[0],
        None if indices is None else (indices.shape[0], per),
        (weights.experts, weights.rows, weights.width),
        (weights.bits, weights.group or weights.width),
        dtype,
    )
    none = nothing(dtype)
    inputs = [
        x,
        weights.w,
        none if weights.scales is None else weights.scales,
        none if weights.biases is None else weights.biases,
        nothing(mx.int32) if indices is None else indices,
    ]
    return launch(what, inputs)[0]


@dataclass(frozen=True, slots=True)
class Cut:
    """How a product is cut: a block has ``warps`` and computes ``columns`` (of 8) by ``rows`` (of 16) at once."""

    columns: int
    rows: int
    warps: int


def cut_of(rows: int, experts: int, n: int, k: int, bits: int) -> Cut:
    """For ``rows`` rows an expert; by what was fastest on an H200 (docs/log.md).

    Four warps keep enough loads in flight, and have less to join than eight; few columns where blocks are few.
    """
    tiles = 1 if rows <= 16 else 2 if rows <= 32 else 4
    few = experts * n // 32 < _FULL
    warps = 8 if few and bits == 4 else 4
    return Cut(4 if few else 8, tiles, max(1, min(warps, k // (128 if bits == 4 else 64))))


@lru_cache(maxsize=4096)
def _launch(
    rows: int,
    routed: tuple[int, int] | None,
    shape: tuple[int, int, int],
    form: tuple[int, int],
    dtype: mx.Dtype,
) -> Launch:
    experts, n, k = shape
    bits, group = form
    pairs, per = routed or (rows, 1)
    cut = cut_of(pairs if routed is None else 2 * -(-pairs // experts), min(experts, pairs), n, k, bits)
    constants = (
        ("T", dtype),
        ("N", n),
        ("K", k),
        ("NT", cut.columns),
        ("MT", cut.rows),
        ("WARPS", cut.warps),
        ("BITS", bits),
        ("GROUP", group),
        ("PER", per),
        ("MOST", max(32, 1 << (pairs - 1).bit_length()) if routed else 32),
        ("BY_PAIR", routed is not None and pairs < experts),
    )
    macros = ("EXPERTS",) if routed else ()
    source = Source("expert_mma" if routed else "rows_mma", "expert_mma", _INPUTS, ("out",), macros, ("nibbles",))
    blocks = -(-n // (8 * cut.columns)), min(experts, pairs) if routed else 1
    return Launch(source, constants, blocks, 32 * cut.warps, (((pairs, n), dtype),))


@lru_cache(maxsize=64)
def row_of_pair(pairs: int, per: int) -> mx.array:
    """i // per for each of ``pairs``, uint32; made once, where MLX would make it anew for each product."""
    rows = mx.arange(pairs, dtype=mx.uint32) // per
    mx.eval(rows)
    return rows
