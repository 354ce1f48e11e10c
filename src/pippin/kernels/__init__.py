"""Attention over the KV pool by page, and writes into it: kernels of ours on a GPU, plain MLX elsewhere.

One body per kernel (``bodies``), in the common subset of Metal and CUDA C++, compiled at its first launch; see
docs/kernels.md. ``reference`` says what each operation computes. Before a kernel's first use on a machine ``verify``
compares it with the reference, and plain MLX takes the place of one that fails.

**In place.** The pools passed in are changed: on a GPU a kernel writes through its input pointer, which MLX does
not know of, so order is the caller's business: what reads the pool takes what the write returned as ``after``, and
what writes takes, as ``after``, something that the last step computed once it had read the pool (its sampled
tokens). On the CPU the objects passed in are rebound to the updated arrays, as with ``pool[slots] = k``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import Literal

import mlx.core as mx

from pippin.folders import cache_folder
from pippin.kernels import drawing, fused, grouped, latent, paged, products, reference, select, tuning
from pippin.kernels.build.prebuilt import BuiltCuda, prefer_built
from pippin.kernels.checking import KernelName
from pippin.kernels.checks import Kind, fingerprint, verdicts
from pippin.kernels.contest import Contests
from pippin.kernels.drawing import MOST_TOPS, Filters
from pippin.kernels.form import Form
from pippin.kernels.fused import Heads, Norm, Rope
from pippin.kernels.grouped import Routed
from pippin.kernels.launch import Launch, Launcher, gpu_launcher
from pippin.kernels.packing import PACKINGS, PackedPool, Packing, Pool, packed, packing_of, storage
from pippin.kernels.paged import tile_rows
from pippin.kernels.products import Gated, Weights
from pippin.kernels.routed import Choice, Gate, Pairs

__all__ = [
    "MOST_TOPS",
    "PACKINGS",
    "Choice",
    "Filters",
    "Form",
    "Gate",
    "Gated",
    "Heads",
    "Norm",
    "PackedPool",
    "Packing",
    "Pairs",
    "Pool",
    "Rope",
    "Routed",
    "Weights",
    "add_rms_norm",
    "backend",
    "boundary",
    "draw",
    "draws",
    "expert_product",
    "geglu",
    "kv_gather",
    "kv_write",
    "latent_decode",
    "launcher_of",
    "measure_products",
    "packed",
    "paged_decode",
    "paged_extend",
    "product_way",
    "quantized_product",
    "rope_kv_write",
    "rows_by_page",
    "rows_per_tile",
    "storage",
    "swiglu",
    "tile_rows",
    "top_logprobs",
    "verify",
    "writes_in_place",
]

Platform = Literal["metal", "cuda"]

log = logging.getLogger(__name__)

_IN_PLACE: tuple[KernelName, ...] = ("kv_write", "paged_decode_write", "rope_kv_write")


def backend() -> Platform | None:
    """The platform that kernels are compiled for, None where plain MLX runs: the one place that decides."""
    if mx.default_device() != mx.Device(mx.gpu):
        return None
    return "metal" if mx.metal.is_available() else "cuda"


def verify(dtype: mx.Dtype = mx.bfloat16, kind: Kind | None = None) -> dict[KernelName, bool]:
    """Which kernels compute what ``reference`` does here, for pools of ``dtype``; those that fail are logged.

    ``kind`` asks for those of quantized pools that are read as ``dtype``, of latents, products, or draws from logits.

    The verdict is kept in the user's cache for this chip, system, MLX version and kernel source. Empty without a GPU.
    """
    platform = backend()
    return {} if platform is None else _verdicts(platform, dtype, kind)


def kv_write(
    k_pool: Pool,
    v_pool: Pool,
    k: mx.array,
    v: mx.array,
    slots: mx.array,
    *,
    after: mx.array | None = None,
) -> mx.array:
    """Stores rows k [R, kv_heads, dim] and v [R, kv_heads, value_dim] at ``slots`` [R] int32, in place.

    Returns a small int32 array to pass on as ``after`` to whatever reads these pools. Padding rows go to slot 0, which
    nothing reads. ``slots`` are not checked: one outside of the pool corrupts memory.
    """
    launch = _launcher("kv_write", k_pool, v_pool)
    if launch is not None:
        return paged.kv_write(launch, k_pool, v_pool, k, v, slots, after)
    reference.kv_write(k_pool, v_pool, k, v, slots)
    return slots


def writes_in_place(k_pool: Pool, v_pool: Pool) -> bool:
    """Whether ``kv_write`` is a kernel for these pools here, and so ``after`` the only thing that orders accesses."""
    return _launcher("kv_write", k_pool, v_pool) is not None


def rope_kv_write(
    y: mx.array,
    k_pool: Pool,
    v_pool: Pool,
    heads: Heads,
    rope: Rope,
    *,
    positions: mx.array,
    slots: mx.array,
    norms: tuple[Norm | None, Norm | None] = (None, None),
    after: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """A layer's q, k and v from rows y [.., n]: q and k normed and rotated, then k and v stored at ``slots`` [T].

    ``heads`` says where in a row they lie, ``norms`` are q's and k's, over a head, ``positions`` [T] int32 what to
    rotate by. Returns q [T, heads, dim] and what readers of the pools pass on as ``after``, as ``kv_write`` does.
    """
    launch = _launcher("rope_kv_write", k_pool, v_pool) if fused.takes_heads(heads, y.shape[-1]) else None
    if launch is not None:
        return fused.rope_kv_write(launch, y, k_pool, v_pool, heads, rope, positions, slots, norms, after)
    q, k, v = reference.heads_of(y.reshape(-1, y.shape[-1]), heads)
    q, k = (x if n is None else reference.rms_norm(x, *n) for x, n in zip((q, k), norms, strict=True))
    q, k = (
        reference.rope(x, positions, rope.dims, rope.frequencies, traditional=rope.traditional, length=rope.length)
        for x in (q, k)
    )
    return q, kv_write(k_pool, v_pool, k, v, slots, after=after)


def add_rms_norm(x: mx.array, r: mx.array, norm: Norm) -> tuple[mx.array, mx.array]:
    """(x + r, that normed), both as x [.., n]; in one launch where there is a kernel for rows of that length."""
    launch = _row_launcher("add_rms_norm", x.shape[-1], x.dtype) if x.dtype == r.dtype == norm.weight.dtype else None
    if launch is None:
        total = x + r
        return total, mx.fast.rms_norm(total, *norm)
    return fused.add_rms_norm(launch, x, r, norm)


def swiglu(y: mx.array) -> mx.array:
    """silu(gate) * up [.., n], where y [.., 2 n] is gate, then up."""
    width = y.shape[-1] // 2
    launch = _row_launcher("swiglu", width, y.dtype)
    if launch is None:
        return reference.swiglu(y)
    return fused.swiglu(launch, y)


def geglu(y: mx.array) -> mx.array:
    """gelu(gate) * up [.., n], gelu in its tanh form, where y [.., 2 n] is gate, then up."""
    launch = _row_launcher("swiglu", y.shape[-1] // 2, y.dtype)
    if launch is None:
        return reference.geglu(y)
    return fused.geglu(launch, y)


def quantized_product(x: mx.array, weights: Weights) -> mx.array:
    """x [T, K] by quantized ``weights`` [N, K], transposed: [T, N]; by whatever is fastest for so many rows here.

    That is a kernel that reads the weights once, MLX's own product, or on CUDA that of weights made whole first: as
    ``measure_products`` found, or else as an H200 did.
    """
    way = "mlx" if backend() is None else _product_way(x.dtype, weights, products.size_of(x.shape[0], products.ROWS))
    if way == "kernel":
        launch = _product_launcher(x.dtype, weights)
        assert launch is not None
        return products.product(launch, x, weights)
    return products.by_whole(x, weights) if way == "whole" else products.by_mlx(x, weights)


def expert_product(x: mx.array, weights: Weights, chosen: Routed, per: int) -> mx.array | None:
    """Row i is row i // per of x [T, K] by the weights [experts, N, K] of the expert of pair i of ``chosen``: [P, N].

    None where there is no kernel for it, or where MLX's own was found to be faster.
    """
    pairs = chosen.pairs
    way = product_way(x.dtype, weights, pairs)
    if way == "mlx":
        return None
    launch = _product_launcher(x.dtype, weights, way)
    assert launch is not None
    if way == "tiles":
        return grouped.product(launch, x, weights, chosen.tiles(launch, weights.experts), per)
    return products.product(launch, x, weights, chosen.indices, per)


def product_way(dtype: mx.Dtype, weights: Weights, pairs: int, gated: bool = False) -> str:
    """How so many pairs of a row and its expert's weights are multiplied best: ``kernel``, ``tiles`` or ``mlx``.

    ``gated``: by weights of a gate, and by those that it gates.
    """
    if gated and pairs <= products.FEW_PAIRS and _product_launcher(dtype, weights) is not None:
        return "kernel"
    return "mlx" if backend() is None else _product_way(dtype, weights, products.size_of(pairs, products.PAIRS))


def measure_products(found: Iterable[Weights], dtype: mx.Dtype) -> None:
    """Finds out which way is fastest for each shape among these weights and for each number of rows of ``dtype``.

    Decodes go first, and of these the largest matrices, since time is bounded (``contest``). Only on CUDA there is more
    than one way.
    """
    platform = backend()
    if platform != "cuda":
        return
    sizes: dict[str, tuple[int, Weights]] = {}
    for weights in found:
        key = products.key_of(weights, dtype, 0)
        sizes[key] = sizes.get(key, (0, weights))[0] + weights.w.nbytes, weights
    held = contests(platform)
    of_size = [weights for _, weights in sorted(sizes.values(), key=lambda pair: -pair[0])]
    rounds = [(weights, size) for weights in of_size for size in products.sizes_of(weights)]
    rounds = [r for r in rounds if held.known(products.key_of(r[0], dtype, r[1])) is None]
    rounds.sort(key=lambda r: r[1] > products.MOST_DECODES)
    _compile_products(rounds, dtype)
    for weights, size in rounds:
        ways = products.ways(_product_launcher(dtype, weights), weights, dtype, size)
        by_tiles = _product_launcher(dtype, weights, "tiles") if grouped.takes(weights, size) else None
        if by_tiles is not None:
            ways |= grouped.ways(by_tiles, weights, dtype, size)
        first = _usual_way(dtype, weights, size)
        if first in ways:
            held.hold(products.key_of(weights, dtype, size), {first: ways.pop(first), **ways})
    held.keep()
    _known_ways.clear()
    mx.clear_cache()


def _compile_products(rounds: Iterable[tuple[Weights, int]], dtype: mx.Dtype) -> None:
    """Compiles the kernels of these products, all together, where that is ours to do."""
    launch, found = _gpu("cuda"), list[tuple[Launch, list[mx.array]]]()
    if not isinstance(launch, BuiltCuda) or launch.refused is not None:
        return

    def record(what: Launch, inputs: Sequence[mx.array]) -> list[mx.array]:
        found.append((what, list(inputs)))
        return [mx.zeros(shape, dtype=kind) for shape, kind in what.outputs]

    for weights, size in rounds:
        if _product_launcher(dtype, weights) is not None:
            products.record(record, weights, dtype, size)
        if grouped.takes(weights, size) and _product_launcher(dtype, weights, "tiles") is not None:
            grouped.ways(record, weights, dtype, size)["tiles"]()
    launch.prepare(found)


_known_ways: dict[tuple[object, ...], str] = {}


def _product_way(dtype: mx.Dtype, weights: Weights, size: int) -> str:
    """kernel, tiles, mlx or whole."""
    takes = products.takes(dtype, weights)  # matrices of one shape may have scales of different types
    key = (tuple(weights.w.shape), weights.bits, weights.group, weights.mode, takes, dtype, size)
    if key not in _known_ways:
        won = contests(backend() or "cuda").known(products.key_of(weights, dtype, size))
        usual = _usual_way(dtype, weights, size)
        able = won not in ("kernel", "tiles") or _product_launcher(dtype, weights, won) is not None
        _known_ways[key] = won if won is not None and able else usual
    return _known_ways[key]


def _usual_way(dtype: mx.Dtype, weights: Weights, size: int) -> str:
    """What to do where nothing was measured."""
    if weights.w.ndim == 2 and size > products.MOST_ROWS:
        return "whole" if backend() == "cuda" else "mlx"
    way = "kernel" if size <= products.MOST_PAIRS else "tiles"
    return way if products.is_likely(weights) and _product_launcher(dtype, weights, way) is not None else "mlx"


def boundary(
    bits: mx.array, mass: mx.array | None, limits: select.Limits, signed: bool = False
) -> tuple[mx.array, mx.array] | None:
    """The last token that ``limits`` leave of each row, in order of (bits, id): its bits and its id, [S, 1] each.

    ``bits`` uint32 [S, n], ``mass`` uint32 [S, n], of which a row sums up to less than 2**32. Bits from 2**31 on are no
    tokens unless ``signed``. ``select.tokens_up_to`` makes a mask of the pair, which names no token where all are left,
    or none. None where there is no kernel for it.
    """
    platform = backend()
    if platform is None or not select.takes(bits):
        return None
    if not _verdicts(platform, mx.float32, "limits")["boundary"]:
        return None
    return select.boundary(_gpu(platform), bits, mass, limits, signed)


def draws(logits: mx.array, vocab_size: int) -> bool:
    """Whether ``draw`` and ``top_logprobs`` take logits [S, V]. If so, then their edits in float32 too."""
    platform = backend()
    if platform is None or not drawing.takes(logits, vocab_size):
        return False
    return all(all(_verdicts(platform, dtype, "draws").values()) for dtype in (mx.float32, logits.dtype))


def draw(logits: mx.array, vocab_size: int, filters: Filters) -> tuple[mx.array, mx.array]:
    """A token a row of logits [S, V] of which ``vocab_size`` exist, int32 [S], and whether the largest is finite.

    As ``reference.draw``, in one launch that makes no arrays as long as a row. A token may be another's only where
    scores differ in float32's last digits. Only where it ``draws``.
    """
    return drawing.draw(_gpu(backend() or "cuda"), logits, vocab_size, filters)


def top_logprobs(
    logits: mx.array, vocab_size: int, tokens: mx.array, count: int
) -> tuple[mx.array, mx.array, mx.array]:
    """Log probabilities float32 [S] of ``tokens`` [S]; ids int32 [S, count] and those of the ``count`` likeliest.

    Largest first, then lower ids; at most ``MOST_TOPS``. For 0 the others say nothing. Only where it ``draws``.
    """
    return drawing.top_logprobs(_gpu(backend() or "cuda"), logits, vocab_size, tokens, count)


def kv_gather(
    k_pool: Pool, v_pool: Pool, table: mx.array, *, page_size: int, after: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """K [R, kv_heads, context, dim] and V [R, kv_heads, context, value_dim] of the tokens in ``table`` [R, pages].

    ``context`` is pages * page_size. For attention that wants K and V in one piece, as MLX's own does.
    """
    launch = _launcher("kv_gather", k_pool, v_pool)
    if launch is not None:
        return paged.kv_gather(launch, k_pool, v_pool, table, page_size, after)
    return reference.kv_gather(k_pool, v_pool, table, page_size=page_size)


def paged_decode(
    q: mx.array,
    k_pool: Pool,
    v_pool: Pool,
    table: mx.array,
    lengths: mx.array,
    form: Form,
    *,
    sinks: mx.array | None = None,
    after: mx.array | None = None,
    new: tuple[mx.array, mx.array] | None = None,
    longest: int | None = None,
    joined: bool = False,
) -> mx.array:
    """Attention of one query per row: q [R, heads, dim] to [R, heads, value_dim], in q's dtype.

    ``table`` [R, pages] int32 are page numbers, ``lengths`` [R] int32 how many tokens each row attends to; a row of
    length 0 is padding and gives zeros. ``new`` = (k [R, kv_heads, dim],
    v [R, kv_heads, value_dim]) also stores them, as the K and V of token ``lengths[r] - 1``, in the same launch: only
    where no other row of this step reads that token. ``longest`` is an upper bound of ``lengths`` that decides how far
    contexts are split; the table's width if left out. ``joined``: heads come out side by side, [R, 1, heads *
    value_dim], as the next projection takes them. The rest as in ``reference``.
    """
    launch = _launcher("paged_decode" if new is None else "paged_decode_write", k_pool, v_pool)
    if launch is not None:
        cut = tuning_for(q.shape[0], q, k_pool, longest or table.shape[1] * form.page_size, form.window)
        return paged.paged_decode(launch, q, k_pool, v_pool, table, lengths, form, cut, sinks, after, new, joined)
    if new is not None:
        after = kv_write(k_pool, v_pool, *new, reference.newest_slots(table, lengths, form.page_size), after=after)
        return paged_decode(
            q, k_pool, v_pool, table, lengths, form, sinks=sinks, after=after, longest=longest, joined=joined
        )
    out = reference.paged_decode(q, k_pool, v_pool, table, lengths, form, sinks=sinks)
    return out.reshape(q.shape[0], 1, -1) if joined else out


def paged_extend(
    q: mx.array,
    k_pool: Pool,
    v_pool: Pool,
    table: mx.array,
    lengths: mx.array,
    tiles: mx.array,
    form: Form,
    *,
    sinks: mx.array | None = None,
    after: mx.array | None = None,
    longest: int | None = None,
) -> mx.array:
    """Attention of several rows of each sequence, K and V read once for up to ``rows_per_tile`` of them.

    q [T, heads, dim] to [T, heads, value_dim]. ``table`` [S, pages] has a line a sequence, ``lengths`` [T] a number a
    row (its position plus 1). ``tiles`` [N, 3] int32 as ``tile_rows`` makes them, of at most ``rows_per_tile(heads,
    kv_heads)`` rows. Rows in no tile give whatever: do not read them.
    """
    launch = _launcher("paged_extend", k_pool, v_pool)
    if launch is None:  # row by row, by the kernel for that if there is one
        lines = table[reference.owners(tiles, q.shape[0])]
        return paged_decode(q, k_pool, v_pool, lines, lengths, form, sinks=sinks, after=after, longest=longest)
    units, seen = tiles.shape[0], longest or table.shape[1] * form.page_size
    cut = replace(tuning_for(units, q, k_pool, seen, form.window, "extend"), unroll=2)
    return paged.paged_extend(launch, q, k_pool, v_pool, table, lengths, tiles, form, cut, sinks, after)


def latent_decode(
    q: mx.array,
    q_turned: mx.array,
    k_pool: Pool,
    v_pool: Pool,
    table: mx.array,
    lengths: mx.array,
    form: Form,
    *,
    after: mx.array | None = None,
    longest: int | None = None,
) -> mx.array:
    """Absorbed latent attention: q [R, heads, dim] and q_turned [R, heads, turned] to [R, heads, dim], in q's dtype.

    ``k_pool`` [slots, 1, dim] has latents, ``v_pool`` [slots, 1, turned] their turned keys; ``q_turned`` is scaled
    already. The rest as in ``reference`` and ``paged_decode``. The kernel reads them where they lie, where it is right
    and was found to be faster than products of gathered ones.
    """
    launch = _latent_launcher(q, q_turned.shape[2], k_pool, v_pool)
    if launch is not None:
        chip = tuning.table(backend() or "cuda")
        cut = latent.cut_of(chip.base, q.shape[0], q.shape[1], longest or table.shape[1] * form.page_size, chip.cores)
        return latent.latent_decode(launch, q, q_turned, k_pool, v_pool, table, lengths, form, cut, after)
    latents, keys = kv_gather(k_pool, v_pool, table, page_size=form.page_size, after=after)
    return latent.over_gathered(q, q_turned, latents, keys, lengths, form.scale)


def _latent_launcher(q: mx.array, turned: int, k_pool: Pool, v_pool: Pool) -> Launcher | None:
    """What runs the kernel for so many rows, None where MLX's products are to be taken."""
    platform = backend()
    if platform is None or not latent.takes(k_pool, v_pool):
        return None
    if not _verdicts(platform, k_pool.dtype, "latents")["latent_decode"]:
        return None
    _, heads, dim = q.shape
    few, many = _latent_winners(platform, (heads, dim, turned), (q.dtype, k_pool.dtype))
    return _gpu(platform) if (few if q.shape[0] <= latent.FEW_ROWS else many) == "kernel" else None


