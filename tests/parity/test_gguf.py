"""GGUF files, against what transformers reads from the same ones: weights, rotation and tokenizer."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pippin.config import EngineConfig
from pippin.models.load import load_mlx_model
from pippin.text.tokenizer import load_tokenizer
from tests.test_gguf import tokenizer_fields, written

TOKENS = [[5, 9, 200, 41, 7, 3, 77, 130, 12, 90]]


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_transformers_reads_the_same(family: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = written(tmp_path, family, kind, **tokenizer_fields())
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    with torch.no_grad():
        wanted = reference(torch.tensor(TOKENS)).logits.numpy()
    found = np.array(load_mlx_model(str(file), EngineConfig(device="cpu", dtype="float32")).model(mx.array(TOKENS)))
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    text = "<|im_start|>user\nHello wörld 日本<|im_end|>"
    assert load_tokenizer(str(file)).encode(text) == tokenizer.encode(text)
