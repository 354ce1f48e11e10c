"""What a step costs the host where a GPU would run it: microseconds to plan it and to take in what it drew, to build it
anew and compiled, and its launches.

Nothing is computed. MLX runs on the CPU, kernels are launches that return zeros, and graphs are built and dropped, so
figures are of Python and MLX's graph building alone: what queuing takes on a GPU comes on top, of either.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn

from pippin import kernels
from pippin.cache.radix import RadixCache
from pippin.cache.slots import SlotAllocator
from pippin.kernels.launch import Launch, Source
from pippin.probe import Choice, choose_attention
from pippin.runner import MlxModelRunner
from pippin.scheduler import Scheduler
from pippin.types import Batch, Request, RowResult, SamplingParams, Work


class Phantom:
    """A launcher that computes nothing; ``names`` counts what was launched, ``variants`` what would be compiled."""

    def __init__(self) -> None:
        self.names: Counter[str] = Counter()
        self.variants: set[tuple[Source, object, tuple[bool, ...]]] = set()

    def __call__(self, what: Launch, inputs: Sequence[mx.array]) -> list[mx.array]:
        self.names[what.source.name] += 1
        small = tuple(a.size < 8 for a in inputs)
        self.variants.add((what.source, what.constants, small))
        nothing = [mx.broadcast_to(zero(dtype), shape) for shape, dtype in what.outputs]
        hangs: list[mx.array] = mx.depends(nothing, list(inputs))
        return hangs


@cache
def zero(dtype: mx.Dtype) -> mx.array:
    zero = mx.zeros((), dtype)
    mx.eval(zero)
    return zero


@contextmanager
def phantom_gpu() -> Iterator[Phantom]:
    """Makes kernels believe in a GPU whose launches compute nothing."""
    phantom, verdicts = Phantom(), AllRight()

    def backend() -> str:
        return "cuda"

    def launcher(*_: object) -> Phantom:
        return phantom

    def all_right(*_: object) -> AllRight:
        return verdicts

    kernels._gpu.cache_clear()
    with mock.patch.multiple(
        kernels, backend=backend, gpu_launcher=launcher, prefer_built=launcher, _verdicts=all_right
    ):
        yield phantom
    kernels._gpu.cache_clear()


def unqueued(*_: object) -> None:
    """Stands for ``mx.async_eval``."""


class AllRight(dict[Any, bool]):
    """Verdicts: every kernel is right."""

    def __missing__(self, name: Any) -> bool:
        return True

    def __contains__(self, name: object) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class Case:
    """Steps of ``decodes`` single tokens behind ``context`` and ``chunk`` tokens of a prompt behind as many."""

    name: str
    decodes: int
    chunk: int
    context: int


CASES = (
    Case("decode, 1 row", 1, 0, 300),
    Case("decode, 32 rows", 32, 0, 300),
    Case("64 tokens behind 8k", 0, 64, 8192),
    Case("32 decodes and 64 tokens", 32, 64, 1000),
)
PAGE = 16


def requests_of(case: Case, params: SamplingParams) -> list[Work]:
    works, slot = [], PAGE
    for i in range(case.decodes + (case.chunk > 0)):
        count = 1 if i < case.decodes else case.chunk
        request = Request(f"r{i}", [7] * (case.context + count), case.context + 1, params, row=i + 1)
        request.slots = array("i", range(slot, slot + case.context + count))
        if i < case.decodes:
            request.num_prompt = case.context
        slot += -(-len(request.slots) // PAGE) * PAGE
        works.append(Work(request, case.context, case.context + count, True))
    return works


def runner_for(model: nn.Module, choice: Choice, slots: int, vocab_size: int, graphs: bool) -> MlxModelRunner:
    return MlxModelRunner(
        model,
        choice.backend,
        choice.pool(slots, PAGE),
        max_running=64,
        vocab_size=vocab_size,
        graph_rows=64 * graphs,
        extend_rows=256 * graphs,
        fusions=choice.fusions,
    )


def build_microseconds(runner: MlxModelRunner, works: Sequence[Work], rounds: int) -> float:
    """Median time of this thread to build a step, others on the machine left out; it is dropped."""
    found = []
    with mock.patch.object(mx, "async_eval", unqueued):
        for _ in range(rounds):
            begun = time.thread_time()
            runner.launch(Batch(tuple(works)))
            found.append(1e6 * (time.thread_time() - begun))
            runner._last_token = mx.zeros(runner._last_token.shape, mx.int32)
            mx.eval(runner._last_token)
    return statistics.median(found[1:])


def model_of(layers: int) -> nn.Module:
    """Qwen3 of 0.6B's layout with so many layers, and small."""
    from mlx_lm.models.qwen3 import Model, ModelArgs

    args = ModelArgs(
        model_type="qwen3",
        hidden_size=64,
        num_hidden_layers=layers,
        intermediate_size=128,
        num_attention_heads=8,
        rms_norm_eps=1e-6,
        vocab_size=512,
        num_key_value_heads=2,
        max_position_embeddings=40_960,
        rope_theta=1e6,
        head_dim=32,
        tie_word_embeddings=True,
    )
    model = Model(args)
    model.set_dtype(mx.bfloat16)
    mx.eval(model.parameters())
    return model


