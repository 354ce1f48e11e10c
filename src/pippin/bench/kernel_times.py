"""What each kernel is timed on: ours and MLX's own operation over the same arrays."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from pippin import kernels, sampler
from pippin.attention.plain import group_attention
from pippin.bench.kernel_batches import CPU_SHAPES, DTYPES, GPU_SHAPES, BatchShape, make_batch
from pippin.inputs import Group
from pippin.kernels import cpu, reference
from pippin.kernels.select import Limits
from pippin.sampler import SamplingInputs, SamplingPlan

Step = Callable[[int, mx.array], mx.array]

# Pools rotate until together they are larger than any GPU's caches.
_CACHES = 256 << 20


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel on one batch. ``ours`` and ``mlx`` take a counter and the last result, and give the next.

    ``order`` says how many of them are run: ``chained``, queued together, each waiting for the last; ``apart``, queued
    together, none using the last; ``settled``, each done before the next is asked for. ``moved`` are the bytes that
    must be read and written. ``mlx`` is None where MLX has no such operation.
    """

    kernel: str
    shape: str
    moved: int
    start: mx.array
    ours: Step
    mlx: Step | None = None
    order: Literal["chained", "apart", "settled"] = "chained"
    mlx_order: Literal["chained", "apart"] = "chained"


def seconds(step: Step, start: mx.array, order: str, repeats: int, rounds: int) -> float:
    """Median seconds of a step, without what the host takes to describe it unless it is ``settled``."""
    run = {"chained": _chained, "apart": _apart, "settled": _settled}[order]
    times = [run(step, start, repeats) / repeats for _ in range(rounds + 1)]
    return statistics.median(times[1:])


def _chained(step: Step, start: mx.array, repeats: int) -> float:
    x = start
    for i in range(repeats):
        x = step(i, x)
    return _evaluated([x])


def _apart(step: Step, start: mx.array, repeats: int) -> float:
    return _evaluated([step(i, start) for i in range(repeats)])


def _evaluated(arrays: list[mx.array]) -> float:
    mx.synchronize()
    begin = time.perf_counter()
    mx.eval(arrays)
    mx.synchronize()
    return time.perf_counter() - begin


def _settled(step: Step, start: mx.array, repeats: int) -> float:
    begin = time.perf_counter()
    for i in range(repeats):
        mx.eval(step(i, start))
    return time.perf_counter() - begin


def gpu_cases(quick: bool) -> Iterator[Case]:
    """Every kernel, on the shapes of real models."""
    yield from row_cases(128, mx.bfloat16)
    for size in (32,) if quick else (1, 32, 256):
        yield from limit_cases(size)
    for size in (128,) if quick else (1, 8, 128):
        yield from draw_cases(size)
    yield write_case(GPU_SHAPES[0])
    for shape in GPU_SHAPES[:2] if quick else GPU_SHAPES:
        yield from decode_cases(shape)
    yield from packed_cases(BatchShape("8B, 8 rows of 32k", 8, 32768, page_size=16))
    for rows in (4,) if quick else (4, 16, 64):
        yield extend_case(BatchShape(f"8B, {rows} rows of one sequence of 8k", 1, 8192), rows)


def cpu_cases(quick: bool) -> Iterator[Case]:
    """What stands for kernels on the CPU, in float32: ``kernels.cpu``, ``attention.plain``, the pool's operations."""
    yield from elementwise_cases(256 if quick else 512)
    yield write_case(CPU_SHAPES[0])
    for shape in CPU_SHAPES[:1] if quick else CPU_SHAPES:
        yield gather_case(shape)
        yield plain_decode_case(shape)
    yield prompt_case(128 if quick else 512)


# --- attention by page ---


