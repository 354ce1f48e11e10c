"""Pippin's engine and mlx-lm's BatchGenerator, driven alike: greedy, and no answer ends early.

Each has a process of its own, since Pippin puts faster operations in the place of some of mlx-lm's in its process, and
mlx-lm is to be measured as it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from pippin.bench.child import Ask, Child
from pippin.config import EngineConfig

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds from submitting until every stream has its first token, and from then until each has ``steps`` more."""

    prefill: float
    decode: float
    steps: int
    tokens: list[list[int]]


Run = Callable[[Prompts, int], Timing]
"""Prefills all prompts and decodes so many further tokens of each; nothing is left afterwards."""


@contextmanager
def generator(name: str, checkpoint: Path) -> Iterator[Run]:
    """Starts ``pippin`` or ``mlx-lm`` with a checkpoint, in float32; ends it afterwards.

    To be called where ``benchmarks`` can be imported from the working directory, as its child imports it too.
    """
    config = EngineConfig(
        model_path=str(checkpoint), dtype="float32", max_total_tokens=16_384, chunked_prefill_size=2048
    )
    with Child(name, OPENERS[name], config) as child:
        yield lambda prompts, steps: child.ask((prompts, steps), Timing)


def timed(
    step: Callable[[], Sequence[tuple[int, int]]],
    streams: int,
    steps: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Calls ``step``, which returns (stream, token) pairs, until every stream has 1 + ``steps`` tokens."""
    tokens: list[list[int]] = [[] for _ in range(streams)]
    began = clock()
    firsts, early = 0.0, 0
    while min(map(len, tokens)) < 1 + steps:
        for stream, token in step():
            tokens[stream].append(token)
        if not early and all(tokens):
            firsts, early = clock(), sum(map(len, tokens))
    ended = clock()
    # Streams that were prefilled first have decoded beside the others' prefill: those tokens are not decode's.
    done = sum(map(len, tokens)) - early
    return Timing(firsts - began, (ended - firsts) * streams * steps / done if done else 0.0, steps, tokens)


# --- in the child ---


def open_pippin(config: EngineConfig) -> Ask:
    """EngineCore, without a server around it, with room for all prompts in one step, as mlx-lm is given."""
    from pippin.loading import load_core
    from pippin.messages import Submit
    from pippin.types import SamplingParams

    core = load_core(config)
    ids = count()

    def run(question: tuple[Prompts, int]) -> Timing:
        prompts, steps = question
        params = SamplingParams(temperature=0.0, max_new_tokens=1 + steps, ignore_eos=True)
        streams = {str(next(ids)): i for i in range(len(prompts))}
        for id, stream in streams.items():
            core.add(Submit(id, list(prompts[stream]), len(prompts[stream]), params))

        def step() -> list[tuple[int, int]]:
            output = core.step()
            return [(streams[o.id], t) for o in (output.outputs if output else ()) for t in o.tokens]

        timing = timed(step, len(prompts), steps)
        while core.has_work:
            core.step()
        core.flush()
        return timing

    return run


def open_mlx_lm(config: EngineConfig) -> Ask:
    """BatchGenerator with all prompts in one prefill batch: at least as fast for it here as its default of 8."""
    from pippin.bench.mlx_lm import MlxLmRunner, load
    from pippin.bench.runner import timed as timed_batch

    runner = MlxLmRunner(load(config))

    def run(question: tuple[Prompts, int]) -> Timing:
        prompts, steps = question
        timing = timed_batch(runner, prompts, 1 + steps)
        return Timing(timing.prefill, sum(timing.steps), steps, timing.tokens)

    return run


OPENERS = {"pippin": f"{__name__}:open_pippin", "mlx-lm": f"{__name__}:open_mlx_lm"}
