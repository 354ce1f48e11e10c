"""Every kernel against the reference on ragged batches of many shapes: what ``pippin kernels check`` runs on a machine.

``kernels.verify`` is the short form, made before a kernel's first use. The reference runs on the CPU (see
``kernels.checks``). Where MLX has no GPU the kernels run on the host, thread by thread, on a few small shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from pippin import kernels
from pippin.bench.kernel_batches import DTYPES, Batch, BatchShape, make_batch
from pippin.kernels import checks, host, paged, reference, tuning
from pippin.kernels.build.prebuilt import prefer_built
from pippin.kernels.launch import Launcher, gpu_launcher

TOLERANCE = {"float32": 1e-4, "float16": 4e-3, "bfloat16": 2e-2}
_DIMS = ((64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256))


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one check: the largest difference, infinite for a wrong pool or no number; ``detail`` says on what."""

    check: str
    ok: bool
    error: float
    detail: dict[str, Any]


def launcher() -> tuple[Launcher | None, str]:
    """What runs kernels here, and its name; None where there is neither a GPU nor g++."""
    platform = kernels.backend()
    if platform is not None:
        return prefer_built(platform, gpu_launcher(platform)), platform
    return (host.host_launcher(), "host") if host.compiler() else (None, "nothing")


def kernel_checks(quick: bool = False) -> Iterator[Outcome]:
    """All that apply here, quick or at length; none where nothing can run kernels."""
    launch, where = launcher()
    if launch is None:
        return
    on_host = where == "host"
    base = tuning.table(kernels.backend() or "metal").base
    kinds: tuple[checks.Kind | None, ...] = (None, "limits", "experts", "latents", "products", *kernels.PACKINGS)
    for kind in kinds[:3] if on_host else kinds:
        dtype = "float32" if kind in (None, "limits") else "bfloat16"
        for name, ok in checks.check_all(_for_checks(launch, on_host), DTYPES[dtype], base, kind).items():
            detail = {"dtype": dtype} if kind is None else {"dtype": dtype, "kind": kind}
            yield Outcome(name, ok, 0.0 if ok else float("inf"), detail)
    for shape, cut, options in _grid(quick or on_host, base.matrix):
        yield check_decode(launch, shape, cut, options)
        yield check_extend(launch, shape, replace(cut, splits=2, unroll=2))
    if not on_host:
        yield check_order()
        yield check_compiled()


def _for_checks(launch: Launcher, on_host: bool) -> Launcher:
    platform, gpu = kernels.backend(), mx.Device(mx.gpu)
    return launch if on_host or platform is None else prefer_built(platform, gpu_launcher(platform, gpu), gpu)


def _grid(quick: bool, has_matrix: bool) -> Iterator[tuple[BatchShape, paged.Tuning, dict[str, float]]]:
    """Dims, dtypes, groups, pages and features, each of which occurs, without all of their products."""
    for i, dims in enumerate([(128, 128)] if quick else _DIMS):
        for j, dtype in enumerate(DTYPES):
            if dims != (128, 128) and j != i % 3:
                continue
            group, page = (1, 4, 8, 7)[(i + j) % 4], (1, 16)[j % 2]
            shape = BatchShape("check", 5, 40 + 7 * i, 2, group, *dims, dtype, page, longest=300 if quick else 900 + i)
            options = {"window": 200.0, "softcap": 3.0} if (i + j) % 2 else {}
            for matrix in (False, True)[: 1 + (has_matrix and dtype != "float32")]:
                heads, unroll = (8, 4) if has_matrix else (4, 2)
                yield shape, paged.Tuning((1, 4)[j % 2], 4, unroll, heads, matrix), options


def check_decode(launch: Launcher, shape: BatchShape, cut: paged.Tuning, options: dict[str, float]) -> Outcome:
    """Stores the newest token and attends, in one launch; both pools and the result must be the reference's."""
    mine, theirs = make_batch(shape), make_batch(shape)
    form = kernels.Form(shape.page_size, shape.dim**-0.5, _window(options), options.get("softcap"))
    sinks = mx.random.normal((shape.heads,), key=mx.random.key(5)).astype(DTYPES[shape.dtype]) if options else None
    new = mine.k[: shape.rows] * 0.5, mine.v[: shape.rows] * 0.5
    mx.eval(new)
    got = paged.paged_decode(launch, mine.q, mine.k, mine.v, mine.table, mine.lengths, form, cut, sinks, new=new)
    mx.eval(got)
    with mx.stream(mx.cpu):
        slots = reference.newest_slots(theirs.table, theirs.lengths, shape.page_size)
        reference.kv_write(theirs.k, theirs.v, *new, slots)
        want = reference.paged_decode(theirs.q, theirs.k, theirs.v, theirs.table, theirs.lengths, form, sinks=sinks)
        same = bool((mx.array_equal(mine.k, theirs.k) & mx.array_equal(mine.v, theirs.v)).item())
        mx.eval(want)
    error = largest_difference(got, want) if same else float("inf")
    return Outcome("decode with the write", error <= TOLERANCE[shape.dtype], error, _detail(shape, cut, options))


