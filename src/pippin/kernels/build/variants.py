"""Which kernels a model will launch: every variant for its heads, dims and dtype, and for each way to cut a launch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import mlx.core as mx

from pippin.kernels import drawing, fused, grouped, latent, paged, products, routed, select
from pippin.kernels.build.prebuilt import Recorded
from pippin.kernels.build.shapes import Experts, ModelShape
from pippin.kernels.form import Form
from pippin.kernels.launch import Launch, Launcher
from pippin.kernels.packing import PackedPool, Pool, line
from pippin.kernels.products import Gated, Weights
from pippin.kernels.routed import Choice, Gate, Pairs

# Rows for which a product is cut differently.
_ROWS = (8, 16, 32, products.MOST_ROWS)


def variants(shape: ModelShape, tunings: Sequence[paged.Tuning]) -> list[Recorded]:
    """One launch of each kernel that the model needs, with inputs of the right dtypes; ``tunings`` are the cuts in use.

    Of attention, nothing where the kernels don't take such pools.
    """
    found: dict[object, Recorded] = {}

    def record(what: Launch, inputs: Sequence[mx.array]) -> list[mx.array]:
        key = (what.source, what.constants, tuple(a.dtype for a in inputs), tuple(a.size < 8 for a in inputs))
        found.setdefault(key, (what, list(inputs)))
        return [mx.zeros(size, dtype=dtype) for size, dtype in what.outputs]

    k_pool, v_pool = _pools(shape)
    # Metal compiles one source for inputs of under 8 elements and another for more: both batch sizes occur.
    for rows in (1, 8):
        if shape.latents is not None:
            _record_latents(record, shape, tunings, k_pool, v_pool, rows)
        elif paged.supported(k_pool, v_pool):
            _record_all(record, shape, tunings, k_pool, v_pool, rows)
            _record_turned(record, shape, k_pool, v_pool, rows)
        _record_rows(record, shape, rows)
        _record_routed(record, shape, rows)
        _record_boundaries(record, shape, rows)
        _record_draws(record, shape, rows)
    if any(tuning.matrix for tuning in tunings):
        _record_products(record, shape)
    return list(found.values())


def _pools(shape: ModelShape) -> tuple[Pool, Pool]:
    if shape.latents is not None:
        k_pool, v_pool = (mx.zeros((2, 1, d), dtype=shape.dtype) for d in shape.latents)
        return k_pool, v_pool
    dims = shape.dim, shape.value_dim
    if shape.packing is None or any(d % 8 for d in dims):
        k_pool, v_pool = (mx.zeros((2, shape.kv_heads, d), dtype=shape.dtype) for d in dims)
        return k_pool, v_pool
    keys, values = (PackedPool.zeros(2, line(shape.packing, shape.kv_heads, d), shape.dtype) for d in dims)
    return keys, values


def _record_all(
    record: Launcher, shape: ModelShape, tunings: Sequence[paged.Tuning], k_pool: Pool, v_pool: Pool, rows: int
) -> None:
    q = mx.zeros((rows, shape.heads, shape.dim), dtype=shape.dtype)
    k, v = (mx.zeros((rows, *pool.shape[1:]), dtype=shape.dtype) for pool in (k_pool, v_pool))
    lengths, table = mx.zeros(rows, dtype=mx.int32), mx.zeros((rows, 8), dtype=mx.int32)
    tiles = mx.zeros((rows, 3), dtype=mx.int32)
    sinks = mx.zeros(shape.heads, dtype=shape.dtype) if shape.sinks else None
    paged.kv_write(record, k_pool, v_pool, k, v, lengths)
    paged.kv_gather(record, k_pool, v_pool, table, shape.page_size)
    for form, cut in itertools.product(_forms(shape), tunings):
        paged.paged_decode(record, q, k_pool, v_pool, table, lengths, form, cut, sinks)
        if isinstance(k_pool, mx.array):
            paged.paged_decode(record, q, k_pool, v_pool, table, lengths, form, cut, sinks, new=(k, v))
        several = replace(cut, unroll=2)
        paged.paged_extend(record, q, k_pool, v_pool, table, lengths, tiles, form, several, sinks)


def _record_latents(
    record: Launcher, shape: ModelShape, tunings: Sequence[paged.Tuning], k_pool: Pool, v_pool: Pool, rows: int
) -> None:
    if not latent.takes(k_pool, v_pool):
        return
    q, turned = (mx.zeros((rows, shape.heads, pool.shape[2]), dtype=shape.dtype) for pool in (k_pool, v_pool))
    k, v = (mx.zeros((rows, *pool.shape[1:]), dtype=shape.dtype) for pool in (k_pool, v_pool))
    lengths, table = mx.zeros(rows, dtype=mx.int32), mx.zeros((rows, 8), dtype=mx.int32)
    paged.kv_write(record, k_pool, v_pool, k, v, lengths)
    paged.kv_gather(record, k_pool, v_pool, table, shape.page_size)
    for tuning, splits in itertools.product(tunings, (1, 2)):
        cut = replace(latent.cut_of(tuning, rows, shape.heads, 1, 1), splits=splits)
        form = Form(shape.page_size, shape.dim**-0.5)
        latent.latent_decode(record, q, turned, k_pool, v_pool, table, lengths, form, cut)


def _record_rows(record: Launcher, shape: ModelShape, rows: int) -> None:
    """What layers launch whose projections are joined."""
    norm = fused.Norm(mx.zeros(shape.hidden, dtype=shape.dtype), 1e-6)
    if shape.hidden and fused.takes_rows(shape.hidden, shape.dtype):
        x = mx.zeros((rows, shape.hidden), dtype=shape.dtype)
        fused.add_rms_norm(record, x, x, norm)
    if shape.intermediate and fused.takes_rows(shape.intermediate, shape.dtype):
        for gated in (fused.swiglu, fused.geglu):
            gated(record, mx.zeros((rows, 2 * shape.intermediate), dtype=shape.dtype))


def _record_routed(record: Launcher, shape: ModelShape, rows: int) -> None:
    """What is launched round a layer's experts; choices as most models make them."""
    if shape.experts is None:
        return
    count, each = shape.experts.count, shape.experts.each
    soft = Choice(each, later=True, soft=True), Choice(each, smallest=True, soft=True)
    first = Choice(each, later=True, before=True, divided=True), Choice(each, before=True)
    for choice, dtype in (*((c, shape.dtype) for c in (*soft, *first)), (Choice(each, smallest=True), mx.float32)):
        logits = mx.zeros((rows, count), dtype=dtype)
        if routed.takes_choice(logits, logits, choice):
            routed.route(record, logits, logits, choice)
    inner, outer = (_pairs(shape, rows * each, n) for n in (shape.experts.width, shape.hidden))
    if fused.takes_rows(shape.experts.width, shape.dtype):
        routed.expert_gate(record, inner, inner, _gate(shape))
    if shape.hidden and fused.takes_rows(shape.hidden, shape.dtype):
        x, shares = (mx.zeros((rows, n), dtype=shape.dtype) for n in (shape.hidden, each))
        places = routed.sort_pairs(record, outer.indices, each).places
        for pairs in (outer, replace(outer, places=places)):
            routed.add_weighed_rms_norm(record, x, pairs, shares, fused.Norm(x[0], 1e-6))
            for plus in (None, x):
                routed.weighed_sum(record, pairs, shares, plus)


