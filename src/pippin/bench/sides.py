"""Who is measured: our runner in this process, and peers in processes of their own, all asked alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import msgspec

from pippin.bench.child import Ask, Child
from pippin.bench.machine import process_peak_bytes
from pippin.bench.runner import BenchRunner, EngineRunner, Prompts, Timing, timed
from pippin.config import EngineConfig
from pippin.runner import ModelRunner
from pippin.types import ModelInfo, Progress

PEER = "pippin.bench.sides:open_"


class Measured(msgspec.Struct, frozen=True):
    """A run's times and answers; peaks in bytes: of MLX's allocator in this run, of the process since its start."""

    timing: Timing
    device_peak_bytes: int | None
    process_peak_bytes: int


class Side(Protocol):
    """Someone who can be given a batch."""

    name: str

    def run(self, prompts: Prompts, output_len: int) -> Measured: ...


class LocalSide:
    """A BenchRunner in this process."""

    def __init__(self, name: str, runner: BenchRunner) -> None:
        self.name = name
        self.runner = runner

    def run(self, prompts: Prompts, output_len: int) -> Measured:
        mx.reset_peak_memory()
        timing = timed(self.runner, prompts, output_len)
        return Measured(timing, mx.get_peak_memory(), process_peak_bytes())


class ChildSide:
    """A BenchRunner in a process of its own."""

    def __init__(self, name: str, child: Child) -> None:
        self.name = name
        self._child = child

    def run(self, prompts: Prompts, output_len: int) -> Measured:
        return self._child.ask((prompts, output_len), Measured)


@contextmanager
def peer(name: str, config: EngineConfig) -> Iterator[Side]:
    """Starts ``mlx-lm`` or ``torch`` with the same model, and ends it afterwards."""
    with Child(name, PEER + name.replace("-", "_"), config) as child:
        yield ChildSide(name, child)


@dataclass(frozen=True, slots=True)
class Ours:
    """The runner that serves, what it says of itself, and how it is asked."""

    side: LocalSide
    runner: ModelRunner
    info: ModelInfo


def open_ours(config: EngineConfig, progress: Callable[[Progress], None]) -> Ours:
    """Loads the runner that serves with this configuration."""
    from pippin.core import load_runner

    runner, info = load_runner(config, progress)
    side = LocalSide("pippin", EngineRunner(runner, info, overlap=not config.disable_overlap_schedule))
    return Ours(side, runner, info)


# --- in a child ---


def open_mlx_lm(config: EngineConfig) -> Ask:
    """mlx-lm's own generators."""
    from pippin.bench.mlx_lm import MlxLmRunner, load

    return _asking(LocalSide("mlx-lm", MlxLmRunner(load(config))))


def _asking(side: LocalSide) -> Ask:
    def answer(question: tuple[list[list[int]], int]) -> Measured:
        prompts, output_len = question
        return side.run(prompts, output_len)

    return answer
