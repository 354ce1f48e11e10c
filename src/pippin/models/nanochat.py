"""nanochat as transformers publishes it: the epsilon of its norms, which mlx-lm's function fixes for all models."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import nanochat

MLX_EPSILON = 1e-5
_epsilon: ContextVar[float] = ContextVar("nanochat_epsilon", default=MLX_EPSILON)


def _rms_norm(x: mx.array) -> mx.array:
    """In place of mlx-lm's: of the model that runs."""
    return mx.fast.rms_norm(x, None, _epsilon.get())


def fault(facts: dict[str, Any]) -> str | None:
    """Why mlx-lm's class can't run a configuration as it is meant; None if it can."""
    fixed = {"final_logit_softcapping": 15.0, "hidden_act": "relu2", "attention_bias": False}
    for name, value in fixed.items():
        if facts.get(name, value) != value:
            return f"mlx-lm computes with {name} {value}, and config.json states {facts[name]}"
    kind = (facts.get("rope_parameters") or {}).get("rope_type", "default")
    return f"mlx-lm leaves out its rope_type {kind!r}" if kind != "default" else None


def restore_epsilon(model: nn.Module, facts: dict[str, Any]) -> None:
    """Gives a model ``rms_norm_eps``, if its config.json names one; mlx-lm's own checkpoints don't."""
    epsilon = facts.get("rms_norm_eps")
    if facts["model_type"] != "nanochat" or epsilon is None:
        return
    nanochat.rms_norm = _rms_norm
    own = type(model)

    def call(self: nn.Module, *arguments: Any, **named: Any) -> Any:
        before = _epsilon.set(float(epsilon))
        try:
            return own.__call__(self, *arguments, **named)
        finally:
            _epsilon.reset(before)

    model.__class__ = type(own.__name__, (own,), {"__call__": call})
