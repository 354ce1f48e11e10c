"""ERNIE 4.5 MoE with the bias of its routers: it counts when experts are chosen, not when they are weighed.

mlx-lm drops these biases while it reads a checkpoint, before anything could be set right in the model that it builds,
so the class that it builds is this one. A checkpoint that has none computes as in mlx-lm.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import mlx.core as mx
from mlx_lm.models import ernie4_5_moe

BIAS = "e_score_correction_bias"
_PLACE = re.compile(rf"model\.layers\.(\d+)\.mlp\.(?:moe_statics\.)?{BIAS}")
"""As transformers names it, and as it is saved from here."""


class _BiasedChoice(ernie4_5_moe.Ernie4_5_MoeMLP):  # type: ignore[misc]  # mlx_lm has no types
    """Experts with the best scores after the bias was added, by their scores without it."""

    def __call__(self, x: mx.array) -> mx.array:
        scores = self.gate_act(self.gate(x).astype(mx.float32))
        chosen = mx.argpartition(-(scores + self[BIAS]), kth=self.k - 1, axis=-1)[..., : self.k]
        weights = mx.take_along_axis(scores, chosen, axis=-1)
        weights = weights / mx.maximum(weights.sum(axis=-1, keepdims=True), 1e-12)
        experts = self.switch_mlp(x, chosen)
        out: mx.array = (experts * weights[..., None]).sum(axis=-2).astype(experts.dtype)
        return out if self.shared_experts is None else out + self.shared_experts(x)


class ErnieMoeModel(ernie4_5_moe.Model):  # type: ignore[misc]
    """mlx-lm's model, each of whose routers gets the bias that the checkpoint has for it."""

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Weights as mlx-lm names them, and the biases [experts]; layers that have one become such as use it."""
        found: dict[str, mx.array] = super().sanitize(weights)
        for name, value in weights.items():
            if (place := _PLACE.fullmatch(name)) is None or int(place[1]) >= len(self.layers):
                continue
            block = self.layers[int(place[1])].mlp
            if type(block) is ernie4_5_moe.Ernie4_5_MoeMLP:
                block.__class__ = _BiasedChoice
                block[BIAS] = value.flatten()
                found[f"model.layers.{place[1]}.mlp.{BIAS}"] = value.flatten()
        return found

    @property
    def cast_predicate(self) -> Callable[[str], bool]:
        """Biases stay float32: scores of many experts lie near each other."""
        return lambda name: BIAS not in name
