"""Norms of torch tensors, computed by MLX: RMSNorm, LayerNorm, and those that diffusion models fuse with a shift.

Names, arguments and results are those of the functions that SGLang's diffusion models call (``jit_kernel/diffusion``:
``triton/norm.py``, ``triton/scale_shift.py``, ``fused_norm_scale_shift.py``). Each computes in float32, whatever it is
given, and rounds once, to the dtype of ``x``.

MLX computes float32, float16 and bfloat16 tensors on the CPU and, on Apple silicon, on MPS, where memory is shared and
one fast kernel replaces torch's many. Everything else falls back to torch, by the same formula: other dtypes (float64
computes in float64), CUDA, tensors without elements, and whatever wants gradients.

Operands of ``x`` [B, L, D] (``scale``, ``shift``, ``gate``) may be of one element, [D], [B, D], [B, L, D], where B and
L may be 1, or [B, F, 1, D] with one line for each of F frames of L / F tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import torch
import torch.nn.functional as F

from pippin.torch.bridge import DTYPES, mlx_to_torch, torch_to_mlx

Array = Any
"""A torch tensor or an MLX array: a formula below is written once for both."""

MOST_RESULTS = 3
MLX_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Side(NamedTuple):
    """What a formula needs of a library beside arithmetic; norms are over the last axis, weight and bias optional."""

    rms_norm: Callable[[Array, Array | None, float], Array]
    layer_norm: Callable[[Array, Array | None, Array | None, float], Array]
    where: Callable[[Array, Array, Array], Array]
    broadcast_to: Callable[[Array, Sequence[int]], Array]


TORCH = Side(
    lambda x, weight, eps: F.rms_norm(x, x.shape[-1:], weight, eps),
    lambda x, weight, bias, eps: F.layer_norm(x, x.shape[-1:], weight, bias, eps),
    torch.where,
    torch.broadcast_to,
)
MLX = Side(mx.fast.rms_norm, mx.fast.layer_norm, mx.where, mx.broadcast_to)


def by_mlx(x: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether MLX computes on these."""
    tensors = [x, *(t for t in others if t is not None)]
    return (
        x.dtype in MLX_DTYPES
        and all(t.numel() > 0 and t.device == x.device for t in tensors)
        and (x.device.type == "cpu" or (x.device.type == "mps" and mx.metal.is_available()))
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
    )


def _compute(
    formula: Callable[..., tuple[Array, ...]],
    x: torch.Tensor,
    *others: torch.Tensor | None,
    into: Sequence[torch.dtype] | None = None,
    **settings: Any,
) -> list[torch.Tensor]:
    """``formula(side, x, *others, **settings)``, by MLX where it can; bools stay bools, all else is float32.

    Results are of the dtypes ``into``, or all of the dtype of ``x``.
    """
    dtypes = into or [x.dtype] * MOST_RESULTS
    if not by_mlx(x, *others):
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        given = [t if t is None or t.dtype == torch.bool else t.to(wide) for t in (x, *others)]
        return [y.to(dtype) for y, dtype in zip(formula(TORCH, *given, **settings), dtypes, strict=False)]
    arrays = [None if t is None else torch_to_mlx(t.detach()) for t in (x, *others)]
    floats = [a if a is None or a.dtype == mx.bool_ else a.astype(mx.float32) for a in arrays]
    results = zip(formula(MLX, *floats, **settings), dtypes, strict=False)
    return [mlx_to_torch(y.astype(DTYPES[dtype]), x.device) for y, dtype in results]


# --- norms ---


