"""What quantized K and V cost in answers: the shipped model's accuracy by task and its logits, for each kind of slot.

    python scripts/demo_model/kv_quality.py [--count 30] [--kinds auto int8 fp8 int4] [--dtype float32]

Answers are greedy and Pippin's own, over the same held-out questions for each kind. Distances are between logits after
the same prefixes, cut anywhere in conversations: of probabilities (KL divergence, in bits), and of the likeliest token;
``bfloat16`` among them is full slots of that type, whatever the model computes in.
"""

from __future__ import annotations

import argparse
import sys
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from demo_model.chat import render
from demo_model.evaluate import TASKS, Question, matches, questions
from pippin.backend import preload_openblas

if TYPE_CHECKING:
    from pippin.probe import Choice

DEMO = Path(__file__).parents[2] / "src/pippin/demo/pippin-demo"
SLOTS = 16384


@dataclass(frozen=True, slots=True)
class Distance:
    """Of logits from full slots': KL divergence in bits, mean and largest; share of equal likeliest tokens."""

    mean: float
    largest: float
    agreement: float


def replies(kind: str, dtype: str, asked: Sequence[Question]) -> tuple[list[str], int]:
    """Greedy answers, and the bytes of the pool."""
    from pippin import Engine

    engine = Engine(
        model_path=str(DEMO), kv_cache_dtype=kind, dtype=dtype, max_total_tokens=SLOTS, max_running_requests=32
    )
    try:
        prompts = [render(q.messages, q.tools, add_generation_prompt=True) for q in asked]
        found = engine.generate(prompts, {"max_new_tokens": 160, "temperature": 0.0})
        info: dict[str, Any] = engine.get_server_info()
    finally:
        engine.shutdown()
    return [answer["text"] for answer in found], int(info["pool_bytes"])


def logits_of(kinds: Sequence[str], dtype: str, asked: Sequence[Question], cuts: int) -> dict[str, Any]:
    """Logits [n, vocab] float32 by kind, after prefixes of the questions with their answers."""
    import mlx.core as mx
    import numpy as np

    from pippin.config import EngineConfig
    from pippin.models.load import load_mlx_model
    from pippin.probe import choose_attention
    from pippin.runner import MlxModelRunner
    from pippin.text.tokenizer import load_tokenizer
    from pippin.types import Batch, Request, SamplingParams, Work

    loaded = load_mlx_model(str(DEMO), EngineConfig(dtype=dtype))
    choice, rng = choose_attention(loaded.model, "mlx", loaded.vocab_size), Random(0)
    tokenizer = load_tokenizer(str(DEMO))
    rows = [tokenizer.encode(render((*q.messages, q.reference), q.tools)) for q in asked]
    prefixes = [row[: rng.randint(len(row) // 3, len(row) - 1)] for row in rows for _ in range(cuts)]
    found: dict[str, Any] = {}
    for kind in kinds:
        pool = _slots(choice, kind).pool(4096)
        runner = MlxModelRunner(loaded.model, choice.backend, pool, max_running=2, vocab_size=loaded.vocab_size)
        parts = []
        for prefix in prefixes:
            request = Request("r", list(prefix), len(prefix), SamplingParams(), row=1)
            request.slots = array("i", range(1, len(prefix) + 1))
            parts.append(np.asarray(runner.logits(Batch((Work(request, 0, len(prefix), True),)))))
        found[kind] = np.concatenate(parts)
        mx.clear_cache()
    return found


def _slots(choice: Choice, kind: str) -> Choice:
    import mlx.core as mx

    if kind != "bfloat16":
        return choice.with_kv_cache_dtype(kind)
    shapes = tuple(shape and replace(shape, dtype=mx.bfloat16) for shape in choice.shapes)
    return replace(choice, layout=replace(choice.layout, shapes=shapes))


def distance(mine: Any, full: Any) -> Distance:
    """Between logits [n, vocab]."""
    import numpy as np

    wide = (x.astype(np.float64) for x in (full, mine))
    p, q = (x - np.logaddexp.reduce(x, axis=1, keepdims=True) for x in wide)
    divergence = (np.exp(p) * (p - q)).sum(axis=1) / np.log(2)
    same = (mine.argmax(axis=1) == full.argmax(axis=1)).mean()
    return Distance(float(divergence.mean()), float(divergence.max()), float(same))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=30, help="exchanges for each task")
    parser.add_argument("--kinds", nargs="+", default=["auto", "int8", "fp8", "int4"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--cuts", type=int, default=2, help="prefixes of each conversation")
    arguments = parser.parse_args()
    preload_openblas()  # before mlx is imported
    asked = [q for name in TASKS for q in questions(name, arguments.count)]
    right: dict[str, list[bool]] = {}
    sizes: dict[str, int] = {}
    for kind in arguments.kinds:
        began = time.monotonic()
        answers, sizes[kind] = replies(kind, arguments.dtype, asked)
        right[kind] = [matches(a, q.reference, q.check) for a, q in zip(answers, asked, strict=True)]
        print(f"{kind}: {len(asked)} questions in {time.monotonic() - began:.0f} s", file=sys.stderr)
    print(f"| task | of | {' | '.join(arguments.kinds)} |\n|---|---:|{'---:|' * len(arguments.kinds)}")
    for task in dict.fromkeys(q.task for q in asked):
        at = [i for i, q in enumerate(asked) if q.task == task]
        print(f"| {task} | {len(at)} |", " | ".join(str(sum(right[k][i] for i in at)) for k in arguments.kinds), "|")
    print(f"| all | {len(asked)} |", " | ".join(str(sum(right[k])) for k in arguments.kinds), "|")
    quantized = [k for k in arguments.kinds if k != "auto"]
    logits = logits_of(["auto", "bfloat16", *quantized], arguments.dtype, asked, arguments.cuts)
    print("\n| slots | bytes a slot | KL, mean | KL, largest | same likeliest token |\n|---|---:|---:|---:|---:|")
    for kind in ("bfloat16", *quantized):
        d = distance(logits[kind], logits["auto"])
        each = f"{sizes[kind] / (SLOTS + 1):.0f}" if kind in sizes else ""
        print(f"| {kind} | {each} | {d.mean:.2g} bits | {d.largest:.2g} bits | {d.agreement:.2%} |")


if __name__ == "__main__":
    main()
