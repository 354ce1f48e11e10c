"""From results to what a report shows: which belong together, and which plots and tables they make."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pippin.bench.report_charts import Chart, number
from pippin.bench.results import BenchResult, Value

OURS = "pippin"
TITLES = {
    "serving": "Servers under load",
    "one-batch": "One batch, without a server",
    "offline": "The engine alone",
    "gpu": "On a GPU, without a server",
}

LARGEST = 1e15

# What a load is put on, and not what load it is: results that agree in these are drawn together.
WORKLOAD = (
    "dataset_name", "num_prompts", "random_input_len", "random_output_len", "random_range_ratio",
    "gsp_num_groups", "gsp_prompts_per_group", "gsp_system_prompt_len", "gsp_question_len", "gsp_output_len",
    "num_turns", "think_time", "num_documents", "document_len", "questions_per_document", "question_len",
)  # fmt: skip
OF_DATASET = {
    "random": ("num_prompts", "random_"),
    "random-ids": ("num_prompts", "random_"),
    "sharegpt": ("num_prompts",),
    "generated-shared-prefix": ("gsp_",),
    "multi-turn": ("num_prompts", "random_", "num_turns", "think_time"),
    "long-document": ("num_documents", "document_len", "question", "random_output_len", "random_range_ratio"),
}


@dataclass(frozen=True, slots=True)
class Group:
    """One part of a report."""

    title: str
    subtitle: str
    charts: list[Chart]
    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True, slots=True)
class Column:
    """A figure in a table, with its unit in the name; ``scale`` makes that unit of the figure's."""

    name: str
    figure: str
    scale: float = 1.0


@dataclass(slots=True)
class Points:
    """Results of one group as values over x, by series. Several results at one point count by their median.

    A series is a side; where one side has results of several run names or backends, these are in its name.
    """

    results: list[BenchResult]
    x_of: Callable[[BenchResult], Value]
    series: list[str] = field(init=False)
    xs: list[Value] = field(init=False)

    def __post_init__(self) -> None:
        self.results.sort(key=lambda r: (r.side != OURS, r.side))
        self.series = list(dict.fromkeys(map(self.name_of, self.results)))
        self.xs = sorted(dict.fromkeys(map(self.x, self.results)), key=_order)

    def x(self, result: BenchResult) -> Value:
        """Where it stands; a list, which only a foreign file has there, by its text."""
        found = self.x_of(result)
        return str(found) if isinstance(found, list) else found

    def name_of(self, result: BenchResult) -> str:
        same = [r for r in self.results if r.side == result.side]
        runs, backends = {r.run_name for r in same}, {str(r.settings.get("backend")) for r in same}
        more = [str(result.settings.get("backend"))] * (len(backends) > 1) + [result.run_name] * (len(runs) > 1)
        return ", ".join([result.side, *more])

    def values(self, figure: str) -> dict[str, list[float | None]]:
        """A line for each series that has the figure at all."""
        found = {name: [self._at(name, x, figure) for x in self.xs] for name in self.series}
        return {name: line for name, line in found.items() if any(v is not None for v in line)}

    def _at(self, name: str, x: Value, figure: str) -> float | None:
        here = [r for r in self.results if self.name_of(r) == name and self.x(r) == x]
        known = [v for r in here if (v := numeric(r.figures.get(figure))) is not None]
        return statistics.median(known) if known else None


def _order(x: Value) -> tuple[bool, float, str]:
    """Numbers first, in order; no bound is beyond every number."""
    known = numeric(x)
    return known is None, known or 0.0, str(x)


def numeric(value: Value) -> float | None:
    """A number that can be drawn; None for all else."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST
    return float(value) if known else None  # type: ignore[arg-type]


def make_groups(results: Sequence[BenchResult]) -> list[Group]:
    """All parts, servers first. Kinds that nobody knows here get a table."""
    found: dict[tuple[Any, ...], list[BenchResult]] = {}
    for result in results:
        found.setdefault((rank(result.kind), result.kind, *key_of(result)), []).append(result)
    return [MAKERS.get(key[1], other)(group) for key, group in sorted(found.items(), key=lambda item: str(item[0]))]


def rank(kind: str) -> int:
    return list(TITLES).index(kind) if kind in TITLES else len(TITLES)


def key_of(result: BenchResult) -> tuple[Any, ...]:
    """What results of a kind must share to be drawn together."""
    settings = result.settings
    match result.kind:
        case "serving":
            workload = tuple(str(settings.get(name)) for name in WORKLOAD if belongs(name, settings))
            return (last(result.model), *workload)
        case "one-batch":
            return (last(result.model), result.device, str(settings.get("input_len")), str(settings.get("output_len")))
        case "gpu":
            return (last(result.model), result.device, str(settings.get("context")))
        case _:
            return (last(result.model), result.device)


def last(model: str) -> str:
    """A model's name without the directory that it is in."""
    return model.rstrip("/").rpartition("/")[2]


