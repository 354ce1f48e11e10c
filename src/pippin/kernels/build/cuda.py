"""CUDA kernels ahead of time: a cubin each, by NVRTC, or by nvcc where that is what there is."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pippin.kernels.build import nvrtc, toolchain
from pippin.kernels.build.prebuilt import Recorded
from pippin.kernels.build.source import CudaSource, cuda_source
from pippin.kernels.build.store import Key, write, write_manifest
from pippin.kernels.build.toolchain import Machine

Tell = Callable[[str], None]


def build_cuda(
    key: Key, launches: Sequence[Recorded], architecture: str, machine: Machine, tell: Tell, workers: int = 8
) -> tuple[int, int]:
    """Compiles what is not there yet into ``key``'s folder: (kernels, compiled now).

    Raises ToolchainError, CompileError or OSError.
    """
    toolchain.demand(toolchain.cuda_missing(machine))
    by_nvrtc = nvrtc.find_library() is not None and nvrtc.find_headers() is not None
    compiler = f"NVRTC {nvrtc.nvrtc_version()}" if by_nvrtc else "nvcc"
    sources = {s.name: s for s in (cuda_source(what, inputs) for what, inputs in launches)}
    todo = [s for s in sources.values() if not (key.folder / f"{s.name}.cubin").exists()]
    with tempfile.TemporaryDirectory() as scratch:

        def compiled(source: CudaSource) -> None:
            if by_nvrtc:
                cubin = nvrtc.compile_cubin(source.name, source.text, architecture)
            else:
                cubin = toolchain.nvcc_cubin(machine, source.name, source.text, architecture, Path(scratch))
            write(key.folder / f"{source.name}.cubin", cubin)
            tell(source.name)

        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(compiled, todo))
    write_manifest(key, {"compiler": compiler, "architecture": architecture, "kernels": sorted(sources)})
    return len(sources), len(todo)
