"""From a kernel's body to a launch: which source, which constants, how many blocks. Who runs it is a ``Launcher``."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx

_HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Source:
    """A body with the arrays that it names, in order.

    ``macros`` select its variant for the preprocessor; ``headers`` are more bodies that it needs, beside ``common``.
    ``resident`` blocks are to have room on a processor, where we compile: 0 for as many as there happen to be.
    """

    name: str
    body: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    macros: tuple[str, ...] = ()
    headers: tuple[str, ...] = ()
    resident: int = 0

    def header(self, dialect: str) -> str:
        """What stands before the kernel: macros, the dialect, and what the bodies share."""
        known = ("FUSED", "SPLIT", "TILED", "EXPERTS", "GATED", "PACKED", "ASYNC")
        macros = "".join(f"#define {m} {int(m in self.macros)}\n" for m in known)
        more = "".join(_text(f"bodies/{name}.h") for name in self.headers)
        return macros + _text(f"dialects/{dialect}.h") + _text("bodies/common.h") + more

    def text(self, dialect: str) -> str:
        """The kernel's own lines: the dialect's names for where a thread is, then the body."""
        return _text(f"dialects/{dialect}_prologue.h") + _text(f"bodies/{self.body}.h")

    def unique_name(self, dialect: str) -> str:
        """Differs whenever the source does: MLX keeps compiled CUDA kernels on disk by name alone."""
        digest = hashlib.sha256((self.header(dialect) + self.text(dialect)).encode()).hexdigest()
        return f"pippin_{self.name}_{digest[:10]}"


Constants = tuple[tuple[str, int | bool | mx.Dtype], ...]


@dataclass(frozen=True, slots=True)
class Launch:
    """One run of a kernel.

    ``constants`` are known when it is compiled: ints, bools, and dtypes that the body uses as types. ``blocks`` are
    (x, y), each of ``threads`` threads. ``outputs`` are (shape, dtype) in the source's order.
    """

    source: Source
    constants: Constants
    blocks: tuple[int, int]
    threads: int
    outputs: tuple[tuple[tuple[int, ...], mx.Dtype], ...]


Launcher = Callable[[Launch, Sequence[mx.array]], list[mx.array]]


def gpu_launcher(platform: str, stream: mx.Device | None = None) -> Launcher:
    """Runs launches on the GPU through MLX; ``platform`` is metal or cuda. Kernels compile at their first launch.

    ``stream`` is None for MLX's current stream, or the device whose default stream to take.
    """

    def launch(what: Launch, inputs: Sequence[mx.array]) -> list[mx.array]:
        constants = list(what.constants)
        if platform == "metal":
            constants.append(("SMALL", small_inputs(inputs)))
        x, y = what.blocks
        results: list[mx.array] = _gpu_kernel(what.source, platform)(
            inputs=list(inputs),
            template=constants,
            grid=(x * what.threads, y, 1),
            threadgroup=(what.threads, 1, 1),
            output_shapes=[shape for shape, _ in what.outputs],
            output_dtypes=[dtype for _, dtype in what.outputs],
            stream=stream,
        )
        return results

    return launch


def small_inputs(inputs: Sequence[mx.array]) -> int:
    """A bit for each input that Metal puts into the constant address space (under 8 elements).

    The source that MLX generates then differs; as a constant of the kernel, this makes its name differ too, and
    MLX does not compile the same name anew whenever the number of rows changes.
    """
    return sum(1 << i for i, a in enumerate(inputs) if a.size < 8)


@cache
def _gpu_kernel(source: Source, platform: str) -> Callable[..., list[mx.array]]:
    # cuda_kernel raises where MLX has no CUDA, so neither is called before it is needed.
    make: Callable[..., Any] = mx.fast.metal_kernel if platform == "metal" else mx.fast.cuda_kernel
    kernel: Callable[..., list[mx.array]] = make(
        name=source.unique_name(platform),
        input_names=list(source.inputs),
        output_names=list(source.outputs),
        header=source.header(platform),
        source=source.text(platform),
    )
    return kernel


@cache
def _text(path: str) -> str:
    return (_HERE / path).read_text(encoding="utf-8")


# The modules that say how launches are cut.
_CUTTING = ("paged", "latent", "fused", "products", "packing", "select", "drawing", "routed", "grouped")


def dialect_digest(dialect: str) -> str:
    """Of everything that a kernel of this dialect is made of."""
    bodies, dialects = _HERE.glob("bodies/*.h"), _HERE.glob(f"dialects/{dialect}*.h")
    files = sorted((*bodies, *dialects, *(_HERE / f"{name}.py" for name in _CUTTING)))
    return hashlib.sha256(b"\0".join(f.read_bytes() for f in files)).hexdigest()


# Small constant arrays, made once: on a GPU a new array costs a copy. Evaluated ones may be used by any thread.


@lru_cache(maxsize=64)
def params(first: float, second: float, third: float = 0.0) -> mx.array:
    """A few numbers, as the float32 array that bodies call ``params``."""
    return ready(mx.array([first, second, third] + [0.0] * 5, dtype=mx.float32))


@lru_cache
def nothing(dtype: mx.Dtype) -> mx.array:
    """What is passed for an input that is not there."""
    return ready(mx.zeros(8, dtype=dtype))


def ready(array: mx.array) -> mx.array:
    """``array``, evaluated, of at least 8 numbers: Metal puts smaller inputs into another address space."""
    if array.size < 8:
        array = mx.concatenate([array, mx.zeros(8 - array.size, array.dtype)])
    mx.eval(array)
    return array
