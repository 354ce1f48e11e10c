"""``pippin kernels build``: which launches, which toolchain, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from pippin.errors import ConfigError
from pippin.kernels import tuning
from pippin.kernels.build import toolchain
from pippin.kernels.build.cuda import Tell, build_cuda
from pippin.kernels.build.metal import build_metal
from pippin.kernels.build.prebuilt import Recorded
from pippin.kernels.build.shapes import ModelShape
from pippin.kernels.build.store import Key
from pippin.kernels.build.toolchain import Machine
from pippin.kernels.build.variants import variants


@dataclass(frozen=True, slots=True)
class Built:
    """Where a build lies, how many kernels the shapes need, how many of those were compiled now, and in what time."""

    folder: Path
    kernels: int
    compiled: int
    seconds: float


def platform_to_build(machine: Machine) -> str:
    """metal on a Mac, cuda elsewhere."""
    return "metal" if machine.system == "Darwin" else "cuda"


def missing(platform: str, machine: Machine) -> list[str]:
    """What a build for ``platform`` lacks on this machine, a line each; empty for nothing."""
    return toolchain.metal_missing(machine) if platform == "metal" else toolchain.cuda_missing(machine)


def build(
    platform: str,
    shapes: Sequence[ModelShape],
    machine: Machine,
    tell: Tell = lambda _: None,
    architecture: str | None = None,
) -> Built:
    """Compiles the kernels that models of these shapes launch, into the user's cache.

    ``architecture`` such as sm_90 is that of MLX's GPU if left out. Raises ConfigError where that is not known,
    ToolchainError for what is missing, CompileError for what a compiler says.
    """
    toolchain.demand(missing(platform, machine))
    key = _key(platform, architecture)
    launches = _launches(platform, shapes)
    begin = time.perf_counter()
    if platform == "metal":
        kernels, compiled = build_metal(key, launches, machine, tell)
    else:
        kernels, compiled = build_cuda(key, launches, key.chip, machine, tell)
    return Built(key.folder, kernels, compiled, time.perf_counter() - begin)


def _launches(platform: str, shapes: Sequence[ModelShape]) -> list[Recorded]:
    table = tuning.table(platform)
    return [launch for shape in shapes for launch in variants(shape, table.every_cut(shape.dtype))]


def _key(platform: str, architecture: str | None) -> Key:
    key = Key.here(platform)
    if platform == "metal":
        return key
    if architecture is None and mx.default_device() != mx.Device(mx.gpu):
        raise ConfigError("MLX sees no GPU here, so say for which one to build, such as sm_90", "--arch")
    return key if architecture is None else Key(platform, architecture, key.mlx, key.sources)
