"""``pippin bench report``: result files as one HTML page that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from pippin.bench.report_charts import Chart, svg
from pippin.bench.report_groups import OURS, Group, make_groups
from pippin.bench.report_read import read_any
from pippin.bench.results import BenchResult
from pippin.errors import ConfigError


def run(paths: Sequence[Path], output: Path, title: str) -> int:
    """Writes the page; how many results it shows. Raises ConfigError for a file that can't be read or written."""
    results = read_any(paths)
    page = render(results, title)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{output} can't be written: {error.strerror}", "--output") from error
    return len(results)


def render(results: Sequence[BenchResult], title: str) -> str:
    """The page. Whatever a file holds is text in it, never markup."""
    groups = make_groups(results)
    colors = color_numbers(groups)
    template = Environment(
        loader=PackageLoader("pippin.bench", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    ).get_template("report.html.j2")
    return template.render(
        title=title,
        summary=summary(results),
        versions=versions(results),
        groups=groups,
        draw=lambda chart: svg(chart, lambda name: colors[name]),
    )


def color_numbers(groups: Sequence[Group]) -> dict[str, int]:
    """The same colour for the same name in the whole page: ours the first, then as they come."""
    charts: list[Chart] = [chart for group in groups for chart in group.charts]
    names = dict.fromkeys(name for chart in charts for name in chart.series)
    ours = [name for name in names if name.partition(",")[0] == OURS and "/" not in name]
    # Cold and warm, and ratios, stand in plots of their own, with colours of their own.
    fixed = {"cold": 2, "warm": 3}
    rest = [name for name in names if name not in ours and name not in fixed]
    peers = {name: i + 1 for i, name in enumerate(n for n in rest if "/" not in n)}
    ratios = {name: peers.get(name.partition(" / ")[2], 0) for name in rest if "/" in name}
    return {name: 0 if i == 0 else len(peers) + i for i, name in enumerate(ours)} | peers | ratios | fixed


def summary(results: Sequence[BenchResult]) -> str:
    days = sorted({r.when[:10] for r in results if r.when})
    sides = dict.fromkeys(r.side for r in results)
    span = " to ".join(dict.fromkeys([days[0], days[-1]])) if days else ""
    number = f"{len(results)} result{'s' * (len(results) != 1)}"
    return " · ".join(filter(None, [number, ", ".join(sides), span]))


def versions(results: Sequence[BenchResult]) -> str:
    found: dict[str, dict[str, None]] = {}
    for result in results:
        for name, version in result.versions.items():
            found.setdefault(name, {})[version] = None
        if result.commit:
            found.setdefault("commit", {})[result.commit] = None
    return " · ".join(f"{name} {', '.join(each)}" for name, each in found.items())
