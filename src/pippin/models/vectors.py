"""How a checkpoint makes a text into a vector: what sentence-transformers wrote beside it; weights without a head."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from pippin.errors import ModelError

MODULES = "modules.json"
POOLING = {"lasttoken": "last", "mean": "mean", "mean_tokens": "mean"}
"""sentence-transformers' names of what we do."""


@dataclass(frozen=True, slots=True)
class VectorForm:
    """``pooling`` is a ``Pooling.kind``; ``normalizes``: vectors get length 1; ``only``: no text is generated."""

    pooling: str = "last"
    normalizes: bool = True
    only: bool = False


def read_vector_form(path: Path, facts: Mapping[str, Any], pooling: str, only: bool) -> VectorForm:
    """What a checkpoint's files say, unless ``pooling`` is other than ``auto``.

    Without such files: the last token's hidden state, scaled to length 1. Raises ModelError for what we don't compute.
    """
    if facts.get("is_causal") is False or facts.get("use_bidirectional_attention") is True:
        raise ModelError(f"{path}: its tokens attend to later ones too; only causal models are served")
    file = path / MODULES
    if not file.exists():
        return VectorForm("last" if pooling == "auto" else pooling, only=only)
    kinds = [str(module["type"]).rpartition(".")[2] for module in _json(file)]
    folders = {kind: path / module["path"] for kind, module in zip(kinds, _json(file), strict=True)}
    if unknown := [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]:
        raise ModelError(f"{file}: its vectors go through {unknown[0]}, which isn't computed here")
    if pooling == "auto":
        pooling = _pooling(folders["Pooling"] / "config.json") if "Pooling" in folders else "last"
    return VectorForm(pooling, "Normalize" in kinds, only=True)


def _pooling(file: Path) -> str:
    config = _json(file)
    prefix = "pooling_mode_"
    modes = [name.removeprefix(prefix) for name, on in config.items() if name.startswith(prefix) and on is True]
    modes = modes or [str(config.get("pooling_mode"))]
    if len(modes) != 1 or modes[0] not in POOLING:
        raise ModelError(f"{file}: pooling by {', '.join(modes)} isn't computed here; --pooling takes last or mean")
    return POOLING[modes[0]]


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} can't be read: {error}") from error


# --- weights that were saved without the head round them ---


def is_bare(path: Path) -> bool:
    """Whether the weights are of the layers alone, as embedding models are published: no head, no ``model.``."""
    names = {name for file in path.glob("model*.safetensors") for name in mx.load(str(file))}
    return "embed_tokens.weight" in names and "lm_head.weight" not in names