def _pairs(shape: ModelShape, count: int, n: int) -> Pairs:
    return Pairs(mx.zeros((count, n), dtype=shape.dtype), mx.zeros(count, dtype=mx.int32), _bias(shape, n))


def _gate(shape: ModelShape) -> Gate:
    """gpt-oss, which is known by its sinks, clips."""
    return Gate(True, 1.702, 7.0) if shape.sinks else Gate()


def _bias(shape: ModelShape, n: int) -> mx.array | None:
    """Of experts, which gpt-oss' have."""
    assert shape.experts is not None
    return mx.zeros((shape.experts.count, n), dtype=shape.dtype) if shape.sinks else None


def _record_turned(record: Launcher, shape: ModelShape, k_pool: Pool, v_pool: Pool, rows: int) -> None:
    """The same of heads; models with norms of q and k and without them."""
    if not shape.rotated:
        return
    k_at, v_at = shape.heads * shape.dim, (shape.heads + shape.kv_heads) * shape.dim
    heads = fused.Heads(shape.heads, shape.kv_heads, shape.dim, shape.value_dim, 0, k_at, v_at)
    y = mx.zeros((rows, v_at + shape.kv_heads * shape.value_dim), dtype=shape.dtype)
    rope, where = fused.Rope(shape.rotated, False, 1e4, 1.0), mx.zeros(rows, dtype=mx.int32)
    each = fused.Norm(mx.zeros(shape.dim, dtype=shape.dtype), 1e-6)
    for norms in ((None, None), (each, each)):
        fused.rope_kv_write(record, y, k_pool, v_pool, heads, rope, where, where, norms, None)


def _record_boundaries(record: Launcher, shape: ModelShape, rows: int) -> None:
    """What draws launch that have limits, and what finds the likeliest tokens."""
    bits = mx.zeros((rows, shape.vocab), dtype=mx.uint32)
    if not shape.vocab or not select.takes(bits):
        return
    tokens, mass = mx.zeros(rows, dtype=mx.int32), mx.zeros(rows)
    for limits in (select.Limits(tokens, None), select.Limits(None, mass), select.Limits(tokens, mass)):
        select.boundary(record, bits, None if limits.mass is None else bits, limits)
    select.boundary(record, bits, None, select.Limits(tokens, None), signed=True)


