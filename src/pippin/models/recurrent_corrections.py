"""Where mlx-lm's recurrent and hybrid models compute otherwise than transformers does from the same checkpoint.

Set right in the forward, never in the weights: a checkpoint that mlx-lm or ``pippin convert`` wrote has those as mlx-lm
read them, so what is loaded from it must not be changed a second time. ``tests/parity`` compares the outcome.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import falcon_h1, jamba, recurrent_gemma

from pippin.errors import ModelError

Facts = dict[str, Any]


class _SoftmaxOfAll(jamba.JambaSparseMoeBlock):  # type: ignore[misc]  # mlx_lm has no types
    """Jamba weighs its experts by the softmax over all of them; mlx-lm takes it over the chosen ones."""

    def __call__(self, x: mx.array) -> mx.array:
        scores = mx.softmax(self.router(x), axis=-1, precise=True)
        chosen = mx.argpartition(-scores, kth=self.num_experts_per_tok - 1, axis=-1)[..., : self.num_experts_per_tok]
        weights = mx.take_along_axis(scores, chosen, axis=-1).astype(x.dtype)
        out: mx.array = (self.switch_mlp(x, chosen) * weights[..., None]).sum(axis=-2)
        return out


def _correct_jamba(model: nn.Module, facts: Facts) -> None:
    """Experts' weights; and the offset of layers that have experts, which mlx-lm adds where it is to be taken away."""
    period, offset = model.args.expert_layer_period, model.args.expert_layer_offset
    if model.args.num_experts > 1 and 2 * offset % period:
        raise ModelError(f"mlx-lm puts Jamba's experts into other layers (expert_layer_offset {offset} of {period})")
    for _, module in model.named_modules():
        if type(module) is jamba.JambaSparseMoeBlock:
            module.__class__ = _SoftmaxOfAll


class _GroupedNorm(falcon_h1.FalconH1RMSNormGated):  # type: ignore[misc]
    """Falcon-H1 norms each group of its state space by itself; mlx-lm norms all as one."""

    def __call__(self, hidden_states: mx.array, gate: mx.array) -> mx.array:
        x = hidden_states
        if not self.norm_before_gate:
            x = falcon_h1.swiglu(gate, x)
        x = mx.fast.rms_norm(mx.unflatten(x, -1, (self.n_groups, -1)), None, self.variance_epsilon)
        x = self.weight * x.flatten(-2)
        out: mx.array = falcon_h1.swiglu(gate, x) if self.norm_before_gate else x
        return out


class _ScaledValues(falcon_h1.FalconH1Attention):  # type: ignore[misc]
    """Falcon-H1's attention, of whose values nothing is scaled: what it gives is, which is the same."""

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        out: mx.array = super().__call__(x, mask, cache) * self._multiplier
        return out


def _correct_falcon_h1(model: nn.Module, facts: Facts) -> None:
    """The multipliers of keys and values, which mlx-lm's names for their weights miss, and groups of the gated norm."""
    args = model.args
    biases = ("attention_bias", "mlp_bias", "mamba_proj_bias", "projectors_bias")
    if stated := [name for name in biases if facts.get(name)]:
        raise ModelError(f"mlx-lm scales Falcon-H1's weights, but not its biases ({', '.join(stated)})")
    low, high = facts.get("time_step_limit") or (0.0, math.inf)
    for layer in model.layers:
        attention, mixer = layer.self_attn, layer.mamba
        attention.scale *= args.key_multiplier
        if args.attention_in_multiplier != 1:
            attention._multiplier = args.attention_in_multiplier
            attention.__class__ = _ScaledValues
        mixer.time_step_limit = (float(low), float(high))
        if mixer.mamba_rms_norm and mixer.n_groups > 1:
            mixer.norm.__class__ = _GroupedNorm


class _Rounded(nn.Embedding):  # type: ignore[misc]  # mlx.nn has no types
    """Recurrent Gemma's embedding, scaled by what bfloat16 makes of the root of its width, as it was trained."""

    def __call__(self, x: mx.array) -> mx.array:
        out: mx.array = super().__call__(x)
        return out * mx.array(math.sqrt(out.shape[-1]), mx.bfloat16).astype(out.dtype)


class _RoundedQuantized(nn.QuantizedEmbedding):  # type: ignore[misc]
    __call__ = _Rounded.__call__


class _ExactGate(recurrent_gemma.RGLRU):  # type: ignore[misc]
    """Recurrent Gemma's recurrence. 1 - exp(y) for y near 0 keeps few of float32's bits, which expm1 does not lose."""

    def __call__(self, x: mx.array, cache: mx.array | None = None) -> tuple[mx.array, mx.array]:
        gate_x = self._gate(x, self.input_gate_weight, self.input_gate_bias)
        gate_a = self._gate(x, self.recurrent_gate_weight, self.recurrent_gate_bias)
        log_a = -8.0 * gate_a * nn.softplus(self.recurrent_param)
        multiplier = mx.sqrt(-mx.expm1(2 * log_a))
        if cache is None:
            multiplier[:, 0, :] = 1.0
        found: tuple[mx.array, mx.array] = recurrent_gemma.rnn_scan(x * gate_x * multiplier, mx.exp(log_a), cache)
        return found

    def _gate(self, x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
        heads = x.reshape(*x.shape[:2], self.num_heads, self.head_dim).swapaxes(1, 2)
        return mx.sigmoid(((heads @ weight).swapaxes(1, 2) + bias).flatten(2, 3))


def _correct_recurrent_gemma(model: nn.Module, facts: Facts) -> None:
    """Its norms' epsilon, its rotation's base and its embedding's scale: mlx-lm takes its own for each."""
    embedding = model.model.embed_tokens
    if model.model.scale_by_sqrt_dim:
        model.model.scale_by_sqrt_dim = False
        embedding.__class__ = _RoundedQuantized if isinstance(embedding, nn.QuantizedEmbedding) else _Rounded
    for _, module in model.named_modules():
        if isinstance(module, recurrent_gemma.RMSNorm):
            module.eps = model.args.rms_norm_eps
        if isinstance(module, recurrent_gemma.LocalAttentionBlock):
            module.rope.base = model.args.rope_theta
        if isinstance(module, recurrent_gemma.RGLRU):
            module.__class__ = _ExactGate


CORRECTIONS: dict[str, Callable[[nn.Module, Facts], None]] = {
    "jamba": _correct_jamba,
    "falcon_h1": _correct_falcon_h1,
    "recurrent_gemma": _correct_recurrent_gemma,
}
"""By model type. Raises ModelError for what can't be set right."""
