"""The engine alone: every dataset becomes the requests it says, all are served, and figures are of what was served."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.checkpoint import SMALL, make_checkpoint
from pippin.bench.offline import make_requests, measure, to_result
from pippin.bench.offline_run import CoreSide, Done, Requests, Served
from pippin.bench.options import OfflineOptions
from pippin.bench.results import read
from pippin.bench.serving_options import DatasetOptions
from pippin.cli import run_command
from pippin.config import EngineConfig
from pippin.errors import ConfigError
from pippin.loading import load_core
from pippin.messages import ModelInfo
from pippin.text.tokenizer import load_tokenizer
from tests.fake_core import fake_info

Lines = pytest.CaptureFixture[str]
SHARED = DatasetOptions(
    dataset_name="generated-shared-prefix",
    gsp_num_groups=2,
    gsp_prompts_per_group=3,
    gsp_system_prompt_len=40,
    gsp_question_len=5,
    gsp_output_len=4,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("offline") / "model", SMALL)


@pytest.fixture(scope="module")
def side(checkpoint: Path) -> CoreSide:
    return CoreSide("pippin", load_core(EngineConfig(str(checkpoint), max_total_tokens=2000)))


def info_of(checkpoint: Path) -> ModelInfo:
    import msgspec

    return msgspec.structs.replace(
        fake_info(str(checkpoint)), vocab_size=SMALL.vocab, context_length=8192, max_total_tokens=2000
    )


def asked(dataset: DatasetOptions, checkpoint: Path, number: int = 5) -> Requests:
    return make_requests(dataset, OfflineOptions(num_prompts=number), info_of(checkpoint), EngineConfig())


# --- what is served ---


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 6)), min_size=1, max_size=6))
def test_all_requests_get_their_full_length(side: CoreSide, lengths: list[tuple[int, int]]) -> None:
    requests = [([(7 * i + j) % 500 + 1 for j in range(n)], out) for i, (n, out) in enumerate(lengths)]
    done: list[int] = []
    served = side.serve(requests, lambda: done.append(1))
    assert len(done) == len(requests)
    assert served.output_tokens == sum(out for _, out in lengths)
    assert served.seconds > 0


def test_nothing_is_cached_from_a_run_before(side: CoreSide, checkpoint: Path) -> None:
    requests = asked(SHARED, checkpoint)
    first, again = (side.serve(requests, lambda: None).cached_tokens for _ in range(2))
    assert first == again
    assert first is not None
    # Each group's 40 tokens are computed once, and read by its two others.
    assert 2 * 2 * 40 <= first < 2 * 2 * 45
    assert side.serve([([5 + i], 1) for i in range(4)], lambda: None).cached_tokens == 0


# --- datasets ---


def test_random_prompts_are_tokens_of_the_vocabulary(checkpoint: Path) -> None:
    dataset = DatasetOptions(random_input_len=20, random_output_len=10, random_range_ratio=0.5)
    requests = asked(dataset, checkpoint, 40)
    assert len(requests) == 40
    assert all(10 <= len(p) <= 20 and 5 <= n <= 10 and max(p) < SMALL.vocab for p, n in requests)


def test_a_file_s_texts_are_encoded_and_those_too_long_left_out(checkpoint: Path, tmp_path: Path) -> None:
    said = [("bafito kelo", "mun mun"), ("x " * 4000, "no"), ("tarin", "solo")]
    file = tmp_path / "chats.json"
    file.write_text(
        json.dumps([{"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in said])
    )
    requests = asked(DatasetOptions(dataset_name="sharegpt", dataset_path=str(file)), checkpoint, 2)
    tokenizer = load_tokenizer(str(checkpoint))
    assert sorted((list(p), n) for p, n in requests) == sorted(
        (tokenizer.encode(q), len(tokenizer.encode(a))) for q, a in (said[0], said[2])
    )


def test_made_prompts_that_are_too_long_are_refused(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="there is room for 2000") as caught:
        asked(DatasetOptions(random_input_len=3000, random_range_ratio=1.0), checkpoint)
    assert caught.value.option == "--random-input-len"
    with pytest.raises(ConfigError, match="there is room for 2000"):
        asked(dataclasses.replace(SHARED, gsp_system_prompt_len=3000), checkpoint)


# --- figures ---


class Scripted:
    """A side that takes the seconds it is told to."""

    def __init__(self, name: str, seconds: Sequence[float]) -> None:
        self.name = name
        self._seconds = iter(seconds)
        self.asked: list[int] = []

    def serve(self, requests: Requests, done: Done) -> Served:
        self.asked.append(len(requests))
        return Served(next(self._seconds), 8, 3, None, 9)


def test_figures_are_medians_and_ratios_of_rounds(checkpoint: Path) -> None:
    requests = [([1, 2, 3], 2)] * 20
    ours, theirs = Scripted("pippin", [0.1, 2.0, 4.0, 3.0]), Scripted("mlx-lm", [0.1, 4.0, 4.0, 9.0])
    options = OfflineOptions(rounds=3)
    found = measure([ours, theirs], requests, options, lambda label: None)
    assert ours.asked == theirs.asked == [16, 20, 20, 20]
    result, other = (to_result(n, found, requests, options, SHARED, info_of(checkpoint)) for n in found)
    figures = result.figures
    assert (figures["total_latency"], figures["throughput_vs_mlx-lm"]) == (3.0, 2.0)
    assert figures["total_throughput"] == pytest.approx((60 + 8) / 3.0)
    assert figures["output_throughput"] == pytest.approx(8 / 3)
    assert figures["input_throughput"] == 20.0
    assert (figures["cached_tokens"], figures["peak_memory_bytes"], figures["process_peak_bytes"]) == (3, None, 9)
    assert "throughput_vs_mlx-lm" not in other.figures


# --- the command ---


def test_the_command_serves_beside_mlx_lm(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "pippin.bench_offline_throughput", "--model-path", str(checkpoint)]
    command += ["--dataset-name", "generated-shared-prefix", "--gsp-num-groups", "2", "--gsp-prompts-per-group", "2"]
    command += ["--gsp-system-prompt-len", "30", "--gsp-question-len", "4", "--gsp-output-len", "5"]
    command += ["--vs", "mlx-lm", "--run-name", "mine", "--result-filename", str(out), "--rounds", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    ours, theirs = read([out])
    assert [json.loads(line)["side"] for line in done.stdout.splitlines()] == ["pippin", "mlx-lm"]
    for result in (ours, theirs):
        assert (result.kind, result.run_name) == ("offline", "mine")
        assert result.figures["total_input_tokens"] == 4 * 34
        assert result.figures["total_output_tokens"] == 4 * 5
    assert ours.figures["cached_tokens"] == 2 * 30
    assert theirs.figures["cached_tokens"] is None
    assert "4 requests, 136 tokens in, 20 out" in " ".join(done.stderr.split())  # the title holds a path, and wraps


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--num-prompts 0", "--num-prompts: must be at least 1"),
        ("--rounds 0", "--rounds: must be at least 1"),
        ("--vs jax", "--vs: 'jax' is not known; there are mlx-lm, torch"),
        ("--dataset-name multi-turn", "--dataset-name: multi-turn waits for answers"),
        ("--dataset-name sharegpt", "--dataset-path"),
        ("--dataset-name sharegpt --dataset-path nowhere.json", "--dataset-path: nowhere.json"),
        ("--random-input-len 9000 --random-range-ratio 1", "--random-input-len: "),
        ("--num-prompts 1 --result-filename /", "--result-filename"),
    ],
)
def test_wrong_options_are_one_line_and_status_2(arguments: str, said: str, capsys: Lines) -> None:
    assert run_command(["bench", "offline", *arguments.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert said in captured.err