@cache
def _latent_winners(
    platform: Platform, shape: tuple[int, int, int], dtypes: tuple[mx.Dtype, mx.Dtype]
) -> tuple[str, str]:
    """Whether the kernel is faster for few rows of a long context, and for many of a short one.

    Held once, as the probe runs the model, so that no step that is being compiled finds it open.
    """
    table, launch, held = tuning.table(platform), _gpu(platform), contests(platform)
    found = []
    for rows, context in latent.SAMPLES:
        cut = latent.cut_of(table.base, rows, shape[0], context, table.cores)
        key = " ".join(["latents", *map(str, (rows, context, *shape, *dtypes))])
        found.append(held.hold(key, latent.ways(launch, shape, dtypes, rows, context, cut)))
    held.keep()
    return found[0], found[1]


@cache
def contests(platform: Platform) -> Contests:
    """What was found to be fastest on this machine."""
    return Contests(cache_folder() / f"fastest-{fingerprint(platform)}.json")


def _launcher(name: KernelName, k_pool: Pool, v_pool: Pool) -> Launcher | None:
    """What runs this kernel for these pools, None for plain MLX.

    Plain MLX can't be told to read after a kernel has written in place, so pools are written in place only where
    the kernels that read them are right, and otherwise not at all.
    """
    platform = backend()
    wide = latent.are_wide(k_pool, v_pool)
    if platform is None or not (wide or paged.supported(k_pool, v_pool)):
        return None
    right = _verdicts(platform, k_pool.dtype, "latents" if wide else packing_of(k_pool))
    if name not in right:
        return None
    readers: tuple[KernelName, ...] = ("kv_gather",) if wide else ("kv_gather", "paged_decode")
    needed = (name, *readers) if name in _IN_PLACE else (name,)
    return _gpu(platform) if all(right[n] for n in needed) else None


