"""Kernels round a layer's experts on the host, thread by thread: the choice, gates, products of gates, weighed sums."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pippin import kernels
from pippin.kernels import experts, fused, paged, products, reference, routed
from pippin.kernels.expert_checks import EXPERT_CHECKS
from pippin.kernels.grouped import Routed
from pippin.kernels.host import compiler, host_launcher
from pippin.kernels.product_checks import PRODUCT_CHECKS
from pippin.kernels.products import Gated, Weights
from pippin.kernels.routed import Choice, Gate, Pairs
from tests.planted import assert_found
from tests.test_kernels_dispatch import Gpu, played
from tests.test_kernels_rows import DTYPES, FORMS, TOLERANCE, distance

pytestmark = pytest.mark.skipif(compiler() is None, reason="kernels run on the host only where g++ is installed")
CLIPPED = Gate(True, 1.702, 1.0)


def normal(seed: int, *shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape, np.float32)).astype(dtype)


CHOICES = {
    "gpt-oss": Choice(4, later=True, soft=True),
    "mixtral": Choice(2, smallest=True),
    "qwen3": Choice(8, later=True, before=True, divided=True),
    "deepseek": Choice(6, before=True, factor=16.0),
    "all": Choice(9, soft=True),
}


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 9), (5, 32), (3, 129), (9, 512)])
def test_routes_are_the_references(name: str, dtype: mx.Dtype, rows: int, columns: int) -> None:
    choice, keys = CHOICES[name], normal(rows, rows, columns, dtype=dtype)
    values = keys if choice.before else normal(columns, rows, columns, dtype=dtype)
    indices, shares = routed.route(host_launcher(2), keys, values, choice)
    want, want_shares = reference.route(keys, values, choice)
    assert mx.array_equal(indices, want)
    assert shares.dtype == dtype
    assert distance(shares, want_shares) < TOLERANCE[dtype]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, -0.0, 1.0, -3.0, float("inf"), -float("inf")]), min_size=40, max_size=40),
    st.booleans(),
)
def test_among_equals_the_earlier_or_the_later_are_taken(values: list[float], later: bool) -> None:
    keys = mx.array([values])
    choice = Choice(7, later=later)
    indices, _ = routed.route(host_launcher(), keys, keys, choice)
    assert mx.array_equal(indices, reference.route(mx.clip(keys, -1e38, None), keys, choice)[0])


def test_rows_that_are_no_numbers_choose_columns_that_exist() -> None:
    keys = mx.array([[float("nan")] * 33, [float("nan")] * 32 + [1.0]])
    for later in (False, True):
        indices, shares = routed.route(host_launcher(), keys, keys, Choice(5, later=later, soft=True))
        assert all(len(set(row)) == 5 and set(row) <= set(range(33)) for row in np.array(indices).tolist())
        assert indices[1, 0].item() == 32
        assert mx.all(mx.isnan(shares[0]))


def test_what_a_choice_does_not_take_is_left_to_mlx() -> None:
    x = mx.zeros((2, 64))
    assert routed.takes_choice(x, x, Choice(32))
    assert not routed.takes_choice(x, x, Choice(33))
    assert not routed.takes_choice(x, x.astype(mx.float16), Choice(3))
    assert not routed.takes_choice(mx.zeros((2, 513)), mx.zeros((2, 513)), Choice(3))
    assert not routed.takes_choice(x.astype(mx.int32), x.astype(mx.int32), Choice(3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [8, 264, 2880])
@pytest.mark.parametrize("biased", [False, True])
def test_gates_and_sums_of_rows(dtype: mx.Dtype, width: int, biased: bool) -> None:
    tokens, each, count = 3, 4, 5
    indices = mx.array(np.random.default_rng(3).integers(0, count, tokens * each).astype(np.int32))
    bias = [normal(seed, count, width, dtype=dtype) if biased else None for seed in (8, 9)]
    gate, up = (Pairs(normal(i, len(indices), width, dtype=dtype), indices, b) for i, b in enumerate(bias))
    for form in (Gate(), CLIPPED):
        got = routed.expert_gate(host_launcher(1), gate, up, form)
        assert distance(got, reference.expert_gate(gate, up, form)) < TOLERANCE[dtype]
    x, shares = normal(5, tokens, width, dtype=dtype), mx.softmax(normal(6, tokens, each))
    for plus in (None, x):
        got = routed.weighed_sum(host_launcher(1), gate, shares, plus)
        assert got.shape == (tokens, width)
        assert distance(got, reference.weighed_sum(gate, shares, plus)) < TOLERANCE[dtype]
    norm = fused.Norm(normal(7, width, dtype=dtype), 1e-5)
    total, out = routed.add_weighed_rms_norm(host_launcher(1), x[:, None], gate, shares.astype(dtype), norm)
    want = reference.weighed_sum(gate, shares.astype(dtype), x)
    assert total.shape == out.shape == (tokens, 1, width)
    assert distance(total[:, 0], want) < TOLERANCE[dtype]
    assert distance(out[:, 0], reference.rms_norm(total[:, 0], *norm)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_in_other_places_are_summed_alike(dtype: mx.Dtype) -> None:
    indices = mx.array(np.random.default_rng(3).integers(0, 5, 12).astype(np.int32))
    rows, bias = normal(1, 12, 264, dtype=dtype), normal(2, 5, 264, dtype=dtype)
    places = mx.array(np.random.default_rng(4).permutation(12).astype(np.int32))
    pairs, moved = Pairs(rows[places], indices, bias), Pairs(rows, indices, bias, places)
    shares, x = mx.softmax(normal(6, 3, 4), axis=-1), normal(5, 3, 264, dtype=dtype)
    norm = fused.Norm(normal(7, 264, dtype=dtype), 1e-5)
    want = [routed.weighed_sum(host_launcher(), pairs, shares, x)]
    got = [routed.weighed_sum(host_launcher(), moved, shares, x)]
    want += routed.add_weighed_rms_norm(host_launcher(), x, pairs, shares, norm)
    got += routed.add_weighed_rms_norm(host_launcher(), x, moved, shares, norm)
    assert all(mx.array_equal(a, b) for a, b in zip(got, want, strict=True))
    assert distance(got[0], reference.weighed_sum(moved, shares, x)) < TOLERANCE[dtype]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=600), st.integers(1, 8), st.integers(0, 2))
def test_pairs_are_ordered_by_expert_and_then_as_they_come(chosen: list[int], each: int, schedule: int) -> None:
    indices = mx.array(chosen, dtype=mx.int32)
    got, want = routed.sort_pairs(host_launcher(schedule), indices, each), reference.sort_pairs(indices, each)
    for mine, theirs in ((got.places, want.places), (got.experts, want.experts), (got.rows, want.rows)):
        assert mx.array_equal(mine, theirs)
    assert got.experts.tolist() == sorted(chosen)


# (tokens, N, K, experts, pairs a token)
SHAPES = {
    "one-token": (1, 48, 128, 8, 2),
    "edge-of-columns": (5, 72, 64, 4, 3),
    "one-expert-has-all": (20, 32, 64, 2, 1),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_gated_products_are_gates_of_products(shape: str, dtype: mx.Dtype, form: str) -> None:
    made = layer(form, dtype, *SHAPES[shape], one_has_all=shape == "one-expert-has-all")
    for gates, want in made.gated:
        got = products.gated_product(host_launcher(2), made.x, gates, made.indices, made.each)
        assert got.dtype == dtype
        assert distance(got, want) < TOLERANCE[dtype]


@dataclass
class Layer:
    """Rows, the experts that they go to, the weights ``gate``, their ``product``, and ``gated`` layers with theirs."""

    x: mx.array
    indices: mx.array
    each: int
    gate: Weights
    product: mx.array
    gated: list[tuple[Gated, mx.array]]


def layer(
    form: str, dtype: mx.Dtype, tokens: int, n: int, k: int, count: int, each: int, *, one_has_all: bool
) -> Layer:
    x, top = normal(1, tokens, k, dtype=dtype), 1 if one_has_all else count
    indices = mx.array(np.random.default_rng(2).integers(0, top, tokens * each).astype(np.int32))
    (gate, near), (up, near_up) = (quantized(form, normal(s, count, n, k, dtype=dtype) / k**0.5) for s in (3, 4))
    biases = normal(5, count, n, dtype=dtype), normal(6, count, n, dtype=dtype)
    rows = x.astype(mx.float32)[mx.arange(tokens * each) // each]
    y, z = ((rows[:, None] @ w.astype(mx.float32)[indices].swapaxes(1, 2))[:, 0] for w in (near, near_up))
    biased = reference.expert_gate(Pairs(y, indices, biases[0]), Pairs(z, indices, biases[1]), CLIPPED)
    bare = reference.expert_gate(Pairs(y, indices), Pairs(z, indices), Gate())
    gated = [(Gated(gate, up, biases, CLIPPED), biased), (Gated(gate, up, None, Gate()), bare)]
    return Layer(x, indices, each, gate, y, gated)


def quantized(form: str, w: mx.array) -> tuple[Weights, mx.array]:
    """Weights, and the numbers that they stand for."""
    bits, mode = FORMS[form]
    if bits == 16:
        return Weights(w), w
    group = 16 if mode == "nvfp4" else 32
    packed, scales, *rest = mx.quantize(w, group, bits, mode)
    biases = rest[0] if rest else None
    near = mx.dequantize(packed, scales, biases, group, bits, mode, dtype=w.dtype)
    return Weights(packed, scales, biases, bits, group, mode), near


PLANTED: dict[str, tuple[str, str, str]] = {
    "a lane's later keys left out": (
        "route",
        "key[n] >= best : key[n] > best",
        "key[n] >= best : n < 1 && key[n] > best",
    ),
    "the later of equals": ("route", "(LATER ? where > at : where < at)", "(where > at)"),
    "chosen twice": ("route", "== at) key[n] = GONE", "== at + 1) key[n] = GONE"),
    "shares of the row before": (
        "route",
        "values[size_t(row) * COUNT + mine]",
        "values[size_t(row / 2) * COUNT + mine]",
    ),
    "not divided": ("route", "SOFT || DIVIDED", "SOFT"),
    "the factor left out": ("route", "share * params[0]", "share"),
    "a softmax without its last column": ("route", "key[n] > GONE ? exp2_of", "key[n] > GONE && n < 3 ? exp2_of"),
    "the next expert's bias": ("expert_gate", "size_t(indices[block_x])", "size_t(indices[block_x] / 2)"),
    "not clipped below": ("expert_gate", "up < -limit ? -limit : up", "up"),
    "one is not added": ("expert_gate", "(CLIPPED ? u + 1.0f : u)", "u"),
    "a row left out": ("weighed_sum", "n < EACH", "n < EACH - 1"),
    "the bias is not weighed": ("weighed_sum", "share * (float(a.v[e]) + (BIASED", "share * float(a.v[e]) + ((BIASED"),
    "nothing added": ("weighed_sum", "PLUS ? float(a.v[e]) : 0.0f", "0.0f"),
    "another row's shares": ("add_weighed_rms_norm", "shares[pair]", "shares[pair / 2]"),
    "a row where it would be": ("weighed_sum", "PLACED ? places[pair] : int(pair)", "int(pair)"),
    "the same in the norm": ("add_weighed_rms_norm", "PLACED ? places[pair] : int(pair)", "int(pair)"),
    "later ones first": ("sort_pairs", "all[j] == mine && j < i", "all[j] == mine && j > i"),
    "another's row": ("sort_pairs", "rows[place] = i / EACH", "rows[place] = place / EACH"),
    "pairs not waited for": ("sort_pairs", "  BARRIER();\n", ""),
    "the gate twice": ("gated", "t < OWN ? w : up_w", "w"),
    "the gate's scales": ("gated_mxfp4", "t < OWN ? scales : up_scales", "scales"),
    "columns of up": ("gated_mxfp4", "j % WIDTH + WIDTH]", "j % WIDTH]"),
    "another expert's bias": ("gated_nvfp4", "size_t of = size_t(expert)", "size_t of = size_t(expert / 2)"),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults_are_found(fault: str) -> None:
    """By the self-check that would have to find them on a machine that nobody has seen."""
    name, line, planted = PLANTED[fault]
    check: Callable[..., bool] = {**EXPERT_CHECKS, **PRODUCT_CHECKS}[name]  # type: ignore[index]
    tuning = paged.Tuning(matrix=True)
    dtype = mx.bfloat16 if name in PRODUCT_CHECKS else mx.float32
    with mx.stream(mx.cpu):
        assert check(host_launcher(1), dtype, tuning)
    assert_found(line, planted, lambda launch: check(launch, dtype, tuning))


def test_no_one_checks_gates_where_no_one_launches_them() -> None:
    check = PRODUCT_CHECKS["gated"]
    assert check(lambda *_: [], mx.float32, paged.Tuning(matrix=True))
    assert check(lambda *_: [], mx.bfloat16, paged.Tuning(matrix=False))


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Gpu]:
    yield from played(monkeypatch, tmp_path, Gpu(wrong=("route", "gated_mma"), raises=("weighed_sum",)))


def test_kernels_that_are_wrong_are_left_out_one_by_one(wrong: Gpu) -> None:
    x, indices = normal(1, 2, 64, dtype=mx.bfloat16), mx.array([0, 1, 1, 0], mx.int32)
    weights, _ = quantized("affine-4", normal(2, 2, 32, 64, dtype=mx.bfloat16))
    assert experts.route(x, x, Choice(2)) is None
    assert experts.gated_product(x, Gated(weights, weights, None, Gate()), Routed(indices), 2) is None
    pairs = Pairs(normal(3, 4, 64, dtype=mx.bfloat16), indices)
    assert experts.weighed_sum(pairs, normal(4, 2, 2)) is None
    wrong.launched.clear()
    norm = fused.Norm(normal(5, 64, dtype=mx.bfloat16), 1e-5)
    assert experts.expert_gate(pairs, pairs, Gate()) is not None
    assert experts.add_weighed_rms_norm(x, pairs, normal(4, 2, 2), norm) is not None
    assert kernels.expert_product(x, weights, Routed(indices), 2) is not None
    assert wrong.launched == ["expert_gate", "add_weighed_rms_norm", "expert_mma"]


def test_what_is_not_of_one_type_is_left_to_mlx(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for gpu in played(monkeypatch, tmp_path, Gpu()):
        indices, shares = mx.array([0, 1, 1, 0], mx.int32), normal(4, 2, 2)
        pairs = Pairs(normal(3, 4, 64), indices)
        half = replace(pairs, bias=normal(5, 2, 64, dtype=mx.float16))
        norm = fused.Norm(normal(5, 64, dtype=mx.float16), 1e-5)
        assert experts.expert_gate(half, half, Gate()) is None
        assert experts.expert_gate(pairs, replace(pairs, bias=normal(5, 2, 64)), Gate()) is None
        assert experts.weighed_sum(half, shares) is None
        assert experts.weighed_sum(pairs, shares, normal(6, 2, 64, dtype=mx.float16)) is None
        assert experts.add_weighed_rms_norm(normal(6, 2, 64), pairs, shares, norm) is None
        odd = Pairs(normal(3, 4, 63), indices)
        assert experts.weighed_sum(odd, shares) is None, "no whole packs"
        assert gpu.launched == []


def test_experts_whose_scales_are_of_another_type_are_left_to_mlx(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for gpu in played(monkeypatch, tmp_path, Gpu()):
        x, chosen = normal(1, 4, 64, dtype=mx.bfloat16), Routed(mx.array([0, 1, 1, 0], mx.int32))
        weights, _ = quantized("affine-4", normal(2, 2, 32, 64, dtype=mx.bfloat16))
        assert weights.scales is not None
        assert weights.biases is not None
        wide = replace(weights, scales=weights.scales.astype(mx.float32), biases=weights.biases.astype(mx.float32))
        assert not weights.like(wide), "else up's numbers would be read as the gate's type"
        bias = normal(3, 2, 32, dtype=mx.bfloat16)
        assert experts.gated_product(x, Gated(weights, weights, (bias, bias), Gate()), chosen, 1) is not None
        gpu.launched.clear()
        assert kernels.expert_product(x, weights, chosen, 1) is not None
        assert kernels.expert_product(x, wide, chosen, 1) is None, "though one of its shape goes by a kernel"
        wider = bias.astype(mx.float32)
        assert experts.gated_product(x, Gated(weights, weights, (bias, wider), Gate()), chosen, 1) is None
        assert gpu.launched == ["expert_mma"]
