"""Host arrays on their way to a GPU that has memory of its own."""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Callable, Sequence
from itertools import pairwise

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from pippin import kernels

log = logging.getLogger(__name__)

LINES = 64
LINE_WORDS = 1 << 14

_PREFERRED_LOCATION, _ACCESSED_BY, _HOST = 3, 5, -1  # of cuMemAdvise

_of_thread = threading.local()


class Lines:
    """Lines of 4-byte words that the host writes and a GPU reads where they are, one after the other.

    ``memory`` uint32 [lines, words] is used by nobody else; ``host`` is what the host sees of it. Whoever comes to a
    line again waits for the step that was to read it.
    """

    def __init__(self, memory: mx.array) -> None:
        self._memory = memory.reshape(-1)
        mx.eval(self._memory)
        self._words = memory.shape[1]
        self.host = np.array(self._memory, copy=False).reshape(memory.shape)
        self._sent: list[mx.array | None] = [None] * len(memory)
        self._next = 0

    def takes(self, values: npt.NDArray[np.generic]) -> bool:
        return values.itemsize == 4 and 0 < values.size <= self._words

    def send(self, values: npt.NDArray[np.generic]) -> mx.array:
        """Lazy: a copy of what ``takes`` took, of the same shape and dtype."""
        line, self._next = self._next, (self._next + 1) % len(self._sent)
        before = self._sent[line]
        if before is not None:
            mx.eval(before)
        self.host[line, : values.size] = values.reshape(-1).view(np.uint32)
        begin = line * self._words
        given = self._memory[begin : begin + values.size]
        sent = self._sent[line] = mx.maximum(given, given)
        return sent.view(mx.array(values[:0]).dtype).reshape(values.shape)


def upload(values: npt.NDArray[np.generic]) -> mx.array:
    """Lazy: an array of what the host has laid out, of the same shape and dtype.

    On CUDA MLX puts such an array where both sides can reach it: whoever reads what the other wrote waits for a page
    fault. On an H200 the first kernel waits 60 µs for an input of one row and 220 for one of 128, each that reads it
    later is slower too (6.8 µs in place of 1.8 for a layer's rotation), and the host waits 80 µs to write the next. So
    it is written into memory that stays on the host, and copied from there into the GPU's own.
    """
    if kernels.backend() != "cuda" or not values.size:
        return mx.array(values)
    lines = _lines()
    if lines is not None and lines.takes(values):
        return lines.send(values)
    given = mx.array(values)
    # Not `given + 0`: that would let the sum have the array's own memory.
    return mx.maximum(given, given)


def upload_together(values: Sequence[npt.NDArray[np.generic]]) -> list[mx.array]:
    """The same for several arrays of numbers of 4 bytes each, by one copy for all of them."""
    if kernels.backend() != "cuda":
        return [mx.array(v) for v in values]
    sent = upload(np.concatenate([v.reshape(-1).view(np.uint32) for v in values]))
    ends = np.cumsum([0, *(v.size for v in values)]).tolist()
    kinds = [mx.array(v[:0]).dtype for v in values]
    parts = zip(values, kinds, pairwise(ends), strict=True)
    return [sent[first:end].view(kind).reshape(v.shape) for v, kind, (first, end) in parts]


def _lines() -> Lines | None:
    """This thread's, None where the driver can't keep them on the host."""
    if "lines" not in _of_thread.__dict__:
        lines = Lines(mx.array(np.zeros((LINES, LINE_WORDS), np.uint32)))
        _of_thread.lines = lines if keep_with_host(lines.host) else None
    found: Lines | None = _of_thread.lines
    return found


def keep_with_host(memory: npt.NDArray[np.generic], open_library: Callable[[str], ctypes.CDLL] = ctypes.CDLL) -> bool:
    """Tells CUDA's driver that managed ``memory`` stays with the host and is read there by the GPU; whether it will be.

    MLX's host memory is managed there: without it pages go to whoever touches them.
    """
    device = ctypes.c_int()
    try:
        driver = open_library("libcuda.so.1")
        told = driver.cuCtxGetDevice(ctypes.byref(device))
        advise, start = driver.cuMemAdvise, memory.ctypes.data
        advise.argtypes = [ctypes.c_uint64, ctypes.c_size_t, ctypes.c_int, ctypes.c_int]
        for advice, whom in ((_PREFERRED_LOCATION, _HOST), (_ACCESSED_BY, device.value)):
            told = told or advise(start, memory.nbytes, advice, whom)
    except (OSError, AttributeError) as error:
        told = error
    if told:
        log.info("pages that the host fills for the GPU may move between them, which is only slower (%s)", told)
    return not told
