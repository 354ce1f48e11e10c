"""Launches of the paged kernels: how an operation of ``reference`` is cut into blocks, and with which constants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from pippin.kernels.launch import Launch, Launcher, Source

Constant = tuple[str, int | bool | mx.Dtype]

_POOLS = ("k_pool", "v_pool")
_REST = ("sinks", "params", "after")
_PARTS = ("accumulated", "stats")
KV_WRITE = Source("kv_write", "kv_write", ("k", "v", *_POOLS, "slots", "after"), ("token",))
KV_GATHER = Source("kv_gather", "kv_gather", (*_POOLS, "table", "after"), ("k", "v"))
REDUCE = Source("paged_reduce", "paged_reduce", (*_PARTS, "sinks"), ("out",))

_DECODE_INPUTS = ("q", *_POOLS, "table", "lengths", *_REST)
_EXTEND_INPUTS = ("q", *_POOLS, "table", "lengths", "tiles", *_REST)

# Fewest tokens that are worth a split of their own, and most splits of one row.
LEAST_SPLIT = 64
MOST_SPLITS = 64
_SHARED_BYTES = 16384


@dataclass(frozen=True, slots=True)
class Form:
    """What attention computes, apart from the arrays; see ``reference``."""

    page_size: int
    scale: float
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True, slots=True)
class Tuning:
    """How a launch is cut: ``splits`` of the tokens, ``warps`` a block, ``unroll`` loads in flight a lane.

    ``heads`` is the most query heads that a warp keeps in registers, each with about 8 values of q and 8 of the sum
    in every lane. More of them read K and V less often; too many spill (CUDA has 255 registers a lane, Apple 128).
    """

    splits: int = 1
    warps: int = 4
    unroll: int = 4
    heads: int = 8


def supported(k_pool: mx.array, v_pool: mx.array) -> bool:
    """Whether the kernels take these pools: 16-byte rows, at most 256 wide, of a float type."""
    dims = (k_pool.shape[2], v_pool.shape[2])
    return k_pool.dtype in (mx.float32, mx.float16, mx.bfloat16) and all(d % 8 == 0 and 8 <= d <= 256 for d in dims)


def choose_splits(blocks: int, longest: int, cores: int) -> int:
    """Into how many parts the tokens of each row are cut, a power of 2.

    Enough that ``blocks`` (without splits) fill the GPU's ``cores`` four times over, and that no block has more than
    4096 tokens, since one long row would keep the others waiting; but no part under LEAST_SPLIT tokens.
    """
    wanted = max(-(-4 * cores // max(blocks, 1)) if blocks < 2 * cores else 1, -(-longest // 4096))
    most = min(wanted, -(-longest // LEAST_SPLIT), MOST_SPLITS)
    return 1 << max(most - 1, 0).bit_length()


def kv_write(
    launch: Launcher,
    k_pool: mx.array,
    v_pool: mx.array,
    k: mx.array,
    v: mx.array,
    slots: mx.array,
    after: mx.array | None = None,
) -> mx.array:
    """See ``kernels.kv_write``."""
    rows, kv_heads, dim = k.shape
    parts, threads = _copy_parts(k_pool, v_pool)
    what = Launch(
        KV_WRITE,
        (("T", k_pool.dtype), ("HKV", kv_heads), ("D", dim), ("DV", v.shape[2]), ("THREADS", threads)),
        (rows, parts),
        threads,
        (((8,), mx.int32),),
    )
    inputs = [k.astype(k_pool.dtype), v.astype(v_pool.dtype), k_pool, v_pool, slots, _token(after)]
    return launch(what, inputs)[0]


def kv_gather(
    launch: Launcher,
    k_pool: mx.array,
    v_pool: mx.array,
    table: mx.array,
    page_size: int,
    after: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """See ``kernels.kv_gather``."""
    rows, context = table.shape[0], table.shape[1] * page_size
    kv_heads, dim, value_dim = k_pool.shape[1], k_pool.shape[2], v_pool.shape[2]
    parts, threads = _copy_parts(k_pool, v_pool)
    shape = (("HKV", kv_heads), ("D", dim), ("DV", value_dim), ("PAGE", page_size), ("THREADS", threads))
    what = Launch(
        KV_GATHER,
        (("T", k_pool.dtype), *shape),
        (rows * context, parts),
        threads,
        tuple(((rows, kv_heads, context, d), k_pool.dtype) for d in (dim, value_dim)),
    )
    k, v = launch(what, [k_pool, v_pool, table, _token(after)])
    return k, v


def _copy_parts(k_pool: mx.array, v_pool: mx.array) -> tuple[int, int]:
    """(blocks, threads of each) for one token's K and V, a pack of 16 bytes a thread."""
    packs = k_pool.shape[1] * max(k_pool.shape[2], v_pool.shape[2]) * k_pool.dtype.size // 16
    threads = min(256, -(-packs // 32) * 32)
    return -(-packs // threads), threads


def paged_decode(
    launch: Launcher,
    q: mx.array,
    k_pool: mx.array,
    v_pool: mx.array,
    table: mx.array,
    lengths: mx.array,
    form: Form,
    tuning: Tuning,
    sinks: mx.array | None = None,
    after: mx.array | None = None,
    new: tuple[mx.array, mx.array] | None = None,
) -> mx.array:
    """See ``kernels.paged_decode``; with ``new`` (k, v) it stores each row's newest K and V too."""
    rows = q.shape[0]
    plan = _plan(q, k_pool, v_pool, form, tuning, sinks)
    per_head = tuning.warps * v_pool.shape[2] * 4
    source = _source("paged_decode", _DECODE_INPUTS, tuning.splits > 1, new is not None)
    constants = (
        *plan.constants,
        ("WARPS", tuning.warps),
        ("U", tuning.unroll),
        ("HEADS_AT_ONCE", max(1, min(plan.tile, _SHARED_BYTES // per_head))),
        ("LEAST", LEAST_SPLIT if tuning.splits > 1 else 1),
    )
    blocks = rows * k_pool.shape[1] * plan.tiles
    inputs = [q, k_pool, v_pool, table, lengths, *_rest(q, sinks, form, after)]
    if new is not None:
        inputs += [a.astype(k_pool.dtype) for a in new]
    return _attend(launch, source, constants, blocks, inputs, tuning, plan)


def paged_extend(
    launch: Launcher,
    q: mx.array,
    k_pool: mx.array,
    v_pool: mx.array,
    table: mx.array,
    lengths: mx.array,
    tiles: mx.array,
    form: Form,
    tuning: Tuning,
    sinks: mx.array | None = None,
    after: mx.array | None = None,
) -> mx.array:
    """See ``kernels.paged_extend``; ``tiles`` have at most ``rows_per_tile`` rows each."""
    plan = _plan(q, k_pool, v_pool, form, tuning, sinks)
    size, dims = k_pool.dtype.size, (q.shape[2], v_pool.shape[2])
    at_once = tuning.unroll * 32 // _lanes(max(dims) * size // 16)
    tokens = max(at_once, _SHARED_BYTES // (sum(dims) * size) // at_once * at_once)
    constants = (
        *plan.constants,
        ("WARPS", tuning.warps),
        ("U", tuning.unroll),
        ("ROWS", rows_per_tile(q.shape[1] // k_pool.shape[1], tuning.heads)),
        ("TOKENS", min(tokens, 64 // at_once * at_once or at_once)),
        ("LEAST", LEAST_SPLIT if tuning.splits > 1 else 1),
    )
    blocks = tiles.shape[0] * k_pool.shape[1] * plan.tiles
    source = _source("paged_extend", _EXTEND_INPUTS, tuning.splits > 1, False)
    inputs = [q, k_pool, v_pool, table, lengths, tiles, *_rest(q, sinks, form, after)]
    return _attend(launch, source, constants, blocks, inputs, tuning, plan)


def rows_per_tile(group: int, most_heads: int) -> int:
    """Most rows of one sequence that a block of ``paged_extend`` takes: 4 or 8, by what its registers hold.

    ``group`` is the number of query heads to a KV head, ``most_heads`` is ``Tuning.heads``.
    """
    tile, _ = head_tiles(group, most_heads)
    return 8 if 2 * tile <= most_heads else 4


def tile_rows(counts: Sequence[int], most: int, pad_to: int | None = None) -> npt.NDArray[np.int32]:
    """Cuts sequences whose rows lie one after the other into tiles [N, 3]: (first row, rows, sequence).

    ``counts`` has each sequence's rows, ``most`` is ``rows_per_tile``; ``pad_to`` adds empty tiles up to that number.
    """
    tiles, first = [], 0
    for sequence, count in enumerate(counts):
        tiles += [(first + at, min(most, count - at), sequence) for at in range(0, count, most)]
        first += count
    tiles += [(0, 0, 0)] * ((pad_to or 0) - len(tiles))
    return np.array(tiles, np.int32).reshape(-1, 3)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What decode and extend share: heads a block (``tile``), blocks a KV head (``tiles``), constants, output."""

    tile: int
    tiles: int
    constants: tuple[Constant, ...]
    shape: tuple[int, int, int]
    dtype: mx.Dtype
    sinks: mx.array


def _plan(q: mx.array, k_pool: mx.array, v_pool: mx.array, form: Form, tuning: Tuning, sinks: mx.array | None) -> _Plan:
    rows, heads, dim = q.shape
    kv_heads, value_dim = k_pool.shape[1], v_pool.shape[2]
    tile, tiles = head_tiles(heads // kv_heads, tuning.heads)
    constants: tuple[Constant, ...] = (
        ("T", q.dtype),
        ("KT", k_pool.dtype),
        ("D", dim),
        ("DV", value_dim),
        ("HKV", kv_heads),
        ("G", heads // kv_heads),
        ("GT", tile),
        ("TILES", tiles),
        ("PAGE", form.page_size),
        ("WINDOW", form.window or 0),
        ("SINKS", sinks is not None),
        ("SOFTCAP", form.softcap is not None),
    )
    held = _no_sinks(q.dtype) if sinks is None else sinks.astype(q.dtype)
    return _Plan(tile, tiles, constants, (rows, heads, value_dim), q.dtype, held)


def _attend(
    launch: Launcher,
    source: Source,
    constants: tuple[Constant, ...],
    blocks: int,
    inputs: list[mx.array],
    tuning: Tuning,
    plan: _Plan,
) -> mx.array:
    """One launch, or with splits two: their partial sums, and the sum of those."""
    threads = 32 * tuning.warps
    rows, heads, value_dim = plan.shape
    if tuning.splits == 1:
        return launch(Launch(source, constants, (blocks, 1), threads, ((plan.shape, plan.dtype),)), inputs)[0]
    parts = (
        ((rows * heads, tuning.splits, value_dim), mx.float32),
        ((rows * heads, tuning.splits, 2), mx.float32),
    )
    accumulated, stats = launch(Launch(source, constants, (blocks, tuning.splits), threads, parts), inputs)
    has_sinks = ("SINKS", True) in constants
    reduce_constants = (("T", plan.dtype), ("DV", value_dim), ("HQ", heads), ("SINKS", has_sinks), ("THREADS", 128))
    what = Launch(REDUCE, reduce_constants, (rows * heads, 1), 128, ((plan.shape, plan.dtype),))
    return launch(what, [accumulated, stats, plan.sinks])[0]


@lru_cache
def _source(name: str, inputs: tuple[str, ...], split: bool, fused: bool) -> Source:
    macros = ("SPLIT",) * split + ("FUSED",) * fused
    suffix = "".join(f"_{m.lower()}" for m in macros)
    return Source(name + suffix, name, (*inputs, "k", "v") if fused else inputs, _PARTS if split else ("out",), macros)


def _rest(q: mx.array, sinks: mx.array | None, form: Form, after: mx.array | None) -> list[mx.array]:
    held = _no_sinks(q.dtype) if sinks is None else sinks.astype(q.dtype)
    return [held, _params(form.scale, form.softcap or 1.0), _token(after)]


def head_tiles(group: int, most: int) -> tuple[int, int]:
    """(heads a block, blocks) for the ``group`` query heads of a KV head, cut as evenly as ``most`` allows."""
    tiles = -(-group // most)
    return -(-group // tiles), tiles


def _lanes(packs: int) -> int:
    """``lanes_for`` of bodies/common.h."""
    return min(32, 1 << (packs - 1).bit_length())


def _token(after: mx.array | None) -> mx.array:
    return _no_token() if after is None else after


# Small constant arrays, made once: on a GPU a new array costs a copy. Evaluated ones may be used by any thread.


@lru_cache(maxsize=64)
def _params(scale: float, softcap: float) -> mx.array:
    return _ready(mx.array([scale, softcap] + [0.0] * 6, dtype=mx.float32))


@lru_cache
def _no_sinks(dtype: mx.Dtype) -> mx.array:
    return _ready(mx.zeros(8, dtype=dtype))


@lru_cache
def _no_token() -> mx.array:
    return _ready(mx.zeros(8, dtype=mx.int32))


def _ready(array: mx.array) -> mx.array:
    mx.eval(array)
    return array
