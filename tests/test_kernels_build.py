"""Kernels ahead of time: what is missing is named, and the command builds what a model needs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pippin.cli import run_command
from pippin.demo import demo_model_path
from pippin.kernels.build import nvrtc, store, toolchain
from pippin.kernels.build.build import build
from pippin.kernels.build.shapes import read_config, shape_of_config
from pippin.kernels.build.toolchain import Machine, Result, ToolchainError
from tests.kernel_builds import (
    KEY,
    SMALL,
    Toolchain,
    cache,
    mac,
)

__all__ = ["cache"]


@pytest.mark.parametrize(
    ("machine", "says"),
    [
        (Machine("Linux", "x86_64", Toolchain()), ["not macOS", "Linux"]),
        (Machine("Darwin", "x86_64", Toolchain()), ["not arm64", "Rosetta"]),
        (mac(Toolchain({"xcode-select": 2})), ["no Command Line Tools", "xcode-select --install"]),
        (mac(Toolchain({"xcrun": 72})), ["no Metal compiler", "xcodebuild -downloadComponent MetalToolchain"]),
        (mac(Toolchain(), nanobind=False), ["no nanobind", "pip install nanobind"]),
    ],
)
def test_what_a_metal_build_lacks_is_named_with_its_mend(machine: Machine, says: list[str]) -> None:
    (line,) = toolchain.metal_missing(machine)
    assert all(word in line for word in says)
    with pytest.raises(ToolchainError, match=re.escape(says[0])):
        build("metal", [SMALL], machine)


def test_a_mac_with_everything_lacks_nothing() -> None:
    run = Toolchain()
    assert toolchain.metal_missing(mac(run)) == []
    assert run.commands == [["xcode-select", "-p"], ["xcrun", "-sdk", "macosx", "-f", "metal"]]


def test_all_that_is_missing_is_said_at_once() -> None:
    assert len(toolchain.metal_missing(mac(Toolchain({"xcode-select": 2}), nanobind=False))) == 2


@pytest.mark.parametrize(
    ("library", "headers", "nvcc", "lacks"),
    [
        (True, True, False, []),
        (False, False, True, []),
        (False, False, False, ["nvidia-cuda-nvrtc nvidia-cuda-runtime"]),
        (True, False, False, ["install nvidia-cuda-runtime`"]),
    ],
)
def test_what_a_cuda_build_lacks(
    monkeypatch: pytest.MonkeyPatch, library: bool, headers: bool, nvcc: bool, lacks: list[str]
) -> None:
    monkeypatch.setattr(toolchain, "find_library", lambda: object() if library else None)
    monkeypatch.setattr(toolchain, "find_headers", lambda: Path() if headers else None)
    machine = Machine("Linux", "x86_64", Toolchain(), {"nvcc": "/bin/nvcc"}.get if nvcc else lambda _: None)
    found = toolchain.cuda_missing(machine)
    assert len(found) == len(lacks)
    assert all(part in line for part, line in zip(lacks, found, strict=True))


def test_a_program_that_is_not_there_is_a_result() -> None:
    assert toolchain.run_command(["pippin-has-no-such-program"]).status == 127
    assert toolchain.run_command(["sh", "-c", "echo out; echo err >&2; exit 3"]) == Result(3, "out\nerr\n")


# --- the command ---


def test_the_command_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    machine = Machine("Darwin", "x86_64", Toolchain())
    monkeypatch.setattr(Machine, "here", staticmethod(lambda: machine))
    assert run_command(["kernels", "build", "--check"]) == 1
    assert "not arm64" in capsys.readouterr().out
    assert run_command(["kernels", "build"]) == 1
    error = capsys.readouterr().err
    assert "not arm64" in error
    assert "Traceback" not in error


def test_the_command_builds_the_demo_models_kernels(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(nvrtc, "find_library", lambda: None)
    machine = Machine("Linux", "x86_64", Toolchain(), {"nvcc": "/bin/nvcc"}.get)
    monkeypatch.setattr(Machine, "here", staticmethod(lambda: machine))
    assert run_command(["kernels", "build", "--arch", "sm_90"]) == 0
    assert re.search(r"\d+ kernels, \d+ compiled in", capsys.readouterr().out)
    assert run_command(["kernels", "build", "--arch", "sm_90", "--dtype", "int8"]) == 2
    assert "--dtype" in capsys.readouterr().err
    assert run_command(["kernels", "build", "--arch", "sm_90", "--kv-cache-dtype", "int7"]) == 2
    assert "--kv-cache-dtype" in capsys.readouterr().err
    assert run_command(["kernels", "build", "--arch", "sm_90", "--quantization", "q2"]) == 2
    assert "--quantization" in capsys.readouterr().err
    options = ["--kv-cache-dtype", "fp8_e4m3", "--quantization", "mlx_q8"]
    assert run_command(["kernels", "build", "--arch", "sm_90", *options]) == 0
    told = capsys.readouterr().out
    assert "pippin_rows_mma" in told
    assert "pippin_kv_write_packed" in told
    assert run_command(["kernels", "build", "--arch", "sm_90", "--model-path", "./nowhere"]) == 1
    assert "nowhere" in capsys.readouterr().err
    assert shape_of_config(read_config(demo_model_path())).heads > 0


def test_files_appear_whole() -> None:
    """A file appears under its name only when all of it is there."""
    store.write(KEY.folder / "x.cubin", b"1" * 1000)
    assert [p.name for p in KEY.folder.iterdir()] == ["x.cubin"]