def check_extend(launch: Launcher, shape: BatchShape, cut: paged.Tuning) -> Outcome:
    """The last 9 tokens of the longest sequence and the last 3 of the next, as rows."""
    batch, counts = make_batch(shape), (9, 3)
    lengths = [n - count + 1 + i for n, count in zip(shape.lengths, counts, strict=False) for i in range(count)]
    q = mx.random.normal((sum(counts), shape.heads, shape.dim), key=mx.random.key(6)).astype(DTYPES[shape.dtype])
    tiles = mx.array(paged.tile_rows(counts, paged.rows_per_tile(shape.group, DTYPES[shape.dtype], cut)))
    rows, form = mx.array(np.array(lengths, np.int32)), kernels.Form(shape.page_size, shape.dim**-0.5)
    got = paged.paged_extend(launch, q, batch.k, batch.v, batch.table, rows, tiles, form, cut)
    mx.eval(got)
    with mx.stream(mx.cpu):
        want = reference.paged_extend(q, batch.k, batch.v, batch.table, rows, tiles, form)
        mx.eval(want)
    error = largest_difference(got, want)
    return Outcome("extend", error <= TOLERANCE[shape.dtype], error, _detail(shape, cut, {}))


def check_order(steps: int = 40) -> Outcome:
    """Steps queued at once, each of which stores a row, gathers, attends, and goes on from what it attended to.

    Nothing but ``after`` orders them: a launch that overtakes another reads what is not there yet.
    """
    shape = BatchShape("order", 4, 600)
    queued, calm = make_batch(shape), make_batch(shape)
    error = largest_difference(_order_steps(queued, shape, steps, False), _order_steps(calm, shape, steps, True))
    return Outcome("order of queued steps", error == 0.0, error, {"steps": steps})


def _order_steps(batch: Batch, shape: BatchShape, steps: int, settled: bool) -> mx.array:
    slots = reference.newest_slots(batch.table, batch.lengths, shape.page_size)
    q, after = batch.q, slots
    for _ in range(steps):
        new = q[:, :: shape.group]
        token = kernels.kv_write(batch.k, batch.v, new, new, slots, after=after)
        if settled:
            mx.eval(token, batch.k, batch.v)
        form = kernels.Form(1, 0.3)
        whole = kernels.paged_decode(
            q, batch.k, batch.v, batch.table, batch.lengths, form, after=token, longest=shape.context
        )
        k, v = kernels.kv_gather(batch.k, batch.v, batch.table, page_size=1, after=token)
        q = whole + mx.fast.scaled_dot_product_attention(q[:, :, None], k, v, scale=0.3)[:, :, 0]
        if settled:
            mx.eval(q)
        after = q.reshape(-1)[:8].astype(mx.int32)
    return q


def check_compiled() -> Outcome:
    """A write and a decode inside ``mx.compile``, pools captured: the same as outside, step after step."""
    shape = BatchShape("compiled", 4, 100)
    batch, other = make_batch(shape), make_batch(shape)
    slots = reference.newest_slots(batch.table, batch.lengths, shape.page_size)
    mx.eval(slots)

    def step(b: Batch, q: mx.array, after: mx.array) -> mx.array:
        token = kernels.kv_write(b.k, b.v, q[:, :: shape.group], q[:, :: shape.group], slots, after=after)
        return kernels.paged_decode(q, b.k, b.v, b.table, b.lengths, kernels.Form(1, 0.1), after=token, longest=100)

    compiled = mx.compile(lambda q, after: step(batch, q, after))
    mine, theirs, after = batch.q, other.q, mx.zeros(8, dtype=mx.int32)
    for _ in range(5):
        mine = compiled(mine, after)
        theirs = step(other, theirs, after)
        mx.eval(mine, theirs)
    error = largest_difference(mine, theirs)
    return Outcome("inside mx.compile", error == 0.0, error, {})


def largest_difference(got: mx.array, want: mx.array) -> float:
    """Infinite where one of them is not a number."""
    difference = np.abs(np.array(got.astype(mx.float32)) - np.array(want.astype(mx.float32)))
    return float(np.where(np.isnan(difference), np.inf, difference).max())


def _window(options: dict[str, float]) -> int | None:
    return int(options["window"]) if "window" in options else None


def _detail(shape: BatchShape, cut: paged.Tuning, options: dict[str, float]) -> dict[str, Any]:
    names = ("rows", "context", "longest", "kv_heads", "group", "dim", "value_dim", "dtype", "page_size")
    return {**{n: asdict(shape)[n] for n in names}, "splits": cut.splits, "matrix": cut.matrix, **options}
