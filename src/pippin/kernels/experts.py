"""What is done round a layer's experts in one launch each: see ``routed`` and ``products``.

Each gives None where there is no kernel for it: then it is done operation by operation.
"""

from __future__ import annotations

import mlx.core as mx

from pippin import kernels
from pippin.kernels import fused, grouped, products, routed
from pippin.kernels.checking import KernelName
from pippin.kernels.fused import Norm
from pippin.kernels.grouped import Routed
from pippin.kernels.launch import Launcher
from pippin.kernels.products import Gated, Weights
from pippin.kernels.routed import Choice, Gate, Order, Pairs


def may_route(columns: int, dtype: mx.Dtype) -> bool:
    """Whether rows of so many columns may be a router's."""
    return columns <= routed.MOST_EXPERTS and dtype in (mx.float32, mx.float16, mx.bfloat16)


def route(keys: mx.array, values: mx.array, choice: Choice) -> tuple[mx.array, mx.array] | None:
    """The columns that each row of ``keys`` [.., n] chooses, int32 [T, chosen], and their shares by ``values``."""
    takes = routed.takes_choice(keys, values, choice)
    launch = kernels.launcher_of("route", keys.dtype, "experts") if takes else None
    return None if launch is None else routed.route(launch, keys, values, choice)


def gated_product(x: mx.array, layer: Gated, chosen: Routed, per: int) -> mx.array | None:
    """Row i is row i // per of x [T, K] by the gate of pair i's expert, and by what it gates, together: [P, N]."""
    if any(bias.dtype != x.dtype for bias in layer.biases or ()):
        return None
    way = kernels.product_way(x.dtype, layer.gate, chosen.pairs, gated=True)
    if way == "mlx":
        return None
    if way == "tiles":
        launch = kernels.launcher_of(grouped.check_of(layer.gate), x.dtype, "tiles")
        assert launch is not None
        return grouped.gated_product(launch, x, layer, chosen.tiles(launch, layer.gate.experts), per)
    launch = kernels.launcher_of(products.checks_of(layer.gate)[1], x.dtype, "products")
    return None if launch is None else products.gated_product(launch, x, layer, chosen.indices, per)


def product(x: mx.array, weights: Weights, chosen: Routed, per: int) -> mx.array | None:
    """``kernels.expert_product``, or MLX's own unless it wants many pairs in another order."""
    found = kernels.expert_product(x, weights, chosen, per)
    disordered = chosen.pairs >= products.SORTED and not chosen.ordered
    if found is not None or kernels.backend() is None or disordered:
        return found
    return products.by_mlx_routed(x, weights, chosen.indices, per)


def sort_pairs(indices: mx.array, each: int, dtype: mx.Dtype) -> Order | None:
    """The order of experts ``indices`` [P] int32 in which MLX multiplies many pairs, ``each`` of a row, the best.

    ``dtype`` is the rows': it says which verdict counts.
    """
    fits = products.SORTED <= indices.shape[0] <= routed.MOST_SORTED
    launch = kernels.launcher_of("sort_pairs", dtype, "experts") if fits else None
    return None if launch is None else routed.sort_pairs(launch, indices, each)


def expert_gate(gate: Pairs, up: Pairs, form: Gate) -> mx.array | None:
    """What experts do with their gate [P, N] and what it is multiplied with, biases added first."""
    biases = [p.bias for p in (gate, up) if p.bias is not None]
    if len(biases) == 1 or any(a.dtype != gate.y.dtype for a in (up.y, *biases)):
        return None
    launch = _launcher("expert_gate", gate.y)
    return None if launch is None else routed.expert_gate(launch, gate, up, form)


def weighed_sum(pairs: Pairs, shares: mx.array, plus: mx.array | None = None) -> mx.array | None:
    """What its experts say of each token, summed by ``shares`` [T, each], and ``plus`` [T, n]: [T, n]."""
    if any(a is not None and a.dtype != pairs.y.dtype for a in (pairs.bias, plus)):
        return None
    launch = _launcher("weighed_sum", pairs.y)
    return None if launch is None else routed.weighed_sum(launch, pairs, shares, plus)


def add_weighed_rms_norm(x: mx.array, pairs: Pairs, shares: mx.array, norm: Norm) -> tuple[mx.array, mx.array] | None:
    """(x and ``weighed_sum``, that normed), both as x [.., n]."""
    if any(a is not None and a.dtype != x.dtype for a in (pairs.y, pairs.bias, norm.weight)):
        return None
    launch = _launcher("add_weighed_rms_norm", pairs.y)
    return None if launch is None else routed.add_weighed_rms_norm(launch, x, pairs, shares, norm)


def _launcher(name: KernelName, rows: mx.array) -> Launcher | None:
    fits = fused.takes_rows(rows.shape[-1], rows.dtype)
    return kernels.launcher_of(name, rows.dtype, "experts") if fits else None