def belongs(name: str, settings: Mapping[str, Value]) -> bool:
    """Whether a setting has to do with the dataset."""
    used = OF_DATASET.get(str(settings.get("dataset_name")), ())
    return name == "dataset_name" or name.startswith(used)


def about(results: Iterable[BenchResult], *more: str) -> str:
    """Models and devices, and what else there is to say."""
    models = dict.fromkeys(last(r.model) for r in results)
    devices = dict.fromkeys(r.device for r in results if r.device != "unknown")
    return " · ".join([", ".join(models), *([", ".join(devices)] if devices else []), *filter(None, more)])


def lines(points: Points, title: str, unit: str, figure: str, x_title: str, note: str = "") -> list[Chart]:
    """A plot of one figure over x; bars where there is one x. None if nobody has the figure."""
    values = points.values(figure)
    if not values:
        return []
    labels = [label(x) for x in points.xs]
    if len(labels) > 1:
        return [Chart(title, unit, labels, values, "line", x_title, note)]
    return [Chart(title, unit, labels if labels[0] else [" "], values, "bar", x_title, note)]


def label(x: Value) -> str:
    return "no bound" if x is None else number(x) if isinstance(x, int | float) else str(x)


def versus(points: Points, figure: str, what: str, x_title: str) -> list[Chart]:
    """How many times ours is of each peer."""
    values = points.values(figure)
    ours = {name: line for name, line in values.items() if name.partition(",")[0] == OURS}
    ratios = {
        f"{name} / {peer}": [a / b if a is not None and b else None for a, b in zip(line, theirs, strict=True)]
        for name, line in ours.items()
        for peer, theirs in values.items()
        if peer not in ours
    }
    if not any(value is not None for line in ratios.values() for value in line):
        return []
    title = f"Ours against peers: {what}"
    note = "Above 1 Pippin is ahead."
    return [Chart(title, "times", [label(x) for x in points.xs], ratios, "bar", x_title, note)]


def percentiles(points: Points, name: str, title: str) -> list[Chart]:
    """Median to p99 of one latency at the largest load that all have measured."""
    common = [
        x
        for x in points.xs
        if all(line[points.xs.index(x)] is not None for line in points.values(f"p99_{name}_ms").values())
    ]
    if not common:
        return []
    at = points.xs.index(common[-1])
    kinds = ("median", "p90", "p95", "p99")
    found: dict[str, list[float | None]] = {}
    for kind in kinds:
        for series, line in points.values(f"{kind}_{name}_ms").items():
            found.setdefault(series, []).append(line[at])
    full = {series: line for series, line in found.items() if len(line) == len(kinds)}
    note = f"At the largest load: {load_of(points.xs[at])}." if len(points.xs) > 1 else ""
    return [Chart(title, "ms", kinds, full, "bar", "", note)] if full else []


def load_of(x: Value) -> str:
    return "no bound on requests at once" if x is None else f"{label(x)}"


def cold_and_warm(points: Points) -> list[Chart]:
    """Time to the first token of prompts whose beginning is new, and of those that were begun before."""
    rows = {kind: points.values(f"median_ttft_{kind}_ms") for kind in ("cold", "warm")}
    sides = [s for s in points.series if s in rows["cold"] and s in rows["warm"]]
    if not sides:
        return []
    series = {kind: [_first(rows[kind][side]) for side in sides] for kind in ("cold", "warm")}
    note = "Warm: the run sent at least half of the prompt before."
    return [Chart("Cold against warm: time to first token", "ms, median", sides, series, "bar", "", note)]


def _first(line: Iterable[float | None]) -> float | None:
    """The value at the smallest load, where requests wait least for one another."""
    return next((v for v in line if v is not None), None)


SERVING_COLUMNS = (
    Column("answered", "completed"), Column("failed", "errors"), Column("tok/s out", "output_throughput"),
    Column("requests/s", "request_throughput"), Column("TTFT ms", "median_ttft_ms"), Column("p99", "p99_ttft_ms"),
    Column("ITL ms", "median_itl_ms"), Column("p99", "p99_itl_ms"), Column("end to end ms", "median_e2e_latency_ms"),
    Column("p99", "p99_e2e_latency_ms"), Column("cached %", "cache_hit_rate", 100), Column("good %", "good_share", 100),
)  # fmt: skip


def serving(results: list[BenchResult]) -> Group:
    rates = {str(r.settings.get("request_rate")) for r in results}
    by_rate = len(rates) > len({str(r.settings.get("max_concurrency")) for r in results})
    x_name, x_title = ("request_rate", "requests a second") if by_rate else ("max_concurrency", "requests at once")
    points = Points(results, lambda r: r.settings.get(x_name))
    over = " against rate" if by_rate else " against concurrency"
    charts = [
        *lines(points, "Throughput" + over * (len(points.xs) > 1), "tokens/s", "output_throughput", x_title),
        *lines(points, "Time to first token", "ms, median", "median_ttft_ms", x_title),
        *lines(points, "Time between tokens", "ms, median", "median_itl_ms", x_title),
        *versus(points, "output_throughput", "tokens a second", x_title),
        *percentiles(points, "ttft", "Time to first token, percentiles"),
        *percentiles(points, "itl", "Time between tokens, percentiles"),
        *percentiles(points, "e2e_latency", "End to end, percentiles"),
        *cold_and_warm(points),
    ]
    return Group(
        TITLES["serving"], about(results, workload(results[0])), charts, *table(points, x_title, SERVING_COLUMNS)
    )


