"""``make bench-cpu``: Pippin against mlx-lm's BatchGenerator and mlx_lm.server on this CPU, in one run.

Both serve the same random Qwen3 (42 M parameters, float32), with OpenBLAS in front of MLX where it is installed.
The two take turns, who begins changes each round, and a ratio is the median of the rounds' ratios, so that
whatever else the machine does weighs on both.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from tokenizers import Tokenizer

from benchmarks import HAS_OPENBLAS
from benchmarks.checkpoint import FULL, SMALL, Size, make_checkpoint, text_of
from benchmarks.generators import Run, generator
from benchmarks.servers import Server, ask_all, cpu_seconds, serve

OURS, THEIRS = "pippin", "mlx-lm"
LARGEST_OVERHEAD = 0.05  # of a step, per streamed token


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured."""

    size: Size = FULL
    rounds: int = 5
    alone: int = 3  # rounds without servers for each round with them: they are short, and so noisier
    streams: int = 16
    prompt: int = 128
    steps: int = 32
    prefix: int = 1024
    suffix: int = 16
    answer: int = 16
    served_steps: int = 48


QUICK = Scale(SMALL, rounds=1, alone=1, streams=4, prompt=24, steps=4, prefix=64, suffix=8, answer=4, served_steps=6)


@dataclass(slots=True)
class Result:
    """One comparison: a number a round for each side. ``floor`` is the ratio of ours to theirs that we promise."""

    name: str
    unit: str
    floor: float
    more_is_better: bool = True
    values: dict[str, list[float]] = field(default_factory=lambda: {OURS: [], THEIRS: []})

    @property
    def ratio(self) -> float:
        """How many times better ours is: the median over the rounds."""
        pairs = zip(self.values[OURS], self.values[THEIRS], strict=True)
        return statistics.median(a / b if self.more_is_better else b / a for a, b in pairs)

    @property
    def best_ratio(self) -> float:
        """The same of each side's best round, which a busy machine disturbs least."""
        best = max if self.more_is_better else min
        ours, theirs = best(self.values[OURS]), best(self.values[THEIRS])
        return ours / theirs if self.more_is_better else theirs / ours

    @property
    def verdict(self) -> str:
        slower = "" if self.ratio >= 1 else f"{1 / self.ratio:.2f} times SLOWER than mlx-lm; "
        return slower + (f"≥ {self.floor:g}: ok" if self.ratio >= self.floor else f"under the {self.floor:g} promised")


@dataclass(frozen=True, slots=True)
class Overhead:
    """What serving costs beside computing, at ``streams`` streams.

    ``step`` is the seconds of an engine's step alone; ``http_cpu`` the HTTP process's CPU seconds per streamed
    token (None where unknown); ``served_step`` the seconds between tokens that a client sees.
    """

    streams: int
    step: float
    served_step: float
    http_cpu: float | None

    @property
    def share(self) -> float | None:
        """CPU time of the server per streamed token, as a share of a step."""
        return None if self.http_cpu is None else self.http_cpu / self.step


@dataclass(slots=True)
class Report:
    """Everything that a run found."""

    results: list[Result]
    overheads: list[Overhead]
    environment: dict[str, str]
    notes: list[str]


Tick = Callable[[str], None]


def measure(scale: Scale, directory: Path, tick: Tick) -> Report:
    """Runs all comparisons; ``tick`` is called with a label before each of ``ticks(scale)`` parts."""
    tick("checkpoint")
    found = environment()
    checkpoint = make_checkpoint(directory / "qwen3", scale.size)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    results, notes, step = without_servers(scale, checkpoint, tick)
    served, overheads = over_http(scale, checkpoint, tokenizer, step, directory, tick)
    results.append(served)
    notes.append("mlx_lm.server was given a listen queue of 128: with its own, of 5, it resets some of 16 clients.")
    return Report(results, overheads, found, notes)


def ticks(scale: Scale) -> int:
    return 1 + 2 + 2 * (scale.alone * scale.rounds + 1) + 2 + 3 * scale.rounds


