"""What ``pippin bench serving`` shows: a bar while it goes on, a table when it is done. All on stderr."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from pippin.bench.results import BenchResult, Value
from pippin.bench.serving_load import Watch, clock

REFRESH = 0.2

LATENCIES = (
    ("time to first token", "ttft"),
    ("time per output token", "tpot"),
    ("between tokens", "itl"),
    ("end to end", "e2e_latency"),
)
COLUMNS = ("mean", "median", "p90", "p99")


@asynccontextmanager
async def shown(watch: Watch, title: str, console: Console, quiet: bool) -> AsyncIterator[None]:
    """A bar with what is running, failed, and tokens a second; nothing where stderr is no terminal."""
    if quiet or not console.is_terminal:
        yield
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[now]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        refresher = asyncio.create_task(_refresh(progress, progress.add_task(title, now="", total=None), watch))
        try:
            yield
        finally:
            refresher.cancel()
            with suppress(asyncio.CancelledError):
                await refresher


async def _refresh(progress: Progress, task: TaskID, watch: Watch) -> None:
    began = clock()
    while True:
        rate = watch.tokens / max(clock() - began, 1e-9)
        failed = f" · [red]{watch.failed} failed[/]" if watch.failed else ""
        now = f"{watch.running} running · {rate:.0f} tok/s{failed}"
        progress.update(task, completed=watch.done, total=watch.total, now=now)
        await asyncio.sleep(REFRESH)


def table(result: BenchResult, stopped: bool, unfinished: int) -> Table:
    """A result for people. Latencies in milliseconds."""
    figures, settings = result.figures, result.settings
    bound, rate = settings["max_concurrency"] or "no bound", settings["request_rate"]
    title = f"{result.side} · {settings['dataset_name']} · at once {bound} · requests/s {rate}"
    if stopped:
        title += f" · stopped with {unfinished} running"
    found = Table(title=escape(title), title_justify="left", show_header=False, box=None, pad_edge=False)
    found.add_column(style="dim")
    for _ in COLUMNS:
        found.add_column(justify="right")
    for name, text in _counts(figures):
        found.add_row(name, text)
    found.add_row()
    found.add_row("milliseconds", *COLUMNS, style="dim")
    for title, name in LATENCIES:
        found.add_row(title, *(number(figures[f"{column}_{name}_ms"]) for column in COLUMNS))
    return found


def _counts(figures: dict[str, Value]) -> list[tuple[str, str]]:
    rows = [
        ("requests", f"{figures['completed']} answered, {figures['errors']} failed in {number(figures['duration'])} s"),
        ("requests/s", number(figures["request_throughput"])),
        ("tokens", f"{number(figures['total_input_tokens'])} in, {number(figures['total_output_tokens'])} out"),
        ("tokens/s", f"{number(figures['input_throughput'])} in, {number(figures['output_throughput'])} out"),
        ("at once, on average", number(figures["concurrency"])),
    ]
    if figures["cached_tokens"] is not None:
        rows.append(("prompt tokens cached", f"{figures['cached_tokens']} ({share(figures['cache_hit_rate'])})"))
    if figures["median_ttft_warm_ms"] is not None and figures["median_ttft_cold_ms"] is not None:
        cold, warm = number(figures["median_ttft_cold_ms"]), number(figures["median_ttft_warm_ms"])
        rows.append(("first token, median ms", f"{cold} cold, {warm} warm"))
    if figures["good_share"] is not None:
        rows.append(("goodput", f"{number(figures['request_goodput'])} requests/s ({share(figures['good_share'])})"))
    if figures["output_counted_by"] == "events":
        rows.append(("", "the server does not count tokens: each event with text counts as one"))
    return rows


def number(value: Value) -> str:
    """With about three digits that matter."""
    if not isinstance(value, int | float):
        return "-"
    return f"{value:.0f}" if isinstance(value, int) or value >= 100 else f"{value:.3g}"


def share(value: Value) -> str:
    return f"{100 * value:.0f} %" if isinstance(value, int | float) else "-"


def errors(figures: dict[str, Value]) -> list[str]:
    """A line for each kind of error: how many, and one of them."""
    samples = figures["error_samples"]
    kinds = figures["error_kinds"]
    assert isinstance(kinds, list)
    assert isinstance(samples, list)
    return [f"{kind} ({str(sample).partition(': ')[2]})" for kind, sample in zip(kinds, samples, strict=True)]
