"""Launches of products with few rows: quantized weights, and experts that each take the rows routed to them.

Which way is taken for how many rows is measured on the machine (``contest``); ``ways`` says which there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import mlx.core as mx

from pippin.kernels.launch import Launch, Launcher, Source, nothing
from pippin.kernels.routed import Gate

_INPUTS = ("x", "w", "scales", "biases", "indices")
_GATED_INPUTS = (*_INPUTS, "up_w", "up_scales", "up_biases", "gate_bias", "up_bias", "params")
_HEADERS = ("packed", "packed_words", "codes")
_ROWS = Source("rows_mma", "expert_mma", _INPUTS, ("out",), (), _HEADERS)
_EXPERTS = Source("expert_mma", "expert_mma", _INPUTS, ("out",), ("EXPERTS",), _HEADERS)
_GATED = Source("gated_mma", "expert_mma", _GATED_INPUTS, ("out",), ("EXPERTS", "GATED"), (*_HEADERS, "gates"))

# What bodies/codes.h calls the modes of so many bits, and in which groups they come; affine ones in 32, 64 or 128.
_KINDS = {("affine", 4): 4, ("affine", 8): 8, ("nvfp4", 4): 14, ("mxfp4", 4): 24, ("mxfp8", 8): 28}
_GROUPS = {"nvfp4": 16, "mxfp4": 32, "mxfp8": 32}
_DENSE = 16

ProductCheck = Literal["product", "product_8", "product_mxfp4", "product_mxfp8", "product_nvfp4"]
GatedCheck = Literal["gated", "gated_8", "gated_mxfp4", "gated_mxfp8", "gated_nvfp4"]
_CHECKS: dict[str, tuple[ProductCheck, GatedCheck]] = {
    "mxfp4": ("product_mxfp4", "gated_mxfp4"),
    "mxfp8": ("product_mxfp8", "gated_mxfp8"),
    "nvfp4": ("product_nvfp4", "gated_nvfp4"),
}

# Rows up to which reading the weights decides, and not multiplying: beyond, MLX's own products are faster.
MOST_ROWS = 256
MOST_PAIRS = 2048
# Pairs of a row and its expert for which gates always are one launch with what they gate, and never three of MLX's: on
# an H200 it took 0.2 to 0.8 of their time in each of 14 cases (docs/log.md).
FEW_PAIRS = 16
# Rows, or pairs of a row and its expert, for which ways are compared; what lies between goes by the next of them.
ROWS = (1, 8, 32, 128, 512, 2048)
PAIRS = (4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 8192)
# Up to so many are steps of decodes, which are measured first.
MOST_DECODES = 256
# Numbers of a matrix up to which it may be made whole for a measurement: half a GiB.
_MOST_NUMBERS = 1 << 28
_FULL = 264  # blocks that fill a GPU twice over: with fewer, blocks take fewer columns


@dataclass(frozen=True, slots=True)
class Weights:
    """A matrix [experts, N, K], or [N, K]: as it is, or quantized as ``mx.quantize`` does, which ``mode`` explains."""

    w: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None
    bits: int = 16
    group: int = 0
    mode: str = "affine"

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

    def like(self, other: Weights) -> bool:
        """Whether only their numbers differ."""
        return self._form() == other._form()

    def _form(self) -> tuple[object, ...]:
        kept = (None if a is None else a.dtype for a in (self.scales, self.biases))
        return self.w.shape, self.w.dtype, self.bits, self.group, self.mode, *kept


def takes(dtype: mx.Dtype, weights: Weights) -> bool:
    """Whether the kernel computes rows of ``dtype`` by these weights."""
    if dtype not in (mx.float16, mx.bfloat16) or weights.width % 32 or weights.rows % 8:
        return False
    if weights.bits == 16:
        return weights.w.dtype == dtype
    if weights.scales is None or kind_of(weights) is None:
        return False
    if weights.mode == "affine":
        if weights.biases is None or weights.group % 32:
            return False
        return weights.scales.dtype == weights.biases.dtype == dtype
    return weights.group == _GROUPS[weights.mode] and weights.scales.dtype == mx.uint8


def kind_of(weights: Weights) -> int | None:
    """What ``bodies/codes.h`` calls them, None for what it does not know."""
    return _DENSE if weights.bits == 16 else _KINDS.get((weights.mode, weights.bits))


def checks_of(weights: Weights) -> tuple[ProductCheck, GatedCheck]:
    """The checks that say whether the kernel is right for such weights: alone, and of a gate with what it gates."""
    if weights.mode != "affine":
        return _CHECKS[weights.mode]
    return ("product_8", "gated_8") if weights.bits == 8 else ("product", "gated")


def product(launch: Launcher, x: mx.array, weights: Weights, indices: mx.array | None = None, per: int = 1) -> mx.array:
    """See ``kernels.expert_product``; x is [T, K]."""
    dtype, kind = x.dtype, kind_of(weights)
    assert kind is not None
    what = _launch(
        x.shape[0],
        None if indices is None else (indices.shape[0], per),
        (weights.experts, weights.rows, weights.width),
        (kind, weights.bits, weights.group or weights.width),
        dtype,
    )
    return launch(what, [x, *words(weights, dtype), nothing(mx.int32) if indices is None else indices])[0]


def words(weights: Weights, dtype: mx.Dtype) -> list[mx.array]:
    """Codes, scales and biases; something where there are none."""
    none = nothing(dtype)
    return [weights.w, *(none if a is None else a for a in (weights.scales, weights.biases))]


@dataclass(frozen=True, slots=True)
class Gated:
    """Experts' weights for the gate and for what it is multiplied with, their biases [experts, N] if any, and how.

    The two differ in nothing but their numbers.
    """

    gate: Weights
    up: Weights
    biases: tuple[mx.array, mx.array] | None
    form: Gate


def gated_product(launch: Launcher, x: mx.array, layer: Gated, indices: mx.array, per: int) -> mx.array:
    """See ``kernels.gated_product``; x is [T, K]."""
    dtype, weights, none = x.dtype, layer.gate, nothing(x.dtype)
    kind = kind_of(weights)
    assert kind is not None
    what = _launch(
        x.shape[0],
        (indices.shape[0], per),
        (weights.experts, weights.rows, weights.width),
        (kind, weights.bits, weights.group or weights.width),
        dtype,
        (layer.biases is not None, layer.form.clipped),
    )
    inputs = [x, *words(weights, dtype), indices, *words(layer.up, dtype), *(layer.biases or (none, none))]
    return launch(what, [*inputs, layer.form.params])[0]


@dataclass(frozen=True, slots=True)
class Cut:
    """How a product is cut: a block's ``warps`` share K, and compute ``columns`` (even) by ``rows``, both of 8.

    A lane loads ``packs`` of 16 bytes of each row of weights for a step; those of the next step before this one is
    multiplied if ``ahead``.
    """

    columns: int
    rows: int
    warps: int
    packs: int
    ahead: bool = False


def cut_of(rows: int, experts: int, n: int, k: int, bits: int) -> Cut:
    """For ``rows`` rows an expert: what an H200 found fastest for up to 16 (docs/log.md), then what leaves registers.

    Four warps keep enough loads in flight, and have less to join than eight, which are better where blocks are few.
    Whole weights wait for memory: 32 columns leave registers for the next step's. Codes wait for instructions.
    """
    tiles = 1 if rows <= 8 else 2 if rows <= 16 else 4 if rows <= 32 else 8
    if bits == _DENSE:
        return Cut(4, tiles, max(1, min(4, k // 64)), 2, tiles <= 2)
    most = 8 if experts * n // 32 < _FULL else 4
    return Cut(4, tiles, max(1, min(most, k // (128 if bits == 4 else 64))), 1)


@lru_cache(maxsize=4096)
def _launch(
    rows: int,
    routed: tuple[int, int] | None,
    shape: tuple[int, int, int],
    form: tuple[int, int, int],
    dtype: mx.Dtype,
    gated: tuple[bool, bool] | None = None,
) -> Launch:
    experts, n, k = shape
    kind, bits, group = form
    pairs, per = routed or (rows, 1)
    columns = n if gated is None else 2 * n
    cut = cut_of(pairs if routed is None else 2 * -(-pairs // experts), min(experts, pairs), columns, k, bits)
    constants = (
        ("T", dtype),
        ("N", n),
        ("K", k),
        ("NT", cut.columns),
        ("MT", cut.rows),
        ("WARPS", cut.warps),
        ("PACKS", cut.packs),
        ("AHEAD", cut.ahead),
        ("KIND", kind),
        ("GROUP", group),
        ("PER", per),
        ("MOST", max(32, 1 << (pairs - 1).bit_length()) if routed else 32),
        ("BY_PAIR", routed is not None and pairs < experts),
        *(() if gated is None else (("BIASED", gated[0]), ("CLIPPED", gated[1]))),
    )
    source = _GATED if gated is not None else _EXPERTS if routed else _ROWS
    blocks = -(-columns // (8 * cut.columns)), min(experts, pairs) if routed else 1
    return Launch(source, constants, blocks, 32 * cut.warps, (((pairs, n), dtype),))


@lru_cache(maxsize=64)
def row_of_pair(pairs: int, per: int) -> mx.array:
    """i // per for each of ``pairs``, uint32; made once, where MLX would make it anew for each product."""
    rows = mx.arange(pairs, dtype=mx.uint32) // per
    mx.eval(rows)
    return rows


