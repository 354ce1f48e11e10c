"""Engines whose process gets no more memory: for ``worker.Hello.core``, which names a function."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path

from benchmarks.shortage import ShortRunner
from pippin.config import EngineConfig
from pippin.core import EngineCore
from pippin.flight import Flight
from pippin.loading import load_core
from pippin.messages import Progress
from pippin.types import Batch

FOLDER = "PIPPIN_TEST_SHORT"
STEP_TOKENS = 24  # less than the longest prompt has, so that one step asks for more however requests arrive
SPARE = 1 << 20
AT_ONCE = 8

_ballast: list[bytearray] = []


class Refusing(ShortRunner):
    """Leaves a file behind when it has refused."""

    def launch(self, batch: Batch) -> Flight:
        try:
            return super().launch(batch)
        except RuntimeError:
            folder().joinpath("refused").touch()
            raise


def folder() -> Path:
    return Path(os.environ[FOLDER])


def refusing(config: EngineConfig, progress: Callable[[Progress], None]) -> EngineCore:
    """Steps of more than ``STEP_TOKENS`` tokens raise what MLX raises where a device's allocator says no."""
    core = load_core(config, progress)
    core._runner = Refusing(core._runner, STEP_TOKENS)
    return core


def starved(config: EngineConfig, progress: Callable[[Progress], None]) -> EngineCore:
    """The first process of a folder may take a megabyte more than it has: real allocations fail in its steps.

    MLX's CPU backend does not look whether it got memory, so that the process ends by a signal, as with Metal.
    """
    core, marker = load_core(config, progress), folder() / "starved"
    if not marker.exists():
        marker.touch()
        assert core._grammars._compiler is not None
        core._grammars._compiler._vocabulary.result()  # what loading it takes on the way would be room later
        starve()
        gather(core, AT_ONCE)
    return core


def gather(core: EngineCore, count: int) -> None:
    """Lets the first step wait until so many requests have come: one by one they may find room."""
    schedule, arrived = core._scheduler.schedule, False

    def gathered() -> Batch | None:
        nonlocal arrived
        arrived = arrived or len(core._scheduler.runs.waiting) >= count
        return schedule() if arrived else None

    core._scheduler.schedule = gathered  # type: ignore[method-assign]


def starve() -> None:
    import mlx.core as mx

    mx.clear_cache()
    mx.set_cache_limit(0)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (now, resource.getrlimit(resource.RLIMIT_AS)[1]))
    for size in (1 << 20, 1 << 16, 1 << 12):  # what libc has kept, too
        while True:
            try:
                _ballast.append(bytearray(size))
            except MemoryError:
                break
    del _ballast[: SPARE >> 20]
