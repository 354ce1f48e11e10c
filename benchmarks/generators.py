"""Pippin's engine and mlx-lm's BatchGenerator, driven alike in this process: greedy, and no answer ends early."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Protocol

import mlx.core as mx
import mlx_lm
from mlx_lm.generate import BatchGenerator

from pippin.config import EngineConfig
from pippin.core import load_core
from pippin.types import SamplingParams, Submit

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds from submitting until every stream has its first token, and from then until each has ``steps`` more."""

    prefill: float
    decode: float
    steps: int
    tokens: dict[int, list[int]]


class Generator(Protocol):
    """One of the two."""

    name: str

    def run(self, prompts: Prompts, steps: int) -> Timing:
        """Prefills all prompts and decodes ``steps`` further tokens of each; nothing is left afterwards."""


def timed(
    step: Callable[[], Sequence[tuple[int, int]]],
    streams: int,
    steps: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Calls ``step``, which returns (stream, token) pairs, until every stream has 1 + ``steps`` tokens."""
    tokens: dict[int, list[int]] = {i: [] for i in range(streams)}
    began = clock()
    firsts = 0.0
    while min(map(len, tokens.values())) < 1 + steps:
        for stream, token in step():
            tokens[stream].append(token)
        if not firsts and all(tokens.values()):
            firsts, early = clock(), Counter({i: len(t) for i, t in tokens.items()})
    ended = clock()
    # Streams that were prefilled first have decoded beside the others' prefill: those tokens are not decode's.
    done = sum(map(len, tokens.values())) - sum(early.values())
    decode = (ended - firsts) * streams * steps / done if done else 0.0
    return Timing(firsts - began, decode, steps, tokens)


class Pippin:
    """EngineCore, without a server around it."""

    name = "pippin"

    def __init__(self, checkpoint: Path) -> None:
        self._core = load_core(EngineConfig(model_path=str(checkpoint), dtype="float32", max_total_tokens=16_384))
        self._ids = count()

    def run(self, prompts: Prompts, steps: int) -> Timing:
        params = SamplingParams(temperature=0.0, max_new_tokens=1 + steps, ignore_eos=True)
        streams = {str(next(self._ids)): i for i in range(len(prompts))}
        for id, stream in streams.items():
            self._core.add(Submit(id, list(prompts[stream]), len(prompts[stream]), params))

        def step() -> list[tuple[int, int]]:
            output = self._core.step()
            return [(streams[o.id], t) for o in (output.outputs if output else ()) for t in o.tokens]

        timing = timed(step, len(prompts), steps)
        while self._core.has_work:
            self._core.step()
        self._core.flush()
        return timing


class MlxLm:
    """BatchGenerator with all prompts in one prefill batch: at least as fast for it here as its default of 8."""

    name = "mlx-lm"

    def __init__(self, checkpoint: Path) -> None:
        self._model, _ = mlx_lm.load(str(checkpoint))
        mx.eval(self._model.parameters())

    def run(self, prompts: Prompts, steps: int) -> Timing:
        generator = BatchGenerator(
            self._model, completion_batch_size=len(prompts), prefill_batch_size=len(prompts), max_tokens=1 + steps
        )
        streams = {uid: i for i, uid in enumerate(generator.insert([list(p) for p in prompts]))}

        def step() -> list[tuple[int, int]]:
            return [(streams[r.uid], r.token) for r in generator.next()[1]]

        timing = timed(step, len(prompts), steps)
        generator.close()
        return timing
