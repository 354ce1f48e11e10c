"""Pippin serves large language models on MLX.

Importing it is cheap: MLX, transformers and the rest are loaded when ``Engine`` or ``load_mlx_model`` is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pippin.engine import Engine
    from pippin.models.load import load_mlx_model
    from pippin.types import SamplingParams

__version__ = "0.1.0"

__all__ = ["Engine", "SamplingParams", "__version__", "load_mlx_model"]

_HOMES = {"Engine": "pippin.engine", "SamplingParams": "pippin.types", "load_mlx_model": "pippin.models.load"}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'pippin' has no attribute {name!r}")
    value = vars(importlib.import_module(_HOMES[name]))[name]
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