def by_mlx(x: mx.array, weights: Weights) -> mx.array:
    """MLX's own product, of x [T, K]: [T, N]."""
    w, scales, biases, group, bits = weights.w, weights.scales, weights.biases, weights.group, weights.bits
    assert scales is not None
    return mx.quantized_matmul(x, w, scales, biases, True, group, bits, weights.mode)


def by_whole(x: mx.array, weights: Weights) -> mx.array:
    """The same with the weights made whole first."""
    w, scales, biases, group, bits = weights.w, weights.scales, weights.biases, weights.group, weights.bits
    assert scales is not None
    return x @ mx.dequantize(w, scales, biases, group, bits, weights.mode, dtype=x.dtype).T


def by_mlx_routed(x: mx.array, weights: Weights, indices: mx.array, per: int = 1) -> mx.array:
    """MLX's own products of rows x [P / per, K], each by the weights of its experts; as sorted as the indices are."""
    w, scales, pairs = weights.w, weights.scales, indices.shape[0]
    # Not x[:, None]: of an axis that is put in, MLX's product of sorted pairs takes a stride for that of rows.
    rows = x.reshape(-1, 1, x.shape[-1])
    # MLX wants uint32, and a cast is a launch.
    options: dict[str, Any] = {"rhs_indices": indices.view(mx.uint32), "sorted_indices": pairs >= SORTED}
    if pairs < SORTED:  # otherwise MLX makes them anew for each product; of sorted ones it wants none
        options["lhs_indices"] = row_of_pair(pairs, per)
    if scales is None:
        return mx.gather_mm(rows, w.swapaxes(-1, -2), **options)[:, 0]
    form: dict[str, Any] = {"group_size": weights.group, "bits": weights.bits, "mode": weights.mode}
    return mx.gather_qmm(rows, w, scales, weights.biases, transpose=True, **form, **options)[:, 0]


