"""Launches of the kernels that do several small operations of a layer at once; ``reference`` says what they compute."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from pippin.kernels.launch import Launch, Launcher, Source, nothing, params, ready
from pippin.kernels.packing import Packing, Pool, packing_of, storage
from pippin.kernels.paged import packed_constants, packed_source

ROPE_KV_WRITE = Source(
    "rope_kv_write",
    "rope_kv_write",
    ("y", "k_pool", "v_pool", "q_weight", "k_weight", "frequencies", "positions", "slots", "params", "after"),
    ("q", "token"),
)
ADD_RMS_NORM = Source("add_rms_norm", "add_rms_norm", ("x", "r", "weight", "params"), ("total", "out"))
SWIGLU = Source("swiglu", "swiglu", ("y",), ("out",))

MOST_WARPS = 16
# From so many rows on a block takes a whole row: its sines are computed once, and there are blocks enough.
_MANY_ROWS = 256


class Norm(NamedTuple):
    """RMS norm over the last axis: ``weight`` [n] and what is added to the mean square."""

    weight: mx.array
    eps: float


@dataclass(frozen=True, slots=True, eq=False)
class Rope:
    """Rotary embedding of a head's first ``dims`` numbers: ``mx.fast.rope``'s arguments.

    ``frequencies`` [dims / 2] float32 are radians a token, before ``scale``; made of ``base`` if None is given.
    ``length`` is what the rotated numbers are multiplied by (YaRN's mscale, arXiv:2309.00071).
    """

    dims: int
    traditional: bool
    base: float | None
    scale: float
    periods: mx.array | None = None
    length: float = 1.0

    @property
    def frequencies(self) -> mx.array:
        """Radians a token, [dims / 2] float32; made once."""
        if self.periods is None:
            assert self.base is not None
            return _frequencies(self.dims, self.base, self.scale)
        return _inverse(id(self.periods), _Held(self.periods), self.scale)

    def same_as(self, other: Rope) -> bool:
        """Whether both rotate alike."""
        mine, theirs = (
            (r.dims, r.traditional, r.base if r.periods is None else 0, r.scale, id(r.periods), r.length)
            for r in (self, other)
        )
        return mine == theirs


class _Held:
    """An array that a cache's line keeps alive, so that its identity stays its own; not compared."""

    def __init__(self, array: mx.array) -> None:
        self.array = array

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held)

    def __hash__(self) -> int:
        return 0


