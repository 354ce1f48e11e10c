"""``pippin bench kernels``: the time of each kernel, against a copy of as many bytes and MLX's own operation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import mlx.core as mx
import typer
from rich.table import Table

from pippin import kernels
from pippin.bench.kernel_times import Case, cpu_cases, gpu_cases, seconds
from pippin.bench.machine import copy_bandwidth
from pippin.bench.options import KernelOptions
from pippin.bench.product_times import contested_cases
from pippin.bench.results import BenchResult, append, make_result, to_line
from pippin.bench.screen import stderr
from pippin.environment import device
from pippin.errors import ConfigError

# Steps of a run: enough that starting and ending one doesn't count.
_REPEATS = {"chained": 24, "apart": 8, "settled": 24}


@dataclass(frozen=True, slots=True)
class KernelTime:
    """Seconds of one launch and of MLX's operation, and the bytes that it must move."""

    kernel: str
    shape: str
    seconds: float
    bytes: int
    mlx_seconds: float | None

    def copy_share(self, bandwidth: float) -> float:
        """The bytes by the time that they took, as a share of ``bandwidth`` in bytes a second."""
        return self.bytes / self.seconds / bandwidth

    @property
    def vs_mlx(self) -> float | None:
        """How many times faster than MLX's operation."""
        return None if self.mlx_seconds is None else self.mlx_seconds / self.seconds


def run(options: KernelOptions) -> None:
    """Prints a table to standard error and a JSON line a kernel to standard output. Raises ConfigError."""
    saved = Path(options.result_filename) if options.result_filename else None
    if saved:
        append(saved, [])  # a file that can't be written is said now
    bandwidth, console = copy_bandwidth(), stderr()
    found: list[KernelTime] = []
    for time in measure(options):
        console.print(f"{time.kernel}, {time.shape}: {time.seconds * 1e6:.1f} µs", style="dim")
        found.append(time)
    if not found:
        raise ConfigError(f"no kernel here has {' or '.join(options.kernel or ())} in its name", "--kernel")
    console.print(table(found, bandwidth))
    results = [result(time, bandwidth, options) for time in found]
    for line in results:
        typer.echo(to_line(line))
    if saved:
        append(saved, results)


def measure(options: KernelOptions) -> Iterator[KernelTime]:
    """The kernels of MLX's device, or what stands for them on the CPU."""
    if kernels.backend() is None:
        yield from times(cpu_cases(options.quick), options)
        return
    yield from times(chain(gpu_cases(options.quick), contested_cases(options.quick)), options)


def times(cases: Iterable[Case], options: KernelOptions) -> Iterator[KernelTime]:
    """Ours and MLX's of each case whose kernel was asked for."""
    for case in cases:
        if options.kernel and not any(part in case.kernel for part in options.kernel):
            continue
        ours = seconds(case.ours, case.start, case.order, _REPEATS[case.order], options.rounds)
        mlx = None
        if case.mlx is not None:
            mlx = seconds(case.mlx, case.start, case.mlx_order, _REPEATS[case.mlx_order], options.rounds)
        yield KernelTime(case.kernel, case.shape, ours, case.moved, mlx)
        mx.clear_cache()


def table(found: Iterable[KernelTime], bandwidth: float) -> Table:
    """A line a kernel."""
    title = f"{device()['device']}; a copy moves {bandwidth / 1e9:.0f} GB/s"
    shown = Table("kernel", "shape", title=title)
    for name in ("time", "bytes", "of a copy", "MLX's own", "ours is"):
        shown.add_column(name, justify="right")
    for time in found:
        shown.add_row(
            time.kernel,
            time.shape,
            f"{time.seconds * 1e6:.1f} µs",
            f"{time.bytes / 1e6:.2f} MB",
            f"{time.copy_share(bandwidth):.0%}",
            f"{time.mlx_seconds * 1e6:.1f} µs" if time.mlx_seconds is not None else "-",
            f"{time.vs_mlx:.2f}x" if time.vs_mlx is not None else "",
        )
    return shown


def result(time: KernelTime, bandwidth: float, options: KernelOptions) -> BenchResult:
    """One line of JSON: seconds, bytes, shares and ratios."""
    return make_result(
        "kernels",
        run_name=options.run_name,
        side="pippin",
        model=time.shape,
        device=device()["device"],
        settings={
            "kernel": time.kernel,
            "shape": time.shape,
            **{k: v for k, v in asdict(options).items() if k in _KEPT},
        },
        figures={
            "seconds": time.seconds,
            "bytes": time.bytes,
            "copy_share": time.copy_share(bandwidth),
            "copy_bandwidth": bandwidth,
            "mlx_seconds": time.mlx_seconds,
            "vs_mlx": time.vs_mlx,
        },
    )


_KEPT = ("quick", "rounds")
