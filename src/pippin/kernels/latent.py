"""Launches of absorbed latent attention by page (DeepSeek-V2, arXiv 2405.04434), and the same from gathered latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx

from pippin.kernels.form import Form
from pippin.kernels.launch import Launch, Launcher, Source, nothing, params
from pippin.kernels.packing import PackedPool, Pool, storage
from pippin.kernels.paged import LEAST_SPLIT, Constant, Tuning, choose_cut, kv_gather, reduce_launch

_INPUTS = ("q", "q_turned", "k_pool", "v_pool", "table", "lengths", "params", "after")
_PARTS = ("accumulated", "stats")
_DTYPES = (mx.float32, mx.float16, mx.bfloat16)
_SHARED_BYTES = 16384
_WARPS, _UNROLL = 8, 2
# A latent is twice the widest head, and a query of it takes as many of a lane's registers as two and a half of those.
_WIDEST, _WIDEST_HEAD = 1024, 256

# Where the two ways are compared, as rows and tokens of each, and the most rows for which the first decides.
SAMPLES = ((1, 4096), (32, 1024))
FEW_ROWS = 8


def takes(k_pool: Pool, v_pool: Pool) -> bool:
    """Whether the kernel reads latents [slots, 1, dim] and turned keys [slots, 1, turned] from these pools."""
    if isinstance(k_pool, PackedPool) or isinstance(v_pool, PackedPool) or k_pool.dtype not in _DTYPES:
        return False
    (_, heads, dim), (_, others, turned) = k_pool.shape, v_pool.shape
    whole = all(d % 8 == 0 and d >= 8 for d in (dim, turned))
    return heads == others == 1 and whole and dim <= _WIDEST and turned <= _WIDEST_HEAD


def are_wide(k_pool: Pool, v_pool: Pool) -> bool:
    """Whether these can only be latents, since no head is as wide; then only what is made for latents reads them."""
    return takes(k_pool, v_pool) and k_pool.shape[2] > _WIDEST_HEAD


@dataclass(frozen=True, slots=True)
class Cut:
    """A block has ``warps``, each with ``queries`` heads; ``tiles`` of them make a row, ``splits`` its context."""

    warps: int
    queries: int
    tiles: int
    splits: int


def cut_of(tuning: Tuning, rows: int, heads: int, longest: int, cores: int) -> Cut:
    """As even as the heads that a warp's registers hold allow, and split as ``paged.choose_cut`` says."""
    warps, most = min(_WARPS, max(4, heads)), max(1, tuning.heads // 2)
    tiles = -(-heads // (warps * most))
    whole = Tuning(warps=tuning.warps, matrix=False)
    return Cut(warps, -(-heads // (tiles * warps)), tiles, choose_cut(whole, rows * tiles, longest, cores).splits)


def latent_decode(
    launch: Launcher,
    q: mx.array,
    q_turned: mx.array,
    k_pool: Pool,
    v_pool: Pool,
    table: mx.array,
    lengths: mx.array,
    form: Form,
    cut: Cut,
    after: mx.array | None = None,
) -> mx.array:
    """See ``kernels.latent_decode``."""
    first, second = _launches(tuple(q.shape), q_turned.shape[2], (q.dtype, k_pool.dtype), form.page_size, cut)
    pools, token = (storage(k_pool), storage(v_pool)), nothing(mx.int32) if after is None else after
    results = launch(first, [q, q_turned.astype(q.dtype), *pools, table, lengths, params(form.scale, 1.0), token])
    return results[0] if second is None else launch(second, [*results, nothing(q.dtype)])[0]


@lru_cache(maxsize=1024)
def _launches(
    shape: tuple[int, ...], turned: int, dtypes: tuple[mx.Dtype, mx.Dtype], page_size: int, cut: Cut
) -> tuple[Launch, Launch | None]:
    """One launch, or with splits two: their partial sums, and the sum of those."""
    (rows, heads, dim), (dtype, kv_dtype), split = shape, dtypes, cut.splits > 1
    tokens = _SHARED_BYTES // ((dim + turned) * kv_dtype.size) // _UNROLL * _UNROLL
    constants: tuple[Constant, ...] = (
        ("T", dtype),
        ("KT", kv_dtype),
        ("D", dim),
        ("DR", turned),
        ("HQ", heads),
        ("TILES", cut.tiles),
        ("QUERIES", cut.queries),
        ("PAGE", page_size),
        ("WARPS", cut.warps),
        ("TOKENS", max(_UNROLL, min(64, tokens))),
        ("U", _UNROLL),
        ("LEAST", LEAST_SPLIT if split else 1),
    )
    macros, name = (("SPLIT",), "latent_decode_split") if split else ((), "latent_decode")
    source = Source(name, "latent_decode", _INPUTS, _PARTS if split else ("out",), macros)
    blocks, threads, queries = (rows * cut.tiles, cut.splits), 32 * cut.warps, rows * heads
    if not split:
        return Launch(source, constants, blocks, threads, ((shape, dtype),)), None
    parts = ((queries, cut.splits, dim), mx.float32), ((queries, cut.splits, 2), mx.float32)
    return Launch(source, constants, blocks, threads, parts), reduce_launch(queries, heads, (shape, dtype))


def over_gathered(
    q: mx.array, q_turned: mx.array, latents: mx.array, keys: mx.array, lengths: mx.array, scale: float
) -> mx.array:
    """The same from latents [R, 1, context, dim] and turned keys [R, 1, context, turned], in plain products."""
    whole = mx.concatenate([q * scale, q_turned.astype(q.dtype)], axis=-1)[:, None]
    scores = whole @ mx.concatenate([latents, keys], axis=-1).swapaxes(-1, -2)
    seen = mx.arange(latents.shape[2], dtype=mx.int32) < lengths[:, None, None, None]
    weights = mx.softmax(mx.where(seen, scores, mx.finfo(scores.dtype).min), axis=-1, precise=True)
    return mx.where(lengths[:, None, None] > 0, (weights @ latents)[:, 0], 0).astype(q.dtype)


def ways(
    launch: Launcher,
    shape: tuple[int, int, int],
    dtypes: tuple[mx.Dtype, mx.Dtype],
    rows: int,
    context: int,
    cut: Cut,
) -> dict[str, Callable[[], mx.array]]:
    """Both ways to attend, over ``rows`` contexts of zeros: for heads, dim and turned, in q's and the pool's dtype."""
    heads, dim, turned = shape
    q, q_turned = (mx.zeros((rows, heads, d), dtypes[0]) for d in (dim, turned))
    k_pool, v_pool = (mx.zeros((rows * context + 1, 1, d), dtypes[1]) for d in (dim, turned))
    table = mx.arange(1, rows * context + 1, dtype=mx.int32).reshape(rows, context)
    lengths, form = mx.full((rows,), context, mx.int32), Form(1, 1.0)
    mx.eval(q, q_turned, k_pool, v_pool, table, lengths)

    def gathered() -> mx.array:
        latents, keys = kv_gather(launch, k_pool, v_pool, table, 1)
        return over_gathered(q, q_turned, latents, keys, lengths, form.scale)

    def kernel() -> mx.array:
        return latent_decode(launch, q, q_turned, k_pool, v_pool, table, lengths, form, cut)

    return {"gathered": gathered, "kernel": kernel}
