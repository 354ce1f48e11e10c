"""What a build runs, and what has to be there for it: commands go through a ``Run``, so that tests can record them."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pippin.errors import PippinError
from pippin.kernels.build.nvrtc import CompileError, find_headers, find_library


class ToolchainError(PippinError):
    """Kernels can't be built ahead of time here; the message says what is missing and how to get it."""


@dataclass(frozen=True, slots=True)
class Result:
    """Of a command that has ended."""

    status: int
    output: str


Run = Callable[[Sequence[str]], Result]


def run_command(command: Sequence[str]) -> Result:
    """Runs it to its end, both outputs together; status 127 where there is no such program."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except OSError as error:
        return Result(127, str(error))
    return Result(done.returncode, done.stdout)


def succeed(run: Run, command: Sequence[str]) -> str:
    """Its output. Raises CompileError with the command and what it said."""
    result = run(command)
    if result.status:
        raise CompileError(
            f"{' '.join(command[:4])} … ended with status {result.status}: {result.output[-2000:].strip()}"
        )
    return result.output


@dataclass(frozen=True, slots=True)
class Machine:
    """What decides which toolchain there can be; ``system`` and ``processor`` as ``platform`` names them."""

    system: str
    processor: str
    run: Run
    find: Callable[[str], str | None] = shutil.which
    installed: Callable[[str], bool] = lambda name: importlib.util.find_spec(name) is not None

    @staticmethod
    def here() -> Machine:
        return Machine(platform.system(), platform.machine(), run_command)

    def through_ccache(self, command: Sequence[str]) -> list[str]:
        """The command, behind ccache where that is installed."""
        ccache = self.find("ccache")
        return [*([ccache] if ccache else []), *command]


def metal_missing(machine: Machine) -> list[str]:
    """What a Metal build lacks here, a line each, with how to get it; the first reasons rule out the others."""
    if machine.system != "Darwin":
        return [f"not macOS: Metal kernels are built on a Mac, and this is {machine.system}"]
    if machine.processor != "arm64":
        return [
            f"not arm64: MLX needs Apple silicon, and this Python is for {machine.processor} (under Rosetta, perhaps)"
        ]
    missing = []
    if machine.run(["xcode-select", "-p"]).status:
        missing.append("no Command Line Tools: run `xcode-select --install`")
    elif machine.run(["xcrun", "-sdk", "macosx", "-f", "metal"]).status:
        missing.append(
            "no Metal compiler: the Command Line Tools lack it; install Xcode, then run "
            "`sudo xcode-select -s /Applications/Xcode.app` and `xcodebuild -downloadComponent MetalToolchain`"
        )
    if not machine.installed("nanobind"):
        missing.append("no nanobind: run `pip install nanobind`")
    return missing


def cuda_missing(machine: Machine) -> list[str]:
    """What a CUDA build lacks here, a line each, with how to get it."""
    if find_library() is not None and find_headers() is not None:
        return []
    if machine.find("nvcc"):
        return []
    packages = [
        *(["nvidia-cuda-nvrtc"] if find_library() is None else []),
        *(["nvidia-cuda-runtime"] if find_headers() is None else []),
    ]
    return [f"no CUDA compiler: run `pip install {' '.join(packages)}`, as mlx[cuda13] does, or install nvcc"]


def demand(missing: Sequence[str]) -> None:
    """Raises ToolchainError if anything is missing."""
    if missing:
        raise ToolchainError("kernels can't be built here: " + "; ".join(missing))


def nvcc_cubin(machine: Machine, name: str, text: str, architecture: str, folder: Path) -> bytes:
    """The cubin of CUDA source by nvcc, for where there is no NVRTC. Raises CompileError."""
    source, target = folder / f"{name}.cu", folder / f"{name}.cubin"
    source.write_text(text, encoding="utf-8")
    command = ["nvcc", "-cubin", f"-arch={architecture}", "-std=c++17", "-o", str(target), str(source)]
    succeed(machine.run, machine.through_ccache(command))
    return target.read_bytes()
