"""Attention over gathered K and V in plain MLX: what rows use where no kernel of ours runs."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from pippin.cache.pool import KVPool
from pippin.inputs import Group
from pippin.kernels.cpu import softmax_values

KeysAndValues = tuple[mx.array, mx.array]

# Most attention scores at once on the CPU, where MLX computes them all: a few arrays of them fit in its cache.
_MOST_SCORES = 1 << 18
_LEAST_ROWS = 32


def fetch(pool: KVPool, layer: int, group: Group, after: mx.array, rows: Callable[[], mx.array]) -> KeysAndValues:
    """K and V of a group's contexts, [count, kv_heads, context, …], once ``after`` is computed.

    ``rows`` makes ``Group.head_rows`` for this layer, where MLX's own indexing reads the pool.
    """
    if group.pages is None:
        assert group.slots is not None
        return pool.gather_slots(layer, group.slots, rows)
    keys, values = pool.gather_pages(layer, group.pages, after)
    return keys[:, :, : group.context], values[:, :, : group.context]


def group_attention(
    q: mx.array,
    keys: mx.array,
    values: mx.array,
    group: Group,
    scale: float,
    window: int | None,
    sinks: mx.array | None,
) -> mx.array:
    """Causal attention of one group.

    ``q`` [count * rows, heads, 1, dim], ``keys`` and ``values`` [count, kv_heads, context, …]; returns
    [count * rows, heads, 1, value_dim]. Token ``i`` sees tokens ``i - window + 1 … i``.
    """
    heads, dim = q.shape[1], q.shape[3]
    q = q.reshape(group.count, group.rows, heads, dim).transpose(0, 2, 1, 3)
    if mx.default_device() == mx.Device(mx.gpu) or q.dtype != mx.float32:  # MLX's own is fused on a GPU
        mask = causal_mask(group, window)
        out = mx.fast.scaled_dot_product_attention(q, keys, values, scale=scale, mask=mask, sinks=sinks)
    else:
        out = _composed(q, keys, values, group, scale, window, sinks)
    return out.transpose(0, 2, 1, 3).reshape(group.count * group.rows, heads, 1, out.shape[-1])


def _composed(
    q: mx.array,
    keys: mx.array,
    values: mx.array,
    group: Group,
    scale: float,
    window: int | None,
    sinks: mx.array | None,
) -> mx.array:
    """The same by matrix products, a few rows of each work at a time, each against what it may see.

    MLX's attention on the CPU computes every score, those that the mask hides too, and holds them all.
    """
    count, heads, rows, dim = q.shape
    kv_heads, value_dim = keys.shape[1], values.shape[-1]
    shape = count, kv_heads, heads // kv_heads
    q, keys = (q * scale).reshape(*shape, rows, dim), keys.swapaxes(-1, -2)
    if sinks is not None:
        sinks = sinks.astype(q.dtype).reshape(kv_heads, heads // kv_heads, 1, 1)
    mask = None if causal_mask(group, window) is None else positional_mask(group, window)[:, :, None]
    step = max(_LEAST_ROWS, _MOST_SCORES // (count * heads * group.context))
    parts = []
    for at in range(0, rows, step):
        seen = group.context if group.ragged else group.context - rows + min(at + step, rows)
        # Query heads of one KV head are rows of one product: broadcasting K over them takes half as long again.
        some = q[..., at : at + step, :].reshape(count, kv_heads, -1, dim)
        scores = (some @ keys[..., :seen]).reshape(*shape, -1, seen)
        if mask is not None:
            scores = mx.where(mask[..., at : at + step, :seen], scores, mx.finfo(scores.dtype).min)
        parts.append(softmax_values(scores, values[..., :seen, :], sinks))
    out = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-2)
    return out.reshape(count, heads, rows, value_dim)


def causal_mask(group: Group, window: int | None) -> mx.array | str | None:
    """What MLX's attention needs: nothing, "causal", or bool [count, 1, rows, context]."""
    if group.ragged or (window is not None and window < group.context):
        return positional_mask(group, window)
    return None if group.rows == 1 else "causal"


def positional_mask(group: Group, window: int | None) -> mx.array:
    """Which slot each token sees, bool [count, 1, rows, context]: none after it, none further back than the window."""
    positions = group.positions[:, None, :, None]
    slots = mx.arange(group.context, dtype=mx.int32)
    mask = slots <= positions
    if window is not None and window < group.context:
        mask = mask & (slots > positions - window)
    return mask
