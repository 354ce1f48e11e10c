"""Norms by MLX equal torch's, on whatever torch tensors they get, and torch computes what MLX doesn't."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from pippin.torch import norms

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float64: 1e-12}
B, L, D = 2, 6, 16


def draw(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0, spread: float = 1.0
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * spread).to(dtype)


def assert_close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """``expected`` in float64; ``found`` must be of ``dtype`` and within its rounding of it."""
    assert (found.dtype, found.shape) == (dtype, expected.shape)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)


def reference(x: torch.Tensor, weight: Any, bias: Any, eps: float, rms: bool) -> torch.Tensor:
    x, weight, bias = (None if t is None else t.double() for t in (x, weight, bias))
    if not rms:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    y = F.rms_norm(x, x.shape[-1:], weight, eps)
    return y if bias is None else y + bias


@given(
    st.lists(st.integers(1, 5), max_size=3).map(tuple),
    st.integers(1, 70),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1e-6, 1e-5, 1e-2]),
    st.integers(0, 99),
)
def test_norm_infer_is_torchs_norm(
    lead: tuple[int, ...], dim: int, dtype: torch.dtype, rms: bool, weighted: bool, biased: bool, eps: float, seed: int
) -> None:
    x = draw((*lead, dim), dtype, seed, spread=3.0)
    weight = 1 + draw((dim,), dtype, seed + 1, 0.3) if weighted else None
    bias = draw((dim,), dtype, seed + 2) if biased else None
    assert norms.by_mlx(x, weight, bias)
    found = norms.norm_infer(x, weight, bias, eps, is_rms_norm=rms)
    if dim == 1 and not rms:  # a difference from its own mean: nothing but rounding, of 0
        assert found.double().abs().max() <= (0 if bias is None else bias.double().abs().max()) + 1e-2
        return
    assert_close(found, reference(x, weight, bias, eps, rms), dtype)


@pytest.mark.parametrize("view", ["transposed", "sliced", "expanded"])
def test_strides_do_not_matter(view: str) -> None:
    base = draw((8, 12, 16))
    x = {"transposed": base.transpose(0, 2), "sliced": base[::2, 1:, ::3], "expanded": base[:1].expand(4, -1, -1)}[view]
    found = norms.norm_infer(x, None, None, 1e-6)
    assert_close(found, reference(x, None, None, 1e-6, rms=False), torch.float32)


def test_out_is_written_and_returned() -> None:
    x, out = draw((4, 8)), torch.empty(4, 8, dtype=torch.float16)
    assert norms.norm_infer(x, None, None, 1e-6, out=out) is out
    assert_close(out, reference(x, None, None, 1e-6, rms=False), torch.float16)


def test_one_pass_rms_norm() -> None:
    x, weight = draw((4, 3, 8), torch.bfloat16), draw((8,), torch.float32, 1)
    assert_close(
        norms.triton_one_pass_rms_norm(x, weight, 1e-5), reference(x, weight, None, 1e-5, rms=True), torch.bfloat16
    )


@given(st.sampled_from(DTYPES), st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 99))
def test_rms_norm_fn(dtype: torch.dtype, summed: bool, wide: bool, around_1: bool, biased: bool, seed: int) -> None:
    x, residual = draw((3, 5, D), dtype, seed), draw((3, 5, D), dtype, seed + 1) if summed else None
    weight, bias = draw((D,), dtype, seed + 2, 0.3), draw((D,), dtype, seed + 3) if biased else None
    found = norms.rms_norm_fn(x, weight, bias, residual, eps=1e-6, residual_in_fp32=wide, zero_centered_weight=around_1)
    total = x.double() + (0 if residual is None else residual.double())
    expected = reference(total, weight.double() + 1 if around_1 else weight, bias, 1e-6, rms=True)
    if residual is None:
        assert isinstance(found, torch.Tensor)
        assert_close(found, expected, dtype)
        return
    assert isinstance(found, tuple)
    assert_close(found[0], expected, dtype)
    assert_close(found[1], total, torch.float32 if wide else dtype)


def test_rms_norm_fns_result_may_be_of_another_dtype() -> None:
    x = draw((3, D), torch.bfloat16)
    found = norms.rms_norm_fn(x, None, None, out_dtype=torch.float32)
    assert isinstance(found, torch.Tensor)
    assert_close(found, reference(x, None, None, 1e-6, rms=True), torch.float32)


# --- with scale and shift ---

SHAPES: list[tuple[int, ...]] = [
    (), (1,), (D,), (1, D), (B, D), (1, 1, D), (B, 1, D), (1, L, D), (B, L, D),
    (B, 3, 1, D), (1, 2, 1, D), (1, 1, 1, 1),
]  # fmt: skip


def spread(t: torch.Tensor) -> torch.Tensor:
    """Written out token by token, [B, L, D] float64."""
    out = torch.empty(B, L, D, dtype=torch.float64)
    for b in range(B):
        for n in range(L):
            match t.shape:
                case () | (_,):
                    line = t
                case (rows, _):
                    line = t[b % rows]
                case (rows, length, _):
                    line = t[b % rows, n % length]
                case (rows, frames, _, _):
                    line = t[b % rows, n // (L // frames), 0]
            out[b, n] = line.double()
    return out


OPERAND = st.tuples(st.sampled_from(SHAPES), st.integers(0, 99)).map(lambda a: (a[0], a[1]))


@given(st.sampled_from(DTYPES), OPERAND, OPERAND, st.sampled_from([0.0, 1.0]))
def test_scale_and_shift(dtype: torch.dtype, scale: Any, shift: Any, constant: float) -> None:
    x, (a, b) = draw((B, L, D), dtype, 1), (draw(shape, dtype, seed) for shape, seed in (scale, shift))
    found = norms.fuse_scale_shift_kernel(x, a, b, constant)
    assert_close(found, x.double() * (constant + spread(a)) + spread(b), dtype)


@given(st.sampled_from(DTYPES), OPERAND, OPERAND, st.sampled_from(["layer", "rms"]), st.booleans())
def test_norm_scale_shift(dtype: torch.dtype, scale: Any, shift: Any, kind: str, affine: bool) -> None:
    x, (a, b) = draw((B, L, D), dtype, 1), (draw(shape, dtype, seed) for shape, seed in (scale, shift))
    weight, bias = (draw((D,), torch.float32, 7), draw((D,), torch.float32, 8)) if affine else (None, None)
    found = norms.fused_norm_scale_shift(x, weight, bias, a, b, kind, 1e-5)
    expected = reference(x, weight, bias, 1e-5, kind == "rms") * (1 + spread(a)) + spread(b)
    assert_close(found, expected, dtype)


@given(st.sampled_from(DTYPES), OPERAND | st.sampled_from([None, 1]), OPERAND, st.sampled_from(["layer", "rms"]))
def test_scale_residual_norm_scale_shift(dtype: torch.dtype, gate: Any, scale: Any, kind: str) -> None:
    x, residual, shift = (draw((B, L, D), dtype, seed) for seed in (1, 2, 3))
    gates = draw(gate[0], dtype, gate[1]) if isinstance(gate, tuple) else gate
    a = draw(scale[0], dtype, scale[1])
    found = norms.fused_scale_residual_norm_scale_shift(residual, x, gates, None, None, a, shift, kind, 1e-5)
    total = residual.double() + x.double() * (spread(gates) if isinstance(gates, torch.Tensor) else 1)
    assert_close(found[1], total, dtype)
    assert_close(found[0], reference(total, None, None, 1e-5, kind == "rms") * (1 + spread(a)) + shift.double(), dtype)


@given(
    st.sampled_from(DTYPES), st.booleans(), st.sampled_from([torch.int32, torch.int64, torch.bool]), st.integers(0, 99)
)
def test_select01(dtype: torch.dtype, affine: bool, kind: torch.dtype, seed: int) -> None:
    x, residual, gate = (draw((B, L, D), dtype, seed + i) for i in range(3))
    sets: tuple[Any, ...] = tuple(draw((B, D), dtype, seed + 10 + i) for i in range(6))
    index = torch.randint(0, 2, (B, L), generator=torch.Generator().manual_seed(seed)).to(kind)
    weight, bias = (draw((D,), dtype, 7), draw((D,), dtype, 8)) if affine else (None, None)
    scale, shift, gates = (
        torch.where(index.bool()[..., None], one[:, None], zero[:, None])
        for zero, one in zip(sets[:3], sets[3:], strict=True)
    )

    def expected(rows: torch.Tensor) -> torch.Tensor:
        return reference(rows, weight, bias, 1e-6, rms=False) * (1 + scale.double()) + shift.double()

    operands: Any = (*sets, index, 1e-6)
    plain = norms.fuse_layernorm_scale_shift_gate_select01_kernel(x, weight, bias, *operands)
    assert_close(plain[0], expected(x), dtype)
    assert torch.equal(plain[1], gates)
    y, total, picked = norms.fuse_residual_layernorm_scale_shift_gate_select01_kernel(
        x, residual, gate, weight, bias, *operands
    )
    unrounded = residual.double() + gate.double() * x.double()
    assert_close(total, unrounded, dtype)
    assert_close(y, expected(unrounded), dtype)
    assert torch.equal(picked, gates)


# --- modules, and what torch computes itself ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("ours", "torchs"), [(norms.RMSNorm, torch.nn.RMSNorm), (norms.LayerNorm, torch.nn.LayerNorm)])
@pytest.mark.parametrize("shape", [(D,), (L, D)])
def test_modules_take_torchs_place(ours: Any, torchs: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    theirs, mine = torchs(shape, eps=1e-5, dtype=dtype), ours(shape, eps=1e-5, dtype=dtype)
    with torch.no_grad():
        for i, parameter in enumerate(theirs.parameters()):
            parameter.copy_(draw(tuple(parameter.shape), dtype, i))
        mine.load_state_dict(theirs.state_dict())
        x = draw((B, L, D), dtype)
        assert_close(mine(x), theirs.double()(x.double()), dtype)


def test_a_module_without_eps_has_torchs() -> None:
    x = draw((3, D)) * 1e-3
    with torch.no_grad():
        assert_close(norms.RMSNorm(D)(x), torch.nn.RMSNorm(D)(x), torch.float32)


def test_gradients_flow_where_they_are_wanted() -> None:
    """And a module's parameters, which ask for them, are MLX's where nobody wants any."""
    module, x = norms.LayerNorm(D), draw((3, D)).requires_grad_()
    assert not norms.by_mlx(x, module.weight)
    module(x).square().sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        assert norms.by_mlx(x, module.weight)
        expected = F.layer_norm(x, (D,))
        assert_close(module(x), expected, torch.float32)


@pytest.mark.parametrize("shape", [(0, D), (3, 0, D)])
def test_tensors_without_elements_are_torchs(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape)
    assert not norms.by_mlx(x)
    assert norms.norm_infer(x, None, None, 1e-6).shape == shape


def test_float64_is_torchs_and_keeps_its_precision() -> None:
    x, scale, shift = (draw((B, L, D), torch.float64, seed) for seed in range(3))
    assert not norms.by_mlx(x)
    found = norms.fused_norm_scale_shift(x, None, None, scale, shift, "layer", 1e-6)
    assert_close(found, reference(x, None, None, 1e-6, rms=False) * (1 + scale) + shift, torch.float64)


def test_mlx_computes_what_it_says_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    sides = {name: getattr(norms, name) for name in ("MLX", "TORCH")}
    for name, side in sides.items():

        def norm(*given: Any, name: str = name, own: Any = side.layer_norm) -> Any:
            used.append(name)
            return own(*given)

        monkeypatch.setattr(norms, name, side._replace(layer_norm=norm))
    norms.norm_infer(draw((2, D)), None, None, 1e-6)
    norms.norm_infer(draw((2, D), torch.float64), None, None, 1e-6)
    assert used == ["MLX", "TORCH"]


def wrong_sets(x: torch.Tensor) -> Any:
    """One of the six has a line for each token."""
    return (*[x[:, 0]] * 5, x, torch.zeros(B, L), 1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: norms.norm_infer(x, torch.ones(3), None, 1e-6), r"weight is \(3,\), and must be \(16,\)"),
        (lambda x: norms.norm_infer(x, None, torch.ones(1, D), 1e-6), r"bias is \(1, 16\)"),
        (lambda x: norms.rms_norm_fn(x, None, None, x[:1]), "residual is .*must be alike"),
        (lambda x: norms.fuse_scale_shift_kernel(x[0], x[0], x[0]), "x must be"),
        (lambda x: norms.fuse_scale_shift_kernel(x, torch.ones(3, D), x), r"scale is \(3, 16\)"),
        (lambda x: norms.fuse_scale_shift_kernel(x, x, torch.ones(B, 4, 1, D)), r"shift is \(2, 4, 1, 16\)"),
        (lambda x: norms.fused_norm_scale_shift(x, None, None, x, x, "batch"), "'layer' or 'rms', not 'batch'"),
        (lambda x: norms.fused_scale_residual_norm_scale_shift(x, x, 2, None, None, x, x, "rms"), "gate is 2"),
        (
            lambda x: norms.fuse_layernorm_scale_shift_gate_select01_kernel(x, None, None, *wrong_sets(x)),
            r"gates \[B, D\]",
        ),
    ],
)
def test_wrong_shapes_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(draw((B, L, D)))


def test_results_are_torchs_to_write() -> None:
    """MLX's memory is shared, and nobody else holds it."""
    x = draw((3, D))
    found = norms.norm_infer(x, None, None, 1e-6)
    found.zero_()
    assert not torch.equal(norms.norm_infer(x, None, None, 1e-6), found)
