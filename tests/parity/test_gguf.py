"""GGUF files, against what transformers reads from the same ones: weights, rotation and tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from pippin.config import EngineConfig
from pippin.models.load import load_mlx_model
from pippin.text.tokenizer import load_tokenizer
from tests.test_gguf import sentencepiece_fields, tokenizer_fields, written

TOKENS = [[5, 9, 200, 41, 7, 3, 77, 130, 12, 90]]


def read_by_transformers(file: Path) -> Any:
    """What `from_pretrained(gguf_file=...)` does, which wants accelerate for it."""
    config = load_gguf_checkpoint(str(file))["config"]
    if config["model_type"] == "qwen3":
        config["head_dim"] = 32  # it takes no notice of the file's
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32).eval()
    weights = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"]
    left = model.load_state_dict(weights, strict=False)
    assert (set(left.missing_keys) - {"lm_head.weight"}, left.unexpected_keys) == (set(), [])
    model.tie_weights()
    return model


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_transformers_reads_the_same(family: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = written(tmp_path, family, kind, **(sentencepiece_fields() if family == "llama" else tokenizer_fields()))
    reference = read_by_transformers(file)
    with torch.no_grad():
        wanted = reference(torch.tensor(TOKENS)).logits.numpy()
    found = np.array(load_mlx_model(str(file), EngineConfig(device="cpu", dtype="float32")).model(mx.array(TOKENS)))
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    text = "<|im_start|>user\nHello wörld 日本<|im_end|>"
    assert load_tokenizer(str(file)).encode(text) == tokenizer.encode(text)