def decode_cases(shape: BatchShape) -> Iterator[Case]:
    """As the engine cuts it, alone and with the write; beside MLX's, K and V in one piece or gathered first."""
    batches = [make_batch(shape, i) for i in range(max(1, min(12, _CACHES // shape.kv_bytes)))]
    scale, longest = shape.dim**-0.5, max(shape.lengths)
    form = kernels.Form(shape.page_size, scale)
    new = batches[0].k[1 : shape.rows + 1], batches[0].v[1 : shape.rows + 1]
    slots = reference.slots_of(batches[0].table, shape.page_size)[:, : shape.context]
    pieces = tuple(mx.contiguous(pool[slots].transpose(0, 2, 1, 3)) for pool in (batches[0].k, batches[0].v))
    mx.eval(new, slots, pieces)

    def ours(i: int, q: mx.array, new: tuple[mx.array, mx.array] | None = None) -> mx.array:
        b = batches[i % len(batches)]
        return kernels.paged_decode(q, b.k, b.v, b.table, b.lengths, form, longest=longest, new=new)

    def whole(_: int, q: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q[:, :, None], *pieces, scale=scale)[:, :, 0]

    def gathered(i: int, q: mx.array) -> mx.array:
        b = batches[i % len(batches)]
        k, v = (pool[slots].transpose(0, 2, 1, 3) for pool in (b.k, b.v))
        return mx.fast.scaled_dot_product_attention(q[:, :, None], k, v, scale=scale)[:, :, 0]

    q = batches[0].q
    yield Case("paged_decode", shape.name, shape.kv_bytes, q, ours, whole)
    yield Case("paged_decode, MLX gathering first", shape.name, shape.kv_bytes, q, ours, gathered)
    yield Case("paged_decode with the write", shape.name, shape.kv_bytes, q, lambda i, q: ours(i, q, new))
    yield gather_case(shape)


def packed_cases(shape: BatchShape) -> Iterator[Case]:
    """Decodes over full slots, and over quantized ones that hold the same."""
    batch, form = make_batch(shape), kernels.Form(shape.page_size, shape.dim**-0.5)

    def over(k: kernels.Pool, v: kernels.Pool) -> Step:
        mx.eval(kernels.storage(k), kernels.storage(v))
        longest = max(shape.lengths)
        return lambda _, q: kernels.paged_decode(q, k, v, batch.table, batch.lengths, form, longest=longest)

    yield Case("paged_decode, full slots", shape.name, shape.kv_bytes, batch.q, over(batch.k, batch.v))
    for packing in kernels.PACKINGS:
        k, v = (kernels.packed(pool, packing) for pool in (batch.k, batch.v))
        moved = sum(shape.lengths) * (k.layout.nbytes + v.layout.nbytes)
        yield Case(f"paged_decode, {packing} slots", shape.name, moved, batch.q, over(k, v))


def extend_case(shape: BatchShape, rows: int) -> Case:
    """``rows`` tokens of one sequence at once, beside MLX's gather and attention."""
    b, scale = make_batch(shape), shape.dim**-0.5
    q = mx.random.normal((rows, shape.heads, shape.dim)).astype(DTYPES[shape.dtype])
    lengths = mx.array(np.arange(shape.context - rows + 1, shape.context + 1, dtype=np.int32))
    most = kernels.rows_per_tile(shape.heads, shape.kv_heads, q.dtype)
    tiles = mx.array(kernels.tile_rows([rows], most))
    mx.eval(q, lengths, tiles)

    def ours(_: int, q: mx.array) -> mx.array:
        return kernels.paged_extend(q, b.k, b.v, b.table, lengths, tiles, kernels.Form(shape.page_size, scale))

    def theirs(_: int, q: mx.array) -> mx.array:
        k, v = (pool[b.table[0]].transpose(1, 0, 2)[None] for pool in (b.k, b.v))
        out = mx.fast.scaled_dot_product_attention(q.transpose(1, 0, 2)[None], k, v, scale=scale, mask="causal")
        return out[0].transpose(1, 0, 2)

    return Case("paged_extend", shape.name, shape.kv_bytes, q, ours, theirs)


# --- the pool ---


def write_case(shape: BatchShape) -> Case:
    """A row of K and V for each of the batch. MLX has nothing that writes in place while a step in flight reads."""
    b = make_batch(shape)
    k, v = b.k[: shape.rows] + 1, b.v[: shape.rows] + 1
    slots = mx.arange(1, shape.rows + 1, dtype=mx.int32)
    mx.eval(k, v, slots)

    def ours(_: int, token: mx.array) -> mx.array:
        return kernels.kv_write(b.k, b.v, k, v, slots, after=token)

    def settled(_: int, token: mx.array) -> mx.array:
        mx.eval(kernels.kv_write(b.k, b.v, k, v, slots), b.k, b.v)
        return token

    moved, name = 2 * (k.nbytes + v.nbytes), f"{shape.rows} rows of {shape.kv_heads} x {shape.dim}"
    # Without a kernel nothing but the pool's own arrays orders one write after another.
    if kernels.writes_in_place(b.k, b.v):
        return Case("kv_write", name, moved, slots, ours)
    return Case("kv_write", name, moved, slots, settled, order="settled")


def gather_case(shape: BatchShape) -> Case:
    """K and V in one piece, heads first, beside MLX's indexing."""
    b = make_batch(shape)
    slots = reference.slots_of(b.table, shape.page_size)
    mx.eval(slots)

    def zero(k: mx.array, v: mx.array) -> mx.array:
        return ((k[0, 0, 0, :1] + v[0, 0, 0, :1]) * 0).astype(mx.int32)

    def ours(_: int, last: mx.array) -> mx.array:
        return zero(*kernels.kv_gather(b.k, b.v, b.table + last, page_size=shape.page_size))

    def theirs(_: int, last: mx.array) -> mx.array:
        now = slots + last
        k, v = (mx.contiguous(pool[now].transpose(0, 2, 1, 3)) for pool in (b.k, b.v))
        return zero(k, v)

    mlx = theirs if kernels.backend() else None  # elsewhere it is MLX's
    return Case("kv_gather", shape.name, 2 * shape.kv_bytes, mx.zeros(1, dtype=mx.int32), ours, mlx)


# --- rows of numbers ---


def row_cases(rows: int, dtype: mx.Dtype, hidden: int = 4096, intermediate: int = 12288) -> Iterator[Case]:
    """Kernels that join a layer's small operations, at an 8B model's widths."""
    x, r = (mx.random.normal((rows, hidden)).astype(dtype) for _ in range(2))
    y = mx.random.normal((rows, 2 * intermediate)).astype(dtype)
    norm = kernels.Norm(mx.ones(hidden, dtype=dtype), 1e-6)
    mx.eval(x, r, y, norm.weight)

    def theirs(_: int, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x + r, norm.weight, norm.eps)

    def swiglu(_: int, y: mx.array) -> mx.array:
        return nn.silu(y[:, :intermediate]) * y[:, intermediate:]  # type: ignore[no-any-return]

    name = f"{rows} rows of"
    moved = 4 * x.nbytes
    yield Case("add_rms_norm", f"{name} {hidden}", moved, x, lambda _, x: kernels.add_rms_norm(x, r, norm)[1], theirs)
    yield Case(
        "swiglu",
        f"{name} {intermediate}",
        y.nbytes * 3 // 2,
        y,
        lambda _, y: kernels.swiglu(y),
        swiglu,
        "apart",
        "apart",
    )
    yield rope_case(rows, dtype)


def rope_case(rows: int, dtype: mx.Dtype) -> Case:
    """q and k normed and turned, k and v stored, beside MLX's norms and rotations (without the write)."""
    shape = BatchShape("", rows, 4)
    b, dim = make_batch(shape), shape.dim
    k_at, v_at = shape.heads * dim, (shape.heads + shape.kv_heads) * dim
    heads = kernels.Heads(shape.heads, shape.kv_heads, dim, dim, 0, k_at, v_at)
    y = mx.random.normal((rows, v_at + shape.kv_heads * dim)).astype(dtype)
    norm, rope = kernels.Norm(mx.ones(dim, dtype=dtype), 1e-6), kernels.Rope(dim, False, 1e6, 1.0)
    positions, slots = mx.arange(rows, dtype=mx.int32), mx.arange(1, rows + 1, dtype=mx.int32)
    mx.eval(y, norm.weight, positions, slots)
    in_place = kernels.writes_in_place(b.k, b.v)

    def ours(_: int, token: mx.array) -> mx.array:
        q, after = kernels.rope_kv_write(
            y, b.k, b.v, heads, rope, positions=positions, slots=slots, norms=(norm, norm), after=token
        )
        if not in_place:
            mx.eval(q, b.k, b.v)
        return after

    def theirs(_: int, token: mx.array) -> mx.array:
        parts = []
        for part, count in ((y[:, :k_at], shape.heads), (y[:, k_at:v_at], shape.kv_heads)):
            normed = mx.fast.rms_norm(part.reshape(rows, count, 1, dim), *norm)
            turned = mx.fast.rope(normed, dim, traditional=False, base=1e6, scale=1.0, offset=positions)
            parts.append(turned.reshape(rows, -1))
        return mx.concatenate(parts, axis=1)

    name = f"{rows} rows, {shape.heads} heads over {shape.kv_heads} of {dim}"
    return Case("rope_kv_write", name, 2 * y.nbytes, slots, ours, theirs, "chained" if in_place else "settled", "apart")


def limit_cases(rows: int, vocab: int = 151_936) -> Iterator[Case]:
    """Where top_k, top_p or both end in a Qwen's vocabulary, of logits as they are; beside the definition, a sort."""
    logits = 3 * mx.random.normal((rows, vocab))
    distance = logits.max(axis=-1, keepdims=True) - logits
    weights = mx.exp(-distance)
    mass = (weights * (2.0**31 / weights.sum(axis=-1, keepdims=True)) + 0.5).astype(mx.uint32)
    tokens, share = mx.full(rows, 40, mx.int32), mx.full(rows, 0.9) * 2**31
    bits = distance.view(mx.uint32)
    mx.eval(bits, mass, tokens, share)

    def case(name: str, limits: Limits) -> Case:
        given = None if limits.mass is None else mass

        def ours(_: int, bits: mx.array) -> mx.array:
            found = kernels.boundary(bits, given, limits)
            return reference.kept(bits, given, limits) if found is None else found[1]

        moved = bits.nbytes * (1 if given is None else 2)
        return Case(
            f"boundary of {name}",
            f"{rows} rows of {vocab}",
            moved,
            bits,
            ours,
            lambda _, bits: reference.kept(bits, given, limits),
            "apart",
            "apart",
        )

    yield case("top_k", Limits(tokens, None))
    yield case("top_p", Limits(None, share))
    yield case("top_k and top_p", Limits(tokens, share))


def draw_cases(rows: int, vocab: int = 151_936) -> Iterator[Case]:
    """A step's draws from a Qwen's logits, flat ones: all of the noise counts. Beside what plain MLX does for them."""
    logits = (3 * mx.random.normal((rows, vocab))).astype(mx.bfloat16)
    keys = mx.random.randint(0, 2**31 - 1, (rows, 2)).astype(mx.uint32)
    hot, allowed = mx.ones(rows), mx.full((rows, -(-vocab // 32)), 0x5F5F5F5F, mx.uint32)
    tokens, share = mx.full(rows, 40, mx.int32), mx.full(rows, 0.9)
    mx.eval(logits, keys, hot, allowed, tokens, share)
    asked = {
        "greedy": SamplingInputs(),
        "a mask": SamplingInputs(allowed=allowed),
        "a temperature": SamplingInputs(hot, keys),
        "top_k": SamplingInputs(hot, keys, tokens),
        "top_p": SamplingInputs(hot, keys, None, share),
        "top_k and top_p": SamplingInputs(hot, keys, tokens, share),
    }
    shape = f"{rows} rows of {vocab}"
    for name, inputs in asked.items():
        plan = SamplingPlan(vocab, inputs.keys is not None, inputs.top_k is not None, inputs.top_p is not None)
        ours, theirs = (mx.compile(partial(run, plan, inputs)) for run in (_drawn_by_kernel, _drawn_by_mlx))
        yield Case(f"draw: {name}", shape, logits.nbytes, logits, _step(ours), _step(theirs), "apart", "apart")
    for count in (0, 5, 20):
        ours, theirs = (mx.compile(partial(run, vocab, count)) for run in (_scored_by_kernel, _scored_by_mlx))
        yield Case(
            f"draw: {count} top logprobs", shape, logits.nbytes, logits, _step(ours), _step(theirs), "apart", "apart"
        )


def _step(run: Callable[[mx.array], mx.array]) -> Step:
    return lambda _, logits: run(logits)


def _drawn_by_kernel(plan: SamplingPlan, inputs: SamplingInputs, logits: mx.array) -> mx.array:
    return sampler.draw(logits, None, plan, inputs)[0]


def _drawn_by_mlx(plan: SamplingPlan, inputs: SamplingInputs, logits: mx.array) -> mx.array:
    tokens, finite = sampler.plain_draw(logits, None, plan, inputs)
    return mx.where(finite, tokens, -1)


def _scored_by_kernel(vocab: int, count: int, logits: mx.array) -> mx.array:
    logprob, _, logprobs = sampler.token_logprobs(logits, vocab, mx.zeros(logits.shape[0], mx.int32), count)
    return logprob if logprobs is None else logprobs


def _scored_by_mlx(vocab: int, count: int, logits: mx.array) -> mx.array:
    logprob, _, logprobs = sampler.plain_logprobs(logits, vocab, mx.zeros(logits.shape[0], mx.int32), count)
    return logprob if logprobs is None else logprobs


# --- the CPU ---


def elementwise_cases(rows: int, width: int = 1536) -> Iterator[Case]:
    """exp, SwiGLU and the softmax of attention, by multiplications and additions."""
    gate, x = (mx.random.normal((rows, width)) for _ in range(2))
    scores, values = mx.random.normal((4, 2, 2, rows // 4, rows)), mx.random.normal((4, 2, rows, 64))
    mx.eval(gate, x, scores, values)

    def softmax(_: int, scores: mx.array) -> mx.array:
        return mx.softmax(scores, axis=-1) @ values[:, :, None]

    name = f"{rows} rows of {width}"
    moved = scores.nbytes + values.nbytes
    ours: list[tuple[str, str, int, mx.array, Step, Step]] = [
        ("cpu.exp", name, 2 * x.nbytes, x, lambda _, x: cpu.exp(x), lambda _, x: mx.exp(x)),
        (
            "cpu.swiglu",
            name,
            3 * x.nbytes,
            x,
            lambda _, x: cpu.swiglu(gate, x),
            lambda _, x: nn.silu(gate) * x,
        ),
        (
            "cpu.softmax_values",
            f"16 heads, {rows // 4} rows over {rows}",
            moved,
            scores,
            lambda _, s: cpu.softmax_values(s, values, None),
            softmax,
        ),
    ]
    for case in ours:
        yield Case(*case, order="apart", mlx_order="apart")


def plain_decode_case(shape: BatchShape) -> Case:
    """A step's attention by ``attention.plain``, K and V gathered, beside MLX's over the same."""
    b, scale = make_batch(shape), shape.dim**-0.5
    k, v = map(mx.contiguous, reference.kv_gather(b.k, b.v, b.table, page_size=shape.page_size))
    mx.eval(k, v)
    starts = mx.array(np.full(shape.rows, shape.context - 1, np.int32))
    group = Group(0, shape.rows, 1, shape.context, False, None, starts)
    q = b.q[:, :, None]
    return Case(
        "plain attention, decode",
        shape.name,
        shape.kv_bytes,
        q,
        lambda _, q: group_attention(q, k, v, group, scale, None, None),
        lambda _, q: mx.fast.scaled_dot_product_attention(q, k, v, scale=scale),
        "apart",
        "apart",
    )


def prompt_case(rows: int) -> Case:
    """A prompt's attention by ``attention.plain``, which leaves masked blocks out, beside MLX's."""
    heads, dim = 8, 64
    q = mx.random.normal((rows, heads, 1, dim))
    k, v = (mx.random.normal((1, 2, rows, dim)) for _ in range(2))
    mx.eval(q, k, v)
    group = Group(0, 1, rows, rows, False, None, mx.zeros(1, dtype=mx.int32))

    def theirs(_: int, q: mx.array) -> mx.array:
        across = q[:, :, 0].transpose(1, 0, 2)[None]
        return mx.fast.scaled_dot_product_attention(across, k, v, scale=0.125, mask="causal")

    return Case(
        "plain attention, prompt",
        f"{rows} tokens, {heads} heads over 2",
        2 * q.nbytes + k.nbytes + v.nbytes,
        q,
        lambda _, q: group_attention(q, k, v, group, 0.125, None, None),
        theirs,
        "apart",
        "apart",
    )
