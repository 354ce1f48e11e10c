"""Launches of the paged kernels: how an operation of ``reference`` is cut into blocks, and with which constants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from pippin.kernels.form import Form
from pippin.kernels.launch import Launch, Launcher, Source, nothing, params
from pippin.kernels.packing import Packing, Pool, packing_of, storage

Constant = tuple[str, int | bool | mx.Dtype]

_POOLS = ("k_pool", "v_pool")
_REST = ("sinks", "params", "after")
_PARTS = ("accumulated", "stats")
KV_WRITE = Source("kv_write", "kv_write", ("k", "v", *_POOLS, "slots", "after"), ("token",))
KV_GATHER = Source("kv_gather", "kv_gather", (*_POOLS, "table", "after"), ("k", "v"))
REDUCE = Source("paged_reduce", "paged_reduce", (*_PARTS, "sinks"), ("out",))

_DECODE_INPUTS = ("q", *_POOLS, "table", "lengths", *_REST)

# Tokens of a context that are worth a part of their own where the GPU is not full, tokens of the longest part
# otherwise, and most parts of a context.
LEAST_SPLIT = 512
LONGEST_SPLIT = 2048
MOST_SPLITS = 64
_SHARED_BYTES = 16384
# Queries in one matrix product.
_QUERIES = 16


@dataclass(frozen=True, slots=True)
class Tuning:
    """How a launch is cut: ``splits`` of the tokens, ``warps`` a block, ``unroll`` loads in flight a lane.

    ``heads`` is the most query heads that a warp keeps in registers, each with about 8 values of q and 8 of the sum
    in every lane. More of them read K and V less often; too many spill (CUDA has 255 registers a lane, Apple 128).
    ``matrix`` takes 16-bit types through matrix products (``bodies/paged_mma.h``), where the dialect has them.
    """

    splits: int = 1
    warps: int = 4
    unroll: int = 4
    heads: int = 8
    matrix: bool = False

    def most_heads(self, dtype: mx.Dtype) -> int:
        """Query heads of a KV head that one block takes."""
        return _QUERIES if self.matrix and dtype != mx.float32 else self.heads


# What bodies/packed.h calls the packings.
_KINDS = {"int8": 8, "int4": 4, "fp8": 43}


def packed_constants(packing: Packing | None) -> tuple[Constant, ...]:
    """What a body must know of quantized slots; nothing for others."""
    return (("KIND", _KINDS[packing]),) if packing else ()


def packed_source(source: Source, packing: Packing | None, *headers: str) -> Source:
    """The variant of a body for quantized slots."""
    if packing is None:
        return source
    macros = (*source.macros, "PACKED")
    return replace(source, name=f"{source.name}_packed", macros=macros, headers=("packed", *headers))


def supported(k_pool: Pool, v_pool: Pool) -> bool:
    """Whether the kernels take these pools: 16-byte rows, at most 256 wide, of a float type."""
    dims = (k_pool.shape[2], v_pool.shape[2])
    return k_pool.dtype in (mx.float32, mx.float16, mx.bfloat16) and all(d % 8 == 0 and 8 <= d <= 256 for d in dims)


def choose_cut(tuning: Tuning, blocks: int, longest: int, cores: int) -> Tuning:
    """``tuning`` with the warps and splits for ``blocks`` (without splits) whose longest context is ``longest``.

    Where two blocks a core do not come together, blocks get twice the warps, and then contexts are split until they do.
    A part has at most LONGEST_SPLIT tokens anyway, since one long row would keep the others waiting, but not under
    LEAST_SPLIT, since a second launch costs as much as reading those. Splits are a power of 2.
    """
    few = blocks < 2 * cores
    warps = 2 * tuning.warps if few and tuning.matrix else tuning.warps
    fill = 2 * cores * tuning.warps // (blocks * warps) if few else 1
    wanted = max(fill, -(-longest // LONGEST_SPLIT))
    most = max(1, min(wanted, longest // LEAST_SPLIT, MOST_SPLITS))
    return replace(tuning, warps=warps, splits=1 << (most - 1).bit_length())


def kv_write(
    launch: Launcher,
    k_pool: Pool,
    v_pool: Pool,
    k: mx.array,
    v: mx.array,
    slots: mx.array,
    after: mx.array | None = None,
) -> mx.array:
    """See ``kernels.kv_write``."""
    rows, kv_heads, dim = k.shape
    packing = packing_of(k_pool)
    parts, threads = _copy_parts(k_pool, v_pool) if packing is None else (-(-2 * kv_heads // 4), 128)
    shape = (("HKV", kv_heads), ("D", dim), ("DV", v.shape[2]), ("THREADS", threads))
    what = Launch(
        packed_source(KV_WRITE, packing),
        (("T", k_pool.dtype), *shape, *packed_constants(packing)),
        (rows, parts),
        threads,
        (((8,), mx.int32),),
    )
    pools = storage(k_pool), storage(v_pool)
    inputs = [k.astype(k_pool.dtype), v.astype(v_pool.dtype), *pools, slots, _token(after)]
    return launch(what, inputs)[0]


def kv_gather(
    launch: Launcher,
    k_pool: Pool,
    v_pool: Pool,
    table: mx.array,
    page_size: int,
    after: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """See ``kernels.kv_gather``."""
    rows, context = table.shape[0], table.shape[1] * page_size
    kv_heads, dim, value_dim = k_pool.shape[1], k_pool.shape[2], v_pool.shape[2]
    parts, threads = _copy_parts(k_pool, v_pool)
    packing = packing_of(k_pool)
    shape = (("HKV", kv_heads), ("D", dim), ("DV", value_dim), ("PAGE", page_size), ("THREADS", threads))
    what = Launch(
        packed_source(KV_GATHER, packing),
        (("T", k_pool.dtype), *shape, *packed_constants(packing)),
        (rows * context, parts),
        threads,
        tuple(((rows, kv_heads, context, d), k_pool.dtype) for d in (dim, value_dim)),
    )
    k, v = launch(what, [storage(k_pool), storage(v_pool), table, _token(after)])
    return k, v


def _copy_parts(k_pool: Pool, v_pool: Pool) -> tuple[int, int]:
    """(blocks, threads of each) for one token's K and V, a pack of 16 bytes (8 quantized numbers) a thread."""
    width = 16 // k_pool.dtype.size if packing_of(k_pool) is None else 8
    packs = k_pool.shape[1] * max(k_pool.shape[2], v_pool.shape[2]) // width
    threads = min(256, -(-packs // 32) * 32)
    return -(-packs // threads), threads


def paged_decode(
    launch: Launcher,
    q: mx.array,
    k_pool: Pool,
    v_pool: Pool,
    table: mx.array,
    lengths: mx.array,
    form: Form,
    tuning: Tuning,
    sinks: mx.array | None = None,
    after: mx.array | None = None,
    new: tuple[mx.array, mx.array] | None = None,
    joined: bool = False,
) -> mx.array:
    """See ``kernels.paged_decode``; with ``new`` (k, v) it stores each row's newest K and V too: in full slots only."""
    shape = Shape.of(q, k_pool, v_pool, joined)
    first, second = _decode_launches(shape, form, tuning, sinks is not None, new is not None)
    inputs = [q, storage(k_pool), storage(v_pool), table, lengths, *_rest(q, sinks, form, after)]
    if new is not None:
        inputs += [a.astype(k_pool.dtype) for a in new]
    return _attend(launch, first, second, inputs)


def paged_extend(
    launch: Launcher,
    q: mx.array,
    k_pool: Pool,
    v_pool: Pool,
    table: mx.array,
    lengths: mx.array,
    tiles: mx.array,
    form: Form,
    tuning: Tuning,
    sinks: mx.array | None = None,
    after: mx.array | None = None,
) -> mx.array:
    """See ``kernels.paged_extend``; ``tiles`` have at most ``rows_per_tile`` rows each."""
    shape = Shape.of(q, k_pool, v_pool)
    first, second = _extend_launches(shape, tiles.shape[0], form, tuning, sinks is not None)
    inputs = [q, storage(k_pool), storage(v_pool), table, lengths, *_rest(q, sinks, form, after), tiles]
    return _attend(launch, first, second, inputs)


def rows_per_tile(group: int, dtype: mx.Dtype, tuning: Tuning) -> int:
    """Most rows of one sequence that a block of ``paged_extend`` takes, by what its registers hold.

    ``group`` is the number of query heads to a KV head.
    """
    tile, _ = head_tiles(group, tuning.most_heads(dtype))
    if tuning.matrix and dtype != mx.float32:
        return max(1, _QUERIES // tile)
    return 8 if 2 * tile <= tuning.heads else 4


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
class Shape:
    """What a launch must know of q [rows, heads, dim] and the pools; small and hashable."""

    rows: int
    heads: int
    dim: int
    value_dim: int
    kv_heads: int
    dtype: mx.Dtype
    kv_dtype: mx.Dtype
    joined: bool = False
    packing: Packing | None = None

    @staticmethod
    def of(q: mx.array, k_pool: Pool, v_pool: Pool, joined: bool = False) -> Shape:
        rows, heads, dim = q.shape
        packing = packing_of(k_pool)
        return Shape(rows, heads, dim, v_pool.shape[2], k_pool.shape[1], q.dtype, k_pool.dtype, joined, packing)

    @property
    def out(self) -> tuple[int, ...]:
        """[rows, heads, value_dim], or if ``joined`` [rows, 1, heads * value_dim]."""
        heads = (1, self.heads * self.value_dim) if self.joined else (self.heads, self.value_dim)
        return (self.rows, *heads)


# Launches are made once for each shape: a step asks for the same ones in every layer.


@lru_cache(maxsize=1024)
def _decode_launches(
    shape: Shape, form: Form, tuning: Tuning, sinks: bool, fused: bool
) -> tuple[Launch, Launch | None]:
    # At 256 dims the fragments spill, and one row does not have enough queries to make up for that.
    matrix = _takes_matrix(shape, tuning) and max(shape.dim, shape.value_dim) <= 192
    tile, tiles = _heads(shape, tuning, matrix)
    cut: tuple[Constant, ...]
    if matrix:
        cut = (("ROWS", 1), ("AT_ONCE", _at_once(tile, shape, tuning)))
    else:
        cut = (("U", tuning.unroll), ("HEADS_AT_ONCE", _at_once(tile, shape, tuning)))
    macros = ("FUSED",) * fused
    blocks = shape.rows * shape.kv_heads * tiles
    body = "paged_mma" if matrix else "paged_decode"
    return _launches(body, "paged_decode", _DECODE_INPUTS, macros, shape, form, tuning, sinks, cut, blocks, tile, tiles)


@lru_cache(maxsize=1024)
def _extend_launches(
    shape: Shape, num_tiles: int, form: Form, tuning: Tuning, sinks: bool
) -> tuple[Launch, Launch | None]:
    matrix = _takes_matrix(shape, tuning)
    tile, tiles = _heads(shape, tuning, matrix)
    rows = rows_per_tile(shape.heads // shape.kv_heads, shape.kv_dtype if matrix else mx.float32, tuning)
    cut: tuple[Constant, ...]
    if matrix:
        cut = (("ROWS", rows), ("AT_ONCE", _at_once(tile * rows, shape, tuning)))
    else:
        # Eight quantized numbers with their scale take up to 16 bytes, as eight of 16 bits do.
        size, dims = shape.kv_dtype.size if shape.packing is None else 2, (shape.dim, shape.value_dim)
        at_once = tuning.unroll * 32 // _lanes(max(dims) * size // 16)
        tokens = max(at_once, min(64, _SHARED_BYTES // (sum(dims) * size)) // at_once * at_once)
        cut = (("U", tuning.unroll), ("ROWS", rows), ("TOKENS", tokens))
    blocks = num_tiles * shape.kv_heads * tiles
    body = "paged_mma" if matrix else "paged_extend"
    inputs = (*_DECODE_INPUTS, "tiles")
    return _launches(body, "paged_extend", inputs, ("TILED",), shape, form, tuning, sinks, cut, blocks, tile, tiles)


def _takes_matrix(shape: Shape, tuning: Tuning) -> bool:
    return tuning.matrix and shape.dtype == shape.kv_dtype != mx.float32


def _heads(shape: Shape, tuning: Tuning, matrix: bool) -> tuple[int, int]:
    return head_tiles(shape.heads // shape.kv_heads, tuning.most_heads(shape.kv_dtype if matrix else mx.float32))


def _at_once(queries: int, shape: Shape, tuning: Tuning) -> int:
    """How many queries' sums the warps of a block join at once in shared memory."""
    return max(1, min(queries, _SHARED_BYTES // (tuning.warps * shape.value_dim * 4)))


def _launches(
    body: str,
    name: str,
    inputs: tuple[str, ...],
    macros: tuple[str, ...],
    shape: Shape,
    form: Form,
    tuning: Tuning,
    sinks: bool,
    cut: tuple[Constant, ...],
    blocks: int,
    tile: int,
    tiles: int,
) -> tuple[Launch, Launch | None]:
    """One launch, or with splits two: their partial sums, and the sum of those."""
    split, threads = tuning.splits > 1, 32 * tuning.warps
    macros = (*macros, *("SPLIT",) * split)
    suffix = "".join(f"_{m.lower()}" for m in (*("MMA",) * (body == "paged_mma"), *macros) if m != "TILED")
    given = (*inputs, "k", "v") if "FUSED" in macros else inputs
    plain = Source(name + suffix, body, given, _PARTS if split else ("out",), macros)
    source = packed_source(plain, shape.packing, *("packed_words",) * (body == "paged_mma"))
    constants: tuple[Constant, ...] = (
        ("T", shape.dtype),
        ("KT", shape.kv_dtype),
        ("D", shape.dim),
        ("DV", shape.value_dim),
        ("HKV", shape.kv_heads),
        ("G", shape.heads // shape.kv_heads),
        ("GT", tile),
        ("TILES", tiles),
        ("PAGE", form.page_size),
        ("WINDOW", form.window or 0),
        ("SINKS", sinks),
        ("SOFTCAP", form.softcap is not None),
        ("WARPS", tuning.warps),
        ("LEAST", LEAST_SPLIT if split else 1),
        *cut,
        *packed_constants(shape.packing),
    )
    queries = shape.rows * shape.heads
    whole = ((shape.out, shape.dtype),)
    if not split:
        return Launch(source, constants, (blocks, 1), threads, whole), None
    parts = (
        ((queries, tuning.splits, shape.value_dim), mx.float32),
        ((queries, tuning.splits, 2), mx.float32),
    )
    first = Launch(source, constants, (blocks, tuning.splits), threads, parts)
    return first, reduce_launch(queries, shape.heads, whole[0], sinks, shape.value_dim)


def reduce_launch(
    queries: int, heads: int, out: tuple[tuple[int, ...], mx.Dtype], sinks: bool = False, width: int | None = None
) -> Launch:
    """Sums the parts of ``queries`` queries of ``heads`` heads a row, each ``width`` wide, out's last axis if None."""
    constants = (("T", out[1]), ("DV", width or out[0][-1]), ("HQ", heads), ("SINKS", sinks), ("THREADS", 128))
    return Launch(REDUCE, constants, (queries, 1), 128, (out,))


def _attend(launch: Launcher, first: Launch, second: Launch | None, inputs: list[mx.array]) -> mx.array:
    results = launch(first, inputs)
    return results[0] if second is None else launch(second, [*results, inputs[5]])[0]


def _rest(q: mx.array, sinks: mx.array | None, form: Form, after: mx.array | None) -> tuple[mx.array, ...]:
    held = nothing(q.dtype) if sinks is None else sinks if sinks.dtype == q.dtype else sinks.astype(q.dtype)
    return held, params(form.scale, form.softcap or 1.0), _token(after)


def head_tiles(group: int, most: int) -> tuple[int, int]:
    """(heads a block, blocks) for the ``group`` query heads of a KV head, cut as evenly as ``most`` allows."""
    tiles = -(-group // most)
    return -(-group // tiles), tiles


def _lanes(packs: int) -> int:
    """``lanes_for`` of bodies/common.h."""
    return min(32, 1 << (packs - 1).bit_length())


def _token(after: mx.array | None) -> mx.array:
    return nothing(mx.int32) if after is None else after
