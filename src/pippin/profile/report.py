"""A timeline's summary in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pippin.profile.summary import Summary


def show_summary(summary: Summary, console: Console, top: int = 10) -> None:
    """Prints lanes, stages, the ``top`` slowest steps and the ``top`` longest gaps."""
    about = summary.about
    where = " · ".join(escape(str(about[name])) for name in ("model", "device", "written") if about.get(name))
    console.print(f"[bold]{summary.wall:.1f} ms[/bold]{' · ' + where if where else ''}")
    if about.get("error"):
        console.print(f"[red]{escape(str(about['error']))}[/red]")
    console.print(_lanes(summary))
    if summary.steps:
        console.print(_stages(summary))
        console.print(_device(summary))
        console.print(_steps(summary, top))
    if summary.gaps:
        console.print(_gaps(summary, top))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    return table


def _lanes(summary: Summary) -> Table:
    table = _table("Time by lane", "lane", "spans", "busy ms", "of wall", "mean ms", "longest ms")
    process = ""
    for lane in summary.lanes:
        if lane.process != process:
            process = lane.process
            table.add_row(f"[dim]{escape(process)}[/dim]")
        name = f"  {escape(lane.lane)}" + (f" ({lane.rows} at once)" if lane.rows > 1 else "")
        mean, share = lane.total / lane.count, lane.busy / summary.wall if summary.wall else 0.0
        table.add_row(name, str(lane.count), f"{lane.busy:.2f}", f"{share:.1%}", f"{mean:.3f}", f"{lane.longest:.3f}")
    return table


def _stages(summary: Summary) -> Table:
    table = _table("Device steps by stage", "stage", "steps", "ms", "prefill", "decode", "cached", "tok/s")
    for stage in summary.stages:
        tokens = stage.prefill_tokens + stage.decode_tokens
        rate = f"{1000 * tokens / stage.busy:.0f}" if stage.busy else ""
        counts = (stage.prefill_tokens, stage.decode_tokens, stage.cached_tokens)
        table.add_row(stage.stage, str(stage.steps), f"{stage.busy:.2f}", *map(str, counts), rate)
    return table


def _device(summary: Summary) -> str:
    lost, steps = sum(gap.length for gap in summary.gaps), len(summary.steps)
    return (
        f"{len(summary.gaps)} gaps between device steps, {lost:.2f} ms together; "
        f"{summary.early} of {steps} steps were done before the host asked"
    )


def _steps(summary: Summary, top: int) -> Table:
    table = _table(f"Slowest of {len(summary.steps)} steps", "batch", "step", "at ms", "ms", "waited ms")
    for step in summary.steps[:top]:
        times = (f"{step.start:.1f}", f"{step.length:.3f}", f"{step.waited:.3f}")
        table.add_row(escape(step.label), _number(step.number), *times)
    return table


def _gaps(summary: Summary, top: int) -> Table:
    table = _table(f"Longest of {len(summary.gaps)} gaps", "before", "step", "at ms", "ms")
    for gap in summary.gaps[:top]:
        table.add_row(escape(gap.label), _number(gap.number), f"{gap.start:.1f}", f"{gap.length:.3f}")
    return table


def _number(step: int | None) -> str:
    return "" if step is None else str(step)
