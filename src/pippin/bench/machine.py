"""What the figures of a batch are held against: the memory's bandwidth, and how much memory was taken."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from pippin.bench.child import Ask, Child
from pippin.cache.layout import CacheLayout
from pippin.config import EngineConfig
from pippin.memory import on_gpu, use_device

_COPIES = 8


def copy_bandwidth(gpu_bytes: int = 1 << 30, cpu_bytes: int = 1 << 28) -> float:
    """Bytes read and written a second, by the best of a few copies of an array of so many bytes.

    On a GPU MLX adds one to each number, which costs no more than copying does; on a CPU every core copies a part,
    since MLX's own elementwise operations run on one.
    """
    return _best(_gpu_copy(gpu_bytes), gpu_bytes) if on_gpu() else _best(_cpu_copy(cpu_bytes), cpu_bytes)


def open_bandwidth(config: EngineConfig) -> Ask:
    """For a process of its own: the arrays would count among the peaks of whoever measures."""
    use_device(config.device)
    return lambda _: copy_bandwidth()


def _best(copy: Callable[[], None], size: int) -> float:
    seconds = []
    for _ in range(_COPIES):
        began = time.perf_counter()
        copy()
        seconds.append(time.perf_counter() - began)
    return 2 * size / min(seconds)


def _gpu_copy(size: int) -> Callable[[], None]:
    source = mx.zeros((size // 4,), mx.uint32)
    mx.eval(source)
    return lambda: mx.eval(source + 1)


def _cpu_copy(size: int) -> Callable[[], None]:
    cores = os.cpu_count() or 1
    source, target = (np.array_split(np.ones(size // 8), cores) for _ in range(2))
    pool = ThreadPoolExecutor(cores)

    def copy() -> None:
        for _ in pool.map(np.copyto, target, source):
            pass

    return copy


def measured_bandwidth(config: EngineConfig) -> float:
    """``copy_bandwidth`` of the device that MLX would use, measured in another process."""
    with Child("the bandwidth's measurement", f"{__name__}:{open_bandwidth.__name__}", config) as child:
        return child.ask(None, float)


def weight_bytes_read(model: nn.Module, vocab_size: int) -> int | None:
    """Bytes of weights that a decode step must read; None where that depends on the tokens (experts are chosen).

    All but an input embedding that is not the head as well: of that, a step reads a row a token.
    """
    total, tables = 0, []
    for name, module in model.named_modules():
        if any(cls.__module__.endswith("switch_layers") for cls in type(module).__mro__):
            return None
        weight = module.get("weight")
        if isinstance(weight, mx.array) and weight.ndim == 2 and weight.shape[0] >= vocab_size:
            tables.append((name, isinstance(module, nn.Embedding), _bytes(module)))
    total = _bytes(model)
    if len(tables) > 1:
        total -= sum(size for _, embeds, size in tables if embeds)
    return total


def context_bytes(layout: CacheLayout, length: float) -> float:
    """Bytes of K, V and states that a token behind ``length`` others reads; a layer with a window reads that much."""
    layers = [s for s in layout.shapes if s]
    return layout.state_bytes + sum(s.bytes_per_slot * min(length, s.window or length) for s in layers)


def _bytes(module: nn.Module) -> int:
    return sum(int(v.nbytes) for _, v in tree_flatten(module.parameters()))


def process_peak_bytes() -> int:
    """The most memory that this process has had at any time, as the system counts it."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
