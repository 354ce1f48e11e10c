"""What this machine has, for ``pippin env`` and bug reports. Nothing here fails: what can't be found out says so."""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING

from pippin import __version__
from pippin.backend import NoBackendError, preload_openblas, prepare

if TYPE_CHECKING:
    from rich.console import RenderableType

Facts = dict[str, str]

_MISSING = "not installed"

# MLX's other half, of which each machine has one.
_NATIVE = ("mlx-metal", "mlx-cpu", "mlx-cuda-12", "mlx-cuda-13")


@dataclass(frozen=True, slots=True)
class Feature:
    """Something that works here or not; ``mend`` is how to get it, if it is to be had on this machine."""

    name: str
    ready: bool
    detail: str
    mend: str = ""


@dataclass(frozen=True, slots=True)
class Environment:
    """Each section's names and values, in the order to print."""

    system: Facts
    device: Facts
    packages: Facts
    features: tuple[Feature, ...]


def describe() -> Environment:
    """Looks at everything; takes as long as importing MLX does."""
    return Environment(system(), device(), packages(), features())


def system() -> Facts:
    """Program, interpreter, machine and the limits that the system sets."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return {
        "pippin": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "os": platform.platform(),
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "memory": _gib(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        "open files": str(files),
    }


def device() -> Facts:
    """The device that MLX would use, its memory and limits, and the attention backends."""
    blas = preload_openblas()
    try:
        prepare()
    except NoBackendError as error:
        return {"device": f"none: {error}"}
    import mlx.core as mx

    from pippin import kernels
    from pippin.attention import backends_to_try
    from pippin.memory import device_bytes, on_gpu

    info = mx.device_info()
    named = {"metal": "Metal", "cuda": "CUDA"}
    return {
        "device": f"{mx.default_device()}, {info.get('device_name') or info.get('architecture')}",
        "backend": named.get(kernels.backend() or "", "CPU"),
        "usable memory": _gib(device_bytes()),
        "blas": "OpenBLAS" if blas else "of the device" if on_gpu() else "MLX's own (slow)",
        "attention backends": ", ".join(backend.name for backend in backends_to_try("mlx")),
        "kernels": "ours" if kernels.backend() else "plain MLX",
        **{k.replace("_", " "): _shown(k, v) for k, v in sorted(info.items()) if k != "device_name"},
        **_driver(),
    }


def packages() -> Facts:
    """Versions of what Pippin depends on, optional packages too; those say how to get them."""
    found = {name: package_version(name) for name in _NATIVE if package_version(name)[0].isdigit()}
    try:
        wanted = requires("pippin") or []
    except PackageNotFoundError:  # run from a folder of sources
        wanted = []
    for requirement in wanted:
        name = re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0]
        extra = re.search(r"extra == ['\"]([\w-]+)", requirement)
        if name not in found:
            found[name] = package_version(name, extra[1] if extra else None)
    return found


def package_version(name: str, extra: str | None = None) -> str:
    """Its version, or that it is not installed, and the extra that would bring it."""
    try:
        return version(name)
    except PackageNotFoundError:
        return _MISSING + (f" (`pip install 'pippin[{extra}]'`)" if extra else "")


def features() -> tuple[Feature, ...]:
    """What works here, and what would bring the rest."""
    return (_gpu(), _fast_cpu(), _compiled_ahead(), _kernel_checks(), _torch(), _metal_capture(), _hub())


def _gpu() -> Feature:
    name = "models on a GPU"
    try:
        prepare()
    except NoBackendError as error:
        return Feature(name, False, "MLX can't be imported", str(error))
    import mlx.core as mx

    from pippin.memory import on_gpu

    if on_gpu():
        return Feature(name, True, str(mx.device_info().get("device_name", "")))
    if shutil.which("nvidia-smi"):
        return Feature(name, False, "an NVIDIA GPU, and MLX's CPU build", "pip install 'pippin[cuda13]', or [cuda12]")
    return Feature(name, False, "MLX sees none; the CPU serves small models")


def _fast_cpu() -> Feature:
    from ctypes.util import find_library

    name = "fast float32 on the CPU"
    if sys.platform != "linux":
        return Feature(name, True, "Accelerate")
    if find_library("openblas"):
        return Feature(name, True, "OpenBLAS")
    return Feature(name, False, "10 to 20 times slower without OpenBLAS", "apt-get install libopenblas0-pthread")


def _compiled_ahead() -> Feature:
    name = "kernels built ahead of time"
    try:
        prepare()
    except NoBackendError:
        return Feature(name, False, "needs MLX")
    from pippin.kernels.build.build import missing, platform_to_build
    from pippin.kernels.build.toolchain import Machine

    machine = Machine.here()
    lacks = missing(platform_to_build(machine), machine)
    if lacks:
        return Feature(name, False, lacks[0].split(":")[0], "; ".join(lacks))
    return Feature(name, True, f"`pippin kernels build` can make {platform_to_build(machine)} kernels")


def _kernel_checks() -> Feature:
    name = "GPU kernels run on the CPU (for tests)"
    if shutil.which("g++"):
        return Feature(name, True, "g++")
    return Feature(
        name, False, "no g++", "xcode-select --install" if sys.platform == "darwin" else "apt-get install g++"
    )


def _torch() -> Feature:
    name = "PyTorch runner and tensor bridge"
    found = package_version("torch")
    if found[0].isdigit():
        return Feature(name, True, f"torch {found}")
    return Feature(name, False, "torch is not installed", "pip install 'pippin[torch]'")


def _metal_capture() -> Feature:
    name = "Metal captures"
    if sys.platform != "darwin":
        return Feature(name, False, "on a Mac only")
    if os.environ.get("MTL_CAPTURE_ENABLED") == "1":
        return Feature(name, True, "MTL_CAPTURE_ENABLED=1")
    return Feature(name, False, "MTL_CAPTURE_ENABLED is not set", "start the program with MTL_CAPTURE_ENABLED=1")


def _hub() -> Feature:
    from huggingface_hub import constants, get_token

    name = "models from the hub"
    if constants.HF_HUB_OFFLINE:
        return Feature(name, False, "HF_HUB_OFFLINE is set: only what is in the cache", "unset HF_HUB_OFFLINE")
    token = "with a token" if get_token() else "without a token: gated models need `hf auth login`"
    return Feature(name, True, f"{token}; cache {constants.HF_HUB_CACHE}")


def as_json(found: Environment) -> str:
    """One JSON object, indented."""
    return json.dumps(asdict(found), indent=2)


def as_table(found: Environment) -> RenderableType:
    """For a terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for section in (found.system.items(), found.device.items(), _together(found.packages)):
        for name, value in section:
            table.add_row(name, Text(value))
        table.add_row()
    ways = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for feature in found.features:
        mark = Text("yes", "green") if feature.ready else Text("no", "yellow")
        ways.add_row(mark, feature.name, Text(feature.detail + (f" → {feature.mend}" if feature.mend else "")))
    return Group(table, ways)


