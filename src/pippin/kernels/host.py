"""Runs kernels on the CPU, thread by thread: how they are checked where there is no GPU. Needs g++; not for serving.

Every thread of a block is a fiber; ``schedule`` says in which order they go on between barriers (0 in order, 1 in
reverse, others at random), so that a missing barrier gives a wrong result in one of them.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from pippin.errors import PippinError
from pippin.kernels.launch import Launch, Launcher

_TYPES = {
    mx.float32: "float",
    mx.float16: "pippin::half",
    mx.bfloat16: "pippin::bfloat",
    mx.int32: "int",
    mx.uint32: "unsigned",
    mx.uint8: "unsigned char",
}
FOLDER_VARIABLE = "PIPPIN_HOST_KERNELS"
_FLAGS = ("-std=c++14", "-O1", "-shared", "-fPIC", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE")


class KernelFault(PippinError):
    """A kernel that does not compile on the host, or that breaks the rules of barriers and shuffles."""


def compiler() -> str | None:
    """Path of g++, or None."""
    return shutil.which("g++")


def libraries() -> Path:
    """Where compiled kernels are kept; processes may share it, since each library appears there whole."""
    given = os.environ.get(FOLDER_VARIABLE)
    return Path(given) if given else Path(tempfile.gettempdir()) / f"pippin-host-kernels-{os.getuid()}"


def host_launcher(schedule: int = 0, seed: int = 0, edit: Callable[[str], str] | None = None) -> Launcher:
    """A launcher that runs kernels here; writes through input pointers land in the arrays that were passed.

    ``edit`` changes a kernel's lines, and its header, before they are compiled: for tests that plant a fault.
    """

    def launch(what: Launch, inputs: Sequence[mx.array]) -> list[mx.array]:
        mx.eval(*inputs)
        outputs = [_garbage(shape, dtype) for shape, dtype in what.outputs]
        buffers = [_view(a) for a in (*inputs, *outputs)]
        shapes = [np.array(a.shape, np.int32) for a in inputs]
        pointers = [b.ctypes.data for b in buffers] + [s.ctypes.data for s in shapes]
        run = _library(host_source(what, inputs, edit)).run
        fault = run(*what.blocks, what.threads, schedule, seed, (ctypes.c_void_p * len(pointers))(*pointers))
        if fault:
            raise KernelFault(f"{what.source.name}: {fault.decode()}")
        return outputs

    return launch


def host_source(what: Launch, inputs: Sequence[mx.array], edit: Callable[[str], str] | None = None) -> str:
    """The C++ that runs a launch here."""
    source = what.source
    constants = "".join(f"  {_constant(name, value)}\n" for name, value in what.constants)
    dtypes = [a.dtype for a in inputs] + [dtype for _, dtype in what.outputs]
    arrays = "".join(
        f"  {'const ' * (i < len(inputs))}{_TYPES[dtype]}* {name} = ({_TYPES[dtype]}*)pippin::arguments[{i}];\n"
        for i, (name, dtype) in enumerate(zip((*source.inputs, *source.outputs), dtypes, strict=True))
    )
    header, text = source.header("host"), source.text("host")
    if edit:
        header, text = edit(header), edit(text)
    shapes = "".join(
        f"  const int* {name}_shape = (int*)pippin::arguments[{len(dtypes) + i}];\n"
        for i, name in enumerate(source.inputs)
        if f"{name}_shape" in text
    )
    ignore = "".join(f"  (void){name};\n" for name in (*source.inputs, *source.outputs))
    return (
        f"{header}\nstatic void kernel_body() {{\n{constants}{arrays}{shapes}{ignore}{text}}}\n"
        "static bool bound = (pippin::body = kernel_body, true);\n"
    )


def _constant(name: str, value: int | bool | mx.Dtype) -> str:
    if isinstance(value, mx.Dtype):
        return f"using {name} = {_TYPES[value]};"
    if isinstance(value, bool):
        return f"constexpr bool {name} = {str(value).lower()}; (void){name};"
    return f"constexpr int {name} = {value}; (void){name};"


def _garbage(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """An output as a GPU allocates it: not cleared. NaN, or a large number, so that what is not written shows."""
    large = {mx.int32: 0x7F7F7F7F, mx.uint32: 0x7F7F7F7F, mx.uint8: 0x7F}
    array = mx.full(shape, large.get(dtype, float("nan")), dtype=dtype)
    mx.eval(array)
    return array


def _view(array: mx.array) -> npt.NDArray[np.uint8]:
    """The array's own bytes, shared with it."""
    if array.size == 0:
        return np.zeros(16, np.uint8)
    return np.asarray(array.reshape(-1).view(mx.uint8))


@cache
def _library(source: str) -> ctypes.CDLL:
    """Compiles once per source and user; raises KernelFault with the compiler's words."""
    gxx = compiler()
    if gxx is None:
        raise KernelFault("running a kernel on the host needs g++, which is not installed")
    folder = libraries()
    folder.mkdir(mode=0o700, exist_ok=True)
    target = folder / f"{hashlib.sha256(' '.join((*_FLAGS, source)).encode()).hexdigest()[:24]}.so"
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}")
        command = [gxx, *_FLAGS, "-x", "c++", "-", "-o", str(partial)]
        done = subprocess.run(command, input=source, text=True, capture_output=True, check=False)
        if done.returncode != 0:
            raise KernelFault(f"g++: {done.stderr[:4000]}")
        partial.rename(target)
    library = ctypes.CDLL(str(target))
    library.run.restype = ctypes.c_char_p
    ints = [ctypes.c_int] * 4
    library.run.argtypes = [*ints, ctypes.c_uint64, ctypes.POINTER(ctypes.c_void_p)]
    return library
