"""Where mlx-lm would read a checkpoint otherwise than transformers does, without a word: set right here.

Each of these changes what the model computes. transformers 5 nests and renames settings in config.json that mlx-lm
then takes from its own defaults (a Llama saved today would run with the wrong RoPE base); some classes ignore
the window of sliding attention; YaRN without truncated bounds (gpt-oss) is read as if truncated; Gemma's GELU is
taken at its word, which was a slip.
``tests/parity`` compares the outcome with transformers, family by family.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gemma, ministral3, mistral3
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import KVCache, RotatingKVCache
from mlx_lm.models.rope_utils import YarnRoPE

from pippin.errors import ModelError
from pippin.models import nanochat
from pippin.models.gelu import restore_gelu
from pippin.models.recurrent_corrections import CORRECTIONS

logger = logging.getLogger(__name__)

FULL, SLIDING = "full_attention", "sliding_attention"
GRANITE_LAYERS = {"linear_attention": "mamba", FULL: "attention"}
"""transformers 5 writes one name for a kind of layer, whatever the family; mlx-lm reads the family's own."""
OLDER_NAMES = {
    "num_expert_group": "n_group",
    "num_experts_per_token": "num_experts_per_tok",
    "num_shared_experts": "n_shared_experts",
    "moe_renormalize": "norm_topk_prob",
    "model_max_length": "max_position_embeddings",
}
"""What transformers 5 writes for Ling 3 in place of its makers' names."""
NEOX_NAMES = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
"""What it writes for GPT-NeoX in place of its makers' names."""
ARCHITECTURES = {"BailingHybridForCausalLM": "BailingMoeV3ForCausalLM"}
MODEL_TYPES = {"qwen3_5_text": "qwen3_5", "qwen3_5_moe_text": "qwen3_5_moe"}
"""Of a text model that was saved without what it is a part of."""


def older_names(facts: dict[str, Any]) -> dict[str, Any]:
    """Settings that config.json states as transformers 5 writes them, under the names that mlx-lm reads.

    Only names that ``facts`` does not have yet, so what it states itself always counts; and kinds of layers.
    """
    found = _rope_names(facts)
    found |= {name: facts[newer] for newer, name in OLDER_NAMES.items() if newer in facts}
    if (period := _window_period(facts.get("layer_types"))) is not None:
        found["sliding_window_pattern"] = period
    if isinstance(experts := facts.get("num_local_experts"), int):
        found["num_experts"] = experts
    if facts.get("model_type") == "granitemoehybrid" and isinstance(types := facts.get("layer_types"), list):
        facts = facts | {"layer_types": None}
        found["layer_types"] = [GRANITE_LAYERS.get(kind, kind) for kind in types]
    new = {name: value for name, value in found.items() if facts.get(name) is None}
    if isinstance(classes := facts.get("architectures"), list):
        new["architectures"] = [ARCHITECTURES.get(name, name) for name in classes]
    if (whole := MODEL_TYPES.get(facts.get("model_type", ""))) is not None:
        new["model_type"] = whole
    if isinstance(text := facts.get("text_config"), dict):
        new["text_config"] = text | older_names(text)
    return new


def _rope_names(facts: dict[str, Any]) -> dict[str, Any]:
    rope = facts.get("rope_parameters")
    if not isinstance(rope, dict):
        return {}
    local = rope.get(SLIDING)
    full = rope.get(FULL) if isinstance(local, dict) else rope
    if not isinstance(full, dict):
        return {}
    found = {name: full[name] for name in ("rope_theta", "partial_rotary_factor") if name in full}
    if facts.get("model_type") == "gpt_neox":
        found |= {NEOX_NAMES[name]: value for name, value in found.items()}
    kind = full.get("rope_type", "default")
    found["rope_scaling"] = None if kind == "default" else full | {"type": kind}
    if isinstance(local, dict) and "rope_theta" in local:
        found["rope_local_base_freq"] = local["rope_theta"]
    return found


def _window_period(types: Any) -> int | None:
    """n if every n-th layer sees everything and the others a window; None for any other arrangement."""
    if not isinstance(types, list) or FULL not in types or SLIDING not in types:
        return None
    period = types.index(FULL) + 1
    expected = [SLIDING if (i + 1) % period else FULL for i in range(len(types))]
    return period if types == expected else None


