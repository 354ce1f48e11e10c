"""One batch: the tokens that mlx-lm gives, steps cut as the engine cuts them, and the command as its users run it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm import load as load_with_mlx_lm
from mlx_lm.generate import generate_step
from tokenizers import Tokenizer

from benchmarks.checkpoint import SMALL, make_checkpoint
from pippin.bench.machine import copy_bandwidth
from pippin.bench.one_batch import Measurement, Shape, Yardstick
from pippin.bench.prompts import plain_ids
from pippin.bench.results import BenchResult, read
from pippin.bench.runner import EngineRunner, Timing, timed
from pippin.bench.sides import Measured, open_ours
from pippin.cache.layout import CacheLayout, LayerShape
from pippin.cli import run_command
from pippin.config import EngineConfig
from pippin.errors import EngineError
from pippin.flight import Masks
from pippin.messages import ModelInfo
from pippin.types import Batch, RowResult, Work
from tests.fake_core import expected, fake_info


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("bench") / "model", SMALL)


# --- the runner ---


class FakeFlight:
    """A step that draws ``next_token`` of what the host knows when it is read, and checks that it knows enough."""

    def __init__(self, batch: Batch, log: list[str]) -> None:
        self.batch = batch
        self._log = log

    def draw(self, masks: Masks) -> None:
        """Nothing waits for masks here."""

    def drawn(self) -> list[tuple[Work, int]]:
        raise AssertionError("nothing is looked ahead at here")

    def read(self) -> list[RowResult]:
        self._log.append("read")
        results = []
        for work in self.batch.works:
            assert len(work.request.tokens) == work.end or not work.samples
            token = expected(work.request.tokens, 1)[0] if work.samples else None
            results.append(RowResult(token))
        return results


class FakeRunner:
    """Records what is queued, and when it is read."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.works: list[list[tuple[str, int, int]]] = []
        self.slots: list[set[int]] = []

    def launch(self, batch: Batch) -> FakeFlight:
        self.log.append("launch")
        self.works.append([(w.request.id, w.start, w.end) for w in batch.works])
        rows = [w.request.row for w in batch.works]
        assert len(set(rows)) == len(rows)
        assert min(rows) > 0
        self.slots += [set(w.request.slots[w.start : w.end]) for w in batch.works]
        return FakeFlight(batch, self.log)

    def reset(self) -> None:
        raise AssertionError("nothing failed")


