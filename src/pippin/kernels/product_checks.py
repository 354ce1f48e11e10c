"""Checks of products by quantized weights and by those of experts; see ``checks``."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import mlx.core as mx

from pippin.kernels import grouped, paged, products, reference, routed
from pippin.kernels.checking import Check, KernelName, close
from pippin.kernels.launch import Launcher


def check_product(launch: Launcher, dtype: mx.Dtype, tuning: paged.Tuning, bits: int = 4, mode: str = "affine") -> bool:
    """Seven rows by quantized weights, and by those of three experts, two of which get rows; 40 columns, 160 wide."""
    if not tuning.matrix or dtype == mx.float32:
        return True  # nobody launches it there
    x = mx.random.normal((7, 160), key=mx.random.key(14)).astype(dtype)
    w, experts, near = _experts(dtype, bits, mode, 15)
    scales, biases = experts.scales, experts.biases
    assert scales is not None
    indices = mx.array(_TOLD, dtype=mx.int32)
    one = replace(experts, w=experts.w[1], scales=scales[1], biases=None if biases is None else biases[1])
    mx.eval(x, indices, one.w, one.scales, [] if one.biases is None else one.biases)
    got = [products.product(launch, x, one), products.product(launch, x, experts, indices, 2)]
    wide, pairs = x.astype(mx.float32), mx.arange(14) // 2
    want = [wide @ near[1].astype(mx.float32).T, _routed(wide[pairs], near, indices)]
    if bits == 4 and mode == "affine":
        got.append(products.product(launch, x, products.Weights(w), indices, 2))
        want.append(_routed(wide[pairs], w, indices))
    return all(close(a, b.astype(dtype)) for a, b in zip(got, want, strict=True))


_TOLD = [2, 0, 0, 2, 2, 2, 0, 2, 0, 0, 2, 2, 2, 0]


def _experts(dtype: mx.Dtype, bits: int, mode: str, seed: int) -> tuple[mx.array, products.Weights, mx.array]:
    """Three experts' weights [40, 160]: as they are, quantized, and made whole again."""
    w = (mx.random.normal((3, 40, 160), key=mx.random.key(seed)) / 16).astype(dtype)
    group = 16 if mode == "nvfp4" else 32
    packed, scales, *rest = mx.quantize(w, group, bits, mode)
    biases = rest[0] if rest else None
    near = mx.dequantize(packed, scales, biases, group, bits, mode, dtype=dtype)
    mx.eval(w, packed, scales, rest, near)
    return w, products.Weights(packed, scales, biases, bits, group, mode), near


def check_gated(launch: Launcher, dtype: mx.Dtype, tuning: paged.Tuning, bits: int = 4, mode: str = "affine") -> bool:
    """Seven rows by the gates of three experts and by what they gate: with biases and clipped, and without."""
    if not tuning.matrix or dtype == mx.float32:
        return True  # nobody launches it there
    indices = mx.array(_TOLD, dtype=mx.int32)
    x, layers, want = _gated(dtype, bits, mode, indices, 15)
    got = [products.gated_product(launch, x, layer, indices, 2) for layer in layers]
    return all(close(a / 4, b.astype(dtype) / 4) for a, b in zip(got, want, strict=True))


def check_tiles(launch: Launcher, dtype: mx.Dtype, tuning: paged.Tuning, bits: int = 4, mode: str = "affine") -> bool:
    """150 pairs of three experts, one of which gets none: a product, and gates as in ``check_gated``."""
    if not tuning.matrix or dtype == mx.float32:
        return True  # nobody launches it there
    indices = 2 * ((mx.arange(150, dtype=mx.int32) * 37 + 11) % 7 // 4)
    x, layers, want = _gated(dtype, bits, mode, indices, 29)
    w, experts, near = _experts(dtype, bits, mode, 31)
    alone = [(experts, near), (products.Weights(w), w)] if bits == 4 and mode == "affine" else [(experts, near)]
    # Products go by the reference's tiles: wrong ones would lead out of their arrays.
    tiles, made = reference.tiles(indices, 3), grouped.tiles(launch, indices, 3)
    got = [grouped.gated_product(launch, x, layer, tiles, 2) for layer in layers]
    got += [grouped.product(launch, x, weights, tiles, 2) for weights, _ in alone]
    want += [_routed(x[mx.arange(150) // 2].astype(mx.float32), near, indices) for _, near in alone]
    right = mx.array_equal(made.order, tiles.order).item() and mx.array_equal(made.table, tiles.table).item()
    return bool(right) and all(close(a / 4, b.astype(dtype) / 4) for a, b in zip(got, want, strict=True))


def _gated(
    dtype: mx.Dtype, bits: int, mode: str, indices: mx.array, seed: int
) -> tuple[mx.array, list[products.Gated], list[mx.array]]:
    """Rows, of which each goes to two of three experts; their gates; and what comes out of these."""
    count = indices.shape[0] // 2
    keys = mx.random.split(mx.random.key(seed + 2), 3)
    x = mx.random.normal((count, 160), key=keys[0]).astype(dtype)
    of_gate, of_up = (mx.random.normal((3, 40), key=key).astype(dtype) for key in keys[1:])
    gate, up = (_experts(dtype, bits, mode, seed + i) for i in (0, 1))
    mx.eval(x, of_gate, of_up, indices)
    weights = [(gate[1], up[1], gate[2], up[2])]
    if bits == 4 and mode == "affine":
        weights.append((products.Weights(gate[0]), products.Weights(up[0]), gate[0], up[0]))
    layers, want, rows = [], [], x.astype(mx.float32)[mx.arange(2 * count) // 2]
    for one, other, near, near_up in weights:
        g, u = (_routed(rows, w, indices) for w in (near, near_up))
        rich = products.Gated(one, other, (of_gate, of_up), routed.Gate(True, 1.702, 1.0))
        layers += [rich, products.Gated(one, other, None, routed.Gate())]
        biased = routed.Pairs(g, indices, of_gate), routed.Pairs(u, indices, of_up)
        want.append(reference.expert_gate(*biased, rich.form))
        want.append(reference.expert_gate(routed.Pairs(g, indices), routed.Pairs(u, indices), routed.Gate()))
    return x, layers, want


def _routed(x: mx.array, w: mx.array, indices: mx.array) -> mx.array:
    """Each row by the weights of its expert."""
    return (x[:, None] @ w.astype(mx.float32)[indices].swapaxes(1, 2))[:, 0]


PRODUCT_CHECKS: dict[KernelName, Check] = {
    "product": check_product,
    "product_8": partial(check_product, bits=8),
    "product_mxfp4": partial(check_product, mode="mxfp4"),
    "product_mxfp8": partial(check_product, bits=8, mode="mxfp8"),
    "product_nvfp4": partial(check_product, mode="nvfp4"),
    "gated": check_gated,
    "gated_8": partial(check_gated, bits=8),
    "gated_mxfp4": partial(check_gated, mode="mxfp4"),
    "gated_mxfp8": partial(check_gated, bits=8, mode="mxfp8"),
    "gated_nvfp4": partial(check_gated, mode="nvfp4"),
}

TILES_CHECKS: dict[KernelName, Check] = {
    "tiles": check_tiles,
    "tiles_8": partial(check_tiles, bits=8),
    "tiles_mxfp4": partial(check_tiles, mode="mxfp4"),
    "tiles_mxfp8": partial(check_tiles, bits=8, mode="mxfp8"),
    "tiles_nvfp4": partial(check_tiles, mode="nvfp4"),
}
