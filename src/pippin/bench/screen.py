"""What benchmarks show on standard error; their results go to standard output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from pippin.bench.results import BenchResult, append, to_line

Tick = Callable[[str], None]


def stderr() -> Console:
    """A console on standard error, wide enough for tables where there is no terminal to ask."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        console.width = 140
    return console


@contextmanager
def bar(console: Console, total: int) -> Iterator[Tick]:
    """A progress bar that is gone afterwards; what it yields is called with a label before each part."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total, completed=-1)
        yield lambda label: progress.update(task, description=label, advance=1)


def writer(filename: str | None) -> Callable[[Sequence[BenchResult]], None]:
    """What writes results: as lines of JSON to standard output, and to a file if one is named.

    Raises ConfigError naming ``--result-filename`` now if the file can't be written.
    """
    if filename:
        append(Path(filename), [])

    def write(results: Sequence[BenchResult]) -> None:
        for result in results:
            typer.echo(to_line(result))
        if filename:
            append(Path(filename), results)

    return write
