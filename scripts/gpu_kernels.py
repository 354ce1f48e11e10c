"""Checks every kernel against the reference on this machine's GPU, and times it against the memory and MLX's own.

    python scripts/gpu_kernels.py [--quick] [--json kernels.jsonl]

Prints a table; ``--json`` also writes a line for each check and each time. Times are medians of runs in which every
launch waits for the one before it; K and V rotate through pools that are together larger than the GPU's caches.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np

from pippin import kernels
from pippin.kernels import paged, reference
from pippin.kernels.checks import check_all
from pippin.kernels.launch import Launcher, gpu_launcher

Row = dict[str, object]
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
TOLERANCE = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 1.6e-2}
_CACHES = 256 << 20


@dataclass(frozen=True)
class Shape:
    """A batch of decodes: ``rows`` contexts of ``context`` tokens, the first of them ``longest``."""

    name: str
    rows: int
    context: int
    kv_heads: int = 8
    group: int = 4
    dim: int = 128
    value_dim: int = 128
    dtype: str = "bfloat16"
    page_size: int = 1
    longest: int = 0

    @property
    def lengths(self) -> list[int]:
        return [max(self.longest, self.context)] + [self.context] * (self.rows - 1)

    @property
    def kv_bytes(self) -> int:
        per_token = self.kv_heads * (self.dim + self.value_dim) * DTYPES[self.dtype].size
        return sum(self.lengths) * per_token


SHAPES = [
    Shape("8B, 128 rows", 128, 306),
    Shape("8B, 1 row", 1, 306),
    Shape("0.6B, 128 rows", 128, 306, group=2),
    Shape("8B, 32 rows of 8k", 32, 8192),
    Shape("8B, 32 rows of 8k, pages of 16", 32, 8192, page_size=16),
    Shape("8B, 1 row of 8k", 1, 8192),
    Shape("8B, 1 row of 32k among 32 of 500", 32, 500, longest=32768),
    Shape("30B-A3B, 32 rows of 1k", 32, 1024, kv_heads=4, group=8),
    Shape("dim 256, 32 rows of 2k", 32, 2048, kv_heads=4, group=2, dim=256, value_dim=256),
    Shape("MHA, 32 rows of 2k", 32, 2048, kv_heads=16, group=1, dim=64, value_dim=64),
]
TUNED = ("8B, 128 rows", "8B, 1 row", "8B, 32 rows of 8k", "8B, 1 row of 8k", "30B-A3B, 32 rows of 1k")


@dataclass
class Pool:
    """A shuffled pool for a shape, with its table, lengths and queries."""

    k: mx.array
    v: mx.array
    table: mx.array
    lengths: mx.array
    q: mx.array


def make_pool(shape: Shape, seed: int = 0) -> Pool:
    """Every sequence's pages lie anywhere in the pool; page 0 is scratch."""
    counts = [-(-n // shape.page_size) for n in shape.lengths]
    pages = np.random.default_rng(seed).permutation(sum(counts)) + 1
    table = np.zeros((shape.rows, max(counts)), np.int32)
    for line, count, start in zip(table, counts, np.cumsum([0, *counts]), strict=False):
        line[:count] = pages[start : start + count]
    slots, dtype = (sum(counts) + 1) * shape.page_size, DTYPES[shape.dtype]
    keys = mx.random.split(mx.random.key(seed), 3)
    made = Pool(
        k=mx.random.normal((slots, shape.kv_heads, shape.dim), key=keys[0], dtype=dtype),
        v=mx.random.normal((slots, shape.kv_heads, shape.value_dim), key=keys[1], dtype=dtype),
        table=mx.array(table),
        lengths=mx.array(np.array(shape.lengths, np.int32)),
        q=mx.random.normal((shape.rows, shape.kv_heads * shape.group, shape.dim), key=keys[2], dtype=dtype),
    )
    mx.eval(made.k, made.v, made.table, made.lengths, made.q)
    return made


# --- checks ---


def checks(quick: bool) -> Iterator[Row]:
    """Each kernel on ragged batches of every dtype and head dim, compared with the reference on the same GPU."""
    apart = gpu_launcher(kernels.backend() or "cuda", mx.Device(mx.gpu))
    for name, ok in check_all(apart, mx.float32, paged.Tuning()).items():
        yield {"check": name, "ok": ok}
    yield check_order()
    yield check_compiled()
    dims = [(128, 128)] if quick else [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)]
    for i, (dim, value_dim) in enumerate(dims):
        for j, dtype in enumerate(DTYPES):
            if dim != 128 and j != i % 3:
                continue
            shape = Shape("check", 5, 40 + 7 * i, 2, (1, 4, 8, 7)[(i + j) % 4], dim, value_dim, dtype, (1, 16)[j % 2])
            shape = replace(shape, longest=900 + i)
            options = {"window": 300, "softcap": 3.0} if i % 2 else {}
            for matrix in (False, True)[: 1 + (dtype != "float32")]:
                yield check_decode(shape, paged.Tuning(splits=(1, 4)[j % 2], matrix=matrix), options)
                yield check_extend(shape, matrix)


def check_decode(shape: Shape, tuning: paged.Tuning, options: dict[str, float]) -> Row:
    """Stores the newest token and attends, fused; both pools and the result must be the reference's."""
    mine, theirs = make_pool(shape), make_pool(shape)
    window, softcap = int(options["window"]) if options else None, options.get("softcap")
    sinks = mx.random.normal((shape.kv_heads * shape.group,)).astype(DTYPES[shape.dtype]) if options else None
    new = (mine.k[: shape.rows] * 0.5, mine.v[: shape.rows] * 0.5)
    mx.eval(new)
    form = paged.Form(shape.page_size, shape.dim**-0.5, window, softcap)
    launch = gpu_launcher(kernels.backend() or "cuda")
    got = paged.paged_decode(
        launch, mine.q, mine.k, mine.v, mine.table, mine.lengths, form, tuning, sinks=sinks, new=new
    )
    mx.eval(got)
    reference.kv_write(theirs.k, theirs.v, *new, reference.newest_slots(theirs.table, theirs.lengths, shape.page_size))
    want = reference.paged_decode(
        theirs.q,
        theirs.k,
        theirs.v,
        theirs.table,
        theirs.lengths,
        page_size=shape.page_size,
        scale=form.scale,
        window=window,
        sinks=sinks,
        softcap=softcap,
    )
    same = bool((mx.array_equal(mine.k, theirs.k) & mx.array_equal(mine.v, theirs.v)).item())
    error = largest_difference(got, want)
    ok = same and error <= TOLERANCE[shape.dtype]
    return {"check": "decode", "ok": ok, "error": error, "pools_equal": same, **asdict(shape), **asdict(tuning)}


def check_order(steps: int = 40) -> Row:
    """Steps queued at once, each of which stores a row, gathers, attends, and goes on from what it attended to.

    Nothing but ``after`` orders them: a launch that overtakes another reads what is not there yet.
    """
    shape = Shape("order", 4, 600)
    pool, calm = make_pool(shape), make_pool(shape)
    slots = reference.newest_slots(pool.table, pool.lengths, shape.page_size)
    q, after = pool.q, slots
    for _ in range(steps):
        new = q[:, :: shape.group]
        token = kernels.kv_write(pool.k, pool.v, new, new, slots, after=after)
        whole = kernels.paged_decode(
            q, pool.k, pool.v, pool.table, pool.lengths, page_size=1, scale=0.3, after=token, longest=600
        )
        k, v = kernels.kv_gather(pool.k, pool.v, pool.table, page_size=1, after=token)
        q = whole + mx.fast.scaled_dot_product_attention(q[:, :, None], k, v, scale=0.3)[:, :, 0]
        after = q.reshape(-1)[:8].astype(mx.int32)
    q_calm = calm.q
    for _ in range(steps):
        new = q_calm[:, :: shape.group]
        reference.kv_write(calm.k, calm.v, new, new, slots)
        mx.eval(calm.k, calm.v)
        whole = paged.paged_decode(
            gpu_launcher(kernels.backend() or "cuda"),
            q_calm,
            calm.k,
            calm.v,
            calm.table,
            calm.lengths,
            paged.Form(1, 0.3),
            kernels.tuning_for(shape.rows, q_calm, calm.k, 600, None),
        )
        k, v = reference.kv_gather(calm.k, calm.v, calm.table, page_size=1)
        q_calm = whole + mx.fast.scaled_dot_product_attention(q_calm[:, :, None], k, v, scale=0.3)[:, :, 0]
        mx.eval(q_calm)
    error = largest_difference(q, q_calm)
    return {"check": "order of queued steps", "ok": error == 0.0, "error": error}


def check_compiled() -> Row:
    """A write and a decode inside ``mx.compile``, pools captured: the same as outside, step after step."""
    shape = Shape("compiled", 4, 100)
    pool, other = make_pool(shape), make_pool(shape)
    slots = reference.newest_slots(pool.table, pool.lengths, shape.page_size)
    mx.eval(slots)

    def step(p: Pool, q: mx.array, after: mx.array) -> mx.array:
        token = kernels.kv_write(p.k, p.v, q[:, :: shape.group], q[:, :: shape.group], slots, after=after)
        return kernels.paged_decode(q, p.k, p.v, p.table, p.lengths, page_size=1, scale=0.1, after=token, longest=100)

    compiled = mx.compile(lambda q, after: step(pool, q, after))
    mine, theirs, after = pool.q, other.q, mx.zeros(8, dtype=mx.int32)
    for _ in range(5):
        mine = compiled(mine, after)
        theirs = step(other, theirs, after)
        mx.eval(mine, theirs)
    error = largest_difference(mine, theirs)
    return {"check": "inside mx.compile", "ok": error == 0.0, "error": error}


def check_extend(shape: Shape, matrix: bool) -> Row:
    """The last 9 tokens of the longest sequence and the last 3 of the next, as rows."""
    pool, counts = make_pool(shape), (9, 3)
    lengths = [n - count + 1 + i for n, count in zip(shape.lengths, counts, strict=False) for i in range(count)]
    q = mx.random.normal((sum(counts), shape.kv_heads * shape.group, shape.dim)).astype(DTYPES[shape.dtype])
    tuning = paged.Tuning(splits=2, unroll=2, matrix=matrix)
    tiles = mx.array(paged.tile_rows(counts, paged.rows_per_tile(shape.group, DTYPES[shape.dtype], tuning)))
    rows, form = mx.array(np.array(lengths, np.int32)), paged.Form(shape.page_size, shape.dim**-0.5)
    launch = gpu_launcher(kernels.backend() or "cuda")
    got = paged.paged_extend(launch, q, pool.k, pool.v, pool.table, rows, tiles, form, tuning)
    want = reference.paged_extend(
        q, pool.k, pool.v, pool.table, rows, tiles, page_size=shape.page_size, scale=form.scale
    )
    error = largest_difference(got, want)
    return {"check": "extend", "ok": error <= TOLERANCE[shape.dtype], "error": error, **asdict(shape), "matrix": matrix}


def largest_difference(got: mx.array, want: mx.array) -> float:
    difference = np.abs(np.array(got.astype(mx.float32)) - np.array(want.astype(mx.float32)))
    return float(np.where(np.isnan(difference), np.inf, difference).max())


# --- times ---


def seconds(step: Callable[[int, mx.array], mx.array], start: mx.array, repeats: int = 48) -> float:
    """Median seconds of one ``step(i, last)``, each of which waits for the last; the host's part is not in it."""
    times = []
    for _ in range(5):
        x = start
        for i in range(repeats):
            x = step(i, x)
        mx.synchronize()
        begin = time.perf_counter()
        mx.eval(x)
        mx.synchronize()
        times.append((time.perf_counter() - begin) / repeats)
    return statistics.median(times[1:])


def host_seconds(step: Callable[[int, mx.array], mx.array], start: mx.array, repeats: int = 200) -> float:
    """Seconds that the host takes to describe one step, before anything runs."""
    begin, x = time.perf_counter(), start
    for i in range(repeats):
        x = step(i, x)
    taken = (time.perf_counter() - begin) / repeats
    mx.eval(x)
    return taken


def copy_bandwidth() -> float:
    """Bytes a second that MLX moves when it adds 1 to an array: read once, written once."""
    x = mx.zeros((1 << 30,), dtype=mx.bfloat16)
    mx.eval(x)
    return 2 * x.nbytes / seconds(lambda _, y: y + 1, x, repeats=8)


def decode_times(shape: Shape, quick: bool) -> Iterator[Row]:
    """Decode as the engine would cut it, other cuts, the fused write, and MLX's attention over contiguous K and V."""
    pools = [make_pool(shape, i) for i in range(max(1, min(12, _CACHES // shape.kv_bytes)))]
    launch, form = gpu_launcher(kernels.backend() or "cuda"), paged.Form(shape.page_size, shape.dim**-0.5)

    def timed(what: str, run: Callable[[Pool, mx.array], mx.array], **facts: object) -> Row:
        taken = seconds(lambda i, q: run(pools[i % len(pools)], q), pools[0].q)
        return {"time": what, "us": taken * 1e6, "bytes": shape.kv_bytes, "shape": shape.name, **facts}

    longest = max(shape.lengths)
    new = pools[0].k[1 : shape.rows + 1], pools[0].v[1 : shape.rows + 1]
    mx.eval(new)

    def public(p: Pool, q: mx.array, new: tuple[mx.array, mx.array] | None = None) -> mx.array:
        return kernels.paged_decode(
            q, p.k, p.v, p.table, p.lengths, page_size=form.page_size, scale=form.scale, longest=longest, new=new
        )

    def fused(p: Pool, q: mx.array) -> mx.array:
        return public(p, q, new)

    row = timed("decode", public)
    yield row | {"host_us": host_seconds(lambda i, q: public(pools[0], q), pools[0].q) * 1e6}
    yield timed("decode + write", fused)
    for tuning in tunings(shape, quick):
        yield timed("decode", lambda p, q, t=tuning: decode(launch, p, q, form, t), **asdict(tuning))  # type: ignore[misc]
    yield from mlx_times(shape, pools[0])


def decode(launch: Launcher, pool: Pool, q: mx.array, form: paged.Form, tuning: paged.Tuning) -> mx.array:
    return paged.paged_decode(launch, q, pool.k, pool.v, pool.table, pool.lengths, form, tuning)


def tunings(shape: Shape, quick: bool) -> list[paged.Tuning]:
    """Cuts to compare with the engine's own choice."""
    if quick or shape.name not in TUNED:
        return []
    matrix = paged.Tuning(matrix=True)
    found = [matrix, replace(matrix, warps=8), paged.Tuning(), paged.Tuning(warps=8, unroll=2)]
    return found + [replace(matrix, splits=s) for s in (2, 4, 8, 16, 32) if s * 128 <= shape.context]


def mlx_times(shape: Shape, pool: Pool) -> Iterator[Row]:
    """MLX's attention over gathered K and V: what it takes without pages, and what gathering adds."""
    width = shape.context
    slots = reference.slots_of(pool.table, shape.page_size)[:, :width]
    k = mx.contiguous(pool.k[slots].transpose(0, 2, 1, 3))
    v = mx.contiguous(pool.v[slots].transpose(0, 2, 1, 3))
    mx.eval(k, v, slots)
    scale = shape.dim**-0.5
    facts = {"bytes": shape.kv_bytes, "shape": shape.name}

    def whole(_: int, q: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)

    def gathered(_: int, q: mx.array) -> mx.array:
        keys, values = pool.k[slots].transpose(0, 2, 1, 3), pool.v[slots].transpose(0, 2, 1, 3)
        return mx.fast.scaled_dot_product_attention(q, keys, values, scale=scale)

    q = pool.q[:, :, None]
    yield {"time": "MLX attention, contiguous", "us": seconds(whole, q, 16) * 1e6, **facts}
    yield {"time": "MLX gather + attention", "us": seconds(gathered, q, 16) * 1e6, **facts}


def write_times() -> Iterator[Row]:
    """Storing 128 rows: our kernel, and MLX's indexed update as a step in flight makes it (it copies the pool)."""
    pool = make_pool(Shape("write", 128, 512))
    k, v, slots = pool.k[:128] + 1, pool.v[:128] + 1, mx.arange(1, 129, dtype=mx.int32)
    mx.eval(k, v, slots)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    taken = seconds(lambda _, token: kernels.kv_write(pool.k, pool.v, k, v, slots, after=token), slots)
    facts = {"shape": "128 rows of 8 x 128", "bytes": 2 * k.nbytes * 2}
    yield {"time": "write", "us": taken * 1e6, "peak_bytes": mx.get_peak_memory() - before, **facts}


def extend_times(rows: int, context: int) -> Iterator[Row]:
    """``rows`` tokens of one 8B-shaped sequence at once, against as many decodes and against MLX."""
    shape = Shape(f"8B, {rows} rows of one sequence of {context}", 1, context)
    pool = make_pool(shape)
    q = mx.random.normal((rows, 32, 128)).astype(mx.bfloat16)
    lengths = mx.array(np.arange(context - rows + 1, context + 1, dtype=np.int32))
    tiles = mx.array(kernels.tile_rows([rows], kernels.rows_per_tile(32, 8, mx.bfloat16)))
    table = mx.contiguous(mx.broadcast_to(pool.table, (rows, pool.table.shape[1])))
    mx.eval(q, table, lengths, tiles)
    scale = 128**-0.5
    facts: Row = {"shape": shape.name, "bytes": shape.kv_bytes}

    def extend(_: int, q: mx.array) -> mx.array:
        return kernels.paged_extend(q, pool.k, pool.v, pool.table, lengths, tiles, page_size=1, scale=scale)

    def decodes(_: int, q: mx.array) -> mx.array:
        return kernels.paged_decode(q, pool.k, pool.v, table, lengths, page_size=1, scale=scale)

    def mlx(_: int, q: mx.array) -> mx.array:
        keys, values = (p[pool.table[0]].transpose(1, 0, 2)[None] for p in (pool.k, pool.v))
        out = mx.fast.scaled_dot_product_attention(q.transpose(1, 0, 2)[None], keys, values, scale=scale, mask="causal")
        return out[0].transpose(1, 0, 2)

    for name, step in (("extend", extend), ("decode of each row", decodes), ("MLX gather + attention", mlx)):
        yield {"time": name, "us": seconds(step, q, 16) * 1e6, **facts}


# --- report ---


def show(row: Row, bandwidth: float) -> str:
    if "check" in row:
        detail = (
            f"{row.get('dtype', '')} dim {row.get('dim', '')} group {row.get('group', '')} " if "dim" in row else ""
        )
        return f"{'ok  ' if row['ok'] else 'FAIL'} {row['check']} {detail}{row.get('error', '')}"
    us, moved = float(str(row["us"])), float(str(row["bytes"]))
    share = moved / (us * 1e-6) / bandwidth
    cut = " ".join(f"{k}={row[k]}" for k in ("splits", "warps", "unroll", "heads", "matrix", "host_us") if k in row)
    return f"{us:9.1f} us  {100 * share:5.1f} % of copy  {row['time']:<28} {row['shape']:<40} {cut}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer checks, and only the cuts that the engine chooses")
    parser.add_argument("--json", type=Path, help="also write one JSON line a result")
    options = parser.parse_args()
    if kernels.backend() is None:
        print("gpu_kernels: MLX has no GPU here; tests/test_kernels.py runs the kernels on the CPU", file=sys.stderr)
        return 2
    begin = time.perf_counter()
    verdicts = kernels.verify()
    facts: Row = {"device": str(mx.device_info().get("device_name", "")), "mlx": version("mlx")}
    facts |= {"verdicts": dict(verdicts), "verify_seconds": time.perf_counter() - begin}
    bandwidth = copy_bandwidth()
    facts["copy_bytes_per_second"] = bandwidth
    print(facts, flush=True)
    failed = 0
    with (options.json or Path("/dev/null")).open("w", encoding="utf-8") as out:
        out.write(json.dumps(facts) + "\n")
        for row in results(options.quick):
            failed += row.get("ok") is False
            out.write(json.dumps(row) + "\n")
            print(show(row, bandwidth), flush=True)
    print(f"{failed} checks failed; {time.perf_counter() - begin:.0f} s")
    return 1 if failed else 0


def results(quick: bool) -> Iterator[Row]:
    yield from checks(quick)
    yield from write_times()
    for shape in SHAPES:
        yield from decode_times(shape, quick)
    for rows, context in ((4, 8192), (16, 8192), (64, 8192)):
        yield from extend_times(rows, context)


if __name__ == "__main__":
    sys.exit(main())
