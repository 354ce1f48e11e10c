"""``pippin bench one-batch`` over PyTorch: the same steps, the same tokens, and figures side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.checkpoint import SMALL, make_checkpoint
from pippin.bench.correctness import PROMPTS
from pippin.bench.sides import open_ours, peer
from pippin.cli import run_command
from pippin.config import EngineConfig
from pippin.torch.runner import TorchModelRunner

Lines = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the children too; see conftest.py."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("bench") / "model", SMALL)


@pytest.mark.parametrize("options", [[], ["--chunked-prefill-size", "5", "--page-size", "4"]])
def test_both_runners_answer_alike(options: list[str], capfd: Lines) -> None:
    """Torch is the default peer where it is installed; the demo model, float32."""
    assert run_command(["bench", "one-batch", "--correctness-test", "--output-len", "32", *options]) == 0
    captured = capfd.readouterr()
    result = json.loads(captured.out)
    assert (result["side"], result["settings"]["vs"], result["settings"]["dtype"]) == ("pippin", "torch", "float32")
    assert result["figures"] == {"prompts": len(PROMPTS), "equal": len(PROMPTS), "first_difference": None}


def test_the_reference_is_compared_with_mlx_lm_where_it_is_ours(checkpoint: Path, capfd: Lines) -> None:
    command = ["bench", "one-batch", "--correctness-test", "--device", "torch", "--model-path", str(checkpoint)]
    assert run_command(command) == 0
    result = json.loads(capfd.readouterr().out)
    assert (result["side"], result["settings"]["vs"], result["figures"]["equal"]) == ("torch", "mlx-lm", len(PROMPTS))


def test_a_peer_in_another_process_gives_what_the_runner_gives_in_this_one(checkpoint: Path) -> None:
    config = EngineConfig(str(checkpoint), max_total_tokens=100, max_running_requests=2, device="torch:cpu")
    ours = open_ours(config, lambda _: None)
    assert isinstance(ours.runner, TorchModelRunner)
    prompts = [[5, 9, 300, 41, 7], [11]]
    with peer("torch", config, ours.info) as side:
        assert side.run(prompts, 8).timing.tokens == ours.side.run(prompts, 8).timing.tokens


def test_figures_of_both_in_one_table(checkpoint: Path, capfd: Lines) -> None:
    command = ["bench", "one-batch", "--model-path", str(checkpoint), "--vs", "torch", "mlx-lm", "--rounds", "1"]
    assert run_command([*command, "--input-len", "9", "--output-len", "3", "--batch-size", "2"]) == 0
    captured = capfd.readouterr()
    results = [json.loads(line) for line in captured.out.splitlines()]
    assert [r["side"] for r in results] == ["pippin", "torch", "mlx-lm"]
    assert results[0]["figures"]["decode_vs_torch"] > 0
    assert all(r["figures"]["median_decode_latency"] > 0 for r in results)
    assert all(name in captured.err for name in ("pippin", "torch", "mlx-lm"))


def test_the_engine_alone_beside_the_same_scheduler_over_torch(checkpoint: Path, capfd: Lines) -> None:
    command = ["bench", "offline", "--model-path", str(checkpoint), "--vs", "torch", "mlx-lm", "--num-prompts", "5"]
    assert (
        run_command([*command, "--max-total-tokens", "400", "--random-input-len", "9", "--random-output-len", "5"]) == 0
    )
    ours, torch, theirs = (json.loads(line) for line in capfd.readouterr().out.splitlines())
    assert [r["side"] for r in (ours, torch, theirs)] == ["pippin", "torch", "mlx-lm"]
    assert ours["figures"]["throughput_vs_torch"] > 0
    assert ours["figures"]["total_output_tokens"] == torch["figures"]["total_output_tokens"]
    assert torch["figures"]["peak_memory_bytes"] is None, "nobody counts torch's on a CPU"


def test_torch_is_not_measured_beside_itself(capfd: Lines) -> None:
    assert run_command(["bench", "one-batch", "--device", "torch", "--vs", "torch"]) == 2
    assert "--vs: torch is what --device torch runs already" in capfd.readouterr().err
