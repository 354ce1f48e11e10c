"""What mlx-lm's classes would run otherwise than it is meant: set right as often as it is loaded, or refused.

``tests/parity`` compares the outcome with transformers.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

from pippin.config import ConvertOptions, EngineConfig
from pippin.errors import ModelError
from pippin.loading import load_core
from pippin.models.convert import convert
from pippin.models.ernie import BIAS
from pippin.models.gelu import RULES
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


def test_biases_of_ernies_routers_choose_experts(tmp_path: Path) -> None:
    """By so much that the last two of four are always chosen; what was converted chooses the same."""
    path = write_checkpoint(tmp_path / "model", small_config("ernie4_5_moe") | {"moe_k": 2})
    unbiased, file = logits(path), path / "model.safetensors"
    biases = {f"model.layers.{i}.mlp.moe_statics.{BIAS}": mx.array([[0.0, 0.0, 9.0, 9.0]]) for i in range(3)}
    weights: Any = mx.load(str(file))
    mx.save_safetensors(str(file), weights | biases, metadata={"format": "pt"})
    biased = logits(path)
    assert float(mx.abs(biased - unbiased).max()) > 1e-3
    convert(ConvertOptions(output=str(tmp_path / "converted"), model_path=str(path), dtype="float32"))
    assert mx.array_equal(biased, logits(tmp_path / "converted"))


@pytest.mark.parametrize("whole", ["ministral3", "mistral3"])
def test_ministral3s_window_hides_what_is_before_it(whole: str, tmp_path: Path) -> None:
    text = small_config("ministral3") | {"num_hidden_layers": 1, "sliding_window": 4}
    changed = mx.concatenate([TOKENS[:, :1] + 1, TOKENS[:, 1:]], axis=1)
    for window, same in ((4, True), (None, False)):
        own = text | {"sliding_window": window}
        settings = own if whole == "ministral3" else {"model_type": whole, "vocab_size": 288, "text_config": own}
        path = write_checkpoint(tmp_path / f"window-{window}", settings)
        model = load_mlx_model(str(path), EngineConfig(dtype="float32")).model
        assert mx.allclose(model(TOKENS)[0, 4:], model(changed)[0, 4:], atol=1e-5).item() is same
        assert all(isinstance(c, RotatingKVCache) is same for c in make_prompt_cache(model))


@pytest.mark.parametrize("family", ["phimoe", "starcoder2"])
def test_a_window_that_mlx_lm_ignores_is_one_of_the_cache(family: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, small_config(family) | {"sliding_window": 4})
    caches = make_prompt_cache(load_mlx_model(str(path), EngineConfig(dtype="float32")).model)
    assert [c.max_size for c in caches if isinstance(c, RotatingKVCache)] == [4] * len(caches)


@pytest.mark.parametrize("family", ["gpt2", "gpt_bigcode", "gpt_neox", "starcoder2"])
def test_gelu_is_the_one_that_the_configuration_names(family: str, tmp_path: Path) -> None:
    setting = RULES[family][2]
    exact, fast, new = (
        logits(write_checkpoint(tmp_path / name, small_config(family) | {setting: name}))
        for name in ("gelu", "gelu_pytorch_tanh", "gelu_new")
    )
    assert mx.array_equal(fast, new)
    assert 1e-5 < float(mx.abs(exact - fast).max()) < 0.1


def test_dbrx_runs_without_a_bound(tmp_path: Path) -> None:
    """As with one that is never reached."""
    config = small_config("dbrx")
    bounds = [config["attn_config"] | {"clip_qkv": bound} for bound in (None, 1e9, 0.1)]
    found = [logits(write_checkpoint(tmp_path / str(i), config | {"attn_config": b})) for i, b in enumerate(bounds)]
    assert mx.array_equal(found[0], found[1])
    assert not mx.allclose(found[0], found[2])


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
        ("dbrx", {"rope_parameters": {"rope_theta": 5e5}}, "two bases of its rotation"),
        ("dbrx", {"ffn_config": {"moe_normalize_expert_weights": 2}}, "moe_normalize_expert_weights is 2"),
        ("dbrx", {"ffn_config": {"ffn_act_fn": {"name": "gelu"}}}, "ffn_act_fn 'gelu'"),
        ("nanochat", {"final_logit_softcapping": 30.0}, "final_logit_softcapping 15.0, and config.json states 30.0"),
        ("nanochat", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn'"),
        ("starcoder2", {"hidden_act": "silu"}, "hidden_act is 'silu'"),
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
    config = small_config(architecture)
    path = write_checkpoint(tmp_path, config)
    (path / "config.json").write_text(json.dumps(config | settings))
    with pytest.raises(ModelError, match=why):
        load_core(EngineConfig(model_path=str(path), dtype="float32", max_total_tokens=500))


def test_nanochats_epsilon_is_each_models_own(tmp_path: Path) -> None:
    """Also under transformers' names, in turn with another in the same process, and converted."""
    own = write_checkpoint(tmp_path / "own", small_config("nanochat") | {"rms_norm_eps": 0.5})
    plain = tmp_path / "plain"
    shutil.copytree(own, plain)
    facts = json.loads((own / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(facts | {"rms_norm_eps": 1e-5}))
    models = [load_mlx_model(str(path), EngineConfig(dtype="float32")).model for path in (own, plain)]
    found = [models[i](TOKENS) for i in (0, 1, 0)]
    assert float(mx.abs(found[0] - found[1]).max()) > 1e-2
    assert mx.array_equal(found[0], found[2])
    convert(ConvertOptions(output=str(tmp_path / "converted"), model_path=str(own)))
    assert mx.array_equal(found[0], logits(tmp_path / "converted"))


def test_a_class_that_ends_the_process_is_refused(tmp_path: Path) -> None:
    """mlx-lm's olmo does, where a package of OLMo's makers is missing."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "olmo", "vocab_size": 288}))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {"x": mx.zeros(1)}, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="ends the process"):
        load_mlx_model(str(tmp_path), EngineConfig())
