"""The one place where K and V live: an array each per layer, a row a slot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one cache of the model stores for a token, and how far back its layer looks.

    ``window`` is the number of latest tokens attended to (the token itself included), None for all of them.
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: mx.Dtype
    window: int | None = None

    @property
    def bytes_per_slot(self) -> int:
        return self.kv_heads * (self.key_dim + self.value_dim) * self.dtype.size


class KVPool:
    """K [slots, kv_heads, key_dim] and V [slots, kv_heads, value_dim] for each layer; slot 0 is scratch.

    A layer's arrays are written once in a step, before they are read: MLX then updates them in place, as long as
    nothing else holds the buffer. Nobody outside may keep a reference to an array of the pool. Slots are not
    checked here, and MLX does not check them either: the runner does, on the host.
    """

    def __init__(self, shapes: Sequence[LayerShape | None], num_slots: int) -> None:
        self.shapes = tuple(shapes)
        self.num_slots = num_slots
        self.keys = [mx.zeros((num_slots, s.kv_heads, s.key_dim), dtype=s.dtype) if s else None for s in self.shapes]
        self.values = [
            mx.zeros((num_slots, s.kv_heads, s.value_dim), dtype=s.dtype) if s else None for s in self.shapes
        ]
        mx.eval(self.arrays)

    @property
    def arrays(self) -> list[mx.array]:
        """Every array, to hand to ``mx.async_eval`` with a step: a write that nobody evaluates piles up."""
        return [a for a in (*self.keys, *self.values) if a is not None]

    @property
    def nbytes(self) -> int:
        return self.num_slots * bytes_per_slot(self.shapes)

    def write(self, layer: int, slots: mx.array, k: mx.array, v: mx.array) -> None:
        """Stores k [n, kv_heads, key_dim] and v [n, kv_heads, value_dim] at ``slots`` [n] int32."""
        keys, values = self.keys[layer], self.values[layer]
        if keys is None or values is None:
            raise LookupError(f"layer {layer} stored nothing when the model was measured")
        keys[slots] = k.astype(keys.dtype)
        values[slots] = v.astype(values.dtype)

    def gather(self, layer: int, slots: mx.array) -> tuple[mx.array, mx.array]:
        """K and V at ``slots`` [b, n], as attention wants them: [b, kv_heads, n, key_dim or value_dim]."""
        keys, values = self.keys[layer], self.values[layer]
        if keys is None or values is None:
            raise LookupError(f"layer {layer} stored nothing when the model was measured")
        return keys[slots].transpose(0, 2, 1, 3), values[slots].transpose(0, 2, 1, 3)


def bytes_per_slot(shapes: Sequence[LayerShape | None]) -> int:
    """Bytes that one token takes in all layers together."""
    return sum(s.bytes_per_slot for s in shapes if s)
