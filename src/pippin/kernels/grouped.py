"""Launches of experts' products where many pairs of a row and its expert go to each: chunks of prompts.

Pairs are ordered by expert and cut into tiles, once for all products of a layer. Which way is taken for how many pairs
is measured on the machine (``contest``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import mlx.core as mx

from pippin.kernels import products
from pippin.kernels.launch import Launch, Launcher, Source, nothing
from pippin.kernels.products import Gated, Weights

_INPUTS = ("x", "w", "scales", "biases", "order", "tiles")
_GATED_INPUTS = (*_INPUTS, "up_w", "up_scales", "up_biases", "gate_bias", "up_bias", "params")
_HEADERS = ("packed", "packed_words", "codes")
# Blocks that hide each other's barriers; without a bound some variants take registers for one alone.
_RESIDENT = 2
TILES = Source("expert_tiles", "expert_tiles", ("indices",), ("order", "tiles"))
GROUPED = Source("grouped_mma", "grouped_mma", _INPUTS, ("out",), ("ASYNC",), _HEADERS, _RESIDENT)
GATED = Source(
    "grouped_gated_mma", "grouped_mma", _GATED_INPUTS, ("out",), ("ASYNC", "GATED"), (*_HEADERS, "gates"), _RESIDENT
)

THREADS = 256
# An H200 was slower with tiles of 128, which leave registers for one block a processor.
ROWS = 64
# Rows of a weight that a block takes at once.
_COLUMNS = 128
# Pairs from which on tiles are worth a contest: with fewer, most of a tile is empty.
LEAST_PAIRS = 512

TilesCheck = Literal["tiles", "tiles_8", "tiles_mxfp4", "tiles_mxfp8", "tiles_nvfp4"]
_CHECKS: dict[str, TilesCheck] = {"mxfp4": "tiles_mxfp4", "mxfp8": "tiles_mxfp8", "nvfp4": "tiles_nvfp4"}


@dataclass(frozen=True, slots=True, eq=False)
class Tiles:
    """``order`` [P] int32: pairs by expert. ``table`` [n, 3] int32: tiles (expert, first, count) of up to ``ROWS``."""

    order: mx.array
    table: mx.array


class Routed:
    """The experts ``indices`` [P] int32 that pairs of a row and its expert go to; tiles of them are made once.

    ``ordered``: they are in the order of their experts.
    """

    def __init__(self, indices: mx.array, ordered: bool = False) -> None:
        self.indices = indices
        self.ordered = ordered
        self._tiles: Tiles | None = None

    @property
    def pairs(self) -> int:
        return self.indices.shape[0]

    def tiles(self, launch: Launcher, experts: int) -> Tiles:
        """Those of a layer that has so many experts."""
        if self._tiles is None:
            self._tiles = tiles(launch, self.indices, experts)
        return self._tiles


def takes(weights: Weights, pairs: int) -> bool:
    """Whether so many pairs by such weights may be worth tiles."""
    return weights.w.ndim == 3 and pairs >= LEAST_PAIRS


def check_of(weights: Weights) -> TilesCheck:
    """The check that says whether the kernel is right for such weights."""
    if weights.mode != "affine":
        return _CHECKS[weights.mode]
    return "tiles_8" if weights.bits == 8 else "tiles"


def tiles(launch: Launcher, indices: mx.array, experts: int) -> Tiles:
    """Of experts ``indices`` [P] int32."""
    order, table = launch(_tiles_launch(indices.shape[0], experts), [indices])
    return Tiles(order, table)


@lru_cache(maxsize=1024)
def _tiles_launch(pairs: int, experts: int) -> Launch:
    outputs = ((pairs,), mx.int32), ((pairs // ROWS + experts, 3), mx.int32)
    return Launch(TILES, (("ROWS", ROWS), ("THREADS", THREADS)), (experts, 1), THREADS, outputs)


def product(launch: Launcher, x: mx.array, weights: Weights, tiles: Tiles, per: int) -> mx.array:
    """Row i is row i // per of x [T, K] by the weights of its expert, as ``tiles`` say: [P, N]."""
    what = _launch(tiles.order.shape[0], tiles.table.shape[0], per, _form(weights), x.dtype)
    return launch(what, [x, *products.words(weights, x.dtype), tiles.order, tiles.table])[0]


def gated_product(launch: Launcher, x: mx.array, layer: Gated, tiles: Tiles, per: int) -> mx.array:
    """The same by the gate and by what it gates, together: [P, N]."""
    none, dtype, kind = nothing(x.dtype), x.dtype, (layer.biases is not None, layer.form.clipped)
    what = _launch(tiles.order.shape[0], tiles.table.shape[0], per, _form(layer.gate), dtype, kind)
    gate, up = (products.words(weights, dtype) for weights in (layer.gate, layer.up))
    inputs = [x, *gate, tiles.order, tiles.table, *up, *(layer.biases or (none, none)), layer.form.params]
    return launch(what, inputs)[0]


def _form(weights: Weights) -> tuple[int, int, int, int]:
    kind = products.kind_of(weights)
    assert kind is not None
    return weights.rows, weights.width, kind, weights.group or weights.width


@lru_cache(maxsize=4096)
def _launch(
    pairs: int,
    count: int,
    per: int,
    form: tuple[int, int, int, int],
    dtype: mx.Dtype,
    gated: tuple[bool, bool] | None = None,
) -> Launch:
    n, k, kind, group = form
    constants = (
        ("T", dtype),
        ("N", n),
        ("K", k),
        ("KIND", kind),
        ("GROUP", group),
        ("ROWS", ROWS),
        ("PER", per),
        *(() if gated is None else (("BIASED", gated[0]), ("CLIPPED", gated[1]))),
    )
    columns = n if gated is None else 2 * n
    blocks = -(-columns // _COLUMNS), count
    return Launch(GROUPED if gated is None else GATED, constants, blocks, THREADS, (((pairs, n), dtype),))


def ways(launch: Launcher, weights: Weights, dtype: mx.Dtype, pairs: int) -> dict[str, Callable[[], mx.array]]:
    """``products.ways`` for pairs of random experts: by tiles, which are made anew for each."""
    x, indices = products.random_pairs(weights, dtype, pairs)
    return {"tiles": lambda: product(launch, x, weights, tiles(launch, indices, weights.experts), 1)}
