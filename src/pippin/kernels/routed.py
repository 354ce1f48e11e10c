"""Launches round a layer's experts: who gets a row, what they do with their gate, and the sum of what they say.

``reference`` says what they compute. The products are in ``products``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx

from pippin.kernels.fused import MOST_WARPS, Norm
from pippin.kernels.launch import Launch, Launcher, Source, nothing, params

ROUTE = Source("route", "route", ("keys", "values", "params"), ("indices", "shares"))
EXPERT_GATE = Source(
    "expert_gate",
    "expert_gate",
    ("gate", "up", "gate_bias", "up_bias", "indices", "params"),
    ("out",),
    headers=("gates",),
)
WEIGHED_SUM = Source("weighed_sum", "weighed_sum", ("y", "shares", "indices", "bias", "plus"), ("out",))
WEIGHED_NORM = Source(
    "add_weighed_rms_norm",
    "add_rms_norm",
    ("x", "r", "weight", "params", "shares", "indices", "bias"),
    ("total", "out"),
    ("EXPERTS",),
)

# A lane keeps one of those chosen, and every 32nd of those there are in its registers.
MOST_CHOSEN, MOST_EXPERTS = 32, 512
_WARPS = 4


@dataclass(frozen=True, slots=True)
class Choice:
    """Which columns of a row are chosen, and what shares they get.

    ``chosen`` of the largest keys, or of the smallest; among equal ones the later, or the earlier. ``before``: values
    go through a softmax over the row first (they are the keys then), ``soft``: over those chosen, ``divided``: by their
    sum; all times ``factor``.
    """

    chosen: int
    smallest: bool = False
    later: bool = False
    before: bool = False
    soft: bool = False
    divided: bool = False
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class Gate:
    """silu(gate) * up; or ``clipped``, as gpt-oss has it: (up + 1) * gate * sigmoid(steep * gate), up to ``limit``."""

    clipped: bool = False
    steep: float = 1.0
    limit: float = 0.0

    @property
    def params(self) -> mx.array:
        """What bodies/gates.h takes."""
        return params(self.steep, self.limit)


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """What experts say of tokens: y [T * each, n], row by row, for experts ``indices`` [T * each] int32.

    ``bias`` [experts, n] is still to be added.
    """

    y: mx.array
    indices: mx.array
    bias: mx.array | None = None


def takes_choice(keys: mx.array, values: mx.array, choice: Choice) -> bool:
    """Whether the kernel chooses among so many columns, [.., n] each."""
    floats = keys.dtype in (mx.float32, mx.float16, mx.bfloat16)
    alike = keys.shape == values.shape and keys.dtype == values.dtype
    return floats and alike and choice.chosen <= min(MOST_CHOSEN, keys.shape[-1]) and keys.shape[-1] <= MOST_EXPERTS


def route(launch: Launcher, keys: mx.array, values: mx.array, choice: Choice) -> tuple[mx.array, mx.array]:
    """See ``kernels.route``, for something that it ``takes_choice``."""
    count = keys.shape[-1]
    what = _route_launch(math.prod(keys.shape[:-1]), count, keys.dtype, choice)
    same = keys.reshape(-1, count)
    rows = same if keys is values else values.reshape(-1, count)
    indices, shares = launch(what, [same, rows, params(choice.factor, 0.0)])
    return indices, shares


@lru_cache(maxsize=1024)
def _route_launch(rows: int, count: int, dtype: mx.Dtype, choice: Choice) -> Launch:
    constants = (
        ("T", dtype),
        ("COUNT", count),
        ("CHOSEN", choice.chosen),
        ("SMALLEST", choice.smallest),
        ("LATER", choice.later),
        ("BEFORE", choice.before),
        ("SOFT", choice.soft),
        ("DIVIDED", choice.divided),
        ("WARPS", _WARPS),
    )
    outputs = ((rows, choice.chosen), mx.int32), ((rows, choice.chosen), dtype)
    return Launch(ROUTE, constants, (-(-rows // _WARPS), 1), 32 * _WARPS, outputs)


def expert_gate(launch: Launcher, gate: Pairs, up: Pairs, form: Gate) -> mx.array:
    """See ``kernels.expert_gate``."""
    biased, none = gate.bias is not None, nothing(gate.y.dtype)
    what = _gate_launch(gate.y.shape[0], gate.y.shape[1], gate.y.dtype, biased, form.clipped)
    biases = [none if p.bias is None else p.bias for p in (gate, up)]
    return launch(what, [gate.y, up.y, *biases, gate.indices, form.params])[0]


@lru_cache(maxsize=1024)
def _gate_launch(rows: int, width: int, dtype: mx.Dtype, biased: bool, clipped: bool) -> Launch:
    threads, parts = _cut(width, dtype)
    constants = (("T", dtype), ("WIDTH", width), ("THREADS", threads), ("BIASED", biased), ("CLIPPED", clipped))
    return Launch(EXPERT_GATE, constants, (rows, parts), threads, (((rows, width), dtype),))


def weighed_sum(launch: Launcher, pairs: Pairs, shares: mx.array, plus: mx.array | None = None) -> mx.array:
    """See ``kernels.weighed_sum``; [T, n]."""
    y, bias, none = pairs.y, pairs.bias, nothing(pairs.y.dtype)
    what = _sum_launch(y.shape[0], y.shape[1], shares.shape[-1], y.dtype, bias is not None, plus is not None)
    return launch(what, [y, shares, pairs.indices, none if bias is None else bias, none if plus is None else plus])[0]


@lru_cache(maxsize=1024)
def _sum_launch(pairs: int, width: int, each: int, dtype: mx.Dtype, biased: bool, plus: bool) -> Launch:
    threads, parts = _cut(width, dtype)
    constants = (
        ("T", dtype),
        ("WIDTH", width),
        ("EACH", each),
        ("THREADS", threads),
        ("BIASED", biased),
        ("PLUS", plus),
    )
    rows = pairs // each
    return Launch(WEIGHED_SUM, constants, (rows, parts), threads, (((rows, width), dtype),))


def _cut(width: int, dtype: mx.Dtype) -> tuple[int, int]:
    """(threads of a block, blocks a row), a pack of 16 bytes each."""
    packs = width * dtype.size // 16
    threads = min(256, -(-packs // 32) * 32)
    return threads, -(-packs // threads)


def add_weighed_rms_norm(
    launch: Launcher, x: mx.array, pairs: Pairs, shares: mx.array, norm: Norm
) -> tuple[mx.array, mx.array]:
    """See ``kernels.add_weighed_rms_norm``."""
    bias = nothing(x.dtype) if pairs.bias is None else pairs.bias
    what = _norm_launch(tuple(x.shape), shares.shape[-1], x.dtype, pairs.bias is not None)
    total, out = launch(what, [x, pairs.y, norm.weight, params(norm.eps, 0.0), shares, pairs.indices, bias])
    return total, out


@lru_cache(maxsize=1024)
def _norm_launch(shape: tuple[int, ...], each: int, dtype: mx.Dtype, biased: bool) -> Launch:
    packs = shape[-1] * dtype.size // 16
    warps = min(MOST_WARPS, -(-packs // 32))
    constants = (
        ("T", dtype),
        ("H", shape[-1]),
        ("WARPS", warps),
        ("PACKS", -(-packs // (32 * warps))),
        ("EACH", each),
        ("BIASED", biased),
    )
    return Launch(WEIGHED_NORM, constants, (math.prod(shape[:-1]), 1), 32 * warps, ((shape, dtype),) * 2)
