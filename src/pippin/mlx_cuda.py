"""What MLX's CUDA backend has no call for: the CUDA graphs that it queues, and which freed memory it keeps.

MLX puts operations into a CUDA graph, and when that is to run has the driver make a program of it, or write every
node's parameters into one that it keeps: 5 to 13 µs an operation. Whoever has the program launches the same operations
again by one call. So this stands in the way of the one function of MLX's that hands a graph over, for as long as
something is recorded, and reads MLX's own structures where the versions listed here have them. What it reads is
compared with what MLX says of itself before anything is trusted. Everything here is for the thread that evaluates.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, Protocol

import mlx.core as mx

from pippin.linkage import Slot, jump_slot

VERSIONS = ("0.32.4",)

_COMMIT = "_ZN3mlx4core2cu14CommandEncoder11commit_implEv"
_ENCODER_OF = "_ZN3mlx4core2cu19get_command_encoderENS0_6StreamE"
_STREAM_OF = "_ZN3mlx4core14default_streamENS0_6DeviceE"
_ALLOCATOR = "_ZN3mlx4core9allocator9allocatorEv"
_GPU = 1  # of mlx::core::Device::DeviceType
_NO_LIMIT = 1 << 30
_NOT_READY = 600  # CUDA_ERROR_NOT_READY
_MOST_FREED = 1 << 20


class _Encoder(NamedTuple):
    """Where mlx::core::cu::CommandEncoder has what is needed, in bytes from its start."""

    stream: int = 0x08
    graph: int = 0x10
    nodes: int = 0x28
    before: int = 0x30  # std::vectors of nodes: each of ``after`` waits for the one of ``before`` in its place
    after: int = 0x48
    most_nodes: int = 0x1AC
    most_megabytes: int = 0x1B0


class _Allocator(NamedTuple):
    """The same of mlx::core::cu::CudaAllocator."""

    newest: int = 0x80  # freed buffer: links to the one before and after, then to the buffer: address, bytes
    freed: int = 0x90
    active: int = 0xE0


_AT, _OWNS = _Encoder(), _Allocator()


class Graph(Protocol):
    """Operations that can be launched again, over the memory that they had."""

    def launch(self) -> None:
        """Queues them behind all that is queued. Raises CudaError."""
        ...

    def close(self) -> None:
        """Gives the driver's memory back; they must have run."""
        ...


class CudaError(RuntimeError):
    """The driver refused; the message has its number."""


class UnknownMlxError(RuntimeError):
    """MLX's structures aren't what this knows; the message says which number gave it away."""


class _Device(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int), ("index", ctypes.c_int))


class _Stream(ctypes.Structure):
    _fields_ = (("index", ctypes.c_int), ("kind", ctypes.c_int), ("device", ctypes.c_int))


class CudaGraph:
    """Programs of the driver's, one after the other, and the stream that MLX queues on."""

    def __init__(self, driver: ctypes.CDLL, programs: Sequence[int], stream: int) -> None:
        self._driver = driver
        self._programs = [*programs]
        self._stream = stream

    def launch(self) -> None:
        for program in self._programs:
            _told("to launch a recorded step", self._driver.cuGraphLaunch(program, self._stream))

    def close(self) -> None:
        while self._programs:
            self._driver.cuGraphExecDestroy(self._programs.pop())


