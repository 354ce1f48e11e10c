"""Tiny random models through mlx-lm's own classes, saved as checkpoints."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from tests.checkpoints import family_config


def save_tiny(path: Path, family: str, **overrides: Any) -> None:
    """Writes config.json and model.safetensors of a random float32 model of ``family``."""
    config = family_config(family, **overrides)
    module = importlib.import_module(f"mlx_lm.models.{family}")
    mx.random.seed(11)
    model = module.Model(module.ModelArgs.from_dict(config))
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(path / "model.safetensors"), dict(tree_flatten(model.parameters())))