def _record_draws(record: Launcher, shape: ModelShape, rows: int) -> None:
    """What draws, and finds log probabilities; of logits after edits too, which are float32."""
    for dtype in (shape.dtype, mx.float32):
        logits = mx.zeros((rows, shape.vocab), dtype=dtype)
        if drawing.takes(logits, shape.vocab):
            hot = drawing.Filters(mx.zeros(rows), mx.zeros((rows, 2), dtype=mx.uint32))
            drawing.draw(record, logits, shape.vocab, drawing.Filters())
            drawing.draw(record, logits, shape.vocab, hot)
            drawing.top_logprobs(record, logits, shape.vocab, mx.zeros(rows, dtype=mx.int32), 5)


def _record_products(record: Launcher, shape: ModelShape) -> None:
    """Of quantized matrices, alone and joined, and of experts', which need not be quantized."""
    for n, k in _matrices(shape) if shape.codes else ():
        weights = _weights(shape, n, k)
        if weights is not None:
            for rows in _ROWS:
                products.product(record, mx.zeros((rows, k), dtype=shape.dtype), weights)
    for n, k, per, is_gate in _experts(shape):
        assert shape.experts is not None
        weights = _weights(shape, n, k, shape.experts.count)
        for tokens in _tokens(shape.experts) if weights is not None else ():
            pairs = tokens * shape.experts.each
            x = mx.zeros((-(-pairs // per), k), dtype=shape.dtype)
            assert weights is not None
            indices = mx.zeros(pairs, dtype=mx.int32)
            products.product(record, x, weights, indices, per)
            if is_gate:
                products.gated_product(record, x, _gated(shape, weights), indices, per)
        if weights is not None:
            tiles = grouped.tiles(record, mx.zeros(8, dtype=mx.int32), weights.experts)
            x = mx.zeros((8, k), dtype=shape.dtype)
            grouped.product(record, x, weights, tiles, per)
            if is_gate:
                grouped.gated_product(record, x, _gated(shape, weights), tiles, per)


def _tokens(experts: Experts) -> list[int]:
    """Each of those after which a product of experts is cut differently, and one more."""
    pairs = [1 << i for i in range(products.MOST_PAIRS.bit_length())]
    pairs += [experts.count - 1, *(experts.count * rows // 2 for rows in _ROWS[:-1])]
    found = {p // experts.each + more for p in pairs for more in (0, 1)}
    return sorted(tokens for tokens in found if 0 < tokens * experts.each <= products.MOST_PAIRS)


def _gated(shape: ModelShape, weights: Weights) -> Gated:
    """A gate with what it gates, and their biases where the model has them."""
    bias = _bias(shape, weights.rows)
    return Gated(weights, weights, None if bias is None else (bias, bias), _gate(shape))


def _matrices(shape: ModelShape) -> Iterator[tuple[int, int]]:
    """(rows, columns) of the projections of a plain layer, and of the head."""
    q, k, v = shape.heads * shape.dim, shape.kv_heads * shape.dim, shape.kv_heads * shape.value_dim
    for n in (q + k + v, q, k, v, 2 * shape.intermediate, shape.intermediate, shape.vocab):
        yield n, shape.hidden
    yield shape.hidden, shape.heads * shape.value_dim
    yield shape.hidden, shape.intermediate


def _experts(shape: ModelShape) -> Iterator[tuple[int, int, int, bool]]:
    """(rows, columns, pairs a row of x, whether of a gate) of an expert's matrices."""
    if shape.experts is not None and shape.hidden:
        yield shape.experts.width, shape.hidden, shape.experts.each, True
        yield shape.hidden, shape.experts.width, 1, False


def _weights(shape: ModelShape, n: int, k: int, experts: int = 0) -> Weights | None:
    """Zeros, which nobody computes; None where the kernel does not take such a matrix."""
    lead, codes = ((experts, n) if experts else (n,)), shape.codes
    if not n or not k:
        return None
    if codes is None:
        found = Weights(mx.zeros((*lead, k), dtype=shape.dtype))
    elif k % codes.group:
        return None
    else:
        affine = codes.mode == "affine"
        words = mx.zeros((*lead, k * codes.bits // 32), dtype=mx.uint32)
        scales = mx.zeros((*lead, k // codes.group), dtype=shape.dtype if affine else mx.uint8)
        found = Weights(words, scales, scales if affine else None, codes.bits, codes.group, codes.mode)
    return found if products.takes(shape.dtype, found) else None


def _forms(shape: ModelShape) -> list[Form]:
    return [Form(shape.page_size, shape.dim**-0.5, window, shape.softcap) for window in shape.windows]
