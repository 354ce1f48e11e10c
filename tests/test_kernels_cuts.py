"""Other cuts of products than the machine's own: each gives what the reference does, and each fault in it is found."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest

from pippin.kernels import paged, products, reference
from pippin.kernels.host import compiler, host_launcher
from pippin.kernels.product_checks import PRODUCT_CHECKS
from pippin.kernels.products import Cut, Gated, Weights
from pippin.kernels.routed import Pairs
from tests.planted import assert_found
from tests.test_kernels_experts import CLIPPED, normal, quantized
from tests.test_kernels_rows import FORMS, TOLERANCE, distance

pytestmark = pytest.mark.skipif(compiler() is None, reason="kernels run on the host only where g++ is installed")

# Columns (of 8), rows (of 8), warps, packs, ahead.
CUTS = {
    "ahead": Cut(4, 1, 1, 1, True),
    "many packs": Cut(2, 1, 4, 4, True),
    "one by one": Cut(4, 3, 2, 1, False),
}


@pytest.fixture
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cut]:
    chosen = CUTS[request.param]
    monkeypatch.setattr(products, "cut_of", lambda *_: chosen)
    products._launch.cache_clear()
    yield chosen
    products._launch.cache_clear()


@pytest.mark.parametrize("cut", CUTS, indirect=True)
@pytest.mark.parametrize("form", ["whole", "affine-4", "affine-8", "mxfp4", "nvfp4"])
@pytest.mark.parametrize(("tokens", "each", "count"), [(40, 2, 4), (2, 3, 9)], ids=["many", "few"])
def test_products_are_those_of_the_weights(cut: Cut, form: str, tokens: int, each: int, count: int) -> None:
    dtype, n, k, pairs = mx.bfloat16, 72, 288, tokens * each
    x = normal(1, tokens, k, dtype=dtype)
    # Expert 1 has nothing to do, and expert 0 more than a tile of rows if pairs are many.
    indices = mx.array(np.random.default_rng(2).choice([i for i in range(count) if i != 1], pairs).astype(np.int32))
    (gate, near), (up, near_up) = (quantized(form, normal(s, count, n, k, dtype=dtype) / k**0.5) for s in (3, 4))
    biases = normal(5, count, n, dtype=dtype), normal(6, count, n, dtype=dtype)
    rows = x.astype(mx.float32)[mx.arange(pairs) // each]
    y, z = ((rows[:, None] @ w.astype(mx.float32)[indices].swapaxes(1, 2))[:, 0] for w in (near, near_up))
    layer = Gated(gate, up, biases, CLIPPED)
    want = reference.expert_gate(Pairs(y, indices, biases[0]), Pairs(z, indices, biases[1]), CLIPPED)
    for schedule in (0, 1, 2):
        assert distance(products.product(host_launcher(schedule), x, gate, indices, each), y) < TOLERANCE[dtype]
    assert distance(products.gated_product(host_launcher(2), x, layer, indices, each), want) < TOLERANCE[dtype]


# In place of garbage, by which the host would write anywhere.
ANY_PAIR = "for (int i = 0; i < total; i++) mine[i] = larger(mine[i], 0);"
PLANTED = {
    "another's pair": ("many packs", "= from + j * 32;", "= from / 2 + j * 32;"),
    "pairs not waited for": ("many packs", "return;\n  BARRIER();", f"return;\n  {ANY_PAIR}"),
    "the next step twice": ("ahead", "load(next, k + WARPS * STEP)", "load(next, k)"),
    "the first step later": ("ahead", "load(now, begin);\n  int total", "load(now, begin + STEP);\n  int total"),
    "rows beyond K": ("ahead", "K % STEP == 0 || at < K", "true"),
    "the last columns too early": ("many packs", "N > WIDTH ? N - WIDTH : 0", "N > WIDTH ? N - WIDTH - 8 : 0"),
}


@pytest.mark.parametrize(("cut", "line", "planted"), PLANTED.values(), ids=PLANTED.keys(), indirect=["cut"])
def test_planted_faults_are_found(cut: Cut, line: str, planted: str) -> None:
    check, tuning = PRODUCT_CHECKS["product"], paged.Tuning(matrix=True)
    with mx.stream(mx.cpu):
        assert check(host_launcher(1), mx.bfloat16, tuning)
    assert_found(line, planted, lambda launch: check(launch, mx.bfloat16, tuning))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["affine-4", "affine-8", "mxfp4", "mxfp8", "nvfp4"])
def test_codes_are_the_numbers_that_they_stand_for(form: str, dtype: mx.Dtype) -> None:
    """Every code, by rows of one 1 each: exactly MLX's numbers, and affine ones rounded once."""
    bits, mode = FORMS[form]
    n, k, random = 16, 512, np.random.default_rng(1)
    group = products._GROUPS.get(mode, 64)
    chosen = np.sort(random.integers(0, 256, (n, k * bits // 8)), axis=1).astype(np.uint8)
    codes = mx.array(chosen - (form == "mxfp8") * (chosen & 127 == 127)).view(mx.uint32)  # but e4m3's two that are none
    biases = None
    if mode == "affine":
        scales, biases = (mx.array(random.normal(0, 0.1, (n, k // group))).astype(dtype) for _ in range(2))
        scales[:3] = mx.array([2.0**26 if dtype == mx.bfloat16 else 2.0**8, 0.0, -0.0])[:, None]
        plain = mx.dequantize(codes, mx.ones_like(scales), mx.zeros_like(biases), group, bits)
        q, s, b = (np.array(x.astype(mx.float32), np.float64) for x in (plain, scales, biases))
        want = mx.array((q * s.repeat(group, 1) + b.repeat(group, 1)).astype(np.float32)).astype(dtype)
    else:
        near = (42, 161) if dtype == mx.bfloat16 else (122, 130)  # bfloat16: as far as codes.h says
        low, high = (0, 0x77) if mode == "nvfp4" else near
        scales = mx.array(random.integers(low, high, (n, k // group)).astype(np.uint8))
        want = mx.dequantize(codes, scales, None, group, bits, mode, dtype=dtype)
    numbers = products.product(
        host_launcher(), mx.eye(k, dtype=dtype), Weights(codes, scales, biases, bits, group, mode)
    ).T
    assert mx.array_equal(numbers, want)
