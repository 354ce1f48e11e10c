"""``pippin bench one-batch``: prefill and decode of one batch, ours and others' in turn, in one run."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain, product
from pathlib import Path
from random import Random
from typing import Self

from rich.console import Console
from rich.table import Table

from pippin.bench.correctness import CORRECTNESS, check_correctness
from pippin.bench.machine import context_bytes, measured_bandwidth, weight_bytes_read
from pippin.bench.options import OneBatchOptions, check_ours
from pippin.bench.prompts import plain_ids, random_prompts
from pippin.bench.results import BenchResult, Value, make_result
from pippin.bench.screen import Tick, bar, stderr, writer
from pippin.bench.sides import Measured, Ours, Side, in_turn, mlx_device, open_ours, peer, with_room
from pippin.bench.stages import check_profile, profile_stages
from pippin.cache.layout import CacheLayout
from pippin.config import EngineConfig
from pippin.environment import device
from pippin.errors import ConfigError
from pippin.garbage import loaded_left_alone
from pippin.messages import ModelInfo
from pippin.runner import MlxModelRunner
from pippin.terminal import LoadingBar
from pippin.types import Token


@dataclass(frozen=True, slots=True)
class Shape:
    """One point of the grid."""

    batch_size: int
    input_len: int
    output_len: int

    @property
    def tokens(self) -> int:
        return self.batch_size * (self.input_len + self.output_len)

    def __str__(self) -> str:
        return f"{self.batch_size} x {self.input_len} + {self.output_len}"


@dataclass(slots=True)
class Measurement:
    """The rounds of one side at one shape."""

    side: str
    shape: Shape
    rounds: list[Measured] = field(default_factory=list)

    @property
    def prefill(self) -> float:
        """Seconds until all have their first token: the median of the rounds."""
        return statistics.median(r.timing.prefill for r in self.rounds)

    @property
    def step(self) -> float | None:
        """Seconds of a decode step, the median of all rounds' medians; None if there is none."""
        medians = [statistics.median(r.timing.steps) for r in self.rounds if r.timing.steps]
        return statistics.median(medians) if medians else None

    @property
    def total(self) -> float:
        return statistics.median(r.timing.prefill + sum(r.timing.steps) for r in self.rounds)

    @property
    def device_peak(self) -> int | None:
        """Bytes; None where nobody counts them."""
        return max((r.device_peak_bytes for r in self.rounds if r.device_peak_bytes is not None), default=None)

    @property
    def process_peak(self) -> int:
        return max(r.process_peak_bytes for r in self.rounds)

    def ratios(self, other: Measurement) -> tuple[float, float | None]:
        """How many times faster this side is than ``other``, in prefill and decode: the median of the rounds."""
        pairs = [(a.timing, b.timing) for a, b in zip(self.rounds, other.rounds, strict=True)]
        prefill = statistics.median(b.prefill / a.prefill for a, b in pairs)
        if self.shape.output_len == 1:
            return prefill, None
        return prefill, statistics.median(statistics.median(b.steps) / statistics.median(a.steps) for a, b in pairs)


@dataclass(frozen=True, slots=True)
class Yardstick:
    """The device's measured bandwidth, bytes a second, and what a decode step reads: weights, rows' K, V and states.

    ``weight_bytes`` is None where it is not known: experts are chosen, or PyTorch runs the model.
    """

    bandwidth: float
    weight_bytes: int | None
    layout: CacheLayout

    @classmethod
    def of(cls, ours: Ours, bandwidth: float) -> Self:
        if not isinstance(ours.runner, MlxModelRunner):
            return cls(bandwidth, None, CacheLayout.of([]))
        weights = weight_bytes_read(ours.runner.model, ours.info.vocab_size)
        return cls(bandwidth, weights, ours.runner.pool.layout)

    def share(self, m: Measurement) -> float | None:
        """The share of the bandwidth that a decode step of ``m`` uses at least, halfway through the answers."""
        if self.weight_bytes is None or m.step is None:
            return None
        row = context_bytes(self.layout, m.shape.input_len + m.shape.output_len / 2)
        return (self.weight_bytes + m.shape.batch_size * row) / m.step / self.bandwidth