_ALL: Callable[[int, dict[str, Any]], bool] = lambda layer, facts: True  # noqa: E731
_IGNORED_WINDOWS: dict[str, Callable[[int, dict[str, Any]], bool]] = {
    "mistral": _ALL,
    "mixtral": _ALL,
    "phi3": _ALL,
    "phimoe": _ALL,
    "starcoder2": _ALL,
    "gemma2": lambda layer, facts: layer % 2 == 0,
    "qwen2": lambda layer, facts: bool(facts.get("use_sliding_window")) and layer >= facts.get("max_window_layers", 28),
}
"""Which layers transformers gives a window to, by model type, where mlx-lm gives it to none."""


def _dbrx_fault(facts: dict[str, Any]) -> str | None:
    """transformers 5 turns by rope_parameters, mlx-lm and DBRX's makers by attn_config: who is right, no file says."""
    attention, experts = facts.get("attn_config"), facts.get("ffn_config")
    if not isinstance(attention, dict) or not isinstance(experts, dict):
        return "config.json has no attn_config or no ffn_config"
    rope = facts.get("rope_parameters") or {}
    own, newer = attention.get("rope_theta"), rope.get("rope_theta", facts.get("rope_theta"))
    if own is not None and newer is not None and own != newer:
        return f"config.json states two bases of its rotation: attn_config.rope_theta {own}, and {newer} beside it"
    if (kind := rope.get("rope_type", "default")) != "default":
        return f"mlx-lm leaves out its rope_type {kind!r}"
    if (norm := experts.get("moe_normalize_expert_weights", 1)) != 1:
        return f"mlx-lm norms experts' weights by their sum, moe_normalize_expert_weights is {norm}"
    if (kind := (experts.get("ffn_act_fn") or {}).get("name", "silu")) != "silu":
        return f"mlx-lm's experts know no ffn_act_fn {kind!r}"
    return None


REFUSED: dict[str, Callable[[dict[str, Any]], str | None]] = {
    "dbrx": _dbrx_fault,
    "nanochat": nanochat.fault,
    "phi3small": lambda facts: "its blocks of attention don't fit mlx-lm's own masks, and MLX then reads beyond them",
    "qwen2_moe": lambda facts: (
        "norm_topk_prob is set, and mlx-lm leaves experts' weights as they are" if facts.get("norm_topk_prob") else None
    ),
}
"""By model type: why mlx-lm's class can't run a configuration as it is meant; None if it can."""


def refuse(facts: dict[str, Any]) -> None:
    """Raises ModelError for a configuration that mlx-lm would run otherwise than it is meant, or crash on."""
    rule = REFUSED.get(facts["model_type"])
    if rule is not None and (why := rule(facts)) is not None:
        raise ModelError(f"model_type {facts['model_type']!r} isn't served: {why}")


def correct(model: nn.Module, facts: dict[str, Any]) -> None:
    """Sets right, in a model built by mlx-lm from ``facts``, what can't be set right in ``facts``.

    Raises ModelError for what can't be set right at all.
    """
    _restore_windows(model, facts)
    _restore_ministral3_window(model, facts)
    _unbind_dbrx(model, facts)
    _restore_yarn_bounds(model, facts)
    _restore_gemma_gelu(model)
    restore_gelu(model, facts)
    nanochat.restore_epsilon(model, facts)
    _restore_partial_rotation(model, facts)
    if (recurrent := CORRECTIONS.get(facts["model_type"])) is not None:
        recurrent(model, facts)


def _restore_windows(model: nn.Module, facts: dict[str, Any]) -> None:
    """Makes layers of a class that ignores config.json's sliding window use it."""
    window, rule = facts.get("sliding_window"), _IGNORED_WINDOWS.get(facts["model_type"])
    if rule is None or not isinstance(window, int):
        return
    types = facts.get("layer_types")
    slides = [types[i] == SLIDING if isinstance(types, list) else rule(i, facts) for i in range(len(model.layers))]
    if not any(slides):
        return
    logger.info("%d layers get the sliding window of %d tokens, which mlx-lm ignores", sum(slides), window)
    for layer, windowed in zip(model.layers, slides, strict=True):
        layer.__class__ = _with_own_mask(type(layer), window if windowed else None)
    model.make_cache = lambda: [RotatingKVCache(max_size=window) if windowed else KVCache() for windowed in slides]


