"""Weights under other names than those that mlx-lm reads."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx_lm.utils
from mlx_lm.models import ernie4_5_moe

from pippin.models.ernie import ErnieMoeModel

Weights = dict[str, mx.array]
Renaming = tuple[re.Pattern[str], str]

OLDER: dict[str, tuple[Renaming, ...]] = {
    "gpt2": ((re.compile(r"^transformer\."), ""),),
    "olmo_hybrid": (
        (re.compile(r"\.attention_layer_norm\."), ".input_layernorm."),
        (re.compile(r"\.feedforward_layer_norm\."), ".post_attention_layernorm."),
    ),
    "nanochat": (
        (re.compile(r"^model\.embed_tokens\."), "transformer.wte."),
        (re.compile(r"^model\.layers\.(\d+)\.self_attn\.([qkv])_proj\."), r"transformer.h.\1.attn.c_\2."),
        (re.compile(r"^model\.layers\.(\d+)\.self_attn\.o_proj\."), r"transformer.h.\1.attn.c_proj."),
        (re.compile(r"^model\.layers\.(\d+)\.mlp\.fc1\."), r"transformer.h.\1.mlp.c_fc."),
        (re.compile(r"^model\.layers\.(\d+)\.mlp\.fc2\."), r"transformer.h.\1.mlp.c_proj."),
    ),
    "kimi_linear": ((re.compile(r"\.block_sparse_moe\.(gate|up|down)_proj\."), r".mlp.\1_proj."),),
}
"""By model type: what transformers 5 saves of some layers, and reads as well as the names that mlx-lm knows."""


def renaming_of(model_type: str, bare: bool) -> Callable[[Weights], Weights] | None:
    """What gives a checkpoint's weights other names; None leaves them. ``bare``: they are of the layers alone."""
    if bare:
        return lambda weights: {f"model.{name}": value for name, value in weights.items()}
    return partial(_renamed, OLDER[model_type]) if model_type in OLDER else None


def _renamed(renamings: tuple[Renaming, ...], weights: Weights) -> Weights:
    return {_name(renamings, name): value for name, value in weights.items()}


def _name(renamings: tuple[Renaming, ...], name: str) -> str:
    for pattern, replacement in renamings:
        name = pattern.sub(replacement, name)
    return name


def model_classes(config: dict[str, Any]) -> tuple[type, type]:
    """mlx-lm's classes for a configuration, or ours where its own drops weights that count."""
    model_class, args_class = mlx_lm.utils._get_classes(config)
    return ErnieMoeModel if model_class is ernie4_5_moe.Model else model_class, args_class


def changing_classes(changes: Sequence[Callable[[Weights], Weights]], config: dict[str, Any]) -> tuple[type, type]:
    """The classes for a configuration, the model's of which takes weights as ``changes`` leave them."""
    model_class, args_class = model_classes(config)
    own: Callable[..., Any] | None = vars(model_class).get("sanitize")

    def sanitize(self: Any, weights: Weights) -> Any:
        for change in changes:
            weights = change(weights)
        return own(self, weights) if own is not None else weights

    return type(model_class.__name__, (model_class,), {"sanitize": sanitize}), args_class
