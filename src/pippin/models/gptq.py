"""Checkpoints that GPTQ wrote (Frantar et al., 2022), in AutoGPTQ's layout: as affine weights of MLX, without loss.

mlx-lm takes them for AWQ's, which pack along the other axis. Here each word of ``qweight`` [in * bits / 32, out] holds
neighbours along the input, lowest bits first, as MLX's own words do: transposed they are MLX's. Of zeros, ``qzeros``
[groups, out * bits / 32] holds one less, in all but the second version of the format.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

Weights = dict[str, mx.array]
BITS, GROUPS = (2, 4, 8), (32, 64, 128)


def settings_of(facts: dict[str, Any]) -> dict[str, Any] | None:
    """GPTQ's settings in a config.json that states no quantization of MLX's; None if there are none."""
    text = facts.get("text_config")
    found = facts.get("quantization_config") or (text.get("quantization_config") if isinstance(text, dict) else None)
    gptq = isinstance(found, dict) and found.get("quant_method") == "gptq" and facts.get("quantization") is None
    return found if gptq else None


def quantization_of(settings: dict[str, Any]) -> dict[str, Any]:
    """What mlx-lm is to be told instead. Raises ValueError for what MLX has no form of."""
    bits, group = settings.get("bits", 4), settings.get("group_size", 128)
    if bits not in BITS or group not in GROUPS:
        raise ValueError(f"GPTQ with bits {bits} and group_size {group}: 2, 4 or 8 in groups of 32, 64 or 128 are read")
    return {"bits": bits, "group_size": group, "mode": "affine"}


def as_affine(weights: Weights, settings: dict[str, Any]) -> Weights:
    """Weights, scales and biases of MLX in place of GPTQ's arrays; all others as they are.

    Raises ValueError where groups are not runs of neighbours (``desc_act``).
    """
    layers = [name.removesuffix(".qweight") for name in weights if name.endswith(".qweight")]
    packed = {f"{layer}.{part}" for layer in layers for part in ("qweight", "qzeros", "scales", "g_idx")}
    found = {name: value for name, value in weights.items() if name not in packed}
    for layer in layers:
        found |= _layer(layer, weights, settings)
    return found


def _layer(name: str, weights: Weights, settings: dict[str, Any]) -> Weights:
    bits, scales = settings.get("bits", 4), weights[f"{name}.scales"]
    _check_order(name, weights.get(f"{name}.g_idx"), settings.get("group_size", 128))
    first = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
    zeros = _unpacked(weights[f"{name}.qzeros"], bits) + first
    return {
        f"{name}.weight": mx.contiguous(weights[f"{name}.qweight"].T).view(mx.uint32),
        f"{name}.scales": mx.contiguous(scales.T),
        f"{name}.biases": mx.contiguous((-zeros.astype(mx.float32) * scales.astype(mx.float32)).T).astype(scales.dtype),
    }


def _unpacked(words: mx.array, bits: int) -> mx.array:
    """The numbers in words [n, m], lowest bits first: [n, m * 32 / bits]."""
    shifts = mx.arange(0, 32, bits, dtype=mx.uint32)
    return ((words.view(mx.uint32)[..., None] >> shifts) & ((1 << bits) - 1)).reshape(words.shape[0], -1)


def _check_order(name: str, order: mx.array | None, group: int) -> None:
    if order is not None and not np.array_equal(np.array(order), np.arange(order.size) // group):
        raise ValueError(f"{name}'s groups follow its activations (GPTQ's desc_act), which MLX has no form of")