class MlxCuda:
    """MLX's queue of this thread's stream, and its memory. Raises UnknownMlxError where it can't be read."""

    def __init__(self) -> None:
        if version("mlx") not in VERSIONS or platform.machine() != "x86_64":
            raise UnknownMlxError(f"MLX {version('mlx')} on {platform.machine()} is not known")
        try:
            library = ctypes.CDLL(str(Path(mx.__file__).parent / "lib" / "libmlx.so"))
            self._driver = ctypes.CDLL("libcuda.so.1")
            stream_of, encoder_of, allocator = (library[name] for name in (_STREAM_OF, _ENCODER_OF, _ALLOCATOR))
            self._commit = library[_COMMIT]
            self._declare()
        except (OSError, AttributeError) as error:
            raise UnknownMlxError(str(error)) from None
        stream_of.argtypes, stream_of.restype = [_Device], _Stream
        encoder_of.argtypes, encoder_of.restype = [_Stream], ctypes.c_uint64
        allocator.argtypes, allocator.restype = [], ctypes.c_uint64
        self._commit.argtypes, self._commit.restype = [ctypes.c_uint64], None
        slot = jump_slot(library, _COMMIT)
        if slot is None:
            raise UnknownMlxError("MLX hands its graphs over in another way")
        self._slot: Slot = slot
        mx.synchronize()
        self._encoder: int = encoder_of(stream_of(_Device(_GPU, 0)))
        self._allocator: int = allocator()
        self._check()
        self._stream = _read(self._encoder + _AT.stream)
        told = self._driver.cuStreamQuery(self._stream)
        if told not in (0, _NOT_READY):
            raise UnknownMlxError(f"what should be a stream is none (CUDA error {told})")

    def record(self, run: Callable[[], None]) -> CudaGraph:
        """Runs what evaluates arrays once, waits for it, and keeps the graphs that MLX queued for it.

        Raises CudaError if the driver makes no program of one, once it has run.
        """
        programs: list[int] = []
        refused: list[CudaError] = []

        def commit(encoder: int) -> None:
            try:
                if encoder == self._encoder and _count(encoder + _AT.nodes) and not refused:
                    programs.append(self._program(encoder))
            except CudaError as error:
                refused.append(error)
            finally:
                self._commit(encoder)

        mx.synchronize()
        try:
            with self._unlimited(), self._slot.replaced(ctypes.CFUNCTYPE(None, ctypes.c_uint64)(commit)):
                run()
            mx.synchronize()
            if refused:
                raise refused[0]
        except BaseException:
            CudaGraph(self._driver, programs, self._stream).close()
            raise
        return CudaGraph(self._driver, programs, self._stream)

    def freed(self) -> list[int]:
        """The bytes of each buffer that MLX keeps for its next allocations."""
        sizes: list[int] = []
        holder = _read(self._allocator + _OWNS.newest)
        while holder and len(sizes) < _MOST_FREED:
            sizes.append(_read(_read(holder + 16) + 8))
            holder = _read(holder + 8)
        return sizes

    def _program(self, encoder: int) -> int:
        """Of the graph that is about to run, whose nodes MLX has not put into an order yet."""
        graph, ends = _read(encoder + _AT.graph), [_read(encoder + at + 8) for at in (_AT.before, _AT.after)]
        first, second = (_read(encoder + at) for at in (_AT.before, _AT.after))
        if count := (ends[0] - first) // 8:
            _told("an order of nodes", self._driver.cuGraphAddDependencies(graph, first, second, count))
            for at, start in ((_AT.before, first), (_AT.after, second)):
                ctypes.c_uint64.from_address(encoder + at + 8).value = start  # so that MLX doesn't do it again
        made = ctypes.c_uint64()
        _told("to make a program", self._driver.cuGraphInstantiateWithFlags(ctypes.byref(made), graph, 0))
        return made.value

    @contextmanager
    def _unlimited(self) -> Iterator[None]:
        """While it lasts, all that is evaluated at once is one graph."""
        places = [ctypes.c_int.from_address(self._encoder + at) for at in (_AT.most_nodes, _AT.most_megabytes)]
        before = [place.value for place in places]
        for place in places:
            place.value = _NO_LIMIT
        try:
            yield
        finally:
            for place, value in zip(places, before, strict=True):
                place.value = value

    def _declare(self) -> None:
        one, two = [ctypes.c_uint64], [ctypes.c_uint64] * 2
        driver = self._driver
        driver.cuGraphLaunch.argtypes, driver.cuGraphExecDestroy.argtypes, driver.cuStreamQuery.argtypes = two, one, one
        driver.cuGraphAddDependencies.argtypes = [*two, *two]
        driver.cuGraphInstantiateWithFlags.argtypes = [ctypes.c_void_p, *two]

    def _check(self) -> None:
        """Compares what lies where it should with what is known of it otherwise."""
        most_nodes, most_megabytes = (_count(self._encoder + at) for at in (_AT.most_nodes, _AT.most_megabytes))
        known = {
            "nodes": (_count(self._encoder + _AT.nodes), 0),
            "most nodes": (str(most_nodes), os.environ.get("MLX_MAX_OPS_PER_BUFFER", str(most_nodes))),
            "most megabytes": (str(most_megabytes), os.environ.get("MLX_MAX_MB_PER_BUFFER", str(most_megabytes))),
            "freed bytes": (_read(self._allocator + _OWNS.freed), mx.get_cache_memory()),
            "active bytes": (_read(self._allocator + _OWNS.active), mx.get_active_memory()),
            "nodes in order": (_read(self._encoder + _AT.before), _read(self._encoder + _AT.before + 8)),
        }
        wrong = [f"{name} {found} for {right}" for name, (found, right) in known.items() if found != right]
        if wrong or not 0 < most_nodes < _NO_LIMIT or not 0 < most_megabytes < _NO_LIMIT:
            raise UnknownMlxError("; ".join(wrong) or f"limits of {most_nodes} nodes and {most_megabytes} MB")
        if sum(self.freed()) != mx.get_cache_memory():
            raise UnknownMlxError("freed buffers don't add up")


def _told(what: str, error: int) -> None:
    if error:
        raise CudaError(f"the driver refused {what} (CUDA error {error})")


def _read(address: int) -> int:
    return ctypes.c_uint64.from_address(address).value


def _count(address: int) -> int:
    return ctypes.c_int.from_address(address).value
