"""``--profile``: prefill and decode of each shape in files of their own, with the steps that ran; errors by flag."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from benchmarks.checkpoint import SMALL, make_checkpoint
from pippin.bench.options import OneBatchOptions
from pippin.bench.sides import open_ours
from pippin.bench.stages import decode_window, profile_stages
from pippin.cli import run_command
from pippin.config import EngineConfig
from pippin.errors import ConfigError

Lines = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("profiled") / "model", SMALL)


def device_steps(path: Path) -> list[str]:
    """Names of the steps in a timeline's lane of device steps."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return [e["name"] for e in events if e["ph"] == "X" and "waited_us" in e.get("args", {})]


def test_prefill_and_decode_are_recorded_apart(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Lines
) -> None:
    monkeypatch.setenv("SGLANG_TORCH_PROFILER_DIR", str(tmp_path))
    command = ["bench", "one-batch", "--model-path", str(checkpoint), "--batch-size", "2", "--input-len", "7"]
    command += ["--output-len", "1", "4", "--rounds", "1", "--profile", "--profile-filename-prefix", "mine"]
    command += ["--chunked-prefill-size", "10"]
    assert run_command(command) == 0
    captured = capfd.readouterr()
    stem = str(tmp_path / "mine_batch2_input7_output")
    names = [f"{stem}1_prefill", f"{stem}4_prefill", f"{stem}4_decode"]
    files = [Path(f"{name}.trace.json.gz") for name in names]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert device_steps(files[1]) == ["prefill 10", "prefill 4"]
    assert device_steps(files[2]) == ["decode 2"] * 3
    single, several = (json.loads(line)["figures"]["profiles"] for line in captured.out.splitlines())
    assert [*single, *several] == [str(file) for file in files]
    assert all(str(file) in captured.err for file in files)


def test_a_profile_leaves_the_runner_as_it_was(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_TORCH_PROFILER_DIR", str(tmp_path))
    ours = open_ours(EngineConfig(str(checkpoint), max_total_tokens=64, max_running_requests=2), lambda _: None)
    prompts = [[5, 6, 7], [8, 9, 10]]
    before = ours.side.run(prompts, 5).timing.tokens
    first, second = (profile_stages(ours, prompts, 5, OneBatchOptions(profile=True)) for _ in range(2))
    assert not set(first) & set(second)
    assert ours.side.run(prompts, 5).timing.tokens == before
    assert [len(device_steps(file)) for file in (*first, *second)] == [1, 4, 1, 4]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--profile --profile-activities NPU", "--profile-activities: must be CPU or GPU, not 'NPU'"),
        ("--profile-activities CPU", "--profile-activities: records nothing without --profile"),
        ("--profile-steps 2", "--profile-steps: records nothing without --profile"),
        ("--profile --profile-steps 0", "--profile-steps: must be at least 1"),
        ("--profile --profile-start-step 99", "--profile-start-step: an answer has decode steps 0 to 14"),
        ("--profile --profile-activities CPU GPU --device cpu", "--profile-activities: the model runs on the CPU"),
        ("--profile --profile-filename-prefix a/b", "--profile-filename-prefix: "),
    ],
)
def test_wrong_options_are_one_line_and_status_2(checkpoint: Path, arguments: str, said: str, capsys: Lines) -> None:
    command = ["bench", "one-batch", "--model-path", str(checkpoint), "--input-len", "4", "--rounds", "1"]
    assert run_command([*command, *arguments.split()]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.strip().splitlines()[-1].startswith("pippin: --profile")
    assert captured.out == ""


@pytest.mark.parametrize(
    ("options", "prefills", "decodes"),
    [
        (OneBatchOptions(profile=True, profile_stage="prefill"), 1, None),
        (OneBatchOptions(profile=True, profile_stage="decode"), None, 6),
        (OneBatchOptions(profile=True, profile_start_step=4), 1, 2),
        (OneBatchOptions(profile=True, profile_steps=2), 1, 2),
        (OneBatchOptions(profile=True, profile_start_step=5, profile_steps=9), 1, 1),
    ],
)
def test_one_stage_or_some_decode_steps_alone(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: OneBatchOptions,
    prefills: int | None,
    decodes: int | None,
) -> None:
    monkeypatch.setenv("SGLANG_TORCH_PROFILER_DIR", str(tmp_path))
    ours = open_ours(EngineConfig(str(checkpoint), max_total_tokens=64, max_running_requests=2), lambda _: None)
    files = profile_stages(ours, [[5, 6, 7], [8, 9, 10]], 7, options)
    found = {file.name.partition(".")[0].rpartition("_")[2]: len(device_steps(file)) for file in files}
    assert found == {k: n for k, n in (("prefill", prefills), ("decode", decodes)) if n is not None}


def test_the_window_begins_at_the_step_that_was_asked_for() -> None:
    def taken(**options: int) -> list[int]:
        window = decode_window(OneBatchOptions(profile=True, **options), 10)  # type: ignore[arg-type]
        return [step - 1 for step in range(1, 11) if window.takes(step, "DECODE")]

    assert taken() == list(range(10))
    assert taken(profile_start_step=7) == [7, 8, 9]
    assert taken(profile_start_step=2, profile_steps=3) == [2, 3, 4]
    assert taken(profile_steps=1) == [5], "the middle, as SGLang does"
    with pytest.raises(ConfigError, match="steps 0 to 9, and no step 10"):
        taken(profile_start_step=10)


def test_the_engine_alone_is_recorded_in_a_run_of_its_own(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Lines
) -> None:
    monkeypatch.setenv("SGLANG_TORCH_PROFILER_DIR", str(tmp_path))
    command = ["bench", "offline", "--model-path", str(checkpoint), "--max-total-tokens", "400", "--num-prompts", "3"]
    command += ["--random-input-len", "6", "--random-output-len", "4", "--random-range-ratio", "1", "--profile"]
    assert run_command([*command, "--run-name", "mine"]) == 0
    captured = capfd.readouterr()
    file = tmp_path / "offline-mine.trace.json.gz"
    assert list(tmp_path.iterdir()) == [file]
    assert device_steps(file) == ["prefill 18", *["decode 3"] * 3]
    assert json.loads(captured.out)["figures"]["profiles"] == [str(file)]
    assert f"recorded {file}" in captured.err
    assert run_command([*command, "--run-name", "a/b"]) == 2
