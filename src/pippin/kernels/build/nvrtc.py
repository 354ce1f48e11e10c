"""NVIDIA's run-time compiler, called directly: MLX's CUDA build brings the library, so no toolkit is needed."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from functools import cache
from pathlib import Path

from pippin.errors import PippinError

_LIBRARIES = ("libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12")
_HEADER = "cuda_fp16.h"


class CompileError(PippinError):
    """A kernel that a compiler refuses, or a compiler that is not there; the message has its words."""


def compile_cubin(name: str, text: str, architecture: str) -> bytes:
    """The cubin of CUDA source for ``architecture``, such as sm_90. Raises CompileError."""
    library, folder = find_library(), find_headers()
    if library is None:
        raise CompileError("NVRTC is not installed: `pip install nvidia-cuda-nvrtc`, which mlx[cuda13] does")
    if folder is None:
        raise CompileError(f"CUDA's headers ({_HEADER}) are not installed: `pip install nvidia-cuda-runtime`")
    program = ctypes.c_void_p()
    _check(
        library,
        library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), f"{name}.cu".encode(), 0, None, None),
    )
    try:
        options = [f"--gpu-architecture={architecture}", f"--include-path={folder}", "--std=c++17"]
        given = (ctypes.c_char_p * len(options))(*[o.encode() for o in options])
        if library.nvrtcCompileProgram(program, len(options), given):
            raise CompileError(f"NVRTC refuses {name}: {_read(library, program, 'Program', 'Log').decode()[:2000]}")
        return _read(library, program, "", "CUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def nvrtc_version() -> str | None:
    """Such as ``13.0``; None where there is no NVRTC."""
    library = find_library()
    if library is None:
        return None
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(library, library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return f"{major.value}.{minor.value}"


@cache
def find_library() -> ctypes.CDLL | None:
    """NVRTC: the one that MLX has loaded, one beside NVIDIA's Python packages, or the system's."""
    for name in (
        *_LIBRARIES[1:],
        *_packaged("lib", "libnvrtc.so.*"),
        *_in_toolkit("lib64", "libnvrtc.so*"),
        *_LIBRARIES,
    ):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


@cache
def find_headers() -> Path | None:
    """The folder with CUDA's headers: of NVIDIA's Python packages, CUDA_HOME, CUDA_PATH or /usr/local/cuda."""
    found = [*_packaged("include", _HEADER), *_in_toolkit("include", _HEADER)]
    return Path(found[0]).parent if found else None


def _packaged(folder: str, pattern: str) -> list[str]:
    """Files of the packages nvidia-*, which share the folder ``nvidia``."""
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(place) for place in (spec.submodule_search_locations if spec else None) or []]
    return sorted(str(path) for root in roots for path in root.glob(f"*/{folder}/{pattern}"))


def _in_toolkit(folder: str, pattern: str) -> list[str]:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return [str(path) for home in homes if home for path in sorted((Path(home) / folder).glob(pattern))]


def _read(library: ctypes.CDLL, program: ctypes.c_void_p, prefix: str, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(library, library[f"nvrtcGet{prefix}{what}Size"](program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(library, library[f"nvrtcGet{prefix}{what}"](program, buffer))
    return buffer.raw


def _check(library: ctypes.CDLL, result: int) -> None:
    if result:
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise CompileError(f"NVRTC: {library.nvrtcGetErrorString(result).decode()}")
