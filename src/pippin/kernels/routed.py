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
SORT_PAIRS = Source("sort_pairs", "sort_pairs", ("indices",), ("places", "ordered", "rows"))
WEIGHED_SUM = Source("weighed_sum", "weighed_sum", ("y", "shares", "indices", "bias", "places", "plus"), ("out",))
WEIGHED_NORM = Source(
    "add_weighed_rms_norm",
    "add_rms_norm",
    ("x", "r", "weight", "params", "shares", "indices", "bias", "places"),
    ("total", "out"),
    ("EXPERTS",),
)

# A lane keeps one of those chosen, and every 32nd of those there are in its registers.
MOST_CHOSEN, MOST_EXPERTS = 32, 512
# Pairs that are compared with one another.
MOST_SORTED = 2048
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

    ``bias`` [experts, n] is still to be added. ``places`` [T * each] int32 say in which row of y each lies, None: in
    its own.
    """

    y: mx.array
    indices: mx.array
    bias: mx.array | None = None
    places: mx.array | None = None

    @property
    def form(self) -> tuple[bool, bool]:
        """Whether there are biases and places."""
        return self.bias is not None, self.places is not None

    def in_order(self) -> mx.array:
        """Row by row, with biases; by MLX's operations."""
        y = self.y if self.places is None else self.y[self.places]
        return y if self.bias is None else y + self.bias[self.indices]


@dataclass(frozen=True, slots=True, eq=False)
class Order:
    """Pairs by expert: in which place each is, and of each place its expert and its row, all [P] int32."""

    places: mx.array
    experts: mx.array
    rows: mx.array


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


def sort_pairs(launch: Launcher, indices: mx.array, each: int) -> Order:
    """See ``kernels.experts.sort_pairs``; at most ``MOST_SORTED``."""
    places, ordered, rows = launch(_sort_launch(indices.shape[0], each), [indices])
    return Order(places, ordered, rows)


@lru_cache(maxsize=1024)
def _sort_launch(pairs: int, each: int) -> Launch:
    constants = (("EACH", each), ("MOST", MOST_SORTED), ("THREADS", 256))
    return Launch(SORT_PAIRS, constants, (-(-pairs // 256), 1), 256, (((pairs,), mx.int32),) * 3)


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
    y, none = pairs.y, nothing(pairs.y.dtype)
    what = _sum_launch(y.shape[0], y.shape[1], shares.shape[-1], y.dtype, pairs.form, plus is not None)
    return launch(what, [y, shares, *_experts(pairs), none if plus is None else plus])[0]


def _experts(pairs: Pairs) -> list[mx.array]:
    """Whose rows they are, biases and places; something where there are none."""
    bias = nothing(pairs.y.dtype) if pairs.bias is None else pairs.bias
    return [pairs.indices, bias, nothing(mx.int32) if pairs.places is None else pairs.places]


@lru_cache(maxsize=1024)
def _sum_launch(pairs: int, width: int, each: int, dtype: mx.Dtype, form: tuple[bool, bool], plus: bool) -> Launch:
    threads, parts = _cut(width, dtype)
    constants = (
        ("T", dtype),
        ("WIDTH", width),
        ("EACH", each),
        ("THREADS", threads),
        ("BIASED", form[0]),
        ("PLACED", form[1]),
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
    what = _norm_launch(tuple(x.shape), shares.shape[-1], x.dtype, pairs.form)
    total, out = launch(what, [x, pairs.y, norm.weight, params(norm.eps, 0.0), shares, *_experts(pairs)])
    return total, out


@lru_cache(maxsize=1024)
def _norm_launch(shape: tuple[int, ...], each: int, dtype: mx.Dtype, form: tuple[bool, bool]) -> Launch:
    packs = shape[-1] * dtype.size // 16
    warps = min(MOST_WARPS, -(-packs // 32))
    constants = (
        ("T", dtype),
        ("H", shape[-1]),
        ("WARPS", warps),
        ("PACKS", -(-packs // (32 * warps))),
        ("EACH", each),
        ("BIASED", form[0]),
        ("PLACED", form[1]),
    )
    return Launch(WEIGHED_NORM, constants, (math.prod(shape[:-1]), 1), 32 * warps, ((shape, dtype),) * 2)
