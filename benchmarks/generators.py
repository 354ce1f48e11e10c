"""Pippin's engine and mlx-lm's BatchGenerator, driven alike: greedy, and no answer ends early.

Each has a process of its own, since Pippin puts faster operations in the place of some of mlx-lm's in its process, and
mlx-lm is to be measured as it is. The child reads a JSON line {prompts, steps}, and answers with a Timing's line.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

ROOT = Path(__file__).parent.parent
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
def generator(name: str, checkpoint: Path, log: Path) -> Iterator[Run]:
    """Starts ``pippin`` or ``mlx-lm`` with a checkpoint; ends it afterwards."""
    with log.open("wb") as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.generators", name, str(checkpoint)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=ROOT,
        )

    def run(prompts: Prompts, steps: int) -> Timing:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(json.dumps({"prompts": prompts, "steps": steps}) + "\n")
            child.stdin.flush()
            answer = child.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise RuntimeError(f"{name} ended:\n{log.read_text(errors='replace')[-2000:]}")
        return Timing(**json.loads(answer))

    with child:  # leaving closes its input, which ends it, and waits
        yield run


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


def pippin(checkpoint: Path) -> Run:
    """EngineCore, without a server around it, with room for all prompts in one step, as mlx-lm is given."""
    from pippin.config import EngineConfig
    from pippin.core import load_core
    from pippin.types import SamplingParams, Submit

    config = EngineConfig(
        model_path=str(checkpoint), dtype="float32", max_total_tokens=16_384, chunked_prefill_size=2048
    )
    core = load_core(config)
    ids = count()

    def run(prompts: Prompts, steps: int) -> Timing:
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


def mlx_lm(checkpoint: Path) -> Run:
    """BatchGenerator with all prompts in one prefill batch: at least as fast for it here as its default of 8."""
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.generate import BatchGenerator

    model = load(str(checkpoint))[0]
    mx.eval(model.parameters())
    assert "pippin.core" not in sys.modules

    def run(prompts: Prompts, steps: int) -> Timing:
        size = len(prompts)
        batch = BatchGenerator(model, completion_batch_size=size, prefill_batch_size=size, max_tokens=1 + steps)
        streams = {uid: i for i, uid in enumerate(batch.insert([list(p) for p in prompts]))}
        timing = timed(lambda: [(streams[r.uid], r.token) for r in batch.next()[1]], size, steps)
        batch.close()
        return timing

    return run


def main() -> None:
    name, checkpoint = sys.argv[1:]
    run = {"pippin": pippin, "mlx-lm": mlx_lm}[name](Path(checkpoint))
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(asdict(run(request["prompts"], request["steps"]))), flush=True)


if __name__ == "__main__":
    main()
