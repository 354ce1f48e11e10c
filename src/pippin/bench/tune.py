"""``pippin kernels tune``: measures cuts of paged decode and extend on this chip, and writes its table.

For each power of 2 of blocks and of the longest context every cut is timed, on an 8B model's heads; one more part or
more warps must win by 3 % to be taken, so that noise does not split what need not be split.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np

from pippin import kernels
from pippin.bench.kernel_batches import DTYPES, BatchShape, make_batch
from pippin.bench.kernel_times import seconds
from pippin.errors import ConfigError
from pippin.kernels import paged, tuning
from pippin.kernels.build import store
from pippin.kernels.build.prebuilt import prefer_built
from pippin.kernels.launch import gpu_launcher
from pippin.kernels.tuning import Cell, Cut, Kernel, Table

Measure = Callable[["Point", paged.Tuning], float]

_MARGIN = 0.97
_LEAST_PART = 128
# Rows of the largest batch, by bytes of K and V that its context may take.
_MOST_BYTES = 4 << 30


@dataclass(frozen=True, slots=True)
class Point:
    """Where cuts are timed: rows of as long a context; ``units`` are rows, or for extend tiles of rows."""

    kernel: Kernel
    units: int
    longest: int
    dtype: str

    @property
    def shape(self) -> BatchShape:
        return BatchShape("tuning", self.units, self.longest, dtype=self.dtype)

    def cell(self, table: Table) -> Cell:
        """The cell of the table that this point stands for."""
        shape, matrix = self.shape, table.base.matrix and self.dtype != "float32"
        _, parts = paged.head_tiles(shape.group, table.base.most_heads(DTYPES[self.dtype]))
        return Cell.of(self.kernel, matrix, self.units * shape.kv_heads * parts, self.longest)


def points(quick: bool) -> list[Point]:
    """Decode from 1 row to 256 and extend from 1 tile to 16, over contexts of 256 tokens to 32k."""
    units: dict[Kernel, list[int]] = {"decode": [1, 2, 4, 8, 16, 32, 64, 128, 256], "extend": [1, 4, 16]}
    longest = [1 << n for n in ((10, 13) if quick else range(8, 16))]
    dtypes = ("bfloat16",) if quick else ("bfloat16", "float32")
    found = [
        Point(k, u, n, d)
        for d in dtypes
        for k in units
        for u in (units[k][::3] if quick else units[k])
        for n in longest
    ]
    return [p for p in found if p.shape.kv_bytes <= _MOST_BYTES]


def cuts(table: Table, point: Point) -> list[paged.Tuning]:
    """What to try at a point, the simplest first: 1 part and more, 4 warps, and 8 where there are matrix products."""
    warps = (4, 8) if point.cell(table).matrix else (4,)
    most = max(1, min(paged.MOST_SPLITS, point.longest // _LEAST_PART))
    splits = [1 << n for n in range(most.bit_length())]
    return [replace(table.base, warps=w, splits=s) for s in splits for w in warps]


def best_cut(found: Sequence[tuple[paged.Tuning, float]]) -> paged.Tuning:
    """The first that no later one beats by more than the margin."""
    best, least = found[0]
    for cut, taken in found[1:]:
        if taken < least * _MARGIN:
            best, least = cut, taken
    return best


def tune(
    table: Table, where: Sequence[Point], measure: Measure, chip: str
) -> Iterator[tuple[Point, Cut, float, Table]]:
    """Measures point by point: the point, its best cut, its seconds, and the table with all cells so far."""
    said = f"{time.strftime('%Y-%m-%d', time.gmtime())} by pippin kernels tune, MLX {version('mlx')}"
    for point in where:
        found = [(cut, measure(point, cut)) for cut in cuts(table, point)]
        best = best_cut(found)
        cut = Cut(best.warps, best.splits)
        table = table.with_cells({point.cell(table): cut}, chip, said)
        yield point, cut, dict(found)[best], table


def gpu_measure() -> Measure:
    """Times launches on this machine's GPU. Raises ConfigError where MLX has none, or a kernel is wrong on it."""
    platform = kernels.backend()
    if platform is None:
        raise ConfigError("MLX has no GPU here, so no kernel runs and there is nothing to tune", "pippin kernels tune")
    wrong = [name for name, ok in kernels.verify().items() if not ok]
    if wrong:
        raise ConfigError(f"not right on this machine: {', '.join(wrong)}", "pippin kernels tune")
    launch = prefer_built(platform, gpu_launcher(platform))

    def measure(point: Point, cut: paged.Tuning) -> float:
        shape = point.shape
        batch, form = make_batch(shape), kernels.Form(1, shape.dim**-0.5)
        if point.kernel == "decode":

            def step(_: int, q: mx.array) -> mx.array:
                return paged.paged_decode(launch, q, batch.k, batch.v, batch.table, batch.lengths, form, cut)

            return seconds(step, batch.q, "chained", 24, 3)
        several = replace(cut, unroll=2)
        most = paged.rows_per_tile(shape.group, batch.k.dtype, several)
        q = mx.repeat(batch.q, most, axis=0)
        tiles = mx.array(paged.tile_rows([most] * shape.rows, most))
        lengths = mx.array(np.repeat(np.array(shape.lengths, np.int32), most))

        def extend(_: int, q: mx.array) -> mx.array:
            return paged.paged_extend(launch, q, batch.k, batch.v, batch.table, lengths, tiles, form, several)

        return seconds(extend, q, "chained", 24, 3)

    return measure


def save(table: Table, path: str | None = None) -> str:
    """Writes the table for this chip into the user's cache, or to ``path``; returns where. Raises ConfigError."""
    target = Path(path) if path else tuning.user_file(table.chip)
    try:
        store.write(target, tuning.render(table).encode())
    except OSError as error:
        raise ConfigError(f"{target} can't be written: {error.strerror}", "--output") from error
    tuning.forget()
    return str(target)