def planning_microseconds(rows: int, waiting: int, policy: str, steps: int = 60) -> float:
    """Median time of this thread to plan a step's decodes and to take in their tokens.

    With ``waiting``, all are prompts of 24 thousand tokens, most of them cached, and so many find no room.
    """
    page, length = PAGE, 300 if not waiting else 20_000
    allocator = SlotAllocator(2 + (rows * 40 if not waiting else 1600), page)
    radix = RadixCache(allocator)
    limits = {"max_running": 128, "chunk": 8192, "context_length": 100_000}
    scheduler = Scheduler(allocator, radix, policy=policy, **limits)
    params = SamplingParams(max_new_tokens=300, ignore_eos=True)
    shared = [7 + i % 90 for i in range(length)]
    for i in range(rows + waiting):
        tokens = [*shared, *([i] * (4000 if waiting else 1))]
        scheduler.add(Request(f"r{i}", tokens, len(tokens), params))
    found = []
    for _ in range(steps):
        begun = time.thread_time()
        batch = scheduler.schedule()
        assert batch is not None
        planned = time.thread_time() - begun
        results = [RowResult(token=9 if work.samples else None) for work in batch.works]
        begun = time.thread_time()
        scheduler.finish(batch, results)
        found.append(1e6 * (planned + time.thread_time() - begun))
    return statistics.median(found[steps // 2 :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    for rows, waiting, policy in ((1, 0, "fcfs"), (128, 0, "fcfs"), (4, 128, "fcfs"), (4, 128, "lpm")):
        planned = round(planning_microseconds(rows, waiting, policy))
        print(json.dumps({"planning": rows, "waiting": waiting, "policy": policy, "us": planned}), flush=True)
    model, vocab_size = model_of(options.layers), 512
    choice = choose_attention(model, "rows", vocab_size, fuse=True)
    with phantom_gpu() as phantom:
        for case in CASES:
            works = requests_of(case, SamplingParams(temperature=0.0))
            slots = 2 * PAGE + sum(-(-len(w.request.slots) // PAGE) * PAGE for w in works)
            line: dict[str, object] = {"case": case.name, "layers": options.layers}
            for graphs in (False, True):
                runner = runner_for(model, choice, slots, vocab_size, graphs)
                if graphs:  # after this, what steps are cut into is known
                    runner.launch(Batch(tuple(requests_of(CASES[0], SamplingParams(temperature=0.0)))))
                phantom.names.clear()
                with mock.patch.object(mx, "async_eval", unqueued):
                    runner.launch(Batch(tuple(works)))
                line.setdefault("launches", sum(phantom.names.values()))
                line["compiled" if graphs else "anew"] = round(build_microseconds(runner, works, options.rounds))
            line["ratio"] = round(float(line["anew"]) / float(line["compiled"]), 1)  # type: ignore[arg-type]
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
