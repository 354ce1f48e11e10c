"""Options that nobody would choose together, drawn at random: every answer is what a plain engine gives alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from pippin.core import EngineCore
from pippin.messages import Output, Submit
from pippin.types import Pooling, SamplingParams
from tests.checkpoints import make_checkpoint
from tests.compiling import play_gpu
from tests.cores import collect, make_core
from tests.test_lora import as_mlx, as_peft, draw

ROUNDS = 30 if os.environ.get("PIPPIN_SOAK") else 4
PLAIN = {"disable_radix_cache": True, "disable_hybrid_swa_memory": True, "disable_overlap_schedule": True}
FAMILIES = ("qwen3", "gpt_oss", "gemma2", "falcon_h1", "recurrent_gemma")
POOLINGS = (Pooling("last"), Pooling("mean"), Pooling("labels", (7, 5, 100)))


class Family:
    """A model with two adapters, and what a plain engine answers to a request alone."""

    def __init__(self, root: Path, name: str) -> None:
        self.path = make_checkpoint(root / "model", name)
        layers = (
            "self_attn.q_proj",
            "self_attn.v_proj",
            "temporal_block.q_proj",
            "mlp.down_proj",
            "feed_forward.down_proj",
        )
        first, second = (draw(self.path, seed, layers) for seed in (1, 2))
        self.adapters = [f"one={as_peft(root / 'one', first)}", f"two={as_mlx(root / 'two', second)}"]
        self.plain = self.core(**PLAIN)

    def core(self, **options: Any) -> EngineCore:
        return make_core(self.path, skip_server_warmup=True, lora_paths=self.adapters, **options)

    def alone(self, submit: Submit) -> list[Output]:
        return collect(self.plain, [submit])[submit.id]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tmp_path_factory.mktemp(request.param), request.param)


def odd(rng: Random) -> dict[str, Any]:
    page = rng.choice([1, 2, 16, 64])
    return {
        "page_size": page,
        "chunked_prefill_size": rng.choice([1, 7, 64]),
        "max_total_tokens": rng.choice([128, 192, 320]),
        "max_running_requests": rng.choice([1, 3, 8]),
        "disable_radix_cache": rng.random() < 0.1,
        "disable_overlap_schedule": rng.random() < 0.3,
        "schedule_policy": rng.choice(["fcfs", "lpm"]),
        "swa_full_tokens_ratio": rng.choice([None, 0.01, 0.3, 0.9]),
        "max_mamba_cache_size": rng.choice([None, 0, 1, 20]),
        "kv_canary": "raise",
    }


def asked(rng: Random, rows: list[list[int]], name: str) -> list[Submit]:
    """Answers, drawn ones too, and vectors, each by an adapter or none; many begin as others did."""
    found = []
    for i in range(rng.choice([2, 4, 6])):
        base = rng.choice(rows)[: rng.randrange(20, 80)] if rows and rng.random() < 0.8 else []
        rows.append([*base, *(rng.randrange(3, 280) for _ in range(rng.randrange(1, 40)))])
        pooling = rng.choice(POOLINGS) if rng.random() < 0.2 else None
        params = SamplingParams(
            temperature=rng.choice([0.0, 0.0, 0.9]),
            seed=rng.randrange(9),
            max_new_tokens=rng.choice([2, 8]),
            ignore_eos=True,
            lora_path=rng.choice([None, "one", "two"]),
        )
        found.append(Submit(f"{name}-{i}", rows[-1], len(rows[-1]), params, rng.choice([0, 0, 1]), pooling))
    return found


def assert_same(found: Sequence[Output], expected: Sequence[Output]) -> None:
    assert [t for o in found for t in o.tokens] == [t for o in expected for t in o.tokens]
    assert found[-1].finish == expected[-1].finish
    vector, other = (np.frombuffer(outputs[-1].pooled, "<f4") for outputs in (found, expected))
    np.testing.assert_allclose(vector, other, atol=2e-3)


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_answers_are_those_of_a_plain_engine(family: Family, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, rows = Random(seed), list[list[int]]()
    if seed % 2:
        play_gpu(monkeypatch)
    core = family.core(**odd(rng))
    for turn in range(3):
        requests = asked(rng, rows, str(turn))
        for id, outputs in collect(core, requests).items():
            assert_same(outputs, family.alone(next(r for r in requests if r.id == id)))
    core.flush()
    assert core.stats.slots_free == core.stats.slots_total
    assert core.stats.window_slots_free == core.stats.window_slots_total
