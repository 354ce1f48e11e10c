"""Engines on small models for tests, and what they answer."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step

from pippin.config import EngineConfig
from pippin.core import EngineCore
from pippin.loading import load_core
from pippin.messages import Output, Submit
from pippin.models.load import load_mlx_model
from pippin.types import SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=12, ignore_eos=True)


def make_core(path: Path, **options: Any) -> EngineCore:
    return load_core(EngineConfig(model_path=str(path), **{"max_total_tokens": 2000, **options}))


def prompts(count: int, longest: int = 60, seed: int = 5) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(3, 280) for _ in range(source.randrange(1, longest))] for _ in range(count)]


def run(core: EngineCore, submits: Sequence[Submit]) -> dict[str, list[int]]:
    """Adds all at once and steps until nothing is left; every request must have ended."""
    found = collect(core, submits)
    assert all(outputs[-1].finish is not None for outputs in found.values())
    return {id: [t for o in outputs for t in o.tokens] for id, outputs in found.items()}


def collect(core: EngineCore, submits: Sequence[Submit]) -> dict[str, list[Output]]:
    found: dict[str, list[Output]] = {s.id: [] for s in submits}
    for submit in submits:
        core.add(submit)
    for output in drain(core):
        found[output.id].append(output)
    return found


def drain(core: EngineCore) -> Iterator[Output]:
    for _ in range(5000):
        if not core.has_work:
            return
        step = core.step()
        yield from step.outputs if step else ()
    raise AssertionError("the engine never came to rest")


def submits(rows: Sequence[Sequence[int]], params: SamplingParams = GREEDY, name: str = "r") -> list[Submit]:
    return [Submit(f"{name}{i}", list(row), len(row), params) for i, row in enumerate(rows)]


def greedy_by_mlx_lm(path: Path, row: Sequence[int], count: int) -> list[int]:
    """mlx-lm's own loop and caches, over its model with our corrections, which ``tests/parity`` checks.

    Many tests ask the same of one checkpoint, so it is computed once.
    """
    files = tuple((file.name, file.stat().st_mtime_ns) for file in sorted(path.iterdir()))
    return list(_greedy_by_mlx_lm(path, files, tuple(row), count))


@cache
def _greedy_by_mlx_lm(
    path: Path, files: tuple[tuple[str, int], ...], row: tuple[int, ...], count: int
) -> tuple[int, ...]:
    steps = generate_step(mx.array(list(row)), _model(path, files), max_tokens=count)
    return tuple(int(token) for token, _ in steps)


@lru_cache(maxsize=2)
def _model(path: Path, _files: tuple[tuple[str, int], ...]) -> Any:
    return load_mlx_model(str(path), EngineConfig(dtype="float32")).model


def replace_params(params: SamplingParams, **changes: Any) -> SamplingParams:
    import msgspec

    return msgspec.structs.replace(params, **changes)
