"""Who is measured: our runner in this process, and peers in processes of their own, all asked alike."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import mlx.core as mx
import msgspec

from pippin.bench.child import Ask, Child
from pippin.bench.machine import process_peak_bytes
from pippin.bench.runner import BenchRunner, EngineRunner, Prompts, Timing, timed
from pippin.config import EngineConfig
from pippin.flight import ModelRunner
from pippin.loading import PAGE, load_runner
from pippin.messages import ModelInfo, Progress

T = TypeVar("T")


class Measured(msgspec.Struct, frozen=True):
    """A run's times and answers; peaks in bytes: of the device's allocator in this run, of the process since its start.

    ``device_peak_bytes`` is None where nobody counts.
    """

    timing: Timing
    device_peak_bytes: int | None
    process_peak_bytes: int


class Side(Protocol):
    """Someone who can be given a batch."""

    @property
    def name(self) -> str: ...

    def run(self, prompts: Prompts, output_len: int) -> Measured:
        """Greedy answers of ``output_len`` tokens each to a batch of prompts."""
        ...


class Meter(Protocol):
    """Counts what a device's allocator hands out."""

    def reset(self) -> None: ...

    def peak_bytes(self) -> int | None:
        """The most at any time since ``reset``; None if nobody counts."""
        ...


class MlxMeter:
    """MLX's allocator."""

    def reset(self) -> None:
        mx.reset_peak_memory()

    def peak_bytes(self) -> int | None:
        return int(mx.get_peak_memory())


class NoMeter:
    """For what keeps no count, as PyTorch on a CPU."""

    def reset(self) -> None:
        pass

    def peak_bytes(self) -> None:
        return None


@dataclass(frozen=True, slots=True)
class LocalSide:
    """A BenchRunner in this process."""

    name: str
    runner: BenchRunner
    meter: Meter

    def run(self, prompts: Prompts, output_len: int) -> Measured:
        self.meter.reset()
        timing = timed(self.runner, prompts, output_len)
        return Measured(timing, self.meter.peak_bytes(), process_peak_bytes())


@dataclass(frozen=True, slots=True)
class ChildSide:
    """A BenchRunner in a process of its own."""

    name: str
    child: Child

    def run(self, prompts: Prompts, output_len: int) -> Measured:
        return self.child.ask((prompts, output_len), Measured)


@dataclass(frozen=True, slots=True)
class Ours:
    """The runner that serves, what it says of itself, and how it is asked."""

    side: LocalSide
    engine: EngineRunner
    runner: ModelRunner
    info: ModelInfo


def in_turn(sides: Sequence[T], turn: int) -> list[T]:
    """Everyone's order in a round: they take turns in beginning."""
    first = turn % len(sides)
    return [*sides[first:], *sides[:first]]


def with_room(config: EngineConfig, batches: Sequence[Sequence[int]]) -> EngineConfig:
    """With slots and rows for the largest of ``batches``, lists of lengths, where none are asked for.

    And no more: peers need memory too.
    """
    page = config.with_pages(PAGE).page_size
    slots = max(sum(-(-length // page) * page for length in batch) for batch in batches)
    return dataclasses.replace(
        config,
        max_total_tokens=config.max_total_tokens or max(16, slots),
        max_running_requests=config.max_running_requests or max(map(len, batches)),
    )


def open_ours(config: EngineConfig, progress: Callable[[Progress], None]) -> Ours:
    """Loads the runner that serves with this configuration; ``--device torch`` is PyTorch's.

    No scheduler lets go of slots behind windows here: all layers have as many.
    """
    runner, info = load_runner(dataclasses.replace(config, disable_hybrid_swa_memory=True), progress)
    torch = config.device.startswith("torch")
    overlap = not config.disable_overlap_schedule and not torch
    engine = EngineRunner(runner, info, overlap=overlap)
    side = LocalSide("torch", engine, NoMeter()) if torch else LocalSide("pippin", engine, MlxMeter())
    return Ours(side, engine, runner, info)


@contextmanager
def peer(name: str, config: EngineConfig, info: ModelInfo) -> Iterator[Side]:
    """Starts ``mlx-lm`` or ``torch`` with the same model on the same device as ours, and ends it afterwards.

    Raises what loading it there raises.
    """
    on = torch_device if name == "torch" else mlx_device
    config = dataclasses.replace(config, dtype=info.dtype, device=on(info.device))
    with Child(name, f"{__name__}:{OPENERS[name]}", config) as child:
        yield ChildSide(name, child)


def torch_device(ours: str) -> str:
    """``--device`` by which PyTorch runs where MLX does."""
    if ours.startswith("torch"):
        return ours
    gpu = "mps" if sys.platform == "darwin" else "cuda"
    return f"torch:{gpu if ours == 'gpu' else 'cpu'}"


def mlx_device(ours: str) -> str:
    """``--device`` by which MLX runs where we do."""
    return {"torch": "auto", "torch:cpu": "cpu", "torch:cuda": "gpu", "torch:mps": "gpu"}.get(ours, ours)


# --- in a child ---


def open_mlx_lm(config: EngineConfig) -> Ask:
    """mlx-lm's own generators."""
    from pippin.bench.mlx_lm import MlxLmRunner, load

    return _asking(LocalSide("mlx-lm", MlxLmRunner(load(config)), MlxMeter()))


def open_torch(config: EngineConfig) -> Ask:
    """Our runner over transformers' models, by the steps that MLX's gets."""
    return _asking(open_ours(config, lambda _: None).side)


OPENERS = {"mlx-lm": "open_mlx_lm", "torch": "open_torch"}


def _asking(side: LocalSide) -> Ask:
    def answer(question: tuple[list[list[int]], int]) -> Measured:
        prompts, output_len = question
        return side.run(prompts, output_len)

    return answer
