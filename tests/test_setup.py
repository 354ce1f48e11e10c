"""scripts/setup.sh on machines that this one is not: ``uname`` and the like are scripts in front of PATH."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SETUP = Path(__file__).resolve().parent.parent / "scripts" / "setup.sh"


def machine(where: Path, system: str, processor: str, **programs: str) -> subprocess.CompletedProcess[str]:
    """Runs ``setup.sh extra`` where ``uname`` says so, and each of ``programs`` is a shell script's text."""
    uname = f'[ "$1" = -s ] && echo {system} || echo {processor}'
    for name, text in {"uname": uname, "nvidia-smi": "exit 9", "sysctl": "exit 1", **programs}.items():
        script = where / name.replace("_", "-")
        script.write_text(f"#!/bin/sh\n{text}\n")
        script.chmod(0o755)
    path = f"{where}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [str(SETUP), "extra"],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("printed", "extra"),
    [
        ("| NVIDIA-SMI 550.54    Driver Version: 550.54    CUDA Version: 12.4  |", "cuda12"),
        ("| NVIDIA-SMI 580.65    Driver Version: 580.65    CUDA Version: 13.0  |", "cuda13"),
        ("| NVIDIA-SMI 595.10  KMD Version: 595.10  CUDA UMD Version: 13.2  |", "cuda13"),
        ("| NVIDIA-SMI 470.82    Driver Version: 470.82    CUDA Version: 11.4  |", "cpu"),
        ("Failed to initialize NVML: Driver/library version mismatch", "cpu"),
    ],
)
def test_cuda_by_the_drivers_version(tmp_path: Path, printed: str, extra: str) -> None:
    done = machine(tmp_path, "Linux", "x86_64", nvidia_smi=f"echo '{printed}'")
    assert done.stdout == f"{extra}\n", done.stderr


def test_linux_without_nvidia_is_cpu(tmp_path: Path) -> None:
    assert machine(tmp_path, "Linux", "aarch64").stdout == "cpu\n"


def test_apple_silicon_needs_no_extra(tmp_path: Path) -> None:
    done = machine(tmp_path, "Darwin", "arm64")
    assert (done.returncode, done.stdout) == (0, "\n")


@pytest.mark.parametrize(
    ("system", "processor", "sysctl", "says"),
    [
        ("Darwin", "x86_64", "exit 1", "Intel Macs can't run Pippin"),
        ("Darwin", "x86_64", "echo 1", "Rosetta"),
        ("Linux", "riscv64", "exit 1", "no build for Linux on riscv64"),
        ("FreeBSD", "amd64", "exit 1", "no build for FreeBSD on amd64"),
    ],
)
def test_machines_without_mlx_are_refused_by_name(
    tmp_path: Path, system: str, processor: str, sysctl: str, says: str
) -> None:
    done = machine(tmp_path, system, processor, sysctl=sysctl)
    assert done.returncode == 1
    assert says in done.stderr


def test_an_old_python_is_refused_by_name(tmp_path: Path) -> None:
    old = tmp_path / "python-old"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    clone = tmp_path / "clone" / "scripts"
    clone.mkdir(parents=True)
    (clone / "setup.sh").write_text(SETUP.read_text())
    (clone.parent / "pyproject.toml").write_text("")
    done = subprocess.run(
        ["bash", str(clone / "setup.sh"), "serve"],
        env={**os.environ, "PYTHON": str(old)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert f"PYTHON={old} is not a Python 3.11 or newer" in done.stderr
    assert not (clone.parent / ".venv").exists()
