"""Many requests at once on whatever serves them without HTTP: the engine's core, or mlx-lm's BatchGenerator."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
import msgspec
from mlx_lm.generate import BatchGenerator

from pippin.bench.child import Ask, Child
from pippin.bench.machine import process_peak_bytes
from pippin.bench.mlx_lm import load
from pippin.config import EngineConfig
from pippin.core import EngineCore
from pippin.errors import EngineError
from pippin.loading import load_core
from pippin.messages import Submit
from pippin.types import SamplingParams, Token

Requests = Sequence[tuple[Sequence[Token], int]]
"""Prompts, and how many tokens each is answered with."""
Done = Callable[[], None]


class Served(msgspec.Struct, frozen=True):
    """How a set of requests was served.

    Seconds until the last token; tokens written; prompt tokens that were cached (None where nothing caches); peak bytes
    of the device's allocator in this run (None where nobody counts), and of the process since its start.
    """

    seconds: float
    output_tokens: int
    cached_tokens: int | None
    device_peak_bytes: int | None
    process_peak_bytes: int


class OfflineSide(Protocol):
    """Someone who serves requests."""

    @property
    def name(self) -> str: ...

    def serve(self, requests: Requests, done: Done) -> Served:
        """Answers all, greedily and to their full lengths, with nothing cached before; ``done`` after each."""
        ...


class CoreSide:
    """The engine's core: its scheduler, its prefix cache, its runner. ``counted``: whether MLX's allocator counts."""

    def __init__(self, name: str, core: EngineCore, *, counted: bool = True) -> None:
        self.name = name
        self._core = core
        self._counted = counted
        self._ids = 0

    def serve(self, requests: Requests, done: Done) -> Served:
        """Raises EngineError if a request fails, RequestError if one can't be served."""
        core = self._core
        core.flush()
        before = core.stats.cached_tokens
        mx.reset_peak_memory()
        began = time.perf_counter()
        for prompt, output_len in requests:
            self._ids += 1
            params = SamplingParams(temperature=0.0, max_new_tokens=output_len, ignore_eos=True)
            core.add(Submit(f"bench-{self._ids}", list(prompt), len(prompt), params))
        tokens = self._run(done)
        seconds = time.perf_counter() - began
        peak = int(mx.get_peak_memory()) if self._counted else None
        return Served(seconds, tokens, core.stats.cached_tokens - before, peak, process_peak_bytes())

    def _run(self, done: Done) -> int:
        """Steps until nothing is left; how many tokens came."""
        tokens = 0
        while self._core.has_work:
            step = self._core.step()
            for output in step.outputs if step else ():
                tokens += len(output.tokens)
                if output.finish is not None:
                    if output.finish.reason != "length":
                        raise EngineError(f"a request ended by {output.finish.reason}: {output.finish.message}")
                    done()
        return tokens


class MlxLmSide:
    """mlx-lm's BatchGenerator, with so many rows as ours has, and its own defaults otherwise."""

    name = "mlx-lm"

    def __init__(self, model: nn.Module, rows: int) -> None:
        self._model = model
        self._rows = rows

    def serve(self, requests: Requests, done: Done) -> Served:
        mx.clear_cache()
        mx.reset_peak_memory()
        began = time.perf_counter()
        batch = BatchGenerator(self._model, completion_batch_size=self._rows)
        batch.insert([list(prompt) for prompt, _ in requests], max_tokens=[n for _, n in requests])
        tokens, left = 0, len(requests)
        while left:
            for response in batch.next()[1]:
                tokens += 1
                if response.finish_reason is not None:
                    left -= 1
                    done()
        seconds = time.perf_counter() - began
        batch.close()
        return Served(seconds, tokens, None, int(mx.get_peak_memory()), process_peak_bytes())


@dataclass(frozen=True, slots=True)
class ChildSide:
    """An OfflineSide in a process of its own; it says nothing until all are done."""

    name: str
    child: Child

    def serve(self, requests: Requests, done: Done) -> Served:
        served = self.child.ask(requests, Served)
        for _ in requests:
            done()
        return served


@contextmanager
def peer_side(name: str, config: EngineConfig) -> Iterator[OfflineSide]:
    """Starts ``mlx-lm``, whose rows are ``config.max_running_requests``, or our scheduler over ``torch``'s model."""
    opener = open_torch if name == "torch" else open_mlx_lm
    with Child(name, f"{__name__}:{opener.__name__}", config) as child:
        yield ChildSide(name, child)


def open_torch(config: EngineConfig) -> Ask:
    """In the child."""
    side = CoreSide("torch", load_core(config), counted=False)
    return lambda requests: side.serve(requests, lambda: None)


def open_mlx_lm(config: EngineConfig) -> Ask:
    """In the child."""
    side = MlxLmSide(load(config), config.max_running_requests or 32)
    return lambda requests: side.serve(requests, lambda: None)
