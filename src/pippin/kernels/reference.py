"""What each kernel computes, in plain MLX: the truth that every kernel is compared with, and what runs without a GPU.

Everywhere: ``k_pool`` [slots, kv_heads, dim] and ``v_pool`` [slots, kv_heads, value_dim] share a dtype, and may both be
quantized (``packing.PackedPool``); token ``t`` of a sequence lies in slot
``table[s, t // page_size] * page_size + t % page_size``; a row of length 0 is padding and
gives zeros. ``sinks`` [heads] are logits that take part in the softmax and add nothing. Sums are in float32.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import mlx.core as mx
import numpy as np

from pippin.kernels.drawing import Filters
from pippin.kernels.form import Form
from pippin.kernels.fused import Heads
from pippin.kernels.grouped import ROWS, Tiles
from pippin.kernels.packing import Pool
from pippin.kernels.routed import Choice, Gate, Order, Pairs
from pippin.kernels.select import Limits


def kv_write(k_pool: Pool, v_pool: Pool, k: mx.array, v: mx.array, slots: mx.array) -> None:
    """Stores rows k [R, kv_heads, dim] and v [R, kv_heads, value_dim] at ``slots`` [R] int32 of the pools given.

    Rebinds the two pool objects to the updated arrays, in the same buffers where nothing else holds those.
    """
    k_pool[slots] = k.astype(k_pool.dtype)
    v_pool[slots] = v.astype(v_pool.dtype)


def kv_gather(k_pool: Pool, v_pool: Pool, table: mx.array, *, page_size: int) -> tuple[mx.array, mx.array]:
    """K [R, kv_heads, context, dim] and V of the tokens in ``table`` [R, pages]; context is pages * page_size."""
    slots = slots_of(table, page_size)
    return k_pool[slots].transpose(0, 2, 1, 3), v_pool[slots].transpose(0, 2, 1, 3)


def slots_of(table: mx.array, page_size: int) -> mx.array:
    """Slots of tokens 0, 1, … of each row: table [R, pages] of page numbers to [R, pages * page_size] int32."""
    if page_size == 1:
        return table
    within = mx.arange(page_size, dtype=mx.int32)
    return (table[:, :, None] * page_size + within).reshape(table.shape[0], -1)


def newest_slots(table: mx.array, lengths: mx.array, page_size: int) -> mx.array:
    """The slot of each row's last token, [R] int32; scratch slot 0 for a row of length 0."""
    last = mx.maximum(lengths - 1, 0)
    pages = mx.take_along_axis(table, (last // page_size)[:, None], axis=1)[:, 0]
    return mx.where(lengths > 0, pages * page_size + last % page_size, 0)


def paged_decode(
    q: mx.array,
    k_pool: Pool,
    v_pool: Pool,
    table: mx.array,
    lengths: mx.array,
    form: Form,
    *,
    sinks: mx.array | None = None,
) -> mx.array:
    """Attention of one query per row: q [R, heads, dim] to [R, heads, value_dim], in q's dtype.

    ``table`` [R, pages] int32, ``lengths`` [R] int32: row r attends to tokens 0 … lengths[r]-1.
    """
    rows, heads, dim = q.shape
    kv_heads = k_pool.shape[1]
    slots = slots_of(table, form.page_size)
    keys = k_pool[slots].transpose(0, 2, 3, 1).astype(mx.float32)
    values = v_pool[slots].transpose(0, 2, 1, 3).astype(mx.float32)
    grouped = q.reshape(rows, kv_heads, heads // kv_heads, dim).astype(mx.float32)
    logits = (grouped * form.scale) @ keys
    if form.softcap is not None:
        logits = mx.tanh(logits / form.softcap) * form.softcap
    seen = _seen(lengths, slots.shape[1], form.window)
    weights = _softmax(mx.where(seen[:, None, None], logits, -mx.inf), sinks)
    # What lies in slots that a row does not see may be anything, NaN too: 0 times it must stay 0.
    values = mx.where(seen[:, None, :, None], values, 0.0)
    return (weights @ values).reshape(rows, heads, -1).astype(q.dtype)


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
) -> mx.array:
    """Attention of several rows of each sequence: q [T, heads, dim] to [T, heads, value_dim].

    ``table`` [S, pages] has a line a sequence, ``lengths`` [T] a number a row (its position plus 1). ``tiles`` [N, 3]
    int32 says whose the rows are: (first row, number of rows, sequence); 0 rows is padding. Rows in no tile give
    whatever: the caller does not read them.
    """
    return paged_decode(q, k_pool, v_pool, table[owners(tiles, q.shape[0])], lengths, form, sinks=sinks)


def latent_decode(
    q: mx.array,
    q_turned: mx.array,
    k_pool: Pool,
    v_pool: Pool,
    table: mx.array,
    lengths: mx.array,
    form: Form,
) -> mx.array:
    """Absorbed latent attention: q [R, heads, dim] and q_turned [R, heads, turned] to [R, heads, dim], in q's dtype.

    Latents ``k_pool`` [slots, 1, dim] are keys and values of all heads, ``v_pool`` [slots, 1, turned] turned keys; a
    logit is ``q . latent * scale + q_turned . key``. DeepSeek-V2, arXiv 2405.04434.
    """
    slots = slots_of(table, form.page_size)
    latents, keys = (pool[slots][:, :, 0].astype(mx.float32) for pool in (k_pool, v_pool))
    wide, turned = (x.astype(mx.float32) for x in (q, q_turned))
    logits = (wide * form.scale) @ latents.swapaxes(1, 2) + turned @ keys.swapaxes(1, 2)
    seen = _seen(lengths, slots.shape[1], None)
    weights = _softmax(mx.where(seen[:, None], logits, -mx.inf)[:, None], None)[:, 0]
    return (weights @ mx.where(seen[..., None], latents, 0.0)).astype(q.dtype)


def owners(tiles: mx.array, rows: int) -> mx.array:
    """The sequence of each of ``rows`` rows, [rows] int32; 0 for a row that is in no tile."""
    steps = mx.arange(rows, dtype=mx.int32)[None]
    inside = steps < tiles[:, 1:2]
    owner = mx.zeros(rows + 1, dtype=mx.int32)
    owner[mx.where(inside, tiles[:, :1] + steps, rows)] = mx.broadcast_to(tiles[:, 2:3], inside.shape)
    return owner[:rows]


def _seen(lengths: mx.array, context: int, window: int | None) -> mx.array:
    """Which tokens each row attends to, bool [R, context]."""
    tokens = mx.arange(context, dtype=mx.int32)[None]
    seen = tokens < lengths[:, None]
    return seen if window is None else seen & (tokens >= lengths[:, None] - window)


def _softmax(logits: mx.array, sinks: mx.array | None) -> mx.array:
    """Softmax over the last axis of [R, kv_heads, group, context]; zeros where every logit is -inf and no sink is."""
    top = mx.max(logits, axis=-1, keepdims=True)
    if sinks is not None:
        sink = sinks.astype(mx.float32).reshape(1, logits.shape[1], logits.shape[2], 1)
        top = mx.maximum(top, sink)
    top = mx.where(mx.isinf(top), 0.0, top)
    weights = mx.exp(logits - top)
    total = mx.sum(weights, axis=-1, keepdims=True)
    if sinks is not None:
        total = total + mx.exp(sink - top)
    return weights / mx.where(total > 0, total, 1.0)


def heads_of(y: mx.array, heads: Heads) -> tuple[mx.array, mx.array, mx.array]:
    """q [T, heads, dim], k [T, kv_heads, dim] and v [T, kv_heads, value_dim] from where they lie in y [T, n]."""
    parts = (
        (heads.q_at, heads.heads, heads.dim),
        (heads.k_at, heads.kv_heads, heads.dim),
        (heads.v_at, heads.kv_heads, heads.value_dim),
    )
    q, k, v = (y[:, at : at + n * d].reshape(-1, n, d) for at, n, d in parts)
    return q, k, v


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """x [.., n] by its root mean square, times ``weight`` [n]; rounded to x's dtype before the weight and after."""
    wide = x.astype(mx.float32)
    normed = wide * mx.rsqrt(mx.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (normed.astype(x.dtype) * weight).astype(x.dtype)


def rope(
    x: mx.array,
    positions: mx.array,
    dims: int,
    frequencies: mx.array,
    *,
    traditional: bool = False,
    length: float = 1.0,
) -> mx.array:
    """Rotates the first ``dims`` numbers of heads x [T, heads, n] by ``positions`` [T] * ``frequencies`` [dims / 2].

    Pairs are numbers i and i + dims / 2, or neighbours if ``traditional``. RoFormer, arXiv 2104.09864. What is rotated
    becomes ``length`` times as long.
    """
    angles = (positions.astype(mx.float32)[:, None] * frequencies[: dims // 2])[:, None]
    cos, sin = length * mx.cos(angles), length * mx.sin(angles)
    wide = x[..., :dims].astype(mx.float32)
    if traditional:
        first, second = wide[..., ::2], wide[..., 1::2]
    else:
        first, second = wide[..., : dims // 2], wide[..., dims // 2 :]
    turned = [first * cos - second * sin, first * sin + second * cos]
    whole = mx.stack(turned, axis=-1).reshape(wide.shape) if traditional else mx.concatenate(turned, axis=-1)
    return mx.concatenate([whole.astype(x.dtype), x[..., dims:]], axis=-1)


def add_rms_norm(x: mx.array, r: mx.array, weight: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    """(x + r, that normed), both as x [.., n]."""
    total = x + r
    return total, rms_norm(total, weight, eps)


def route(keys: mx.array, values: mx.array, choice: Choice) -> tuple[mx.array, mx.array]:
    """Of each row [.., n] the ``choice.chosen`` best columns, best first: [T, chosen] int32, and their shares."""
    wide, of = (a.reshape(-1, a.shape[-1]).astype(mx.float32) for a in (keys, values))
    order, last = wide if choice.smallest else -wide, wide.shape[-1] - 1
    if choice.later:
        indices = (last - mx.argsort(order[:, ::-1], axis=-1))[:, : choice.chosen]
    else:
        indices = mx.argsort(order, axis=-1)[:, : choice.chosen]
    shares = mx.take_along_axis(mx.softmax(of, axis=-1) if choice.before else of, indices, axis=-1)
    if choice.soft:
        shares = mx.softmax(shares, axis=-1)
    if choice.divided:
        shares = shares / shares.sum(axis=-1, keepdims=True)
    return indices.astype(mx.int32), (shares * choice.factor).astype(values.dtype)


def expert_gate(gate: Pairs, up: Pairs, form: Gate) -> mx.array:
    """See ``kernels.expert_gate``."""
    g, u = (said(pairs) for pairs in (gate, up))
    if form.clipped:
        g, u = mx.minimum(g, form.limit), mx.clip(u, -form.limit, form.limit) + 1
    return (u * g * mx.sigmoid(form.steep * g)).astype(gate.y.dtype)


def weighed_sum(pairs: Pairs, shares: mx.array, plus: mx.array | None = None) -> mx.array:
    """See ``kernels.weighed_sum``."""
    rows = (said(pairs).reshape(*shares.shape, -1) * shares[..., None].astype(mx.float32)).sum(axis=-2)
    return (rows if plus is None else rows + plus.reshape(rows.shape).astype(mx.float32)).astype(pairs.y.dtype)


def said(pairs: Pairs) -> mx.array:
    """Rows as their tokens come, with their experts' biases, float32."""
    bias = None if pairs.bias is None else pairs.bias.astype(mx.float32)
    return replace(pairs, y=pairs.y.astype(mx.float32), bias=bias).in_order()


def tiles(indices: mx.array, experts: int) -> Tiles:
    """See ``grouped.tiles``."""
    chosen, rows = np.array(indices), ROWS
    starts = np.searchsorted(np.sort(chosen), np.arange(experts + 1))
    table = np.zeros((len(chosen) // rows + experts, 3), np.int32)
    for expert, (start, end) in enumerate(itertools.pairwise(starts.tolist())):
        for at in range(start // rows + expert, end // rows + expert + 1):
            first = start + (at - start // rows - expert) * rows
            table[at] = expert, first, np.clip(end - first, 0, rows)
    return Tiles(mx.array(np.argsort(chosen, kind="stable").astype(np.int32)), mx.array(table))


def sort_pairs(indices: mx.array, each: int) -> Order:
    """See ``kernels.experts.sort_pairs``."""
    order = mx.argsort(indices).astype(mx.int32)
    return Order(mx.argsort(order).astype(mx.int32), indices[order], order // each)


def swiglu(y: mx.array) -> mx.array:
    """silu(gate) * up, where y [.., 2 n] is gate, then up."""
    gate, up = mx.split(y.astype(mx.float32), 2, axis=-1)
    return (gate * mx.sigmoid(gate) * up).astype(y.dtype)


def geglu(y: mx.array) -> mx.array:
    """gelu(gate) * up in its tanh form (arXiv:1606.08415), where y [.., 2 n] is gate, then up."""
    gate, up = mx.split(y.astype(mx.float32), 2, axis=-1)
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    return (0.5 * gate * (1 + mx.tanh(inner)) * up).astype(y.dtype)


def kept(bits: mx.array, mass: mx.array | None, limits: Limits, signed: bool = False) -> mx.array:
    """What ``kernels.boundary`` leaves, bool [S, n]: of tokens in order of (bits, id), those before which is room."""
    ids = mx.broadcast_to(mx.arange(bits.shape[1], dtype=mx.int64), bits.shape)
    order = mx.argsort((bits.astype(mx.int64) - 2**31) * 2**32 + ids, axis=-1)
    before = None if mass is None else mx.cumsum(mx.take_along_axis(mass, order, axis=-1), axis=-1, inclusive=False)
    allowed = mx.broadcast_to(limits.column().allow(mx.arange(bits.shape[1]), before), bits.shape)
    found = mx.put_along_axis(mx.zeros(bits.shape, mx.bool_), order, allowed, axis=-1)
    return found if signed else found & (bits < 2**31)


def gumbel(keys: mx.array, n: int) -> mx.array:
    """Standard Gumbel noise, float32 [S, n], of keys uint32 [S, 2]: -log(E) of exponential E = -log(1 - u).

    u comes in steps of 2**-32 near 0, and E keeps them, so that tokens rarer than float32's 6e-8 come up as
    often as they should.
    """
    u = mx.vmap(lambda key: mx.random.uniform(shape=(n,), key=key))(keys)
    exponential = mx.where(u < 2**-10, u + 0.5 * u * u, -mx.log(1 - u))
    return -mx.log(mx.maximum(exponential, 2**-33))


def draw(logits: mx.array, vocab_size: int, filters: Filters) -> mx.array:
    """The tokens of ``kernels.draw``, int32 [S], of rows in which every logit is a number."""
    temperature, keys, top_k, top_p, log_min_p, allowed = filters
    x = logits[:, :vocab_size].astype(mx.float32)
    ids = mx.arange(vocab_size)
    if allowed is not None:
        x = mx.where((allowed[:, ids // 32] >> (ids % 32).astype(mx.uint32)) & 1 == 1, mx.maximum(x, -1e30), -math.inf)
    likeliest, top = mx.argmax(x, axis=-1), x.max(axis=-1, keepdims=True)
    if temperature is None or keys is None:
        return likeliest.astype(mx.int32)
    heat = mx.where(temperature > 0, temperature, 1.0)[:, None]
    distance = (mx.where(top == -math.inf, 0.0, top) - x) / heat
    mass = mx.minimum(mx.exp(-distance) * (2.0**31 / mx.exp(-distance).sum(axis=-1, keepdims=True)) + 0.5, 2.0**31)
    mass = mass.astype(mx.uint32)
    share = None if top_p is None else top_p * mass.sum(axis=-1).astype(mx.float32)
    near = kept(distance.view(mx.uint32), mass, Limits(top_k, share))
    if log_min_p is not None:
        near = near & (-distance >= log_min_p[:, None])
    scores = mx.where(near, gumbel(keys, vocab_size) - distance, -math.inf)
    return mx.where(temperature > 0, mx.argmax(scores, axis=-1), likeliest).astype(mx.int32)


def top_logprobs(
    logits: mx.array, vocab_size: int, tokens: mx.array, count: int
) -> tuple[mx.array, mx.array, mx.array]:
    """``kernels.top_logprobs``, of rows in which every logit is a number."""
    x = logits[:, :vocab_size].astype(mx.float32)
    logprobs = x - mx.logsumexp(x, axis=-1, keepdims=True)
    bits = (-x).view(mx.int32)
    order = mx.where(bits < 0, bits ^ (2**31 - 1), bits).astype(mx.int64) * 2**32
    ids = mx.argsort(order + mx.arange(vocab_size), axis=-1)[:, :count].astype(mx.int32)
    logprob = mx.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
    return logprob, ids, mx.take_along_axis(logprobs, ids, axis=-1)