def run(config: EngineConfig, options: OneBatchOptions) -> int:
    """Measures or compares, prints what was found to standard error and JSON lines to standard output.

    Returns the exit status: 1 if answers differ. Raises ConfigError naming the option that can't be met.
    """
    check_ours(options.peers, config.device)
    console = stderr()
    write = writer(options.result_filename)
    results = (check_correctness if options.correctness_test else measure_grid)(config, options, console)
    write(results)
    return int(any(r.kind == CORRECTNESS and r.figures["equal"] != r.figures["prompts"] for r in results))


def measure_grid(config: EngineConfig, options: OneBatchOptions, console: Console) -> list[BenchResult]:
    """Measures every combination of sizes, shows the table, returns a result for each side of each."""
    shapes = [Shape(*point) for point in product(options.batch_sizes, options.input_lens, options.output_lens)]
    config = with_room(config, [[s.input_len + s.output_len] * s.batch_size for s in shapes])
    bandwidth = measured_bandwidth(dataclasses.replace(config, device=mlx_device(config.device)))
    with ExitStack() as stack:
        with LoadingBar() as loading:
            ours = open_ours(config, loading)
        info = ours.info
        check_room(info, shapes)
        if options.profile:
            check_profile(info, options, [s.output_len for s in shapes])
        sides: list[Side] = [ours.side, *(stack.enter_context(peer(name, config, info)) for name in options.peers)]
        yardstick = Yardstick.of(ours, bandwidth)
        with bar(console, len(shapes) * (options.rounds + 1) * len(sides)) as tick, loaded_left_alone():
            found = list(measure(sides, plain_ids(info), shapes, options, tick))
        files = {s: profile_shape(ours, s, options) for s in shapes} if options.profile else {}
    for line in decode_steps(found, options.log_decode_step):
        console.print(line)
    console.print(table(found, yardstick, info))
    for path in chain.from_iterable(files.values()):
        console.print(f"recorded {path}", soft_wrap=True)
    return [to_result(m, group, yardstick, info, options, files.get(m.shape, [])) for group in found for m in group]


def decode_steps(found: Sequence[Sequence[Measurement]], every: int) -> Iterator[str]:
    """Every so many decode steps of each side's last round at each shape, as lines; none if ``every`` is 0."""
    for m in chain.from_iterable(found if every else ()):
        for i, seconds in enumerate(m.rounds[-1].timing.steps):
            if i % every == 0:
                yield f"{m.shape}, {m.side}: decode step {i}, {seconds * 1e3:.2f} ms"


def profile_shape(ours: Ours, shape: Shape, options: OneBatchOptions) -> list[Path]:
    """Records one more run, of prompts of its own; its files."""
    ids, rng = plain_ids(ours.info), Random(options.seed)
    return profile_stages(ours, random_prompts(ids, shape.batch_size, shape.input_len, rng), shape.output_len, options)