# Pairs from which on mlx-lm sorts rows by their experts.
SORTED = 64


def size_of(count: int, sizes: tuple[int, ...]) -> int:
    """The one of ``sizes`` by which ``count`` rows or pairs go."""
    return next((size for size in sizes if count <= size), sizes[-1])


def key_of(weights: Weights, dtype: mx.Dtype, size: int) -> str:
    """What a contest is called."""
    kind = f"{weights.bits}-bit {weights.mode} {weights.group}" if weights.bits < _DENSE else "whole"
    routed = f"{weights.experts} experts, " if weights.w.ndim == 3 else ""
    return f"product {routed}{weights.rows} x {weights.width} {kind} {dtype} of {size}"


def sizes_of(weights: Weights) -> tuple[int, ...]:
    """For how many rows, or pairs, ways are compared."""
    return PAIRS if weights.w.ndim == 3 else ROWS


def is_likely(weights: Weights) -> bool:
    """Whether the kernel is what to take where nothing was measured.

    An H200 found it faster for affine 4 bits, and for experts of 16 bits and of affine 4, whose loop others share.
    """
    return weights.w.ndim == 3 or weights.bits == 16 or (weights.bits == 4 and weights.mode == "affine")


def ways(launch: Launcher | None, weights: Weights, dtype: mx.Dtype, rows: int) -> dict[str, Callable[[], mx.array]]:
    """How ``rows`` random rows, or pairs of random experts, can be multiplied; ``launch`` runs the kernel."""
    if weights.w.ndim == 3:
        return {} if launch is None else _routed_ways(launch, weights, dtype, rows)
    x = _random_rows(rows, weights, dtype)
    found: dict[str, Callable[[], mx.array]] = {"mlx": lambda: by_mlx(x, weights)}
    if launch is not None and rows <= 2 * MOST_ROWS:
        found["kernel"] = lambda: product(launch, x, weights)
    if weights.rows * weights.width <= _MOST_NUMBERS:
        found["whole"] = lambda: by_whole(x, weights)
    return found


def record(launch: Launcher, weights: Weights, dtype: mx.Dtype, rows: int) -> None:
    """Shows ``launch`` what ``ways`` would run, with inputs that nobody computes."""
    found = ways(launch, weights, dtype, rows).get("kernel")
    if found is not None:
        found()


def _routed_ways(launch: Launcher, weights: Weights, dtype: mx.Dtype, pairs: int) -> dict[str, Callable[[], mx.array]]:
    x, indices = random_pairs(weights, dtype, pairs)
    order = mx.argsort(indices).astype(mx.int32)
    ordered = indices[order]
    mx.eval(order, ordered)

    def by_mlx() -> mx.array:  # many pairs it wants in order, and somebody must put them into that
        return by_mlx_routed(x[order], weights, ordered) if pairs >= SORTED else by_mlx_routed(x, weights, indices)

    found = {"kernel": lambda: product(launch, x, weights, indices)} if pairs <= MOST_PAIRS else {}
    return found | {"mlx": by_mlx}


def random_pairs(weights: Weights, dtype: mx.Dtype, pairs: int) -> tuple[mx.array, mx.array]:
    """Rows [P, K], and the experts [P] int32 that they go to."""
    indices = mx.random.randint(0, weights.experts, (pairs,), mx.int32, key=mx.random.key(1))
    mx.eval(indices)
    return _random_rows(pairs, weights, dtype), indices


def _random_rows(count: int, weights: Weights, dtype: mx.Dtype) -> mx.array:
    """Not zeros, over which a GPU may be faster than over anything else."""
    x = mx.random.normal((count, weights.width), key=mx.random.key(0)).astype(dtype)
    mx.eval(x)
    return x
