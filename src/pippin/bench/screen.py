"""What benchmarks show on standard error; their results go to standard output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

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
