"""``pippin bench serving``: load on a server, from options to figures."""

from __future__ import annotations

import asyncio
import math
import os
import resource
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import aiohttp
from rich.console import Console

from pippin.bench.results import BenchResult, Value, append, make_result, to_line
from pippin.bench.serving_api import BACKENDS
from pippin.bench.serving_data import Conversation, make_dataset
from pippin.bench.serving_figures import details, figures
from pippin.bench.serving_load import Run, Target, Watch, arrivals, run_load, session
from pippin.bench.serving_options import DatasetOptions, LoadOptions, TargetOptions
from pippin.bench.serving_show import errors, shown, table
from pippin.bench.serving_target import Facts, find_ruler, look, named, post, warm_up

INTERRUPTED = 130
OPEN_FILES = 65535
LENGTHS_KNOWN_BY = {
    "tokenizer": "lengths by --tokenizer",
    "token ids": "prompts are token ids",
    "server": "lengths by the server's count of two prompts",
    "guess": "the server counts no prompt tokens: 1.3 a word is taken; --tokenizer makes lengths exact",
}


def run(target: TargetOptions, load: LoadOptions, dataset: DatasetOptions) -> int:
    """Runs each rate with each bound, and prints a table and a line of JSON for each.

    The exit status: 0, 1 if a run had no request answered, 130 if Ctrl-C ended it (with the figures so far).
    Raises ConfigError for options that can't be met, EngineError if the server can't be reached or fails at once.
    """
    raise_open_files()
    if load.output_file is not None:
        append(Path(load.output_file), [], "--output-file")  # rather now than after an hour
    return asyncio.run(Bench(target, load, dataset, Console(stderr=True)).run())


def raise_open_files() -> None:
    """A connection is a file, and many systems allow 256 or 1024 to begin with."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@dataclass(frozen=True, slots=True)
class Bench:
    """One command: a server, a dataset, one or several loads."""

    target: TargetOptions
    load: LoadOptions
    dataset: DatasetOptions
    console: Console

    async def run(self) -> int:
        """The exit status; raises as ``run`` above does."""
        options = self.target
        target = Target(
            options.url,
            BACKENDS[options.backend],
            stream=not options.disable_stream,
            to_length=not options.disable_ignore_eos,
            timeout=options.request_timeout,
            extra=options.extra_body,
        )
        async with session(os.environ.get("OPENAI_API_KEY")) as http:
            facts = await look(http, target.url)
            target = named(target, facts, options)
            ruler, known_by = await find_ruler(http, target, options, self.dataset, facts)
            self.console.print(f"[dim]{LENGTHS_KNOWN_BY[known_by]}[/]", highlight=False)
            status = 0
            for number, (rate, bound) in enumerate(self._loads()):
                # Other prompts each time: else all but the first run would be answered from the cache.
                seed = self.load.seed + number
                asked = make_dataset(self.dataset, self.load.num_prompts, seed, ruler)
                await warm_up(http, target, asked[: options.warmup_requests], ruler, seed)
                if options.flush_cache:
                    await self._tell(http, target, "/flush_cache")
                done = await self._one(http, target, asked, rate, bound)
                result = self._result(target, facts, done, rate, bound, known_by)
                self._report(result, done)
                if done.stopped:
                    return INTERRUPTED
                status = max(status, int(result.figures["completed"] == 0))
            return status

    def _loads(self) -> Iterator[tuple[float, int | None]]:
        for rate in self.load.rates:
            for bound in self.load.bounds:
                yield rate, bound

    async def _one(
        self, http: aiohttp.ClientSession, target: Target, asked: Sequence[Conversation], rate: float, bound: int | None
    ) -> Run:
        due = arrivals(len(asked), rate, self.load.burstiness, self.load.seed)
        watch = Watch()
        if self.target.profile:
            await self._tell(http, target, "/start_profile")
        async with shown(watch, f"at once {bound or '∞'}", self.console, self.load.disable_tqdm):
            done = await run_load(http, target, asked, due, bound, watch)
        if self.target.profile:
            await self._tell(http, target, "/stop_profile")
        return done

    async def _tell(self, http: aiohttp.ClientSession, target: Target, path: str) -> None:
        if problem := await post(http, target.url, path):
            self.console.print(f"the server did not do it: {problem}", style="yellow", highlight=False, markup=False)

    def _result(
        self, target: Target, facts: Facts, done: Run, rate: float, bound: int | None, known_by: str
    ) -> BenchResult:
        load, dataset = self.load, self.dataset
        settings: dict[str, Value] = {
            "backend": self.target.backend,
            "url": target.url,
            "num_prompts": load.num_prompts,
            "request_rate": "inf" if math.isinf(rate) else rate,
            "burstiness": load.burstiness,
            "max_concurrency": bound,
            "seed": load.seed,
            "goodput": list(load.goodput or ()),
            "stream": target.stream,
            "prompt_lengths_by": known_by,
            "ignore_eos": target.to_length and target.backend.ignore_eos,
            "extra_request_body": self.target.extra_request_body,
            "warmup_requests": self.target.warmup_requests,
        }
        found = figures(done.answers, done.seconds, load.goals) | {
            "unfinished": done.unfinished,
            "stopped": done.stopped,
        }
        return make_result(
            "serving",
            run_name=load.run_name,
            side=load.tag or facts.owner or self.target.backend,
            model=target.model,
            device=facts.device or "unknown",
            settings=settings | asdict(dataset),
            figures=found | (details(done.answers) if load.output_details else {}),
            versions={"server": facts.version} if facts.version else None,
        )

    def _report(self, result: BenchResult, done: Run) -> None:
        self.console.print(table(result, done.stopped, done.unfinished), highlight=False)
        for line in errors(result.figures):
            self.console.print(line, style="red", highlight=False, markup=False)
        sys.stdout.write(to_line(result) + "\n")
        sys.stdout.flush()
        if self.load.output_file is not None:
            append(Path(self.load.output_file), [result], "--output-file")
