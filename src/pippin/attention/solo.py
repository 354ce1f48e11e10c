"""Backend ``solo``: for models that keep a recurrent state beside, or instead of, K and V.

A state has to see its tokens one after the other, and padding would go into it. So a prompt, or a chunk of one, is a
forward of its own, ``[1, L]``, unpadded; single tokens of many requests are one forward, ``[B, 1]``, over their stacked
states. Attention layers use the pool as in backend ``rows``, or ``padded`` where the model computes with its mask.

Backend ``alone`` runs every work by itself, single tokens too: for models that want their position as a number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx

from pippin.attention.padded import PaddedLayer
from pippin.attention.plain import causal_mask, positional_mask
from pippin.attention.rows import RowLayer, Window
from pippin.cache.pool import KVPool
from pippin.inputs import Group, Step, padded_step, row_step
from pippin.models.deferred import Part, settled
from pippin.models.seam import Seam
from pippin.types import Work

# Before so many tokens a state may have another shape (an n-gram's context is not full yet), so it is not stacked.
_SETTLED = 8


class ChunkLayer:
    """The cache object of one attention layer for a forward [1, L]: a RowLayer, whose tokens have an axis."""

    def __init__(self, rows: RowLayer, seam: Seam) -> None:
        self.offset = rows.offset[:1]
        self._rows = rows
        self._seam = seam
        self._stored: tuple[mx.array, mx.array] | None = None

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Window:
        """As ``RowLayer.make_mask``."""
        return self._rows.make_mask(N, return_array, window_size)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Stores keys and values [1, kv_heads, L, …]; returns them as they are, since attention reads the pool."""
        self._rows.update_and_fetch(_turn(keys), _turn(values))
        self._stored = keys, values
        self._seam.own(keys, self)
        return self._stored

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """What this layer stored, for layers that share it."""
        if self._stored is None:
            raise LookupError("a layer asked for shared K and V before they were stored")
        return self._stored

    def attend(self, q: mx.array | Part, scale: float, mask: object, sinks: mx.array | None) -> mx.array:
        """Attention of q [1, heads, L, dim]; see ``seam.LayerAttention``."""
        return _turn(settled(self._rows.attend(_turn(settled(q)), scale, mask, sinks)))


class AloneLayer:
    """The cache object of one attention layer for a forward of one work: it says what mlx-lm's own would say."""

    def __init__(self, layer: PaddedLayer, group: Group, window: int | None) -> None:
        self.offset = group.context - group.rows
        self.update_and_fetch = layer.update_and_fetch
        self.keys_and_values = layer.keys_and_values
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self._group = group
        self._window = window

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str | None:
        """None or "causal" where that will do, or bool [L, context]."""
        window = window_size or self._window
        mask = positional_mask(self._group, window) if return_array and N > 1 else causal_mask(self._group, window)
        return mask[0, 0] if isinstance(mask, mx.array) else mask


def _turn(x: mx.array) -> mx.array:
    """[1, heads, L, dim] to [L, heads, 1, dim], and back."""
    return x.transpose(2, 1, 0, 3)


class Solo:
    """See the module; ``attention.AttentionBackend`` says what each method owes.

    ``padded``: attend as that does. ``alone``: no work runs with another.
    """

    def __init__(self, name: str, padded: bool, alone: bool = False) -> None:
        self.name = name
        self._padded = padded
        self._alone = alone

    def forwards(self, works: Sequence[Work]) -> list[Sequence[Work]]:
        """Each chunk by itself; single tokens together, as far as the order allows.

        A work may stand on K and V that another of this step writes, or on a snapshot that it makes: both begin at an
        earlier position than it does. Nobody stands on a decode, so those can all wait for the rest.
        """
        rest = sorted((w for w in works if not w.decodes), key=lambda w: w.start)
        runs: list[list[Work]] = []
        for work in [*rest, *sorted((w for w in works if w.decodes), key=lambda w: w.start)]:
            if runs and not self._alone and _joins(work) and _joins(runs[-1][-1]):
                runs[-1].append(work)
            else:
                runs.append([work])
        return [sorted(run, key=lambda w: w.request.row) for run in runs]

    def step(self, works: Sequence[Work], last_token: mx.array, pool: KVPool) -> Step:
        page_size = pool.page_size if pool.in_place else None
        if self._padded:
            step, placed = padded_step(works, last_token, page_size, pool.windows), list(works)
        else:
            step = row_step(works, last_token, page_size, pool.rows_by_page, pool.windows)
            placed = [work for _, work in sorted(zip(step.lasts, works, strict=True), key=lambda pair: pair[0])]
            if works[0].end - works[0].start > 1:
                step = replace(step, tokens=step.tokens.reshape(1, -1))
        return replace(step, states=pool.states.open(placed) if pool.states else None)

    def layers(self, step: Step, pool: KVPool, seam: Seam) -> list[object]:
        count, kv = len(pool.shapes), list[object]()
        if self._padded:
            masks: dict[int | None, mx.array] = {}
            padded = [PaddedLayer(i, step, pool, masks, grouped=False) for i in range(count)]
            windows = [shape.window if shape else None for shape in pool.shapes]
            alone = [AloneLayer(p, step.groups[0], w) for p, w in zip(padded, windows, strict=True)]
            kv += alone if self._alone else padded
        else:
            shared: dict[tuple[int | str, ...], mx.array] = {}
            rows = [RowLayer(i, step, pool, seam, shared) for i in range(count)]
            kv += rows if step.tokens.shape[1] == 1 else [ChunkLayer(layer, seam) for layer in rows]
        return pool.layout.nest(kv, step.states.caches if step.states else ())


def _joins(work: Work) -> bool:
    """Whether a work can run with others: a single token, that goes on from a state of the usual shape."""
    return work.end - work.start == 1 and work.start >= _SETTLED and work.save is None
