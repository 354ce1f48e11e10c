"""Metal kernels ahead of time: each source to ``.air``, all to one ``.metallib``, and a module that shows it to MLX.

Not run by us: there was no Mac. The commands are tested with a recording toolchain.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pippin.kernels.build import metal_sources, store, toolchain
from pippin.kernels.build.nvrtc import CompileError
from pippin.kernels.build.prebuilt import HOST_MODULE, Recorded
from pippin.kernels.build.store import Key, write, write_manifest
from pippin.kernels.build.toolchain import Machine, succeed

Tell = Callable[[str], None]

# As MLX compiles its own kernels: MLX 0.32 runs on macOS 14 and newer, and asks its JIT for exact math.
_TARGET = "-mmacosx-version-min=14.0"
_METAL = ("xcrun", "-sdk", "macosx", "metal", "-fno-fast-math", _TARGET)
_CXX = (
    "xcrun",
    "-sdk",
    "macosx",
    "clang++",
    "-std=c++20",
    "-O2",
    "-fvisibility=hidden",
    "-fno-strict-aliasing",
    _TARGET,
)
_PRELUDE = '#include "mlx/backend/metal/kernels/utils.h"\n'


def build_metal(
    key: Key, launches: Sequence[Recorded], machine: Machine, tell: Tell, workers: int = 4
) -> tuple[int, int]:
    """Builds everything into ``key``'s folder: (kernels, compiled now).

    Raises ToolchainError, CompileError or OSError.
    """
    toolchain.demand(toolchain.metal_missing(machine))
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        sources = spoken(machine, launches, scratch)
        library = compile_library(machine, sources, scratch, tell, workers)
        host = compile_host(machine, scratch)
        tell(host.name)
        write(key.folder / library.name, library.read_bytes())
        write(key.folder / host.name, host.read_bytes())
    write(key.folder / "names.json", json.dumps(sorted(sources)).encode())
    write_manifest(key, {"compiler": "xcrun metal", "built": time.time(), "kernels": sorted(sources)})
    store.forgive(key)
    return len(sources), len(sources)


def spoken(machine: Machine, launches: Sequence[Recorded], scratch: Path) -> dict[str, str]:
    """The sources that MLX would compile, by name. Raises CompileError where it names none."""
    file = scratch / "launches.json"
    file.write_text(metal_sources.dump(launches), encoding="utf-8")
    output = succeed(machine.run, [sys.executable, "-m", "pippin.kernels.build.metal_sources", str(file)])
    found = metal_sources.parse(output)
    if launches and not found:
        raise CompileError(f"MLX printed no kernel source, but: {output[:500]}")
    return found


def compile_library(machine: Machine, sources: dict[str, str], scratch: Path, tell: Tell, workers: int) -> Path:
    """One ``.air`` for each source, several at a time, linked into ``pippin.metallib``."""

    def compiled(name: str) -> str:
        source, air = scratch / f"{name}.metal", scratch / f"{name}.air"
        source.write_text(_PRELUDE + sources[name], encoding="utf-8")
        succeed(machine.run, [*_METAL, f"-I{mlx_folder() / 'include'}", "-c", str(source), "-o", str(air)])
        tell(name)
        return str(air)

    with ThreadPoolExecutor(workers) as pool:
        objects = list(pool.map(compiled, sources))
    target = scratch / "pippin.metallib"
    succeed(machine.run, ["xcrun", "-sdk", "macosx", "metallib", *objects, "-o", str(target)])
    return target


def compile_host(machine: Machine, scratch: Path) -> Path:
    """The nanobind module ``metal_host.cpp``, linked against MLX's library."""
    mlx, nanobind = mlx_folder(), package_folder("nanobind")
    folders = [
        mlx / "include",
        mlx / "include" / "metal_cpp",
        nanobind / "include",
        nanobind / "ext" / "robin_map" / "include",
        Path(sysconfig.get_path("include")),
    ]
    objects = []
    for source in (Path(__file__).with_name("metal_host.cpp"), nanobind / "src" / "nb_combined.cpp"):
        objects.append(str(scratch / f"{source.stem}.o"))
        command = [*_CXX, *(f"-I{folder}" for folder in folders), "-c", str(source), "-o", objects[-1]]
        succeed(machine.run, machine.through_ccache(command))
    target = scratch / f"{HOST_MODULE}{sysconfig.get_config_var('EXT_SUFFIX') or '.so'}"
    linked = ["-shared", "-undefined", "dynamic_lookup", f"-L{mlx / 'lib'}", "-lmlx", f"-Wl,-rpath,{mlx / 'lib'}"]
    succeed(
        machine.run, [*_CXX, *objects, *linked, "-framework", "Metal", "-framework", "Foundation", "-o", str(target)]
    )
    return target


def mlx_folder() -> Path:
    """Where MLX's headers and library lie."""
    return package_folder("mlx")


def package_folder(name: str) -> Path:
    """Raises CompileError where the package is not installed."""
    spec = importlib.util.find_spec(name)
    places = list(spec.submodule_search_locations or []) if spec else []
    if not places:
        raise CompileError(f"the package {name} is not installed")
    return Path(places[0])