def _together(packages: Facts) -> list[tuple[str, str]]:
    """What is not installed in one row for each way to get it, behind the rest."""
    missing: dict[str, list[str]] = {}
    for name, value in packages.items():
        if value.startswith(_MISSING):
            missing.setdefault(value, []).append(name)
    there = [(name, value) for name, value in packages.items() if value not in missing]
    return there + [("…", f"{value}: {', '.join(names)}") for value, names in missing.items()]


def _processor() -> str:
    if sys.platform == "darwin":
        return _said(["sysctl", "-n", "machdep.cpu.brand_string"]) or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} ({platform.machine()})" if names else platform.machine()


def _driver() -> Facts:
    """What the system's own tools say of the GPU."""
    facts: Facts = {}
    if shutil.which("nvidia-smi"):
        said = _said(["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"])
        facts["nvidia-smi"] = " | ".join((said or "does not answer").splitlines())
    if sys.platform == "darwin":
        facts["wired limit (MB)"] = _said(["sysctl", "-n", "iogpu.wired_limit_mb"]) or "the system's own"
    return facts


def _said(command: Sequence[str]) -> str | None:
    """What a program prints, None where it isn't there, fails, or takes more than ten seconds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _shown(key: str, value: object) -> str:
    sizes = ("memory", "size", "length")
    return _gib(value) if isinstance(value, int) and any(s in key for s in sizes) else str(value)


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
