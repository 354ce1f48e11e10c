"""What the device's own profiler takes beside the timeline: Metal captures to a file, NVTX ranges on CUDA."""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from pippin.errors import RequestError
from pippin.profile.files import Stage, capture_path, trace_path

log = logging.getLogger(__name__)

CAPTURE_VARIABLE = "MTL_CAPTURE_ENABLED"
INJECTION_VARIABLE = "NVTX_INJECTION64_PATH"
"""Set by NVIDIA's profilers for what they start."""


class Metal(Protocol):
    """``mlx.core.metal``, as far as captures need it."""

    def is_available(self) -> bool: ...

    def start_capture(self, path: str) -> None: ...

    def stop_capture(self) -> None: ...


class Ranges(Protocol):
    """Named ranges that a profiler attached to this process shows, nested as they are opened."""

    def push(self, label: str) -> None: ...

    def pop(self) -> None: ...


class Tracer(Protocol):
    """Told of each recorded step, in the engine's thread. ``alone``: steps must not overlap while it runs."""

    @property
    def alone(self) -> bool: ...

    def launching(self, stage: Stage, label: str) -> None:
        """A step is about to be built."""

    def launched(self) -> None:
        """It is queued, or failed to be."""

    def close(self) -> list[Path]:
        """No more steps; the files that are complete now."""


class MetalCapture:
    """Steps to a ``.gputrace`` for Xcode, named after the timeline's file; with stages apart, one for each.

    A stage's capture ends where a step of the other one comes, since whatever the GPU runs meanwhile is in it.
    """

    alone = True

    def __init__(self, metal: Metal, stem: str, by_stage: bool) -> None:
        self._metal, self._stem, self._by_stage = metal, stem, by_stage
        self._running: Path | None = None
        self._files: list[Path] = []

    def launching(self, stage: Stage, label: str) -> None:
        path = capture_path(trace_path(self._stem, stage if self._by_stage else None))
        if self._running not in (None, path):
            self._stop()
        if self._running is None and path not in self._files:
            self._metal.start_capture(str(path))
            self._running = path

    def launched(self) -> None:
        """The step runs on; its capture goes on until the next one's stage is known."""

    def _stop(self) -> None:
        if self._running is not None:
            path, self._running = self._running, None
            self._metal.stop_capture()
            self._files.append(path)

    def close(self) -> list[Path]:
        self._stop()
        return self._files


class StepRanges:
    """A range for each step, from before it is built until it is queued; Nsight joins the kernels launched in it."""

    alone = False

    def __init__(self, ranges: Ranges) -> None:
        self._ranges = ranges

    def launching(self, stage: Stage, label: str) -> None:
        self._ranges.push(f"{stage}: {label}")

    def launched(self) -> None:
        self._ranges.pop()

    def close(self) -> list[Path]:
        return []


def check_metal(metal: Metal, environ: Mapping[str, str] = os.environ) -> None:
    """Raises RequestError where Metal can't capture, with what to do about it."""
    if not metal.is_available():
        raise RequestError(
            "GPU captures need Metal, and this is no Mac with Apple silicon; leave GPU out for the timeline",
            "activities",
        )
    if environ.get(CAPTURE_VARIABLE) != "1":
        raise RequestError(
            f"Metal captures only if the engine was started with {CAPTURE_VARIABLE}=1 in its environment: start it "
            f"again as `{CAPTURE_VARIABLE}=1 pippin serve …`, or leave GPU out for the timeline",
            "activities",
        )


def open_tracer(
    gpu: bool | None,
    stem: str,
    by_stage: bool,
    *,
    metal: Metal,
    cuda: bool,
    environ: Mapping[str, str] = os.environ,
    find_ranges: Callable[[], Ranges | None] | None = None,
) -> Tracer | None:
    """What ``gpu`` asks for on this device: True wants it and raises RequestError, None takes what can be had."""
    if gpu is False:
        return None
    if cuda:  # without a profiler there, the timeline is what there is
        wanted = gpu or INJECTION_VARIABLE in environ
        ranges = (find_ranges or nvtx_ranges)() if wanted else None
        return StepRanges(ranges) if ranges is not None else None
    try:
        check_metal(metal, environ)
    except RequestError as error:
        if gpu:
            raise
        log.warning("no GPU capture beside the timeline: %s", error.message)
        return None
    # SGLang's activities are CPU and GPU where none are named, and who sets the variable wants captures.
    return MetalCapture(metal, stem, by_stage)


# --- NVTX ---


class NvtxPackage(Protocol):
    """The package ``nvtx``."""

    def push_range(self, message: str) -> object: ...

    def pop_range(self) -> object: ...


class PackageRanges:
    def __init__(self, nvtx: NvtxPackage) -> None:
        self._nvtx = nvtx

    def push(self, label: str) -> None:
        self._nvtx.push_range(label)

    def pop(self) -> None:
        self._nvtx.pop_range()


class LibraryRanges:
    """CUDA's own library: ``libnvToolsExt``, or since CUDA 12.9 ``libnvtx3interop``."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._push, self._pop = library.nvtxRangePushA, library.nvtxRangePop
        self._push.argtypes, self._pop.argtypes = [ctypes.c_char_p], []

    def push(self, label: str) -> None:
        self._push(label.encode())

    def pop(self) -> None:
        self._pop()


def nvtx_ranges(
    load: Callable[[str], NvtxPackage] = importlib.import_module,
    open_library: Callable[[str], ctypes.CDLL] = ctypes.CDLL,
) -> Ranges | None:
    """NVTX by the package ``nvtx`` if it is installed, else by CUDA's library, else None."""
    try:
        return PackageRanges(load("nvtx"))
    except ImportError:
        pass
    for name in ("libnvToolsExt.so.1", "libnvToolsExt.so", "libnvtx3interop.so.1", "libnvtx3interop.so"):
        try:
            return LibraryRanges(open_library(name))
        except (OSError, AttributeError):
            continue
    return None
