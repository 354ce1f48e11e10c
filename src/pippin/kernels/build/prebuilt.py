"""Launches of kernels that were compiled before, or are compiled here and kept; MLX's own JIT where that can't be.

On CUDA a launch looks for its cubin in memory, then in the cache's folder, and is else compiled by NVRTC and put there:
a tenth of the time that MLX's JIT takes. On Metal MLX is told of the functions in the ``.metallib`` of
``pippin kernels build``, and compiles what is not among them.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx

from pippin.kernels.build.nvrtc import CompileError, compile_cubin
from pippin.kernels.build.source import CudaSource, cuda_source
from pippin.kernels.build.store import (
    Key,
    architecture,
    other_builds,
    read_manifest,
    refusal,
    write,
)
from pippin.kernels.launch import Launch, Launcher

log = logging.getLogger(__name__)

Compile = Callable[[str, str, str], bytes]
Recorded = tuple[Launch, Sequence[mx.array]]

_Call = tuple[Launch, dict[str, Any], tuple[int, ...]]
_MOST_CALLS = 4096

HOST_MODULE = "pippin_metal_host"


class Cubins:
    """Compiled CUDA kernels of one ``Key``, in memory and in its folder."""

    def __init__(self, key: Key, compile: Compile = compile_cubin, architecture_name: str | None = None) -> None:
        self._key = key
        self._compile = compile
        self._architecture = architecture_name or architecture()
        self._held: dict[str, bytes] = {}
        self.compiled = 0

    def get(self, source: CudaSource) -> bytes:
        """Raises CompileError where it is not there and can't be made."""
        held = self._held.get(source.name)
        if held is None:
            held = self._held[source.name] = self._read(source) or self._make(source)
        return held

    def prepare(self, launches: Iterable[Recorded], workers: int = 8) -> None:
        """Compiles what is missing for these launches, several at a time. Raises CompileError."""
        sources = {s.name: s for s in (cuda_source(what, inputs) for what, inputs in launches)}
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(self.get, sources.values()))

    def _read(self, source: CudaSource) -> bytes | None:
        try:
            return self._path(source).read_bytes() or None
        except OSError:
            return None

    def _make(self, source: CudaSource) -> bytes:
        cubin = self._compile(source.name, source.text, self._architecture)
        self.compiled += 1
        try:
            write(self._path(source), cubin)
        except OSError as error:
            log.info("compiled kernels are not kept: %s", error)
        return cubin

    def _path(self, source: CudaSource) -> Path:
        return self._key.folder / f"{source.name}.cubin"


class BuiltCuda:
    """A Launcher over ``cubins``; after the first that can't be had, everything goes to ``jit``, with one line."""

    def __init__(self, cubins: Cubins, jit: Launcher, stream: mx.Device | None = None) -> None:
        self._cubins = cubins
        self._jit = jit
        self._stream = stream
        self._calls: dict[int, _Call] = {}
        self.refused: str | None = None

    def __call__(self, what: Launch, inputs: Sequence[mx.array]) -> list[mx.array]:
        if self.refused is None:
            try:
                return self._launch(what, inputs)
            except (CompileError, KeyError, ValueError, RuntimeError) as error:
                self.refuse(str(error))
        return self._jit(what, inputs)

    def prepare(self, launches: Iterable[Recorded]) -> None:
        """Compiles these launches' kernels together, before the first of them runs."""
        try:
            self._cubins.prepare(launches)
        except (CompileError, KeyError) as error:
            self.refuse(str(error))

    def refuse(self, why: str) -> None:
        """From now on MLX compiles."""
        self.refused = why
        log.info("MLX's JIT compiles the kernels, at about a second each: %s", " ".join(why.split()))

    def _launch(self, what: Launch, inputs: Sequence[mx.array]) -> list[mx.array]:
        held = self._calls.get(id(what))
        if held is None:
            held = self._hold(what, inputs)
        _, fixed, shapes = held
        scalars = [size for i in shapes for size in inputs[i].shape]
        results: list[mx.array] = mx.fast.precompiled_cuda_kernel(inputs=inputs, scalars=scalars, **fixed)
        return results

    def _hold(self, what: Launch, inputs: Sequence[mx.array]) -> _Call:
        """A launch comes again in every layer: looking its kernel up by value would take longer than describing it.

        Holding the launch keeps its identity its own. As with MLX's JIT, the first inputs' dtypes are those of all.
        """
        source, (x, y) = cuda_source(what, inputs), what.blocks
        fixed = {
            "name": source.name,
            "compiled_source": self._cubins.get(source),
            "output_shapes": [shape for shape, _ in what.outputs],
            "output_dtypes": [dtype for _, dtype in what.outputs],
            "grid": (x * what.threads, y, 1),
            "threadgroup": (what.threads, 1, 1),
            "ensure_row_contiguous": True,
            "stream": self._stream,
        }
        if len(self._calls) >= _MOST_CALLS:
            self._calls.clear()
        held = self._calls[id(what)] = what, fixed, source.shapes
        return held


def prefer_built(platform: str, jit: Launcher, stream: mx.Device | None = None) -> Launcher:
    """A launcher that takes what was built for this machine, and ``jit`` for the rest; says which in one line."""
    key = Key.here(platform)
    refused = refusal(key)
    if refused is not None:
        log.info("MLX's JIT compiles the kernels: %s", refused)
    elif platform == "cuda":
        return BuiltCuda(Cubins(key), jit, stream)
    else:
        load_metallib(key)
    return jit


def load_metallib(key: Key, load: Callable[[Path], Any] | None = None) -> int:
    """Gives MLX the functions of this key's ``.metallib``; how many. 0 where there is no such build."""
    manifest = read_manifest(key.folder)
    if manifest is None:
        others = other_builds(key)
        reason = "the build here is for " + _differences(key, others[-1]) if others else "none were built ahead of time"
        log.info("kernels compile at their first use: %s (`pippin kernels build` makes them)", reason)
        return 0
    try:
        host = (load or _load_module)(next(key.folder.glob(f"{HOST_MODULE}*.so")))
        names = json.loads((key.folder / "names.json").read_text(encoding="utf-8"))
        host.preload(str(key.folder / "pippin.metallib"), names)
    except (StopIteration, OSError, ValueError, ImportError, RuntimeError) as error:
        log.info("kernels compile at their first use: the build in %s can't be loaded (%s)", key.folder, error)
        return 0
    log.info("%d kernels were built ahead of time", len(names))
    return len(names)


def _differences(key: Key, manifest: dict[str, Any]) -> str:
    labels = {"mlx": "MLX ", "chip": "", "sources": "kernel sources "}
    found = [f"{label}{str(manifest.get(k))[:40]}" for k, label in labels.items() if manifest.get(k) != key.facts()[k]]
    return ", ".join(found)


def _load_module(path: Path) -> Any:
    loader = importlib.machinery.ExtensionFileLoader(HOST_MODULE, str(path))
    spec = importlib.util.spec_from_loader(HOST_MODULE, loader)
    if spec is None:
        raise ImportError(f"{path} is no extension module")
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
