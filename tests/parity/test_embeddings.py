"""Vectors of texts equal transformers' last hidden states, of whole checkpoints and of those saved without a head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoModel

from pippin.config import EngineConfig
from pippin.core import EngineCore
from pippin.loading import load_core
from pippin.messages import Submit
from pippin.types import Pooling, SamplingParams
from tests.parity.reference import build_reference

FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "mistral", "deepseek_v3", "qwen3_next")
BARE = ("llama", "qwen2", "qwen3", "mistral")
LABELS = (7, 5, 100)
LENGTHS = (1, 7, 30, 48)
TOLERANCE = 2e-4

Values = npt.NDArray[np.float32]


def hidden_states(model: Any, rows: Sequence[Sequence[int]]) -> list[Values]:
    with torch.no_grad():
        found = [model(torch.tensor([list(row)]), use_cache=False).last_hidden_state[0] for row in rows]
    return [np.asarray(states.tolist(), np.float32) for states in found]


def vectors(core: EngineCore, rows: Sequence[Sequence[int]]) -> dict[str, Values]:
    for i, row in enumerate(rows):
        core.add(Submit(f"last{i}", list(row), len(row), SamplingParams(), 0, Pooling("last")))
        core.add(Submit(f"mean{i}", list(row), len(row), SamplingParams(), 0, Pooling("mean")))
    return pooled(core)


def pooled(core: EngineCore) -> dict[str, Values]:
    found = {}
    while core.has_work:
        step = core.step()
        found.update({o.id: np.frombuffer(o.pooled, "<f4") for o in (step.outputs if step else ())})
    return found


@pytest.mark.parametrize(("family", "bare"), [(f, False) for f in FAMILIES] + [(f, True) for f in BARE])
def test_vectors_are_transformers_hidden_states(tmp_path: Path, family: str, bare: bool) -> None:
    reference = build_reference(tmp_path / "whole", family)
    model: Any = AutoModel.from_pretrained(reference.path, dtype=torch.float32, attn_implementation="eager").eval()
    path = reference.path
    if bare:
        path = tmp_path / "bare"
        model.save_pretrained(path)
    rows = [tokens[:n] for tokens, n in zip(reference.tokens, LENGTHS, strict=False)]
    core = load_core(
        EngineConfig(model_path=str(path), dtype="float32", max_total_tokens=1000, chunked_prefill_size=16)
    )
    for found in (vectors(core, rows), vectors(core, rows)):  # the second time, from the cache
        for i, states in enumerate(hidden_states(model, rows)):
            scale = float(np.abs(states).max())
            np.testing.assert_allclose(found[f"last{i}"], states[-1], atol=TOLERANCE * scale)
            np.testing.assert_allclose(found[f"mean{i}"], states.mean(axis=0), atol=TOLERANCE * scale)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_next"])
def test_scores_are_transformers_log_probabilities_of_the_labels(tmp_path: Path, family: str) -> None:
    """What /v1/rerank and /v1/score are made of, from logits in float64."""
    reference = build_reference(tmp_path / family, family)
    core = load_core(EngineConfig(model_path=str(reference.path), dtype="float32", chunked_prefill_size=16))
    for i, row in enumerate(reference.tokens):
        core.add(Submit(str(i), row, len(row), SamplingParams(), 0, Pooling("labels", LABELS)))
    found = pooled(core)
    for i, logits in enumerate(reference.logits[:, -1].astype(np.float64)):
        expected = (logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max())[list(LABELS)]
        np.testing.assert_allclose(found[str(i)], expected, atol=TOLERANCE * reference.scale)
