"""Requests that come and go as they like, driven straight into an engine: nothing may be lost, and memory stays flat.

    python -m benchmarks.churn [--shape 0.6b] [--minutes 9] [--oom] [--json results.jsonl]

Random weights in one of ``benchmarks.gpu``'s shapes; ``tiny`` is for a CPU. Lengths, parameters, grammars and
priorities are drawn; some requests end long before they are done, some are to be refused, some go on from an earlier
stream, and a fixed few are asked again and again. The pool has a tenth of what all of a moment may come to need, and
the KV canary is on. Every few seconds all end, the cache is flushed, every slot must be free, and memory is looked at.

One JSON line says what was seen. Exit status 1 if a slot was lost, the canary found something, a request was told what
it should not have been, or memory grew: by 3 % from the third sixth of the run to the last (medians), MLX's arrays
always, the process's where it ran for five minutes, since 256 grammars are kept. On a GPU sums hang on who shares a
step, so there answers that differ from the first are counted and no failure.

``--oom`` then takes the device's memory away, so that steps fail: see ``benchmarks.shortage``.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.grammar import shaped_core
from benchmarks.shortage import shortage, told
from pippin.config import EngineConfig
from pippin.core import EngineCore
from pippin.errors import RequestError
from pippin.footprint import process_bytes
from pippin.messages import Output, Submit
from pippin.types import Finish, Grammar, Pooling, SamplingParams

S = TypeVar("S")

DRIFT = 0.03
SETTLED = 300.0
"""Seconds of a run after which the process's memory, not MLX's alone, is to be flat."""

LEAST_SAMPLES = 6

STUCK = 60.0
"""Seconds without any output while requests run, after which the engine counts as stuck."""


@dataclass(frozen=True, slots=True)
class Scale:
    """So many ``clients`` at once, prompts of up to ``longest`` tokens, ``slots`` in the pool."""

    clients: int
    longest: int
    slots: int
    chunk: int


SMALL, LARGE = Scale(32, 150, 224, 48), Scale(256, 2000, 6400, 2048)


@dataclass(frozen=True, slots=True)
class Sample:
    """Bytes while nobody asks, the cache emptied; ``peak`` is of the time since the sample before."""

    seconds: float
    active: int
    cache: int
    peak: int
    process: int


@dataclass(slots=True)
class Asked:
    """A request that has not ended. ``leaves`` is how many tokens, or else turns, its client waits for."""

    submit: Submit
    leaves: tuple[int | None, int | None] = (None, None)
    fixed: int | None = None
    refused: bool = False
    turns: int = 0
    left: bool = False
    tokens: list[int] = field(default_factory=list)

    @property
    def need(self) -> int:
        return self.submit.num_prompt + self.submit.params.max_new_tokens


def growth(samples: Sequence[S], of: Callable[[S], int]) -> float:
    """By what share the last sixth holds more than the third. Before that, caches fill: 256 grammars are kept."""
    sixth = len(samples) // 6
    before, after = samples[2 * sixth : 3 * sixth], samples[-sixth:]
    held = [statistics.median(of(sample) for sample in some) for some in (before, after)]
    return held[1] / held[0] - 1


class Draws:
    """What is asked: any parameters that may come together, prompts that often begin as others do."""

    def __init__(self, source: random.Random, scale: Scale, vocab: int) -> None:
        self.source, self._scale, self._vocab = source, scale, vocab
        self._trunks = [self._random(scale.longest) for _ in range(6)]

    def _random(self, count: int) -> list[int]:
        return [self.source.randrange(5, self._vocab) for _ in range(count)]

    def prompt(self) -> list[int]:
        source, longest = self.source, self._scale.longest
        begun = source.choice(self._trunks)[: source.choice([0, 8, 64, source.randrange(longest)])]
        return (begun + self._random(source.randrange(1, 60)))[:longest]

    def params(self) -> SamplingParams:
        source = self.source
        return SamplingParams(
            max_new_tokens=source.choice([1, 4, 16, 16, 60, 150]),
            temperature=source.choice([0.0, 0.8, 1.2]),
            top_p=source.choice([1.0, 0.9]),
            top_k=source.choice([-1, -1, 40]),
            frequency_penalty=source.choice([0.0, 0.3]),
            seed=source.getrandbits(60),
            ignore_eos=source.random() < 0.7,
            logprobs=source.random() < 0.15,
            top_logprobs=source.choice([0, 2]),
            prompt_logprobs=source.random() < 0.05,
            grammar=self.grammar(),
        )

    def grammar(self) -> Grammar | None:
        """One in four has one, mostly one that nobody had before."""
        source = self.source
        match source.randrange(12):
            case 0:
                return Grammar("regex", f"[a-{source.choice('cfmz')}]{{{source.randrange(1, 9)},40}}")
            case 1:
                names = [f"name{source.randrange(10**6)}" for _ in range(source.randrange(1, 4))]
                properties = {name: {"type": source.choice(["string", "integer", "boolean"])} for name in names}
                schema = {"type": "object", "properties": properties, "required": names, "additionalProperties": False}
                return Grammar("json_schema", json.dumps(schema))
            case 2:
                return Grammar("grammar", f'root ::= "{source.randrange(10**6)}" [a-z ]+')
        return None

    def wrong(self) -> tuple[list[int], SamplingParams]:
        """What must be refused."""
        return self.source.choice(
            [
                ([5] * (self._scale.slots + 100), SamplingParams()),
                ([10**9], SamplingParams()),
                ([], SamplingParams()),
                ([5], SamplingParams(grammar=Grammar("regex", "["))),
            ]
        )

    def fixed(self, number: int) -> tuple[list[int], SamplingParams]:
        """One of twelve that are always the same, greedy or seeded."""
        params = SamplingParams(max_new_tokens=30, temperature=float(number % 2), seed=number, ignore_eos=True)
        return self._trunks[number // 2][: 10 + 30 * (number % 5)], params


class Churn:
    """Clients of an engine in this process, each with one request at a time, and what they were told."""

    def __init__(self, core: EngineCore, scale: Scale, seed: int = 1) -> None:
        self.core, self._scale = core, scale
        self._draws = Draws(random.Random(seed), scale, core.info.vocab_size)
        self._open: dict[str, Asked] = {}
        self._known: dict[int, list[int]] = {}
        self._heard = time.monotonic()
        self.counts: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.tokens = self.asked = self.lost = self.most_needed = 0

    # --- what is asked ---

    def ask(self) -> None:
        source = self._draws.source
        self.asked += 1
        id = f"c{self.asked}"
        tokens, params = self._draws.prompt(), self._draws.params()
        (way,) = source.choices(
            ("whole", "leaves", "aborts", "refused", "resumed", "pooled", "again"), (9, 4, 3, 1, 1, 1, 2)
        )
        self.counts[way] += 1
        prompt = len(tokens)
        asked = Asked(Submit(id, tokens, prompt, params, source.choice([0, 0, 0, 1, -2])))
        if way == "leaves":
            asked.leaves = (source.randrange(1, 20), None)
        elif way == "aborts":
            asked.leaves = (None, source.choice([0, 0, 1, 2, 5, 20]))
        elif way == "refused":
            tokens, params = self._draws.wrong()
            asked = Asked(Submit(id, tokens, len(tokens), params), refused=True)
        elif way == "resumed" and params.grammar is None and prompt > 4:
            asked = Asked(Submit(id, tokens, prompt - 4, params))
        elif way == "pooled" and self.core.info.pooling:
            asked = Asked(
                Submit(id, tokens, prompt, SamplingParams(), pooling=Pooling(source.choice(["last", "mean"])))
            )
        elif way == "again":
            asked = self._again(source.randrange(12), id)
        self._add(asked)

    def _again(self, number: int, id: str) -> Asked:
        tokens, params = self._draws.fixed(number)
        return Asked(Submit(id, tokens, len(tokens), params), fixed=number)

    def _add(self, asked: Asked) -> None:
        id = asked.submit.id
        try:
            self.core.add(asked.submit)
        except RequestError as error:
            if not (asked.refused and error.status == 400):
                self.errors[f"refused with {error.status}: {error}"] += 1
            return
        self._open[id] = asked
        self.most_needed = max(self.most_needed, sum(a.need for a in self._open.values() if not a.refused))

    # --- what is told ---

    def turn(self) -> None:
        """Whoever leaves leaves, and the engine does a step."""
        for id, asked in self._open.items():
            tokens, turns = asked.leaves
            if (tokens is not None and len(asked.tokens) >= tokens) or (turns is not None and asked.turns >= turns):
                self.core.abort(id)
                asked.left = True
            asked.turns += 1
        step = self.core.step()
        for output in step.outputs if step else ():
            self._hear(output)
        if self._open and time.monotonic() - self._heard > STUCK:
            raise TimeoutError(f"{len(self._open)} requests were told nothing for {STUCK:g} seconds")

    def _hear(self, output: Output) -> None:
        self._heard = time.monotonic()
        asked = self._open.get(output.id)
        if asked is None:
            self.errors["told of a request that had ended"] += 1
            return
        asked.tokens += output.tokens
        self.tokens += len(output.tokens)
        if output.finish is not None:
            del self._open[output.id]
            self.counts[f"ended: {output.finish.reason}"] += 1
            wrong = self._wrong(asked, output.finish, output.pooled)
            if wrong:
                self.errors[wrong] += 1

    def _wrong(self, asked: Asked, finish: Finish, pooled: bytes) -> str | None:
        """What is not as it should be with how a request ended."""
        if asked.refused:
            if finish.reason != "error":
                return "should have been refused"
            return None if finish.status == 400 else f"refused with {finish.status}: {finish.message}"
        match finish.reason:
            case "error":
                return f"{finish.status}: {finish.message}"
            case "abort":
                return None if asked.left else "aborted, and nobody asked for it"
        if asked.submit.pooling is not None:
            return None if pooled else "ended without a vector"
        room = self.core.info.max_total_tokens + 1 - len(asked.submit.tokens)
        given = len(asked.submit.tokens) - asked.submit.num_prompt
        left = min(asked.submit.params.max_new_tokens - given, room)
        if finish.reason == "length" and len(asked.tokens) != max(0, left):
            return "ended by length with another number of tokens"
        if asked.fixed is not None:
            same = self._known.setdefault(asked.fixed, asked.tokens) == asked.tokens
            self.counts["again, the same" if same else "again, another answer"] += 1
            if not same and self.core.info.device == "cpu":
                return "a fixed request had another answer"
        return None

    # --- the run ---

    def begin(self) -> None:
        """The fixed requests' answers while nobody else asks."""
        for number in range(12):
            self._add(self._again(number, f"first{number}"))
            self.drain()

    def drain(self) -> None:
        self._heard = time.monotonic()
        while self._open or self.core.has_work:
            self.turn()

    def run(self, seconds: float, each: float, tell: Callable[[Sample], None] = lambda _: None) -> list[Sample]:
        """Churns for so long or longer, with a rest after ``each`` so many seconds."""
        import mlx.core as mx

        began, samples, source = time.monotonic(), list[Sample](), self._draws.source
        while (now := time.monotonic()) - began < seconds or len(samples) < LEAST_SAMPLES:
            mx.reset_peak_memory()
            self._heard, end = now, now + each
            while time.monotonic() < end:
                while len(self._open) < self._scale.clients and source.random() < 0.8:
                    self.ask()
                if source.random() < 0.01:
                    self._flush(refused=bool(self._open))
                self.turn()
            self.drain()
            self._count_slots()
            samples.append(
                Sample(
                    round(time.monotonic() - began, 1),
                    mx.get_active_memory(),
                    mx.get_cache_memory(),
                    mx.get_peak_memory(),
                    process_bytes(),
                )
            )
            tell(samples[-1])
        return samples

    def _count_slots(self) -> None:
        self._flush(refused=False)
        stats = self.core.stats
        self.lost = max(self.lost, stats.slots_total - stats.slots_free)

    def give_up(self) -> None:
        """Ends all that runs, and counts slots."""
        for id, asked in self._open.items():
            self.core.abort(id)
            asked.left = True
        for _ in range(10):
            self.turn()
        self._count_slots()

    def _flush(self, refused: bool) -> None:
        self.counts["flushes"] += 1
        try:
            self.core.flush()
        except RequestError as error:
            if not refused or error.status != 409:
                self.errors[f"flush: {error}"] += 1


