"""Attention over gathered K and V in plain MLX: what rows use where no kernel of ours runs."""

from __future__ import annotations

import mlx.core as mx

from pippin.inputs import Group

# Most attention scores at once where MLX has no fused attention (the CPU): 64 MiB of float32.
_MOST_SCORES = 1 << 24


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
    most = max(1, _MOST_SCORES // (group.count * heads * group.context))
    parts = []
    for at in range(0, group.rows, most):
        rows = slice(at, min(at + most, group.rows))
        mask = causal_mask(group, rows, window)
        parts.append(
            mx.fast.scaled_dot_product_attention(q[:, :, rows], keys, values, scale=scale, mask=mask, sinks=sinks)
        )
    out = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)
    return out.transpose(0, 2, 1, 3).reshape(group.count * group.rows, heads, 1, out.shape[-1])


def causal_mask(group: Group, rows: slice, window: int | None) -> mx.array | str | None:
    """What MLX's attention needs for ``rows`` of each work: nothing, "causal", or bool [count, 1, rows, context]."""
    windowed = window is not None and window < group.context
    if not group.ragged and not windowed:
        if group.rows == 1:
            return None
        if rows.stop - rows.start == group.rows:
            return "causal"
    return positional_mask(group, window)[:, :, rows]


def positional_mask(group: Group, window: int | None) -> mx.array:
    """Which slot each token sees, bool [count, 1, rows, context]: none after it, none further back than the window."""
    positions = group.positions[:, None, :, None]
    slots = mx.arange(group.context, dtype=mx.int32)
    mask = slots <= positions
    if window is not None and window < group.context:
        mask = mask & (slots > positions - window)
    return mask