def _restore_ministral3_window(model: nn.Module, facts: dict[str, Any]) -> None:
    """Ministral 3 has one window for all layers; mlx-lm gives it to those that layer_types names, to none without."""
    own = model.language_model if isinstance(model, mistral3.Model) else model
    if not isinstance(own, ministral3.Model):
        return
    text = facts.get("text_config", facts)
    if text.get("layer_types") or not isinstance(text.get("sliding_window"), int):
        return
    for layer in own.layers:
        layer.use_sliding = True
    own.model.fa_idx, own.model.swa_idx = None, 0
    model.make_cache = own.make_cache


def _unbind_dbrx(model: nn.Module, facts: dict[str, Any]) -> None:
    """DBRX's Q, K and V are bounded by clip_qkv; null means they are not, and mlx-lm fails on it."""
    if facts["model_type"] == "dbrx":
        for layer in model.layers:
            attention = layer.norm_attn_norm.attn
            attention.clip_qkv = math.inf if attention.clip_qkv is None else attention.clip_qkv


def _with_own_mask(layer: type[nn.Module], window: int | None) -> type[nn.Module]:
    """A layer class that asks its own cache for a mask of ``window`` tokens: the model gives all layers the first's."""

    def call(self: nn.Module, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        array = isinstance(mask, mx.array)
        own = create_attention_mask(x, cache, window_size=window, return_array=array)
        out: mx.array = layer.__call__(self, x, own, cache)
        return out

    return type(f"{layer.__name__}WithOwnMask", (layer,), {"__call__": call})


class _TanhGeluMLP(gemma.MLP):  # type: ignore[misc]  # mlx_lm has no types
    """Gemma's gate with the tanh approximation of GELU: what it was trained with, whatever config.json says."""

    def __call__(self, x: mx.array) -> mx.array:
        out: mx.array = self.down_proj(nn.gelu_approx(self.gate_proj(x)) * self.up_proj(x))
        return out


def _restore_gemma_gelu(model: nn.Module) -> None:
    for _, module in model.named_modules():
        if type(module) is gemma.MLP:
            module.__class__ = _TanhGeluMLP


def _restore_partial_rotation(model: nn.Module, facts: dict[str, Any]) -> None:
    """GLM rotates a part of each head, half of it where config.json doesn't say; mlx-lm rotates all."""
    if facts["model_type"] != "glm":
        return
    for layer in model.layers:
        attention = layer.self_attn
        attention.rope.dims = int(attention.head_dim * facts.get("partial_rotary_factor", 0.5))


def _restore_yarn_bounds(model: nn.Module, facts: dict[str, Any]) -> None:
    """YaRN's ramp between the exact bounds where config.json says ``truncate: false``; mlx-lm rounds them."""
    scaling, base = facts.get("rope_scaling"), facts.get("rope_theta")
    if not isinstance(scaling, dict) or scaling.get("truncate", True) or not isinstance(base, (int, float)):
        return
    for _, module in model.named_modules():
        if isinstance(module, YarnRoPE):
            module._freqs = _yarn_frequencies(module.dims, base, scaling)


def _yarn_frequencies(dims: int, base: float, scaling: dict[str, Any]) -> mx.array:
    """Inverse frequencies [dims / 2] float32 (Peng et al. 2023, section 3.2): few turns scaled, many kept."""
    original, factor = scaling["original_max_position_embeddings"], scaling["factor"]

    def dimension(turns: float) -> float:
        return dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(dimension(scaling.get("beta_fast", 32)), 0)
    high = min(dimension(scaling.get("beta_slow", 1)), dims - 1)
    ramp = mx.clip((mx.arange(dims // 2, dtype=mx.float32) - low) / max(high - low, 1e-3), 0, 1)
    kept = base ** (mx.arange(0, dims, 2, dtype=mx.float32) / dims)
    frequencies: mx.array = 1 / ((1 - ramp) / kept + ramp / (factor * kept))
    return frequencies