def turns(rounds: int) -> Iterator[tuple[int, tuple[str, str]]]:
    """Each round's order; they take turns in beginning."""
    for i in range(rounds):
        yield i, (OURS, THEIRS) if i % 2 == 0 else (THEIRS, OURS)


def without_servers(scale: Scale, checkpoint: Path, tick: Tick) -> tuple[list[Result], list[str], float]:
    """Prefill and decode; also the seconds of one of our decode steps."""
    prefill = Result(f"prefill, {scale.streams} prompts of {scale.prompt} tokens", "tok/s", 1.5)
    decode = Result(f"decode, {scale.streams} streams", "tok/s", 1.0)
    rng, agreed, total = random.Random(1), 0, 0
    with ExitStack() as stack:
        generators: dict[str, Run] = {}
        for name in (OURS, THEIRS):
            tick(f"load {name}")
            generators[name] = stack.enter_context(generator(name, checkpoint))
        for i, order in turns(scale.alone * scale.rounds + 1):
            prompts = [[rng.randrange(1, scale.size.vocab) for _ in range(scale.prompt)] for _ in range(scale.streams)]
            answers = []
            for name in order:
                tick(f"prefill and decode, {name}")
                timing = generators[name](prompts, scale.steps)
                answers.append([tokens[: scale.steps] for tokens in timing.tokens])
                if i:  # the first round warms up
                    prefill.values[name].append(scale.streams * scale.prompt / timing.prefill)
                    decode.values[name].append(scale.streams * scale.steps / timing.decode)
            agreed += sum(a == b for a, b in zip(*answers, strict=True))
            total += scale.streams
    notes = [f"{agreed} of {total} greedy answers agree token for token."]
    return [prefill, decode], notes, scale.streams / statistics.median(decode.values[OURS])


def over_http(
    scale: Scale, checkpoint: Path, tokenizer: Tokenizer, step: float, directory: Path, tick: Tick
) -> tuple[Result, list[Overhead]]:
    """Requests that share a new prefix, sent at once; and what streaming costs our server."""
    name = f"{scale.streams} requests sharing {scale.prefix} tokens, HTTP"
    shared, overheads, rng = Result(name, "s", 4.0, more_is_better=False), list[Overhead](), random.Random(2)
    with ExitStack() as stack:
        servers: dict[str, Server] = {}
        for name in (OURS, THEIRS):
            tick(f"start {name}'s server")
            servers[name] = stack.enter_context(serve(name, checkpoint, directory / f"{name}.log"))
            ask_all(servers[name], [text_of(tokenizer, rng, 40)] * 2, 4)
        for _, order in turns(scale.rounds):
            prefix = text_of(tokenizer, rng, scale.prefix)
            prompts = [f"{prefix} {text_of(tokenizer, rng, scale.suffix)}" for _ in range(scale.streams)]
            for name in order:
                tick(f"shared prefix, {name}'s server")
                seconds, answers = ask_all(servers[name], prompts, scale.answer)
                if any(a.tokens != scale.answer for a in answers):
                    raise RuntimeError(f"{name} answered with other than {scale.answer} tokens")
                shared.values[name].append(seconds)
            tick("streaming")
            overheads.append(overhead(scale, servers[OURS], tokenizer, rng, step))
    return shared, overheads


def overhead(scale: Scale, server: Server, tokenizer: Tokenizer, rng: random.Random, step: float) -> Overhead:
    """One round of streaming from our server."""
    prompts = [text_of(tokenizer, rng, scale.prompt) for _ in range(scale.streams)]
    before = cpu_seconds(server)
    _, answers = ask_all(server, prompts, scale.served_steps)
    after = cpu_seconds(server)
    tokens = sum(a.tokens for a in answers)
    gaps = [later - earlier for a in answers for earlier, later in pairwise(a.arrivals)]
    cpu = None if before is None or after is None else (after - before) / tokens
    return Overhead(scale.streams, step, statistics.median(gaps), cpu)


def environment() -> dict[str, str]:
    """What the numbers depend on."""
    return {
        "machine": f"{platform.system()} {platform.machine()}",
        "CPUs": str(os.cpu_count()),
        "load before": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        "mlx": version("mlx"),
        "mlx-lm": version("mlx-lm"),
        "blas": "OpenBLAS" if HAS_OPENBLAS else "MLX's own",
        "when": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    }


