"""GELU as config.json names it, exact or by tanh, where mlx-lm always computes one of the two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gpt2, gpt_bigcode, gpt_neox, starcoder2

from pippin.errors import ModelError

Activation = Callable[[mx.array], mx.array]

GELUS: dict[str, Activation] = {"gelu": nn.gelu} | dict.fromkeys(
    ("gelu_fast", "gelu_new", "gelu_pytorch_tanh"), nn.gelu_approx
)
"""By transformers' names."""


class _Starcoder2(starcoder2.MLP):  # type: ignore[misc]  # mlx_lm has no types
    def __call__(self, x: mx.array) -> mx.array:
        out: mx.array = self.c_proj(self._activation(self.c_fc(x)))
        return out


class _GptBigcode(gpt_bigcode.MLP):  # type: ignore[misc]
    __call__ = _Starcoder2.__call__


class _Gpt2(gpt2.MLP):  # type: ignore[misc]
    __call__ = _Starcoder2.__call__


class _GptNeox(gpt_neox.MLP):  # type: ignore[misc]
    def __call__(self, x: mx.array) -> mx.array:
        out: mx.array = self.dense_4h_to_h(self._activation(self.dense_h_to_4h(x)))
        return out


RULES: dict[str, tuple[type[Any], type[Any], str, str]] = {
    "gpt2": (gpt2.MLP, _Gpt2, "activation_function", "gelu_new"),
    "gpt_bigcode": (gpt_bigcode.MLP, _GptBigcode, "activation_function", "gelu_pytorch_tanh"),
    "gpt_neox": (gpt_neox.MLP, _GptNeox, "hidden_act", "gelu"),
    "starcoder2": (starcoder2.MLP, _Starcoder2, "hidden_act", "gelu_pytorch_tanh"),
}
"""By model type: mlx-lm's class, ours, which setting names the activation, and transformers' default of that."""


def restore_gelu(model: nn.Module, facts: dict[str, Any]) -> None:
    """Gives the layers of such a model the activation that ``facts`` name. Raises ModelError if it is no GELU."""
    if facts["model_type"] not in RULES:
        return
    theirs, ours, setting, default = RULES[facts["model_type"]]
    name = facts.get(setting) or default
    if name not in GELUS:
        raise ModelError(f"mlx-lm's layers have a GELU, {setting} is {name!r}")
    for _, module in model.named_modules():
        if type(module) is theirs:
            module.__class__ = ours
            module._activation = GELUS[name]
