"""Checks of the kernels round a layer's experts; see ``checks``."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx

from pippin.kernels import fused, paged, reference, routed
from pippin.kernels.checking import Check, KernelName, close
from pippin.kernels.launch import Launcher


def check_route(launch: Launcher, dtype: mx.Dtype, tuning: paged.Tuning) -> bool:
    """Among 100 columns, of which many are equal: the same ones in the same order, for each way to share."""
    keys = mx.random.split(mx.random.key(19), 2)
    x, values = (mx.round(3 * mx.random.normal((5, 100), key=key)).astype(dtype) for key in keys)
    mx.eval(x, values)
    choices = [
        (values, routed.Choice(4, later=True, soft=True)),
        (values, routed.Choice(2, smallest=True, factor=2.5)),
        (x, routed.Choice(8, before=True, divided=True)),
        (x, routed.Choice(3, before=True)),
    ]
    found = [routed.route(launch, x, of, choice) for of, choice in choices]
    wanted = [reference.route(x, of, choice) for of, choice in choices]
    same = [bool(mx.array_equal(mine[0], theirs[0]).item()) for mine, theirs in zip(found, wanted, strict=True)]
    return all(same) and all(close(m[1] / 8, w[1] / 8) for m, w in zip(found, wanted, strict=True))


def check_expert_gate(launch: Launcher, dtype: mx.Dtype, tuning: paged.Tuning) -> bool:
    """Rows of 1056 numbers, clipped with biases and without either."""
    gate, up = (replace(_pairs(dtype, key), places=None) for key in (20, 21))
    clipped, bare = routed.Gate(True, 1.702, 7.0), [replace(p, bias=None) for p in (gate, up)]
    cases = [(gate, up, clipped), (bare[0], bare[1], routed.Gate())]
    found = [routed.expert_gate(launch, *case) for case in cases]
    return all(close(a / 16, reference.expert_gate(*case) / 16) for a, case in zip(found, cases, strict=True))


def check_weighed_sum(launch: Launcher, dtype: mx.Dtype, tuning: paged.Tuning) -> bool:
    """Three rows a token, with biases, places and shares in float32, and without these but with a row more."""
    pairs, shares = _pairs(dtype, 22), _shares()
    plus = mx.random.normal((3, 1056), key=mx.random.key(23)).astype(dtype)
    mx.eval(plus)
    found = [
        routed.weighed_sum(launch, pairs, shares),
        routed.weighed_sum(launch, replace(pairs, bias=None, places=None), shares.astype(dtype), plus),
    ]
    wanted = [
        reference.weighed_sum(pairs, shares),
        reference.weighed_sum(replace(pairs, bias=None, places=None), shares.astype(dtype), plus),
    ]
    return all(close(a / 4, b / 4) for a, b in zip(found, wanted, strict=True))


def check_add_weighed_rms_norm(launch: Launcher, dtype: mx.Dtype, tuning: paged.Tuning) -> bool:
    """The same beside a residual, and normed."""
    pairs, shares = _pairs(dtype, 24), _shares()
    x = mx.random.normal((3, 1056), key=mx.random.key(25)).astype(dtype)
    norm = fused.Norm((1 + 0.1 * mx.random.normal((1056,), key=mx.random.key(26))).astype(dtype), 1e-5)
    mx.eval(x, norm.weight)
    got = routed.add_weighed_rms_norm(launch, x, pairs, shares, norm)
    total = reference.weighed_sum(pairs, shares, x)
    return close(got[0] / 4, total / 4) and close(got[1], reference.rms_norm(total, *norm))


def check_sort_pairs(launch: Launcher, dtype: mx.Dtype, tuning: paged.Tuning) -> bool:
    """More pairs than a block takes, of seven experts, one of whom has none."""
    indices = (mx.arange(300, dtype=mx.int32) * 37 + 11) % 61 % 8
    indices = mx.where(indices == 3, 5, indices).astype(mx.int32)
    mx.eval(indices)
    got, want = routed.sort_pairs(launch, indices, 4), reference.sort_pairs(indices, 4)
    same = [(got.places, want.places), (got.experts, want.experts), (got.rows, want.rows)]
    return all(bool(mx.array_equal(mine, theirs).item()) for mine, theirs in same)


def _pairs(dtype: mx.Dtype, seed: int) -> routed.Pairs:
    """Nine rows of 1056 numbers, of five experts, shuffled."""
    keys = mx.random.split(mx.random.key(seed), 2)
    y, bias = (2 * mx.random.normal((n, 1056), key=key) for n, key in zip((9, 5), keys, strict=True))
    indices, places = ([4, 0, 2, 1, 4, 3, 0, 4, 2], [3, 1, 8, 0, 2, 7, 5, 6, 4])
    found = y.astype(dtype), mx.array(indices, mx.int32), bias.astype(dtype), mx.array(places, mx.int32)
    mx.eval(found)
    return routed.Pairs(*found)


def _shares() -> mx.array:
    shares = mx.softmax(mx.random.normal((3, 3), key=mx.random.key(27)), axis=-1)
    mx.eval(shares)
    return shares


EXPERT_CHECKS: dict[KernelName, Check] = {
    "route": check_route,
    "expert_gate": check_expert_gate,
    "weighed_sum": check_weighed_sum,
    "add_weighed_rms_norm": check_add_weighed_rms_norm,
    "sort_pairs": check_sort_pairs,
}