# --- the report ---


def show(report: Report, console: Console) -> None:
    """The table, then what is slower, then the overhead."""
    title = "Pippin against mlx-lm on the CPU: median of the rounds (best round)"
    table = Table("", OURS, THEIRS, "ratio", "", title=title)
    for r in report.results:
        best = max if r.more_is_better else min
        cells = [f"{statistics.median(v):.2f} ({best(v):.2f}) {r.unit}" for v in (r.values[OURS], r.values[THEIRS])]
        style = "green" if r.ratio >= r.floor else "yellow" if r.ratio >= 1 else "red"
        table.add_row(r.name, *cells, f"[{style}]{r.ratio:.2f}[/] ({r.best_ratio:.2f})", r.verdict)
    console.print(table)
    for line in (*overhead_lines(report.overheads), *slower_lines(report.results), *report.notes):
        console.print(line)
    if float(report.environment["load before"]) > 0.5:
        console.print("The machine was busy with other work: trust the best rounds more, and a quiet machine most.")
    console.print(", ".join(f"{key} {value}" for key, value in report.environment.items()))


def overhead_lines(overheads: Sequence[Overhead]) -> list[str]:
    streams, step = overheads[0].streams, overheads[0].step
    served = statistics.median(o.served_step for o in overheads)
    lines = [
        f"A step of {streams} streams takes {step * 1e3:.1f} ms in the engine alone; clients of the server see a token "
        f"every {served * 1e3:.1f} ms, both processes and the client sharing the CPUs."
    ]
    shares = [o.share for o in overheads if o.share is not None]
    if not shares:
        return [*lines, "The HTTP process's CPU time is not known on this system."]
    share = statistics.median(shares)
    verdict = "ok" if share <= LARGEST_OVERHEAD else "too much"
    cost = f"{share * step * 1e3:.2f} ms of CPU time, {share:.1%} of a step (≤ {LARGEST_OVERHEAD:.0%}: {verdict})"
    return [*lines, f"A streamed token costs the HTTP process {cost}; all {streams} together {share * streams:.0%}."]


def slower_lines(results: Sequence[Result]) -> list[str]:
    slower = [r for r in results if r.ratio < 1]
    if not slower:
        return ["Nothing measured here is slower than mlx-lm."]
    return [f"Slower than mlx-lm: {r.name}, {1 / r.ratio:.2f} times." for r in slower]


def save(report: Report, path: Path) -> None:
    """Appends a JSON line for each result and each round's overhead."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for r in report.results:
            line = asdict(r) | {"ratio": r.ratio, "best_ratio": r.best_ratio, "environment": report.environment}
            file.write(json.dumps(line) + "\n")
        for o in report.overheads:
            line = {"name": "overhead", "share": o.share} | asdict(o) | {"environment": report.environment}
            file.write(json.dumps(line) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.cpu", description=__doc__)
    parser.add_argument("--rounds", type=int, default=Scale().rounds, help="how often each side runs (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tiny model and one round: does it run at all?")
    parser.add_argument("--json", type=Path, default=Path("build/bench-cpu.jsonl"), help="where results are appended")
    parser.add_argument("--report", type=Path, default=Path("build/bench-cpu.txt"), help="where the table goes, too")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    scale = QUICK if options.quick else Scale(rounds=options.rounds)
    console = Console(record=True, width=None if sys.stdout.isatty() else 160)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with tempfile.TemporaryDirectory() as directory, Progress(*columns, transient=True) as progress:
        task = progress.add_task("", total=ticks(scale))

        def tick(label: str) -> None:
            progress.update(task, description=label, advance=1)

        report = measure(scale, Path(directory), tick)
    show(report, console)
    save(report, options.json)
    options.report.parent.mkdir(parents=True, exist_ok=True)
    options.report.write_text(console.export_text())
    print(f"Saved to {options.json} and {options.report}.")


if __name__ == "__main__":
    main()