def _row_launcher(name: KernelName, width: int, dtype: mx.Dtype) -> Launcher | None:
    """What runs this kernel over rows of ``width`` numbers, None for plain MLX."""
    return launcher_of(name, dtype) if fused.takes_rows(width, dtype) else None


def launcher_of(name: KernelName, dtype: mx.Dtype, kind: Kind | None = None) -> Launcher | None:
    """What runs this kernel, None for plain MLX: where there is no GPU, or it was found to be wrong."""
    platform = backend()
    return _gpu(platform) if platform is not None and _verdicts(platform, dtype, kind)[name] else None


def tuning_for(
    units: int, q: mx.array, k_pool: Pool, longest: int, window: int | None, kernel: tuning.Kernel = "decode"
) -> paged.Tuning:
    """How to cut a launch over ``units`` rows or tiles of rows whose longest context is ``longest``."""
    seen = longest if window is None else min(window, longest)
    return tuning.choose(backend() or "cuda", kernel, k_pool.dtype, units, q.shape[1], k_pool.shape[1], seen)


def _product_launcher(dtype: mx.Dtype, weights: Weights, way: str = "kernel") -> Launcher | None:
    """What runs the product in a way of ours, None for plain MLX; only CUDA's dialect has products of fragments."""
    if backend() != "cuda" or not products.takes(dtype, weights):
        return None
    if way == "tiles":
        right = _verdicts("cuda", dtype, "tiles")[grouped.check_of(weights)]
    else:
        right = _verdicts("cuda", dtype, "products")[products.checks_of(weights)[0]]
    return _gpu("cuda") if right else None