@lru_cache(maxsize=64)
def _frequencies(dims: int, base: float, scale: float) -> mx.array:
    exponents = np.arange(dims // 2, dtype=np.float64) * 2 / dims
    return ready(mx.array((scale * base**-exponents).astype(np.float32)))


@lru_cache(maxsize=64)
def _inverse(_: int, periods: _Held, scale: float) -> mx.array:
    return ready(scale / periods.array.astype(mx.float32))


@dataclass(frozen=True, slots=True)
class Heads:
    """Where a row of y [T, n] holds q [heads, dim], k [kv_heads, dim] and v [kv_heads, value_dim]: at which number."""

    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    q_at: int
    k_at: int
    v_at: int


def rope_kv_write(
    launch: Launcher,
    y: mx.array,
    k_pool: Pool,
    v_pool: Pool,
    heads: Heads,
    rope: Rope,
    positions: mx.array,
    slots: mx.array,
    norms: tuple[Norm | None, Norm | None],
    after: mx.array | None,
    many_rows: int = _MANY_ROWS,
) -> tuple[mx.array, mx.array]:
    """See ``kernels.rope_kv_write``. ``heads`` is something that ``takes_heads``."""
    q_norm, k_norm = norms
    none = nothing(y.dtype)
    what = _rope_launch(
        heads,
        (rope.dims, rope.traditional),
        (q_norm is not None, k_norm is not None),
        tuple(y.shape),
        y.dtype,
        k_pool.dtype,
        packing_of(k_pool),
        math.prod(y.shape[:-1]) >= many_rows,
    )
    inputs = [
        y,
        storage(k_pool),
        storage(v_pool),
        q_norm.weight if q_norm else none,
        k_norm.weight if k_norm else none,
        rope.frequencies,
        positions,
        slots,
        params(q_norm.eps if q_norm else 0.0, k_norm.eps if k_norm else 0.0, rope.length),
        nothing(mx.int32) if after is None else after,
    ]
    q, token = launch(what, inputs)
    return q, token


@lru_cache(maxsize=1024)
def _rope_launch(
    heads: Heads,
    rope: tuple[int, bool],
    norms: tuple[bool, bool],
    shape: tuple[int, ...],
    dtype: mx.Dtype,
    kv_dtype: mx.Dtype,
    packing: Packing | None,
    whole_rows: bool,
) -> Launch:
    rows, width = math.prod(shape[:-1]), shape[-1]
    lanes = 32 if packing else 1 << (max(heads.dim, heads.value_dim) // 8 - 1).bit_length()
    warps, together = 4, 32 // lanes
    turns = -(-(heads.heads + 2 * heads.kv_heads) // (warps * together))
    each = turns if whole_rows else 1
    return Launch(
        packed_source(ROPE_KV_WRITE, packing),
        (
            ("T", dtype),
            ("KT", kv_dtype),
            ("N", width),
            ("HQ", heads.heads),
            ("HKV", heads.kv_heads),
            ("D", heads.dim),
            ("DV", heads.value_dim),
            ("QAT", heads.q_at),
            ("KAT", heads.k_at),
            ("VAT", heads.v_at),
            ("DIMS", rope[0]),
            ("TRADITIONAL", rope[1]),
            ("QNORM", norms[0]),
            ("KNORM", norms[1]),
            ("WARPS", warps),
            ("EACH", each),
            *packed_constants(packing),
        ),
        (rows, turns // each),
        32 * warps,
        (((rows, heads.heads, heads.dim), dtype), ((8,), mx.int32)),
    )


def takes_heads(heads: Heads, width: int) -> bool:
    """Whether heads in rows of ``width`` numbers begin and end where the kernel's loads do."""
    return all(n % 8 == 0 for n in (width, heads.dim, heads.value_dim, heads.q_at, heads.k_at, heads.v_at))


def takes_rows(width: int, dtype: mx.Dtype) -> bool:
    """Whether rows of so many numbers are whole packs of 16 bytes that a block's registers hold."""
    vec = 16 // dtype.size
    floats = dtype in (mx.float32, mx.float16, mx.bfloat16)
    return floats and width % vec == 0 and width // vec <= 4 * 32 * MOST_WARPS


def add_rms_norm(launch: Launcher, x: mx.array, r: mx.array, norm: Norm) -> tuple[mx.array, mx.array]:
    """See ``kernels.add_rms_norm``."""
    total, out = launch(_norm_launch(tuple(x.shape), x.dtype), [x, r, norm.weight, params(norm.eps, 0.0)])
    return total, out


@lru_cache(maxsize=1024)
def _norm_launch(shape: tuple[int, ...], dtype: mx.Dtype) -> Launch:
    width = shape[-1]
    packs = width * dtype.size // 16
    warps = min(MOST_WARPS, -(-packs // 32))
    constants = (("T", dtype), ("H", width), ("WARPS", warps), ("PACKS", -(-packs // (32 * warps))))
    return Launch(ADD_RMS_NORM, constants, (math.prod(shape[:-1]), 1), 32 * warps, ((shape, dtype),) * 2)


def swiglu(launch: Launcher, y: mx.array) -> mx.array:
    """See ``kernels.swiglu``."""
    return launch(_gated_launch(tuple(y.shape), y.dtype, False), [y])[0]


def geglu(launch: Launcher, y: mx.array) -> mx.array:
    """See ``kernels.geglu``."""
    return launch(_gated_launch(tuple(y.shape), y.dtype, True), [y])[0]


@lru_cache(maxsize=1024)
def _gated_launch(shape: tuple[int, ...], dtype: mx.Dtype, gelu: bool) -> Launch:
    rows, width = math.prod(shape[:-1]), shape[-1] // 2
    packs = width * dtype.size // 16
    threads = min(256, -(-packs // 32) * 32)
    constants = (("T", dtype), ("WIDTH", width), ("THREADS", threads), ("GELU", gelu))
    return Launch(SWIGLU, constants, (rows, -(-packs // threads)), threads, (((*shape[:-1], width), dtype),))
