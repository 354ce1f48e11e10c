"""What ``pippin check`` says of a model is what loading it finds; ``pippin models`` tells the table of the sweep."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from pippin.catalogue import architectures
from pippin.cli import run_command
from pippin.config import EngineConfig
from pippin.errors import ConfigError, ModelError
from pippin.estimate import as_text, estimate, prove
from pippin.loading import load_core
from tests.checkpoints import make_checkpoint

MODELS = Path(__file__).parents[1] / "docs" / "models.md"


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen3", {}),
        ("qwen3", {"quantization": "mlx_q4"}),
        ("qwen3", {"dtype": "bfloat16", "kv_cache_dtype": "int8"}),
        ("gemma2", {}),
        ("deepseek_v3", {}),
        ("gpt_oss", {"max_total_tokens": 500}),
        ("gpt_oss", {"max_total_tokens": 500, "max_running_requests": 3, "chunked_prefill_size": 32}),
        ("qwen3_next", {"max_running_requests": 3, "max_mamba_cache_size": 5}),
    ],
)
def test_the_estimate_is_what_loading_finds(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    path = make_checkpoint(tmp_path / family, family)
    config = EngineConfig(model_path=str(path), device="cpu", disable_memory_sharing=True, **options)
    found, info = estimate(config), load_core(config).info
    assert found.plan.weight_bytes == info.weight_bytes
    assert found.plan.slots == info.max_total_tokens
    assert found.plan.pool_bytes == info.pool_bytes
    assert (found.plan.window_slots, found.plan.reach) == (info.window_slots, info.window)
    assert found.plan.state_bytes + found.plan.snapshot_bytes == info.state_bytes
    assert found.context_length == info.context_length
    assert found.max_running == info.max_running_requests
    assert found.plan.activation_bytes > info.activation_bytes / 20, "of the same order, or more"


def test_no_weights_are_read() -> None:
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    found = estimate(EngineConfig(device="cpu", quantization="mlx_q4"))
    assert mx.get_peak_memory() - before < found.plan.weight_bytes / 4


def test_streams_and_the_longest_request_that_fit(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model", "qwen3")
    config = EngineConfig(model_path=str(path), device="cpu", max_total_tokens=200, max_running_requests=10)
    found = estimate(config)
    assert found.longest == 200
    assert [found.streams(n) for n in (200, 101, 100, 20, 1)] == [1, 1, 2, 10, 10]
    proof = prove(config, 60)
    assert (proof.longest, proof.length, proof.streams, proof.retractions) == (200, 60, 3, 0)
    assert proof.holds
    assert "it holds" in as_text(found, 60, proof)


def test_what_does_not_fit_says_why() -> None:
    with pytest.raises(ModelError, match="leave no room"):
        estimate(EngineConfig(device="cpu", mem_fraction_static=0.0001))
    with pytest.raises(ConfigError, match="--max-total-tokens"):
        estimate(EngineConfig(device="cpu", max_total_tokens=10**9))


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run_command(["check", "--device", "cpu", "--max-total-tokens", "640", "--length", "64", "--prove", "--json"])
        == 0
    )
    figures = json.loads(capsys.readouterr().out)
    assert (figures["longest"], figures["streams"]) == (640, 10)
    assert figures["proof"]["streams"] == 10
    assert run_command(["check", "--device", "cpu", "--mem-fraction-static", "0.0001"]) == 1
    assert "leave no room" in capsys.readouterr().err


# --- pippin models ---


def test_models_are_those_of_the_sweeps_table() -> None:
    table = MODELS.read_text().split("<!-- sweep: begin -->")[1].split("<!-- sweep: end -->")[0]
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("| ")]
    listed = {row[0]: row[1] for row in rows if row[0] != "architecture"}
    assert {a.architecture: a.backend or "refused" for a in architectures()} == listed
    assert all(a.refusal or len(a.checks) == 5 for a in architectures())


def test_models_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["models", "Qwen3_Next"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"qwen3_next +solo +alone, batched, chunked, prefix hit, retracted", out)
    assert "gemma" not in out
    assert run_command(["models", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["architectures"]) == len(architectures())
    assert run_command(["models", "no-such"]) == 2
    assert "no-such" in capsys.readouterr().err
