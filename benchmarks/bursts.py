"""When the requests of one moment have their first tokens, on a GPU: prompts of one length and of many, cut or whole.

    python -m benchmarks.bursts [--shape 8b] [--requests 64] [--tokens 128] [--spread 0 16] [--apart 0 1]

The engine alone, with random weights, gets ``--requests`` prompts of ``--tokens`` tokens, ``--spread`` more or less,
one every ``--apart`` milliseconds, as a server hands them over. After 16 tokens all have ended, and the next burst
comes, of prompts that nobody has asked. Printed are, of each of ``--rounds`` bursts, milliseconds from when a request
was due to its first token, the middle one and the latest; and the prompt tokens of the last burst's steps. ``cut`` is
with works cut for attention as the engine does (``pippin.pieces``), ``whole`` without.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

from benchmarks.gpu import make_core, make_model
from pippin.core import EngineCore
from pippin.garbage import loaded_left_alone
from pippin.messages import Submit
from pippin.pieces import Pieces
from pippin.types import SamplingParams

NEW = 16
VOCAB = 1000


@dataclass(slots=True)
class Burst:
    """Seconds from when each request was due to its first token, and the prompt tokens of the steps that had some."""

    firsts: dict[str, float] = field(default_factory=dict)
    steps: list[int] = field(default_factory=list)


def burst(core: EngineCore, lengths: Sequence[int], apart: float, rng: random.Random) -> Burst:
    """Serves prompts of such lengths, one due every ``apart`` seconds."""
    params = SamplingParams(temperature=0.0, max_new_tokens=NEW, ignore_eos=True)
    found, began, added = Burst(), time.perf_counter(), 0
    name, computed = rng.getrandbits(64), core.stats.prefill_tokens
    while added < len(lengths) or core.has_work:
        while added < len(lengths) and time.perf_counter() - began >= added * apart:
            tokens = [rng.randrange(3, VOCAB) for _ in range(lengths[added])]
            core.add(Submit(f"{name}:{added}", tokens, len(tokens), params))
            added += 1
        output = core.step()
        if output is None:
            continue
        now = time.perf_counter() - began
        for each in output.outputs:
            if each.tokens and each.id not in found.firsts:
                found.firsts[each.id] = now - int(each.id.rpartition(":")[2]) * apart
        if more := output.stats.prefill_tokens - computed:
            found.steps.append(more)
            computed += more
    return found


def measure(core: EngineCore, requests: int, tokens: int, spread: int, apart: float, rounds: int) -> dict[str, Any]:
    """So many bursts, of prompts of ``tokens`` tokens, ``spread`` more or less."""
    rng = random.Random(f"{tokens} {spread} {apart}")
    bursts = []
    for _ in range(rounds):
        lengths = [tokens + rng.randint(-spread, spread) for _ in range(requests)]
        bursts.append(burst(core, lengths, apart, rng))
    return {
        "middle_ms": [round(1000 * statistics.median(b.firsts.values()), 1) for b in bursts],
        "latest_ms": [round(1000 * max(b.firsts.values()), 1) for b in bursts],
        "steps": bursts[-1].steps,
    }


@contextmanager
def uncut() -> Iterator[None]:
    """Leaves works whole."""
    of = Pieces.of
    with mock.patch.object(Pieces, "of", staticmethod(lambda several: replace(of(several), planned=False))):
        yield


def rows(core: EngineCore, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each spread and each time between requests, both ways."""
    for number, (spread, apart) in enumerate(itertools.product(options.spread, options.apart)):
        for way in ("whole", "cut"):
            tokens = options.tokens + 1 + number  # so that what one row planned is little use to the next
            with uncut() if way == "whole" else nullcontext():
                found = measure(core, options.requests, tokens, spread, apart / 1000, options.rounds)
            yield {"way": way, "tokens": tokens, "spread": spread, "apart_ms": apart, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="8b")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--spread", type=int, nargs="+", default=[0, 16])
    parser.add_argument("--apart", type=float, nargs="+", default=[0.0, 1.0], help="milliseconds between requests")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    longest = options.tokens + max(options.spread) + 1 + len(options.spread) * len(options.apart) + NEW
    core = make_core(
        make_model(options.shape),
        max_total_tokens=(options.requests * (longest + 32) + 1024) // 64 * 64,
        max_running_requests=options.requests,
        context_length=max(1024, 2 * longest),
        disable_radix_cache=True,
    )
    for spread, apart in itertools.product(options.spread, options.apart):  # what is compiled, all but plans
        measure(core, options.requests, options.tokens, spread, apart / 1000, 2)
    with loaded_left_alone():
        for row in rows(core, options):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
