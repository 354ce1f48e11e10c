"""Backend ``rows``: every token is a batch row with a position of its own, and only attention knows of sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from pippin.attention.plain import fetch, group_attention
from pippin.cache.pool import KVPool
from pippin.errors import ModelError
from pippin.inputs import Group, Step, row_step
from pippin.kernels import paged_decode
from pippin.models.seam import Seam
from pippin.types import Work


@dataclass(frozen=True, slots=True)
class Window:
    """The mask that a model asks its cache for and passes on to attention: here, only how far back to look."""

    size: int | None


class RowLayer:
    """The cache object that one layer gets for one forward."""

    def __init__(
        self, layer: int, step: Step, pool: KVPool, seam: Seam, gathers: dict[tuple[int, int], mx.array]
    ) -> None:
        self._gathers = gathers
        self.offset = step.positions
        self._layer = layer
        self._step = step
        self._pool = pool
        self._seam = seam
        shape = pool.shapes[layer]
        self._window = shape.window if shape else None
        self._stored: tuple[mx.array, mx.array] | None = None
        self._written: mx.array | None = None

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Window:
        """mlx-lm's call for a mask; ``window_size`` is in tokens, the newest included."""
        return Window(window_size or self._window)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Stores keys and values [T, kv_heads, 1, …]; returns them as they are, since attention reads the pool.

        Where a kernel stores them as it attends, that comes with the first call of ``attend``.
        """
        self._stored = keys, values
        self._seam.own(keys, self)
        if not self._step.stores_as_it_attends:
            self._written = self._pool.write(
                self._layer, self._step.write_slots, _flat(keys), _flat(values), self._step.after
            )
        return self._stored

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """What this layer stored, for layers that share it (Gemma 3n)."""
        if self._stored is None:
            raise LookupError("a layer asked for shared K and V before they were stored")
        return self._stored

    def attend(self, q: mx.array, scale: float, mask: object, sinks: mx.array | None) -> mx.array:
        """Attention of all rows, group by group; see ``seam.LayerAttention``."""
        if mask is not None and not isinstance(mask, Window):
            raise ModelError("it computes with its attention mask")
        window = mask.size if mask is not None else self._window
        parts = []
        for group in self._step.groups:
            rows = q[group.first : group.first + group.count * group.rows]
            parts.append(self._attend_group(rows, group, scale, window, sinks))
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=0)

    def _attend_group(
        self, q: mx.array, group: Group, scale: float, window: int | None, sinks: mx.array | None
    ) -> mx.array:
        if group.pages is None or group.rows > 1:
            assert self._written is not None
            keys, values = fetch(self._pool, self._layer, group, self._written, lambda: self._head_rows(group))
            return group_attention(q, keys, values, group, scale, window, sinks)
        new = None
        if self._written is None:
            keys, values = self.keys_and_values()
            new = _flat(keys), _flat(values)
        out = paged_decode(
            _flat(q),
            *self._pool.layer(self._layer),
            group.pages,
            group.starts + 1,
            page_size=self._pool.page_size,
            scale=scale,
            window=window,
            sinks=sinks,
            after=self._step.after if new else self._written,
            new=new,
            longest=group.context,
        )
        if new is not None:
            self._written = out  # for another layer that shares these keys: it reads after the write
        return out[:, :, None]

    def _head_rows(self, group: Group) -> mx.array:
        """``Group.head_rows``, made once a step for all layers of as many heads."""
        kv_heads = self._pool.layer(self._layer)[0].shape[1]
        key = group.first, kv_heads
        if key not in self._gathers:
            self._gathers[key] = group.head_rows(kv_heads)
        return self._gathers[key]


def _flat(x: mx.array) -> mx.array:
    """[T, heads, 1, dim] to [T, heads, dim], without a copy."""
    return x.reshape(x.shape[0], x.shape[1], x.shape[3])


class Rows:
    """See the module; ``attention.AttentionBackend`` says what each method owes."""

    name = "rows"

    def forwards(self, works: Sequence[Work]) -> list[Sequence[Work]]:
        return [works]

    def step(self, works: Sequence[Work], last_token: mx.array, pool: KVPool) -> Step:
        return row_step(works, last_token, pool.page_size if pool.in_place else None)

    def layers(self, step: Step, pool: KVPool, seam: Seam) -> list[object]:
        gathers: dict[tuple[int, int], mx.array] = {}
        return [RowLayer(i, step, pool, seam, gathers) for i in range(len(pool.shapes))]