class Logged(logging.Handler):
    """Counts what the engine logs as an error."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines[record.getMessage()] += 1


def churned(core: EngineCore, scale: Scale, seconds: float, seed: int = 1) -> dict[str, Any]:
    """The report of a run; ``failures`` says what is not as it must be."""
    logged, log = Logged(), logging.getLogger("pippin")
    churn, traces = Churn(core, scale, seed), core.stats.graph_traces
    log.addHandler(logged)
    samples, stuck = list[Sample](), ""
    try:
        churn.begin()
        samples = churn.run(seconds, min(10.0, seconds / 12), lambda s: print(asdict(s), file=sys.stderr, flush=True))
    except TimeoutError as error:
        stuck = str(error)
        churn.give_up()
    finally:
        log.removeHandler(logged)
    stats = core.stats
    errors = churn.errors + Counter({f"logged: {line}": count for line, count in logged.lines.items()})
    report: dict[str, Any] = {
        "requests": churn.asked,
        "tokens": churn.tokens,
        "counts": dict(sorted(churn.counts.items())),
        "steps": stats.steps,
        "retractions": stats.retractions,
        "pool": stats.slots_total,
        "needed": churn.most_needed,
        "canary_mismatches": stats.kv_canary_mismatches,
        "slots_lost": churn.lost,
        "errors": dict(errors),
        "graph_traces": [traces, stats.graph_traces],
        "samples": len(samples),
    }
    grown = drift(samples) if len(samples) >= LEAST_SAMPLES else {}
    report |= {"drift_percent": {name: round(100 * share, 2) for name, share in grown.items()}}
    report |= {"first": asdict(samples[0]), "last": asdict(samples[-1])} if samples else {}
    watched = ["active", *(["process"] if seconds >= SETTLED else [])]
    report["failures"] = [
        *([stuck] if stuck else []),
        *([f"{stats.kv_canary_mismatches} mismatches"] if stats.kv_canary_mismatches else []),
        *([f"{churn.lost} slots lost"] if churn.lost else []),
        *([f"{errors.total()} errors"] if errors else []),
        *([] if churn.most_needed > 10 * stats.slots_total else ["the pool was not short"]),
        *([f"{name} grew by {100 * grown[name]:.1f} %" for name in watched if grown.get(name, 0) > DRIFT]),
    ]
    return report


def drift(samples: Sequence[Sample]) -> dict[str, float]:
    """Growth by kind of memory; what was nothing before is left out."""
    kinds: dict[str, Callable[[Sample], int]] = {
        "active": lambda s: s.active,
        "peak": lambda s: s.peak,
        "cache": lambda s: s.cache,
        "process": lambda s: s.process,
    }
    return {name: growth(samples, of) for name, of in kinds.items() if all(map(of, samples))}


def config_of(scale: Scale, **options: Any) -> EngineConfig:
    return EngineConfig(
        **{
            "max_total_tokens": scale.slots,
            "chunked_prefill_size": scale.chunk,
            "kv_canary": "raise",
            "disable_memory_sharing": True,
            **options,
        }
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="0.6b", help="of benchmarks.gpu: tiny, 0.6b, 8b")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--oom", action="store_true", help="take memory away afterwards (benchmarks.shortage)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    scale = SMALL if options.shape == "tiny" else LARGE
    with tempfile.TemporaryDirectory() as folder:
        core = shaped_core(options.shape, config_of(scale), Path(folder))
        report = {"minutes": options.minutes, "clients": scale.clients}
        report |= churned(core, scale, 60 * options.minutes, options.seed)
        core.close()
    if options.oom:
        del core
        report["oom"] = shortage(options.shape)
        report["failures"] += [f"out of memory: {what}" for what in report["oom"]["failures"]]
    return told(report, options.shape, options.json)


if __name__ == "__main__":
    sys.exit(main())
