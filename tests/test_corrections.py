"""What mlx-lm's classes would run otherwise than it is meant: set right as often as it is loaded, or refused.

``tests/parity`` compares the outcome with transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from pippin.config import ConvertOptions, EngineConfig
from pippin.errors import ModelError
from pippin.loading import load_core
from pippin.models.convert import convert
from pippin.models.load import load_mlx_model
from tests.architectures import small_config
from tests.checkpoints import make_checkpoint, write_checkpoint

TOKENS = mx.array([[5, 9, 200, 41, 7, 3, 77, 130]])


def logits(path: Path) -> mx.array:
    found: mx.array = load_mlx_model(str(path), EngineConfig(dtype="float32")).model(TOKENS)
    return found


@pytest.mark.parametrize("family", ["falcon_h1", "jamba", "recurrent_gemma"])
def test_a_converted_checkpoint_is_corrected_once(family: str, tmp_path: Path) -> None:
    """Its weights are what mlx-lm read, so the same has to be set right again, and no more."""
    settings: dict[str, Any] = {"mamba_n_groups": 2, "attention_in_multiplier": 0.7} if family == "falcon_h1" else {}
    path = make_checkpoint(tmp_path / "model", family, **settings)
    convert(ConvertOptions(output=str(tmp_path / "converted"), model_path=str(path)))
    assert mx.array_equal(logits(path), logits(tmp_path / "converted"))


@pytest.mark.parametrize("setting", ["key_multiplier", "attention_in_multiplier"])
def test_falcon_h1s_multipliers_count(setting: str, tmp_path: Path) -> None:
    settings: list[dict[str, Any]] = [{setting: value} for value in (1.0, 0.5)]
    one, half = (logits(make_checkpoint(tmp_path / str(i), "falcon_h1", **each)) for i, each in enumerate(settings))
    assert float(mx.abs(one - half).max()) > 1e-3


@pytest.mark.parametrize(
    ("family", "settings", "why"),
    [
        ("falcon_h1", {"mlp_bias": True}, "biases .mlp_bias"),
        ("jamba", {"expert_layer_period": 3, "expert_layer_offset": 1}, "expert_layer_offset 1 of 3"),
    ],
)
def test_what_cannot_be_set_right_is_refused(family: str, settings: dict[str, Any], why: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, family, **settings)
    with pytest.raises(ModelError, match=why):
        load_mlx_model(str(path), EngineConfig(dtype="float32"))


@pytest.mark.parametrize(
    ("architecture", "settings", "why"),
    [
        ("llama4", {}, "ChunkedKVCache"),
        ("phi3small", {}, "its blocks of attention"),
        ("plamo3", {}, "no attention backend serves"),
        ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("talkie", {}, "no attention backend serves"),
    ],
)
def test_an_architecture_that_is_not_exact_is_refused(
    architecture: str, settings: dict[str, Any], why: str, tmp_path: Path
) -> None:
    path = write_checkpoint(tmp_path, small_config(architecture) | settings)
    with pytest.raises(ModelError, match=why):
        load_core(EngineConfig(model_path=str(path), dtype="float32", max_total_tokens=500))
