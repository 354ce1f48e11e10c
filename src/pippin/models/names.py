"""Weights under other names than those that mlx-lm reads."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx_lm.utils
from mlx_lm.models import ernie4_5_moe

from pippin.models.ernie import ErnieMoeModel

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


def renaming_of(model_type: str, bare: bool) -> Callable[[str], str] | None:
    """What to call a checkpoint's weights by; None leaves them. ``bare``: they are of the layers alone."""
    if bare:
        return "model.{}".format
    return partial(_renamed, OLDER[model_type]) if model_type in OLDER else None


def _renamed(renamings: tuple[Renaming, ...], name: str) -> str:
    for pattern, replacement in renamings:
        name = pattern.sub(replacement, name)
    return name


def model_classes(config: dict[str, Any]) -> tuple[type, type]:
    """mlx-lm's classes for a configuration, or ours where its own drops weights that count."""
    model_class, args_class = mlx_lm.utils._get_classes(config)
    return ErnieMoeModel if model_class is ernie4_5_moe.Model else model_class, args_class


def renaming_classes(rename: Callable[[str], str], config: dict[str, Any]) -> tuple[type, type]:
    """The classes for a configuration, the model's of which takes weights by other names."""
    model_class, args_class = model_classes(config)
    own: Callable[..., Any] | None = vars(model_class).get("sanitize")

    def sanitize(self: Any, weights: dict[str, mx.array]) -> Any:
        named = {rename(name): value for name, value in weights.items()}
        return own(self, named) if own is not None else named

    return type(model_class.__name__, (model_class,), {"sanitize": sanitize}), args_class