def rows_per_tile(heads: int, kv_heads: int, dtype: mx.Dtype) -> int:
    """Most rows that a tile of ``paged_extend`` may have here, for so many heads and a pool of ``dtype``."""
    return paged.rows_per_tile(heads // kv_heads, dtype, tuning.table(backend() or "cuda").base)


def rows_by_page(k_pool: Pool, v_pool: Pool) -> int:
    """Most rows of one sequence that ``paged_extend`` should take, 1 where no kernel does; for more, gather first.

    On an H200 64 rows behind 8k tokens took 179 µs, gathering 318, and longer contexts do not change the ratio. Without
    matrix products a tile has 4 to 8 rows, each of which reads K and V once: not measured, so no more than a few tiles.
    """
    if _launcher("paged_extend", k_pool, v_pool) is None:
        return 1
    return 64 if tuning.table(backend() or "cuda").base.matrix and k_pool.dtype != mx.float32 else 16


def forget() -> None:
    """Makes the next call ask anew which kernels are right, as a new process does."""
    _gpu.cache_clear()
    _verdicts.cache_clear()
    _latent_winners.cache_clear()
    contests.cache_clear()
    _known_ways.clear()
    tuning.forget()


@cache
def _gpu(platform: Platform) -> Launcher:
    return prefer_built(platform, gpu_launcher(platform))


@cache
def _verdicts(platform: Platform, dtype: mx.Dtype, kind: Kind | None = None) -> dict[KernelName, bool]:
    log.info("checking the %s kernels for %s, once on this machine", platform, kind or dtype)
    gpu = mx.Device(mx.gpu)
    launcher = prefer_built(platform, gpu_launcher(platform, gpu), gpu)
    found = verdicts(platform, launcher, dtype, tuning.table(platform).base, kind)
    if isinstance(launcher, BuiltCuda) and launcher.refused is not None:
        _gpu.cache_clear()
    for name, ok in found.items():
        if not ok:
            log.warning("kernel %s is not right on this machine; plain MLX takes its place, slower", name)
    return found
