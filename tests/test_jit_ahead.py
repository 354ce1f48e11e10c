"""Processes that compile ahead of an engine: when they are started, what each does, and that none outlives its use."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import pytest

from pippin import jit_ahead, kernels
from pippin.jit_ahead import JitAhead, compile_part
from pippin.sampler_graphs import SamplerGraphs
from tests.compiling import Counting


class Started:
    """Stands for ``start_process``: processes that do something else."""

    def __init__(self, code: str = "pass") -> None:
        self.code = code
        self.arguments: list[list[str]] = []
        self.processes: list[subprocess.Popen[bytes]] = []

    def __call__(self, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
        self.arguments.append(list(arguments))
        self.processes.append(subprocess.Popen([sys.executable, "-c", self.code], stdin=subprocess.PIPE))
        return self.processes[-1]


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with CUDA and eight cores, where MLX keeps things in the folder."""
    folder = tmp_path / "ptx"
    folder.mkdir()
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", str(folder))
    monkeypatch.setattr(kernels, "backend", lambda: "cuda")
    monkeypatch.setattr("pippin.jit_ahead.cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    return folder


def begun(code: str = "pass", dtype: mx.Dtype = mx.bfloat16) -> tuple[JitAhead, Started]:
    started = Started(code)
    return JitAhead(90, 96, dtype, start=started), started


def test_it_is_done_once(folder: Path) -> None:
    ahead, started = begun()
    assert [a[-1] for a in started.arguments] == ["0/4", "1/4", "2/4", "3/4"]
    assert {tuple(a[:-1]) for a in started.arguments} == {("90", "96", "bfloat16", str(os.getpid()))}
    ahead.wait()
    assert all(process.poll() == 0 for process in started.processes)
    (folder / "add.ptx").touch()
    ahead.note()
    again, started = begun()
    again.wait()
    assert not started.arguments
    other, started = begun(dtype=mx.float16)
    other.wait()
    assert started.arguments, "other logits are another matter"
    (folder / "add.ptx").unlink()
    gone, started = begun()
    gone.wait()
    assert started.arguments, "somebody emptied the folder"


def test_who_takes_too_long_is_ended(folder: Path) -> None:
    ahead, started = begun("import time; time.sleep(600)")
    ahead.wait(0.1)
    assert all(process.poll() not in (None, 0) for process in started.processes)


def test_none_is_left_behind_where_loading_fails(folder: Path) -> None:
    started = Started("import time; time.sleep(600)")
    with pytest.raises(ValueError, match="too large"), JitAhead(90, 96, mx.float16, start=started):
        raise ValueError("too large")
    assert len(started.processes) == 4
    assert all(process.poll() not in (None, 0) for process in started.processes)


def test_who_compiles_no_steps_needs_none(folder: Path) -> None:
    started = Started()
    JitAhead(90, 96, mx.float16, False, started)
    assert not started.arguments


@pytest.mark.parametrize("backend", [None, "metal"])
def test_only_cuda_needs_it(folder: Path, monkeypatch: pytest.MonkeyPatch, backend: str | None) -> None:
    monkeypatch.setattr(kernels, "backend", lambda: backend)
    ahead, started = begun()
    ahead.wait()
    ahead.note()
    assert not started.arguments
    assert not list(folder.parent.glob("cache/*"))


def test_two_cores_are_too_few(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert not begun()[1].arguments


def test_the_parts_are_all_of_it() -> None:
    def traces(*parts: tuple[int, int]) -> int:
        compiler = Counting()  # a CPU's compiler takes a second for each
        graphs = SamplerGraphs(90, compiler)
        for part, count in parts:
            graphs.warm(mx.zeros((2, 96)), mx.zeros(8, mx.int32), part=slice(part, None, count))
        return compiler.traces

    whole = traces((0, 1))
    assert traces(*((i, 3) for i in range(3))) == whole
    assert 0 < traces((1, 3)) < whole


def test_a_process_does_its_part_and_ends(tmp_path: Path) -> None:
    process = jit_ahead.start_process(["90", "96", "float32", str(os.getpid()), "0/4"])
    assert process.wait(120) == 0
    assert process.stdin is not None
    process.stdin.close()


def test_a_process_ends_with_the_one_that_started_it() -> None:
    process = jit_ahead.start_process(["90", "96", "float32", "1", "0/4"])  # process 1 did not
    assert process.wait(120) == 1
    assert process.stdin is not None
    process.stdin.close()


def test_a_part_by_itself() -> None:
    compile_part(90, 96, mx.float16, 2, 5)