def info_of(chunk: int = 512, page: int = 1, slots: int = 100_000) -> ModelInfo:
    import msgspec

    return msgspec.structs.replace(
        fake_info(), chunked_prefill_size=chunk, page_size=page, max_total_tokens=slots, vocab_size=300
    )


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(1, 6), st.integers(1, 9), st.integers(1, 4),
    st.booleans(),
)  # fmt: skip
def test_any_batch_comes_to_what_each_prompt_comes_to_alone(
    lengths: list[int], output_len: int, chunk: int, page: int, overlap: bool
) -> None:
    fake = FakeRunner()
    needed = sum(-(-(n + output_len) // page) * page for n in lengths)  # what a batch leaves taken, the next one lacks
    runner = EngineRunner(fake, info_of(chunk, page, slots=needed), overlap=overlap)
    prompts = [[(7 * i + j) % 290 for j in range(n)] for i, n in enumerate(lengths)]
    for _ in range(2):
        fake.works.clear()
        fake.slots.clear()
        timing = timed(runner, prompts, output_len)
        assert timing.tokens == [expected(p, output_len) for p in prompts]
        assert len(timing.steps) == output_len - 1
        prefills = fake.works[: len(fake.works) - (output_len - 1)]
        assert [sum(end - start for _, start, end in works) for works in prefills[:-1]] == [chunk] * (len(prefills) - 1)
        written = [slot for slots in fake.slots for slot in slots]
        assert len(written) == len(set(written)) == sum(lengths) + len(lengths) * (output_len - 1)


def test_times_are_between_tokens() -> None:
    clock = iter([10.0, 13.0, 14.0, 16.5])
    timing = timed(EngineRunner(FakeRunner(), info_of()), [[1, 2]], 3, clock=lambda: next(clock))
    assert (timing.prefill, timing.steps) == (3.0, [1.0, 2.5])


@pytest.mark.parametrize("overlap", [True, False])
def test_steps_are_queued_before_the_one_before_is_read(overlap: bool) -> None:
    fake = FakeRunner()
    timed(EngineRunner(fake, info_of(chunk=2), overlap=overlap), [[1, 2, 3, 4]], 4)
    prefill = ["launch", "launch", "read", "read"]
    assert fake.log == ([*prefill, "launch", "launch", "read", "launch", "read", "read"] if overlap else
                        ["launch", "read"] * 5)  # fmt: skip


def test_a_batch_that_does_not_fit_is_refused() -> None:
    runner = EngineRunner(FakeRunner(), info_of(slots=16))
    with pytest.raises(EngineError, match="--max-total-tokens"):
        runner.prefill([[1] * 10, [1] * 10], 1)


@settings(max_examples=5)
@given(st.integers(1, 4), st.integers(1, 40), st.sampled_from([3, 512]), st.sampled_from([1, 4]))
def test_tokens_are_those_of_mlx_lm(checkpoint: Path, batch: int, length: int, chunk: int, page: int) -> None:
    config = EngineConfig(
        str(checkpoint), max_total_tokens=400, max_running_requests=4, chunked_prefill_size=chunk, page_size=page
    )
    ours = open_ours(config, lambda _: None)
    prompts = [[(31 * i + 7 * j) % 599 + 1 for j in range(length)] for i in range(batch)]
    assert ours.side.run(prompts, 6).timing.tokens == [alone(checkpoint, p, 6) for p in prompts]


def alone(checkpoint: Path, prompt: Sequence[int], count: int) -> list[int]:
    model = load_with_mlx_lm(str(checkpoint))[0]
    return [int(t) for t, _ in generate_step(mx.array(list(prompt)), model, max_tokens=count)]


# --- figures ---


def of_seconds(shape: Shape, side: str, rounds: Sequence[tuple[float, list[float]]]) -> Measurement:
    return Measurement(side, shape, [Measured(Timing(p, s, []), 10, 20) for p, s in rounds])


def test_figures_are_medians_and_ratios_of_rounds() -> None:
    shape = Shape(2, 10, 4)
    ours = of_seconds(shape, "pippin", [(1.0, [1.0, 2.0, 9.0]), (3.0, [4.0, 4.0, 4.0]), (2.0, [3.0, 3.0, 3.0])])
    theirs = of_seconds(shape, "mlx-lm", [(2.0, [4.0, 4.0, 4.0]), (3.0, [4.0, 4.0, 4.0]), (8.0, [9.0, 9.0, 9.0])])
    assert (ours.prefill, ours.step, ours.total) == (2.0, 3.0, 13.0)
    assert ours.ratios(theirs) == (2.0, 2.0)
    wide, windowed = LayerShape(1, 1, 2, mx.float16), LayerShape(1, 2, 2, mx.float16, window=5)
    yardstick = Yardstick(bandwidth=100.0, weight_bytes=60, layout=CacheLayout.of([wide, None, windowed]))
    assert yardstick.share(ours) == pytest.approx((60 + 2 * (12 * 6 + 5 * 8)) / 3.0 / 100.0)
    single = of_seconds(Shape(2, 10, 1), "pippin", [(1.0, [])])
    assert (single.step, yardstick.share(single), single.ratios(single)) == (None, None, (1.0, None))
    assert replace(yardstick, weight_bytes=None).share(ours) is None


def test_the_bandwidth_is_a_memory_s() -> None:
    assert 1e8 < copy_bandwidth(cpu_bytes=1 << 24) < 1e13


def test_prompts_are_of_ids_that_the_tokenizer_has(checkpoint: Path) -> None:
    ids = plain_ids(open_ours(EngineConfig(str(checkpoint), max_total_tokens=64), lambda _: None).info)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    assert set(ids) == set(range(SMALL.vocab)) - {0}  # 0 ends a text
    assert all(tokenizer.id_to_token(i) for i in ids)


# --- the command ---


def bench(*arguments: str, module: str = "pippin") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_command_measures_a_grid_beside_mlx_lm(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    done = bench(
        *("--model-path", str(checkpoint), "--batch-size", "1", "2", "--input-len", "12", "--output-len", "1", "5"),
        *("--vs", "mlx-lm", "--rounds", "1", "--run-name", "mine", "--result-filename", str(out)),
        module="pippin.bench_one_batch",
    )
    assert done.returncode == 0, done.stderr
    results = read([out])
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        json.loads(line) for line in out.read_text().splitlines()
    ]
    keys = [(r.side, *(r.settings[k] for k in ("batch_size", "input_len", "output_len"))) for r in results]
    assert keys == [(s, b, 12, n) for b in (1, 2) for n in (1, 5) for s in ("pippin", "mlx-lm")]
    for result in results:
        check(result)
    assert "mlx-lm" in done.stderr
    assert "x prefill" in done.stderr


def check(result: BenchResult) -> None:
    figures, settings = result.figures, result.settings
    assert (result.kind, result.run_name, settings["dtype"]) == ("one-batch", "mine", "float32")
    assert isinstance(figures["prefill_latency"], float)
    assert figures["prefill_latency"] > 0
    assert (figures["median_decode_latency"] is None) == (settings["output_len"] == 1)
    assert isinstance(figures["peak_memory_bytes"], int)
    assert ("prefill_vs_mlx-lm" in figures) == (result.side == "pippin")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--batch-size 0", "--batch-size: must be at least 1, not 0"),
        ("--batch-size x", "--batch-size"),
        ("--rounds 0", "--rounds: must be at least 1"),
        ("--vs vllm", "--vs: 'vllm' is not known; there are mlx-lm, torch"),
        ("--input-len 5000", "--input-len: 5000 and --output-len 16 together are beyond the model's context of 4096"),
        ("--input-len 50 --max-total-tokens 20", "--max-total-tokens: 1 x 50 + 16 takes 66 slots, more than 20"),
        ("--input-len 5 --batch-size 3 --max-running-requests 2", "--max-running-requests: 2 is less than"),
        ("--input-len 5 --result-filename /", "--result-filename"),
    ],
)
def test_wrong_options_are_one_line_and_status_2(arguments: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["bench", "one-batch", *arguments.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert said in captured.err


def test_a_missing_model_is_status_1_for_every_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["bench", "one-batch", "--model", str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err
