"""Backend ``rows``: every token is a batch row with a position of its own, and only attention knows of sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from pippin.attention.plain import fetch, group_attention
from pippin.cache.pool import KVPool
from pippin.errors import ModelError
from pippin.inputs import LEAST_INPUT, Group, Step, row_step
from pippin.kernels import Form, Heads, paged_decode, paged_extend, rope_kv_write, rows_per_tile, tile_rows
from pippin.models.deferred import Attended, Part, settled
from pippin.models.seam import Seam
from pippin.types import Work
from pippin.uploads import upload


@dataclass(frozen=True, slots=True)
class Window:
    """The mask that a model asks its cache for and passes on to attention: here, only how far back to look."""

    size: int | None


class RowLayer:
    """The cache object that one layer gets for one forward."""

    def __init__(
        self, layer: int, step: Step, pool: KVPool, seam: Seam, shared: dict[tuple[int | str, ...], mx.array]
    ) -> None:
        self._shared = shared
        self.offset = step.positions
        self._layer = layer
        self._step = step
        self._pool = pool
        self._seam = seam
        shape = pool.shapes[layer]
        self._window = shape.window if shape else None
        self._windowed = pool.is_windowed(layer)
        self._places = step.places(self._windowed)
        self._stored: tuple[mx.array | Part, mx.array | Part] | None = None
        self._written: mx.array | None = None

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Window:
        """mlx-lm's call for a mask; ``window_size`` is in tokens, the newest included."""
        return Window(window_size or self._window)

    def update_and_fetch(
        self, keys: mx.array | Part, values: mx.array | Part
    ) -> tuple[mx.array | Part, mx.array | Part]:
        """Stores keys and values [T, kv_heads, 1, …]; returns them as they are, since attention reads the pool.

        Where a kernel stores them as it rotates or attends, that comes with the first call of ``attend``.
        """
        waits = self._joined(keys, values)
        if not waits:
            keys, values = settled(keys), settled(values)
        self._stored = keys, values
        self._seam.own(keys, self)
        if not waits and not (self._step.stores_as_it_attends and self._pool.stores_as_it_attends(self._layer)):
            self._written = self._write()
        return self._stored

    def _joined(self, keys: mx.array | Part, values: mx.array | Part) -> bool:
        """Whether the two are parts of one product, of which one kernel can make what is stored."""
        if not isinstance(keys, Part) or not isinstance(values, Part) or keys.source is not values.source:
            return False
        plain = values.norm is None and values.turn is None and values.swapped and values.heads == keys.heads
        return plain and keys.turn is not None and keys.turn.offset is self.offset

    def _write(self) -> mx.array:
        keys, values = (settled(x) for x in self.keys_and_values())
        return self._pool.write(self._layer, self._places.write_slots, flat(keys), flat(values), self._step.after)

    def _rotate_and_write(self, q: mx.array | Part) -> mx.array:
        """Stores K and V that are parts, and returns the queries [T, heads, dim]; at once if they are a part too."""
        keys, values = self.keys_and_values()
        assert isinstance(keys, Part)
        assert isinstance(values, Part)
        assert keys.turn is not None
        if not isinstance(q, Part) or q.source is not keys.source or not self._turns_alike(q, keys):
            self._written = self._write()
            return flat(settled(q))
        rows, self._written = rope_kv_write(
            q.source.y,
            *self._pool.layer(self._layer),
            Heads(q.heads, keys.heads, keys.dim, values.dim, q.first, keys.first, values.first),
            keys.turn.rope,
            positions=self._step.positions,
            slots=self._places.write_slots,
            norms=(q.norm, keys.norm),
            after=self._step.after,
        )
        return rows

    def _turns_alike(self, q: Part, keys: Part) -> bool:
        if q.turn is None or keys.turn is None or q.turn.offset is not self.offset or q.dim != keys.dim:
            return False
        return q.turn.rope.same_as(keys.turn.rope)

    def keys_and_values(self) -> tuple[mx.array | Part, mx.array | Part]:
        """What this layer stored, for layers that share it (Gemma 3n)."""
        if self._stored is None:
            raise LookupError("a layer asked for shared K and V before they were stored")
        return self._stored

    def attend(self, q: mx.array | Part, scale: float, mask: object, sinks: mx.array | None) -> mx.array | Attended:
        """Attention of all rows, group by group; see ``seam.LayerAttention``."""
        if mask is not None and not isinstance(mask, Window):
            raise ModelError("it computes with its attention mask")
        window = (mask.size if mask is not None else None) or self._window
        if self._written is None and isinstance(self.keys_and_values()[0], Part):
            queries = self._rotate_and_write(q)
        else:
            queries = flat(settled(q))
        self._pool.note(self._layer, queries.shape[1], Form(self._pool.page_size, scale, window), sinks)
        groups = self._places.groups
        if len(groups) == 1 and self._reads_pages(groups[0]) and self._seam.fusions.joined:
            return Attended(self._decode(queries, groups[0], scale, window, sinks, joined=True), queries.shape[1])
        parts = []
        for group in groups:
            parts.append(self._attend_group(queries[group.tokens], group, scale, window, sinks))
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=0)

    def _reads_pages(self, group: Group) -> bool:
        """Whether a kernel attends to the pool itself, row by row."""
        return group.pages is not None and group.rows == 1 and group.tiles is None

    def _attend_group(
        self, q: mx.array, group: Group, scale: float, window: int | None, sinks: mx.array | None
    ) -> mx.array:
        """q [T, heads, dim] to [T, heads, 1, value_dim]."""
        if self._reads_pages(group):
            return self._decode(q, group, scale, window, sinks)[:, :, None]
        assert self._written is not None
        if group.counts is not None or group.tiles is not None:
            return self._extend(q, group, Form(self._pool.page_size, scale, window), sinks)[:, :, None]
        keys, values = fetch(self._pool, self._layer, group, self._written, lambda: self._head_rows(group))
        return group_attention(q[:, :, None], keys, values, group, scale, window, sinks)

    def _decode(
        self,
        q: mx.array,
        group: Group,
        scale: float,
        window: int | None,
        sinks: mx.array | None,
        joined: bool = False,
    ) -> mx.array:
        assert group.pages is not None
        new = None
        if self._written is None:
            stored = self.keys_and_values()
            new = flat(settled(stored[0])), flat(settled(stored[1]))
        out = paged_decode(
            q,
            *self._pool.layer(self._layer),
            group.pages,
            self._lengths(group),
            Form(self._pool.page_size, scale, window),
            sinks=sinks,
            after=self._step.after if new else self._written,
            new=new,
            longest=group.context,
            joined=joined,
        )
        if new is not None:
            self._written = out  # for another layer that shares these keys: it reads after the write
        return out

    def _extend(self, q: mx.array, group: Group, form: Form, sinks: mx.array | None) -> mx.array:
        """Several rows of each sequence by page, its K and V read once for up to a tile of them."""
        assert group.pages is not None
        pools, tiles = self._pool.layer(self._layer), group.tiles
        if tiles is None:
            most = rows_per_tile(q.shape[1], pools[0].shape[1], pools[0].dtype)
            tiles = self._once(
                (group.first, "tiles", most), lambda: upload(tile_rows(group.counts or (), most, LEAST_INPUT))
            )
        lengths, after = self._lengths(group), self._written
        return paged_extend(
            q, *pools, group.pages, lengths, tiles, form, sinks=sinks, after=after, longest=group.context
        )

    def _lengths(self, group: Group) -> mx.array:
        """``Group.lengths``."""
        return self._once((group.first, "lengths"), group.lengths)

    def _head_rows(self, group: Group) -> mx.array:
        """``Group.head_rows``."""
        kv_heads = self._pool.layer(self._layer)[0].shape[1]
        return self._once((group.first, "heads", kv_heads), lambda: group.head_rows(kv_heads))

    def _once(self, key: tuple[int | str, ...], make: Callable[[], mx.array]) -> mx.array:
        """What all layers of a kind share, made for the first of them that wants it."""
        key = self._windowed, *key
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]


def flat(x: mx.array) -> mx.array:
    """[T, heads, 1, dim] to [T, heads, dim], without a copy."""
    return x.reshape(x.shape[0], x.shape[1], x.shape[3])


class Rows:
    """See the module; ``attention.AttentionBackend`` says what each method owes."""

    name = "rows"

    def forwards(self, works: Sequence[Work]) -> list[Sequence[Work]]:
        return [works]

    def step(self, works: Sequence[Work], last_token: mx.array, pool: KVPool) -> Step:
        return row_step(works, last_token, pool.page_size if pool.in_place else None, pool.rows_by_page, pool.windows)

    def layers(self, step: Step, pool: KVPool, seam: Seam) -> list[object]:
        shared: dict[tuple[int | str, ...], mx.array] = {}
        return pool.layout.nest([RowLayer(i, step, pool, seam, shared) for i in range(len(pool.shapes))])
