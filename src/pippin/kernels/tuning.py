"""How launches are cut on this chip: a table of measured cuts, and ``paged.choose_cut`` where it has none.

A table is JSON: what the chip is like (``cores``, and the fields of ``paged.Tuning`` that hold for all launches), and
``cells``, each a measured cut for a power of 2 of blocks and of the longest context. ``pippin kernels tune`` writes one
into the user's cache for the chip that it runs on; those in ``tables`` come with the package.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from pippin.folders import cache_folder
from pippin.kernels import paged

log = logging.getLogger(__name__)

Kernel = Literal["decode", "extend"]

_SHIPPED = Path(__file__).parent / "tables"


@dataclass(frozen=True, slots=True)
class Cell:
    """Where a cut holds: up to ``blocks`` blocks before splitting, contexts of up to ``longest`` tokens.

    Both are powers of 2. ``matrix`` says whether the pool's dtype goes through matrix products.
    """

    kernel: Kernel
    matrix: bool
    blocks: int
    longest: int

    @staticmethod
    def of(kernel: Kernel, matrix: bool, blocks: int, longest: int) -> Cell:
        """The cell that a launch falls into."""
        return Cell(kernel, matrix, _power(blocks), _power(longest))


@dataclass(frozen=True, slots=True)
class Cut:
    """The measured best: warps a block, and parts of a context."""

    warps: int
    splits: int


@dataclass(frozen=True, slots=True)
class Table:
    """``base`` and ``cores`` say what the chip is like, ``cells`` what was measured; the rest is prose."""

    chip: str
    measured: str
    cores: int
    base: paged.Tuning
    cells: dict[Cell, Cut]

    def cut(self, kernel: Kernel, dtype: mx.Dtype, blocks: int, longest: int) -> paged.Tuning:
        """For a launch of ``blocks`` blocks before splitting, whose longest context has ``longest`` tokens."""
        found = self.cells.get(Cell.of(kernel, self.base.matrix and dtype != mx.float32, blocks, longest))
        if found is None:
            return paged.choose_cut(self.base, blocks, longest, self.cores)
        return replace(self.base, warps=found.warps, splits=found.splits)

    def with_cells(self, cells: dict[Cell, Cut], chip: str, measured: str) -> Table:
        return replace(self, cells={**self.cells, **cells}, chip=chip, measured=measured)

    def every_cut(self, dtype: mx.Dtype) -> list[paged.Tuning]:
        """One of each kind that launches may get here; the number of splits, when above 1, makes no kind."""
        sizes = [1 << n for n in range(18)]
        kernels: tuple[Kernel, ...] = ("decode", "extend")
        cuts = {self.cut(kernel, dtype, blocks, longest) for kernel in kernels for blocks in sizes for longest in sizes}
        return sorted({replace(cut, splits=min(cut.splits, 2)) for cut in cuts}, key=repr)


@lru_cache(maxsize=4096)
def choose(
    platform: str, kernel: Kernel, dtype: mx.Dtype, units: int, heads: int, kv_heads: int, longest: int
) -> paged.Tuning:
    """The cut of a launch on this machine's chip, over ``units`` rows or tiles of rows; see ``Table.cut``."""
    found = table(platform)
    _, parts = paged.head_tiles(heads // kv_heads, found.base.most_heads(dtype))
    return found.cut(kernel, dtype, units * kv_heads * parts, longest)


@cache
def table(platform: str) -> Table:
    """The user's for this chip, else the package's for it, else the package's for the platform."""
    name = str(mx.device_info().get("device_name", ""))
    for path in (user_file(name), _SHIPPED / f"{_file_name(name)}.json"):
        found = read(path) if path.exists() else None
        if found is not None:
            return found
    return _shipped(platform)


def forget() -> None:
    """Makes the next launch read the table anew."""
    table.cache_clear()
    choose.cache_clear()


def user_file(chip: str) -> Path:
    """Where ``pippin kernels tune`` puts the table of a chip."""
    return cache_folder() / "tuning" / f"{_file_name(chip)}.json"


def read(path: Path) -> Table | None:
    """A table from its file; None, and a line in the log, where it isn't one."""
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s is no tuning table, and is ignored: %r", path, error)
        return None


def parse(found: dict[str, Any]) -> Table:
    """Raises ValueError, KeyError or TypeError for what is no table, or has numbers that no launch can have."""
    base = paged.Tuning(
        warps=int(found["warps"]),
        unroll=int(found["unroll"]),
        heads=int(found["heads"]),
        matrix=found["matrix"] is True,
    )
    cells = {
        Cell.of(c["kernel"], c["matrix"] is True, int(c["blocks"]), int(c["longest"])): _checked(c)
        for c in found["cells"]
    }
    if int(found["cores"]) < 1 or base.warps != 4:
        raise ValueError(f"cores {found['cores']}, warps {base.warps}")
    return Table(str(found["chip"]), str(found["measured"]), int(found["cores"]), base, cells)


def render(table: Table) -> str:
    """The JSON of a table, a line a cell."""
    head = {
        "chip": table.chip,
        "measured": table.measured,
        "cores": table.cores,
        "warps": table.base.warps,
        "unroll": table.base.unroll,
        "heads": table.base.heads,
        "matrix": table.base.matrix,
    }
    cells = [json.dumps(cell) for cell in _plain(table.cells.items())]
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}," for name, value in head.items()]
    inner = "".join(f"\n    {cell}," for cell in cells).rstrip(",")
    return "{\n" + "\n".join(lines) + f'\n  "cells": [{inner}' + ("\n  ]\n}\n" if cells else "]\n}\n")


def _plain(cells: Iterable[tuple[Cell, Cut]]) -> list[dict[str, Any]]:
    ordered = sorted(cells, key=lambda c: (c[0].kernel, c[0].matrix, c[0].blocks, c[0].longest))
    return [
        {
            "kernel": cell.kernel,
            "matrix": cell.matrix,
            "blocks": cell.blocks,
            "longest": cell.longest,
            "warps": cut.warps,
            "splits": cut.splits,
        }
        for cell, cut in ordered
    ]


def _checked(cell: dict[str, Any]) -> Cut:
    cut = Cut(int(cell["warps"]), int(cell["splits"]))
    # paged_extend.h gives each warp a whole number of queries, so without matrix products there are always 4.
    if cell["kernel"] not in ("decode", "extend") or cut.warps not in ((4, 8) if cell["matrix"] is True else (4,)):
        raise ValueError(f"no such kernel, or warps that it can't have: {cell}")
    if not 1 <= cut.splits <= paged.MOST_SPLITS or cut.splits & (cut.splits - 1):
        raise ValueError(f"splits must be a power of 2 up to {paged.MOST_SPLITS}: {cell}")
    return cut


@cache
def _shipped(platform: str) -> Table:
    return parse(json.loads((_SHIPPED / f"{platform}.json").read_text(encoding="utf-8")))


def _file_name(chip: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", chip.lower()).strip("_") or "unknown"


def _power(n: int) -> int:
    """The least power of 2 that is not below ``n``."""
    return 1 << max(0, n - 1).bit_length()
