"""Kernels over rows on the host, thread by thread: products, rotation with KV write, sums with norms, SwiGLU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from pippin.kernels import fused, paged, products, reference
from pippin.kernels.checks import CHECKS
from pippin.kernels.host import compiler, host_launcher
from pippin.kernels.product_checks import PRODUCT_CHECKS, check_product
from pippin.kernels.products import Weights
from tests.planted import assert_found

needs_compiler = pytest.mark.skipif(compiler() is None, reason="kernels run on the host only where g++ is installed")
DTYPES = [mx.float32, mx.float16, mx.bfloat16]
TOLERANCE = {mx.float32: 2e-5, mx.float16: 4e-3, mx.bfloat16: 3e-2}


def distance(got: mx.array, want: mx.array) -> float:
    """The largest difference, as a share of the largest wanted number; infinite where one is not a number."""
    a, b = (np.array(x.astype(mx.float32)) for x in (got, want))
    return float(np.where(np.isnan(a - b), np.inf, np.abs(a - b)).max() / max(1.0, float(np.abs(b).max())))


# (rows, N, K, experts, pairs a row); no experts: one matrix.
SHAPES = {
    "one-row": (1, 64, 128, 0, 0),
    "edge-of-columns": (5, 72, 256, 0, 0),
    "two-tiles": (33, 40, 96, 0, 0),
    "many": (70, 64, 384, 0, 0),
    "narrow": (3, 8, 32, 0, 0),
    "few-pairs": (1, 48, 128, 8, 2),
    "experts": (40, 64, 64, 4, 3),
    "one-expert-has-all": (20, 32, 64, 2, 1),
}


FORMS = {
    "whole": (16, ""),
    "affine-4": (4, "affine"),
    "affine-8": (8, "affine"),
    "mxfp4": (4, "mxfp4"),
    "mxfp8": (8, "mxfp8"),
    "nvfp4": (4, "nvfp4"),
}


@needs_compiler
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_the_weights(shape: str, dtype: mx.Dtype, form: str) -> None:
    rows, n, k, experts, each = SHAPES[shape]
    random = np.random.default_rng(7)
    x = mx.array(random.standard_normal((rows, k), np.float32)).astype(dtype)
    w = mx.array(random.standard_normal((experts or 1, n, k), np.float32) / k**0.5).astype(dtype)
    weights, near = Weights(w), w
    if form != "whole":
        bits, mode = FORMS[form]
        group = 16 if mode == "nvfp4" else 64 if mode == "affine" and k % 64 == 0 else 32
        packed, scales, *rest = mx.quantize(w, group, bits, mode)
        biases = rest[0] if rest else None
        near = mx.dequantize(packed, scales, biases, group, bits, mode, dtype=dtype)
        weights = Weights(packed, scales, biases, bits, group, mode)
    assert products.takes(x.dtype, weights)
    wide = x.astype(mx.float32)
    if experts:
        top = 1 if shape == "one-expert-has-all" else experts
        indices = mx.array(random.integers(0, top, rows * each).astype(np.int32))
        want = mx.stack([wide[i // each] @ near[int(e)].astype(mx.float32).T for i, e in enumerate(np.array(indices))])
        found = [products.product(host_launcher(s), x, weights, indices, each) for s in (0, 1)]
    else:
        held = (weights.scales, weights.biases)
        scales_0, biases_0 = (None if a is None else a[0] for a in held)
        one = replace(weights, w=weights.w[0], scales=scales_0, biases=biases_0)
        want = wide @ near[0].astype(mx.float32).T
        found = [products.product(host_launcher(s), x, one) for s in (0, 1)]
    for got in found:
        assert got.dtype == dtype
        assert distance(got, want) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    "weights",
    [
        Weights(mx.zeros((8, 33))),
        Weights(mx.zeros((12, 64), mx.bfloat16)),
        Weights(mx.zeros((8, 8), mx.uint32), mx.zeros((8, 1)), None, 4, 64),
        Weights(mx.zeros((8, 12), mx.uint32), mx.zeros((8, 1)), mx.zeros((8, 1)), 6, 64),
        Weights(mx.zeros((8, 16), mx.uint32), mx.zeros((8, 1)), mx.zeros((8, 1)), 8, 64),
        Weights(mx.zeros((8, 8), mx.uint32), mx.zeros((8, 1), mx.bfloat16), mx.zeros((8, 1)), 4, 64),
        Weights(mx.zeros((8, 8), mx.uint32), mx.zeros((8, 4), mx.uint8), None, 4, 16, "mxfp4"),
        Weights(mx.zeros((8, 8), mx.uint32), mx.zeros((8, 2)), None, 4, 32, "mxfp4"),
    ],
    ids=["width", "rows", "no-biases", "bits", "scales", "float-biases", "group", "float-scales"],
)
def test_what_the_product_does_not_take_is_left_to_mlx(weights: Weights) -> None:
    assert not products.takes(mx.bfloat16, weights)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("dims", "traditional", "dim", "value_dim", "norms"),
    [
        (64, False, 64, 64, True),
        (32, False, 64, 32, False),
        (80, False, 80, 80, True),
        (16, True, 48, 64, False),
        (48, False, 96, 64, True),
        (12, False, 256, 256, True),
    ],
)
def test_heads_are_normed_turned_and_stored(
    dtype: mx.Dtype, dims: int, traditional: bool, dim: int, value_dim: int, norms: bool
) -> None:
    random = np.random.default_rng(3)
    heads = fused.Heads(5, 2, dim, value_dim, 8, 8 + 5 * dim, 8 + 7 * dim)
    width = 8 + 7 * dim + 2 * value_dim
    y = mx.array(random.standard_normal((3, 1, width), np.float32)).astype(dtype)
    weight = mx.array(random.standard_normal(dim, np.float32)).astype(dtype)
    both = (fused.Norm(weight, 1e-5), fused.Norm(weight + 1, 1e-3)) if norms else (None, None)
    rope = fused.Rope(dims, traditional, 1e4, 1.0)
    positions, slots = mx.array([0, 7, 5000], dtype=mx.int32), mx.array([4, 0, 2], dtype=mx.int32)
    q, k, v = reference.heads_of(y[:, 0], heads)
    q, k = (x if n is None else reference.rms_norm(x, *n) for x, n in zip((q, k), both, strict=True))
    q, k = (reference.rope(x, positions, dims, rope.frequencies, traditional=traditional) for x in (q, k))
    for schedule, many_rows in ((0, 4), (1, 4), (2, 4), (0, 3), (1, 3), (2, 3)):
        pools = mx.zeros((5, 2, dim), dtype), mx.zeros((5, 2, value_dim), dtype)
        mx.eval(pools)
        got, _ = fused.rope_kv_write(
            host_launcher(schedule), y, *pools, heads, rope, positions, slots, both, None, many_rows
        )
        assert distance(got, q) < TOLERANCE[dtype]
        assert distance(pools[0][slots], k) < TOLERANCE[dtype]
        assert mx.array_equal(pools[1][slots], v).item()
        assert not mx.any(pools[0][mx.array([1, 3])]).item(), "and nothing else"


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [8, 264, 4096])
def test_sums_are_normed(dtype: mx.Dtype, width: int) -> None:
    random = np.random.default_rng(5)
    x, r, weight = (mx.array(random.standard_normal((2, 1, width), np.float32)).astype(dtype) for _ in range(3))
    assert fused.takes_rows(width, dtype)
    total, out = fused.add_rms_norm(host_launcher(2), x, r, fused.Norm(weight[0, 0], 1e-6))
    want = reference.add_rms_norm(x, r, weight[0, 0], 1e-6)
    assert total.shape == out.shape == x.shape
    assert distance(total, want[0]) == 0
    assert distance(out, want[1]) < TOLERANCE[dtype]


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu_of_a_whole_row(dtype: mx.Dtype) -> None:
    y = mx.array(np.random.default_rng(5).standard_normal((3, 1, 2 * 520), np.float32) * 4).astype(dtype)
    got = fused.swiglu(host_launcher(1), y)
    assert got.shape == (3, 1, 520)
    assert distance(got, reference.swiglu(y)) < TOLERANCE[dtype]


PLANTED: dict[str, tuple[str, str, str]] = {
    "rotation by the wrong half": ("rope_kv_write", "second = TRADITIONAL", "second = !TRADITIONAL"),
    "rotation with another lane": ("rope_kv_write", "STEP > 0 ? STEP : 1", "STEP > 0 ? STEP / 2 : 1"),
    "a head's norm with the other's weight": ("rope_kv_write", "is_q ? q_weight : k_weight", "k_weight"),
    "values where keys go": ("rope_kv_write", "(slot * HKV + h) * DV", "(slot * HKV + 1 - h) * DV"),
    "no wait for the other lanes": ("rope_kv_write", "      BARRIER();\n    }", "    }"),
    "only the first heads of many rows": ("rope_kv_write", "(block_y * EACH + n)", "(block_y * EACH)"),
    "a warp's sum left out": ("add_rms_norm", "w < WARPS; w++", "w < WARPS - 1; w++"),
    "the sum not rounded": ("add_rms_norm", "total)[first + i] = c;", "total)[first + i] = a;"),
    "rotation of another length": ("rope_kv_write", "params[2] * cos_of(angle)", "cos_of(angle)"),
    "half of gelu's tanh": ("swiglu", "1.5957691216f", "0.7978845608f"),
    "gate and up exchanged": ("swiglu", "row * 2 * ROW + i]", "(row * 2 + 1) * ROW + i]"),
    "a part of K left out": ("product", "k += WARPS * STEP", "k += (WARPS + 1) * STEP"),
    "rows of the wrong pair": ("product", "mine[i] / PER", "mine[i] / (PER + 1)"),
    "the next group's scale": ("product", "w_row * GROUPS + at / GROUP", "w_row * GROUPS + (at / GROUP + 1) % GROUPS"),
    "the second half's scale": ("product_nvfp4", "u * 8 / GROUP % SCALES", "0"),
    "the next 16 bytes": ("product_mxfp8", "w_row * (K / EACH) + at / EACH", "w_row * (K / EACH)"),
    "nibbles meet others' numbers": ("product_mxfp4", "far_pairs(b[own][m])", "b[own][m]"),
    "the bias left out": ("product_8", "bias_of<T, KIND, true>(now.bias[t + h][p])", "0u"),
    "warps not waited for": ("product", "      BARRIER();\n      for (int j = tid", "      for (int j = tid"),
}


@needs_compiler
@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults_are_found(fault: str) -> None:
    """By the self-check that would have to find them on a machine that nobody has seen."""
    name, line, planted = PLANTED[fault]
    check: Callable[..., bool] = {**CHECKS, **PRODUCT_CHECKS}[name]  # type: ignore[index]
    tuning = paged.Tuning(matrix=True)
    dtype = mx.bfloat16 if name in PRODUCT_CHECKS else mx.float32
    with mx.stream(mx.cpu):
        assert check(host_launcher(1), dtype, tuning)
    assert_found(line, planted, lambda launch: check(launch, dtype, tuning))


def test_no_one_checks_products_where_no_one_launches_them() -> None:
    assert check_product(lambda *_: [], mx.float32, paged.Tuning(matrix=True))
    assert check_product(lambda *_: [], mx.bfloat16, paged.Tuning(matrix=False))
