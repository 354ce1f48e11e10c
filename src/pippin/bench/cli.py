"""``pippin bench``: parse, call one function."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from pippin.backend import prepare
from pippin.bench.options import KernelOptions, OfflineOptions, OneBatchOptions
from pippin.bench.serving_options import DatasetOptions, LoadOptions, TargetOptions
from pippin.config import EngineConfig
from pippin.options import PANELS, with_options

bench = typer.Typer(
    name="bench",
    help="Measure: one batch, the engine alone, a server under load. Each result is a line of JSON on standard output.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

PANELS.update({TargetOptions: "Server that is measured", LoadOptions: "Load", DatasetOptions: "Prompts and answers"})


class ManyValues(TyperCommand):
    """A command whose list options take several values at once, as SGLang's do: ``--batch-size 1 8 32``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        lists = {name for p in self.params if p.multiple for name in p.opts}
        found: list[str] = super().parse_args(ctx, spread(args, lists))
        return found


def spread(arguments: Sequence[str], lists: set[str]) -> list[str]:
    """``--a 1 2`` as ``--a 1 --a 2`` for the options in ``lists``; all else as it is."""
    found: list[str] = []
    at = 0
    while at < len(arguments):
        name = arguments[at]
        at += 1
        values = list(takewhile(lambda a: not a.startswith("-"), arguments[at:])) if name in lists else []
        found += [word for value in values for word in (name, value)] or [name]
        at += len(values)
    return found


@bench.command("offline", cls=ManyValues)
@with_options
def offline(engine: EngineConfig, options: OfflineOptions, dataset: DatasetOptions) -> None:
    """Serve many requests at once by the engine alone, without HTTP: throughput, cached tokens, memory."""
    prepare()  # before any import of MLX
    from pippin.bench.offline import run

    raise typer.Exit(run(engine, options, dataset))


@bench.command("one-batch", cls=ManyValues)
@with_options
def one_batch(engine: EngineConfig, options: OneBatchOptions) -> None:
    """Prefill and decode one batch of random tokens, without a server: latency, throughput, bandwidth, memory."""
    prepare()  # before any import of MLX
    from pippin.bench.one_batch import run

    raise typer.Exit(run(engine, options))


@bench.command("serving", cls=ManyValues)
@with_options
def serving(target: TargetOptions, load: LoadOptions, dataset: DatasetOptions) -> None:
    """Put load on a server, OpenAI's kind or SGLang's: throughput, latencies, goodput, cached tokens, errors."""
    from pippin.bench.serving import run

    raise typer.Exit(run(target, load, dataset))


@bench.command("kernels", cls=ManyValues)
@with_options
def kernels(options: KernelOptions) -> None:
    """Time each kernel: microseconds, share of what a copy moves, and how much faster than MLX's own operation."""
    prepare()  # before any import of MLX
    from pippin.bench.kernels import run

    run(options)


@bench.command("report")
def report(
    files: Annotated[list[Path], typer.Argument(help="Result files: JSON lines of any of the benchmarks.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Its heading.")] = "Benchmarks",
) -> None:
    """Join result files into one HTML page with plots, that needs no network."""
    from pippin.bench.report import run

    number = run(files, output, title)
    typer.echo(f"{output}: {number} results", err=True)