def norm_infer(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    is_rms_norm: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """LayerNorm or RMSNorm over the last axis of ``x`` [..., D]; weight and bias [D]. Writes to ``out`` if given.

    Raises ValueError where weight or bias is not [D].
    """
    _check_affine(x, weight, bias)
    (y,) = _compute(_norm, x, weight, bias, eps=eps, rms=is_rms_norm)
    return y if out is None else out.copy_(y)


def triton_one_pass_rms_norm(x: torch.Tensor, w: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """RMSNorm over the last axis of ``x`` [..., D], times ``w`` [D]."""
    return norm_infer(x, w, None, eps, is_rms_norm=True)


def rms_norm_fn(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None = None,
    *,
    eps: float = 1e-6,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of ``x`` + ``residual``; with a residual, the sum comes back too, in the dtype of ``x`` or float32.

    ``zero_centered_weight``: the weight's distance from 1 is what is given. Raises ValueError as ``norm_infer`` does.
    """
    _check_affine(x, weight, bias)
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual is {tuple(residual.shape)}, and x {tuple(x.shape)}: they must be alike")
    into = (out_dtype or x.dtype, torch.float32 if residual_in_fp32 else x.dtype)
    y, total = _compute(_rms_norm_of_sum, x, weight, bias, residual, into=into, eps=eps, around_1=zero_centered_weight)
    return y if residual is None else (y, total)


class RMSNorm(torch.nn.RMSNorm):  # type: ignore[misc]  # torch is not there where types are checked
    """torch's module over one axis, computed as above."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` [..., D], normed; by torch if the norm is over several axes."""
        if len(self.normalized_shape) > 1:
            return super().forward(x)
        eps = self.eps if self.eps is not None else torch.finfo(x.dtype).eps
        return norm_infer(x, self.weight, None, eps, is_rms_norm=True)


class LayerNorm(torch.nn.LayerNorm):  # type: ignore[misc]  # torch is not there where types are checked
    """torch's module over one axis, computed as above."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` [..., D], normed; by torch if the norm is over several axes."""
        if len(self.normalized_shape) > 1:
            return super().forward(x)
        return norm_infer(x, self.weight, self.bias, self.eps)


# --- with scale and shift ---


def fuse_scale_shift_kernel(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, scale_constant: float = 1.0
) -> torch.Tensor:
    """``x * (scale_constant + scale) + shift`` of x [B, L, D]. Raises ValueError for operands of other shapes."""
    _check_operands(x, scale=scale, shift=shift)
    (y,) = _compute(_scale_shift, x, scale, shift, shape=tuple(x.shape), constant=scale_constant)
    return y


def fused_norm_scale_shift(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor,
    shift: torch.Tensor,
    norm_type: str,
    eps: float = 1e-5,
) -> torch.Tensor:
    """``norm(x) * (1 + scale) + shift`` of x [B, L, D]; ``norm_type`` is ``layer`` or ``rms``.

    Raises ValueError for another type, and for operands of other shapes.
    """
    _check_affine(x, weight, bias)
    _check_operands(x, scale=scale, shift=shift)
    rms = _is_rms(norm_type)
    (y,) = _compute(_norm_scale_shift, x, weight, bias, scale, shift, shape=tuple(x.shape), eps=eps, rms=rms)
    return y


def fused_scale_residual_norm_scale_shift(
    residual: torch.Tensor,
    x: torch.Tensor,
    gate: torch.Tensor | int | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor,
    shift: torch.Tensor,
    norm_type: str,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(``norm(sum) * (1 + scale) + shift``, sum) with ``sum = residual + gate * x``; a gate of None or 1 is none.

    Raises ValueError as ``fused_norm_scale_shift`` does, and for a gate that is another number.
    """
    if isinstance(gate, int) and gate != 1:
        raise ValueError(f"gate is {gate}; a number can only be 1: give a tensor")
    gates = gate if isinstance(gate, torch.Tensor) else None
    _check_affine(x, weight, bias)
    _check_operands(x, residual=residual, gate=gates, scale=scale, shift=shift)
    y, total = _compute(
        _gated_norm_scale_shift,
        *(x, residual, gates, weight, bias, scale, shift),
        shape=tuple(x.shape),
        eps=eps,
        rms=_is_rms(norm_type),
    )
    return y, total


def fuse_layernorm_scale_shift_gate_select01_kernel(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale0: torch.Tensor,
    shift0: torch.Tensor,
    gate0: torch.Tensor,
    scale1: torch.Tensor,
    shift1: torch.Tensor,
    gate1: torch.Tensor,
    index: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(``layer_norm(x) * (1 + scale) + shift``, gate), each token with the operands [B, D] that ``index`` [B, L] picks.

    Index 0 picks the first three, any other the second; the gate comes back as [B, L, D]. Raises ValueError for
    operands of other shapes.
    """
    operands = (scale0, shift0, gate0, scale1, shift1, gate1)
    _check_affine(x, weight, bias)
    _check_select(x, operands, index)
    y, gate = _compute(_select_norm, x, weight, bias, index != 0, *operands, shape=tuple(x.shape), eps=eps)
    return y, gate


def fuse_residual_layernorm_scale_shift_gate_select01_kernel(
    x: torch.Tensor,
    residual: torch.Tensor,
    residual_gate: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale0: torch.Tensor,
    shift0: torch.Tensor,
    gate0: torch.Tensor,
    scale1: torch.Tensor,
    shift1: torch.Tensor,
    gate1: torch.Tensor,
    index: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As the function above, of ``sum = residual + residual_gate * x``, which comes back between the two."""
    operands = (scale0, shift0, gate0, scale1, shift1, gate1)
    _check_affine(x, weight, bias)
    _check_operands(x, residual=residual, residual_gate=residual_gate)
    _check_select(x, operands, index)
    y, total, gate = _compute(
        _select_norm_of_sum,
        *(x, residual, residual_gate, weight, bias, index != 0, *operands),
        shape=tuple(x.shape),
        eps=eps,
    )
    return y, total, gate


# --- formulas, for either side ---


def _norm(
    side: Side, x: Array, weight: Array | None, bias: Array | None, *, eps: float, rms: bool
) -> tuple[Array, ...]:
    if not rms:
        return (side.layer_norm(x, weight, bias, eps),)
    y = side.rms_norm(x, weight, eps)
    return (y if bias is None else y + bias,)


def _rms_norm_of_sum(
    side: Side,
    x: Array,
    weight: Array | None,
    bias: Array | None,
    residual: Array | None,
    *,
    eps: float,
    around_1: bool,
) -> tuple[Array, ...]:
    total = x if residual is None else x + residual
    if around_1 and weight is not None:
        weight = weight + 1.0
    return (*_norm(side, total, weight, bias, eps=eps, rms=True), total)


def _scale_shift(
    side: Side, x: Array, scale: Array, shift: Array, *, shape: tuple[int, ...], constant: float = 1.0
) -> tuple[Array, ...]:
    return (x * (constant + _spread(side, scale, shape)) + _spread(side, shift, shape),)


def _norm_scale_shift(
    side: Side,
    x: Array,
    weight: Array | None,
    bias: Array | None,
    scale: Array,
    shift: Array,
    *,
    shape: tuple[int, ...],
    eps: float,
    rms: bool,
) -> tuple[Array, ...]:
    (y,) = _norm(side, x, weight, bias, eps=eps, rms=rms)
    return _scale_shift(side, y, scale, shift, shape=shape)


def _gated_norm_scale_shift(
    side: Side,
    x: Array,
    residual: Array,
    gate: Array | None,
    weight: Array | None,
    bias: Array | None,
    scale: Array,
    shift: Array,
    *,
    shape: tuple[int, ...],
    eps: float,
    rms: bool,
) -> tuple[Array, ...]:
    total = residual + (x if gate is None else x * _spread(side, gate, shape))
    return (*_norm_scale_shift(side, total, weight, bias, scale, shift, shape=shape, eps=eps, rms=rms), total)


def _select_norm(
    side: Side,
    x: Array,
    weight: Array | None,
    bias: Array | None,
    second: Array,
    *operands: Array,
    shape: tuple[int, ...],
    eps: float,
) -> tuple[Array, ...]:
    scale, shift, gate = (
        side.where(second[..., None], one[:, None], zero[:, None])
        for zero, one in zip(operands[:3], operands[3:], strict=True)
    )
    (y,) = _norm_scale_shift(side, x, weight, bias, scale, shift, shape=shape, eps=eps, rms=False)
    return y, gate


def _select_norm_of_sum(
    side: Side, x: Array, residual: Array, residual_gate: Array, *rest: Array, shape: tuple[int, ...], eps: float
) -> tuple[Array, ...]:
    total = residual + x * _spread(side, residual_gate, shape)
    y, gate = _select_norm(side, total, *rest, shape=shape, eps=eps)
    return y, total, gate


def _spread(side: Side, operand: Array, shape: tuple[int, ...]) -> Array:
    """``operand`` so that it broadcasts to x's ``shape``."""
    if operand.ndim == 2:
        return operand[:, None]
    if operand.ndim == 4:
        frames = operand.shape[1]
        spread = side.broadcast_to(operand, (operand.shape[0], frames, shape[1] // frames, shape[2]))
        return spread.reshape(operand.shape[0], shape[1], shape[2])
    return operand


# --- checks ---


def _is_rms(norm_type: str) -> bool:
    if norm_type not in ("layer", "rms"):
        raise ValueError(f"norm_type must be 'layer' or 'rms', not {norm_type!r}")
    return norm_type == "rms"


def _check_affine(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> None:
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.shape != x.shape[-1:]:
            raise ValueError(f"{name} is {tuple(t.shape)}, and must be {tuple(x.shape[-1:])}, as x's last axis")


def _check_operands(x: torch.Tensor, **operands: torch.Tensor | None) -> None:
    if x.ndim != 3:
        raise ValueError(f"x must be [B, L, D], not {tuple(x.shape)}")
    batch, length, dim = x.shape
    for name, t in operands.items():
        if t is None or t.numel() == 1:
            continue
        match tuple(t.shape):
            case (d,):
                ok = d == dim
            case (b, d):
                ok = b in (1, batch) and d == dim
            case (b, n, d):
                ok = b in (1, batch) and n in (1, length) and d == dim
            case (b, frames, 1, d):
                ok = b in (1, batch) and frames > 0 and length % frames == 0 and d == dim
            case _:
                ok = False
        if not ok:
            raise ValueError(
                f"{name} is {tuple(t.shape)}, and x {tuple(x.shape)}: it must be one element, [D], [B, D], [B, L, D] "
                "or [B, F, 1, D], where B and L may be 1"
            )


def _check_select(x: torch.Tensor, operands: Sequence[torch.Tensor], index: torch.Tensor) -> None:
    if x.ndim != 3 or index.shape != x.shape[:2] or any(t.shape != (x.shape[0], x.shape[2]) for t in operands):
        raise ValueError("x must be [B, L, D], index [B, L], and scales, shifts and gates [B, D]")