def workload(result: BenchResult) -> str:
    """The dataset in words."""
    settings = result.settings
    named = [name for name in WORKLOAD[1:] if belongs(name, settings) and settings.get(name) is not None]
    shown = [
        f"{name.removeprefix('random_').removeprefix('gsp_').replace('_', ' ')} {label(settings[name])}"
        for name in named
    ]
    return ": ".join(filter(None, [str(settings.get("dataset_name", "")), ", ".join(shown)]))


ONE_BATCH_COLUMNS = (
    Column("prefill ms", "prefill_latency", 1e3), Column("prefill tok/s", "prefill_throughput"),
    Column("decode step ms", "median_decode_latency", 1e3), Column("decode tok/s", "median_decode_throughput"),
    Column("bandwidth %", "bandwidth_share", 100), Column("peak GB", "peak_memory_bytes", 1e-9),
)  # fmt: skip


def one_batch(results: list[BenchResult]) -> Group:
    points = Points(results, lambda r: r.settings.get("batch_size"))
    settings = results[0].settings
    sizes = f"{label(settings.get('input_len'))} tokens in, {label(settings.get('output_len'))} out"
    charts = [
        *lines(points, "Decode against batch size", "tokens/s", "median_decode_throughput", "batch size"),
        *lines(points, "Prefill against batch size", "tokens/s", "prefill_throughput", "batch size"),
        *versus(points, "median_decode_throughput", "decoding", "batch size"),
        *versus(points, "prefill_throughput", "prefill", "batch size"),
    ]
    return Group(TITLES["one-batch"], about(results, sizes), charts, *table(points, "batch size", ONE_BATCH_COLUMNS))


GPU_FIGURES = ("decode", "prefill", "prompt_16k", "peak_gb", "weight_gb")
GPU_COLUMNS = (
    Column("decode tok/s", "decode"), Column("prefill tok/s", "prefill"),
    Column("16k prompt tok/s", "prompt_16k"), Column("peak GB", "peak_gb"),
)  # fmt: skip


def gpu(results: list[BenchResult]) -> Group:
    decodes = Points([r for r in results if "decode" in r.figures], lambda r: r.settings.get("streams"))
    prefills = Points([r for r in results if "prefill" in r.figures], lambda r: "")
    charts = [
        *lines(decodes, "Decode against streams", "tokens/s", "decode", "streams"),
        *lines(prefills, "Prefill", "tokens/s", "prefill", ""),
        *lines(Points(list(results), lambda r: ""), "A prompt of 16384 tokens", "tokens/s", "prompt_16k", ""),
        *versus(decodes, "decode", "decoding", "streams"),
        *versus(prefills, "prefill", "prefill", ""),
    ]
    everything = Points(results, lambda r: r.settings.get("streams") or "prefill")
    more = dict.fromkeys(n for r in results for n in r.figures if n not in GPU_FIGURES)
    columns = [*GPU_COLUMNS, *(Column(n.replace("_", " "), n) for n in more)]
    context = results[0].settings.get("context")
    said = "" if context is None else f"contexts of {context} tokens"
    return Group(TITLES["gpu"], about(results, said), charts, *table(everything, "streams", columns))


def other(results: list[BenchResult]) -> Group:
    """Any kind: bars of each throughput, and a table of all numbers."""
    points = Points(results, lambda r: "")
    names = list(dict.fromkeys(n for r in results for n, v in r.figures.items() if numeric(v) is not None))
    charts = [
        chart
        for name in names
        if name.endswith("throughput")
        for chart in (*lines(points, name.replace("_", " ").capitalize(), "a second", name, ""),)
    ]
    kind = results[0].kind
    return Group(
        TITLES.get(kind, kind),
        about(results),
        charts,
        *table(points, "", [Column(n.replace("_", " "), n) for n in names]),
    )


MAKERS: dict[str, Callable[[list[BenchResult]], Group]] = {"serving": serving, "one-batch": one_batch, "gpu": gpu}


def table(points: Points, x_title: str, columns: Sequence[Column]) -> tuple[list[str], list[list[str]]]:
    """Names and rows; columns that nobody has are left out, and so is x where there is but one."""
    used = [c for c in columns if any(numeric(r.figures.get(c.figure)) is not None for r in points.results)]
    with_x = bool(x_title) and len(points.xs) > 1
    rows = []
    for x in points.xs:
        for r in (r for r in points.results if points.x(r) == x):
            known = [(numeric(r.figures.get(c.figure)), c.scale) for c in used]
            cells = [number(None if v is None else v * scale) for v, scale in known]
            rows.append([*([label(x)] if with_x else []), points.name_of(r), *cells])
    return [*([x_title] if with_x else []), "", *(c.name for c in used)], rows
