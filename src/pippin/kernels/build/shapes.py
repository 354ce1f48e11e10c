"""What a model's kernels are compiled for, as its config.json says."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from pippin.errors import ModelError
from pippin.kernels.packing import Packing

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}

# Models that make whole keys and values of their latents before they store them.
_EXPANDED = ("deepseek_v2", "minicpm3", "youtu_llm")


@dataclass(frozen=True, slots=True)
class Codes:
    """How weights are quantized: ``mx.quantize``'s arguments."""

    group: int
    bits: int
    mode: Literal["affine", "mxfp4", "mxfp8", "nvfp4"] = "affine"


@dataclass(frozen=True, slots=True)
class Experts:
    """How many there are, how many of them a token takes, and how wide they are inside."""

    count: int
    each: int
    width: int


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the kernels of a model are compiled for; a window of None is one that sees all.

    ``hidden`` and ``intermediate`` are widths of its rows, ``rotated`` the dims of a head that turn, ``vocab`` the ids
    that it draws from; 0 if not known. ``packing`` is how K and V are stored, ``codes`` how weights are, None: as they
    are. ``latents`` are the widths of a latent and of its turned key, for models that store these.
    """

    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    dtype: mx.Dtype = mx.bfloat16
    page_size: int = 1
    windows: tuple[int | None, ...] = (None,)
    softcap: float | None = None
    sinks: bool = False
    hidden: int = 0
    intermediate: int = 0
    rotated: int = 0
    vocab: int = 0
    packing: Packing | None = None
    codes: Codes | None = None
    latents: tuple[int, int] | None = None
    experts: Experts | None = None


def shape_of_config(
    config: dict[str, Any],
    page_size: int = 1,
    dtype: mx.Dtype | None = None,
    packing: Packing | None = None,
    codes: Codes | None = None,
) -> ModelShape:
    """From a checkpoint's config.json; ``codes`` if it is quantized as it is loaded.

    Raises ModelError where it names no heads.
    """
    text = config.get("text_config") or config
    try:
        heads = int(text["num_attention_heads"])
        dim = _head_dim(text, heads)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"config.json does not say how many heads the model has, and how wide ({error!r})") from None
    window = text.get("sliding_window") if text.get("use_sliding_window", True) else None
    local = {None, int(window)} if window else {None}
    named = str(text.get("dtype") or text.get("torch_dtype") or config.get("torch_dtype") or "bfloat16")
    return ModelShape(
        heads,
        heads if text.get("kv_lora_rank") else int(text.get("num_key_value_heads") or heads),
        dim,
        int(text.get("v_head_dim") or dim),
        dtype or DTYPES.get(named, mx.bfloat16),
        page_size,
        tuple(sorted(local, key=lambda w: w or 0)),
        text.get("attn_logit_softcapping"),
        text.get("model_type") == "gpt_oss",
        int(text.get("hidden_size") or 0),
        int(text.get("intermediate_size") or 0),
        int(text.get("qk_rope_head_dim") or dim * float(text.get("partial_rotary_factor") or 1.0)),
        int(text.get("vocab_size") or 0),
        packing,
        codes or _codes(config),
        _latents(text),
        _experts(text),
    )


def read_config(folder: Path) -> dict[str, Any]:
    """A checkpoint's config.json. Raises ModelError."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / 'config.json'} can't be read: {error}") from error
    return found if isinstance(found, dict) else {}


def _head_dim(text: dict[str, Any], heads: int) -> int:
    if text.get("kv_lora_rank"):
        return int(text["qk_nope_head_dim"]) + int(text["qk_rope_head_dim"])
    return int(text.get("head_dim") or text["hidden_size"] // heads)


def _latents(text: dict[str, Any]) -> tuple[int, int] | None:
    if not text.get("kv_lora_rank") or text.get("model_type") in _EXPANDED:
        return None
    return int(text["kv_lora_rank"]), int(text["qk_rope_head_dim"])


def _codes(config: dict[str, Any]) -> Codes | None:
    """MLX's own field; a layer's own settings are not looked at."""
    found = config.get("quantization")
    if not isinstance(found, dict) or not isinstance(found.get("bits"), int):
        return None
    return Codes(int(found.get("group_size") or 64), found["bits"], found.get("mode") or "affine")


def _experts(text: dict[str, Any]) -> Experts | None:
    names = ("n_routed_experts", "num_experts", "num_local_experts")
    count = next((int(text[name]) for name in names if text.get(name)), 0)
    width = int(text.get("moe_intermediate_size") or text.get("intermediate_size") or 0)
    each = int(text.get("num_experts_per_tok") or 0)
    return Experts(count, each, width) if count and each and width else None