def check_room(info: ModelInfo, shapes: Sequence[Shape]) -> None:
    """Raises ConfigError if a shape needs a longer context, more slots or more rows than there are."""
    for shape in shapes:
        length = shape.input_len + shape.output_len
        if length > info.context_length:
            raise ConfigError(
                f"{shape.input_len} and --output-len {shape.output_len} together are beyond the model's context of "
                f"{info.context_length} tokens",
                "--input-len",
            )
        pages = shape.batch_size * -(-length // info.page_size)
        if pages * info.page_size > info.max_total_tokens:
            raise ConfigError(
                f"{shape} takes {pages * info.page_size} slots, more than {info.max_total_tokens}", "--max-total-tokens"
            )
        if shape.batch_size > info.max_running_requests:
            raise ConfigError(
                f"{info.max_running_requests} is less than --batch-size {shape.batch_size}", "--max-running-requests"
            )


def measure(
    sides: Sequence[Side], ids: list[Token], shapes: Sequence[Shape], options: OneBatchOptions, tick: Tick
) -> Iterator[list[Measurement]]:
    """For each shape, each side's rounds. The sides take turns, also in who begins; all get the same tokens."""
    rng = Random(options.seed)
    for shape in shapes:
        found = {side.name: Measurement(side.name, shape) for side in sides}
        for turn in range(options.rounds + 1):
            prompts = random_prompts(ids, shape.batch_size, shape.input_len, rng)
            for side in in_turn(sides, turn):
                tick(f"{shape}, {side.name}")
                measured = side.run(prompts, shape.output_len)
                if turn:  # the first warms up
                    found[side.name].rounds.append(measured)
        yield list(found.values())


def to_result(
    m: Measurement,
    group: Sequence[Measurement],
    yardstick: Yardstick,
    info: ModelInfo,
    options: OneBatchOptions,
    profiles: Sequence[Path],
) -> BenchResult:
    """One side at one shape, by SGLang's names: latencies in seconds, throughputs in tokens a second.

    Ours says how many times faster it is than each peer, and where its ``profiles`` are.
    """
    shape = m.shape
    figures: dict[str, Value] = {
        "prefill_latency": m.prefill,
        "prefill_throughput": shape.batch_size * shape.input_len / m.prefill,
        "median_decode_latency": m.step,
        "median_decode_throughput": shape.batch_size / m.step if m.step else None,
        "total_latency": m.total,
        "overall_throughput": shape.tokens / m.total,
        "bandwidth": yardstick.bandwidth,
        "bandwidth_share": yardstick.share(m),
        "peak_memory_bytes": m.device_peak,
        "process_peak_bytes": m.process_peak,
    }
    if m is group[0]:
        figures |= {"profiles": [str(path) for path in profiles]} if profiles else {}
        for other in group[1:]:
            prefill, decode = m.ratios(other)
            figures |= {f"prefill_vs_{other.side}": prefill, f"decode_vs_{other.side}": decode}
    return make_result(
        "one-batch",
        run_name=options.run_name,
        side=m.side,
        model=info.model_path,
        device=device()["device"],
        settings={
            **dataclasses.asdict(shape),
            "rounds": options.rounds,
            "seed": options.seed,
            "dtype": info.dtype,
            "quantization": info.quantization,
            "attention_backend": info.attention_backend,
        },
        figures=figures,
    )


# --- what the terminal shows ---


COLUMNS = (
    "batch x in + out", "side", "prefill", "tok/s", "decode step", "tok/s", "bandwidth", "memory", "process", "ours is"
)  # fmt: skip


def table(found: Sequence[Sequence[Measurement]], yardstick: Yardstick, info: ModelInfo) -> Table:
    """A row for each side at each shape; a peer's row says how many times faster ours is."""
    title = f"{info.model_path}, {info.dtype}, {info.device}; a copy moves {yardstick.bandwidth / 1e9:.0f} GB/s"
    shown = Table(*COLUMNS, title=title)
    for group in found:
        for m in group:
            shape, step, share = m.shape, m.step, yardstick.share(m)
            shown.add_row(
                str(shape) if m is group[0] else "",
                m.side,
                f"{m.prefill * 1e3:.1f} ms",
                f"{shape.batch_size * shape.input_len / m.prefill:.0f}",
                f"{step * 1e3:.2f} ms" if step else "-",
                f"{shape.batch_size / step:.0f}" if step else "-",
                f"{share:.0%}" if share else "-",
                f"{m.device_peak / 1e9:.2f} GB" if m.device_peak else "-",
                f"{m.process_peak / 1e9:.2f} GB",
                ratio_text(group[0], m) if m is not group[0] else "",
            )
    return shown


def ratio_text(ours: Measurement, other: Measurement) -> str:
    """How many times faster ours is: prefill, then decode."""
    prefill, decode = ours.ratios(other)
    return f"{prefill:.2f}x prefill" + (f", {decode:.2f}x decode" if decode else "")
