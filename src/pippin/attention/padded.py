"""Backend ``padded``: works are rows padded to the longest, K and V are gathered, the model attends by itself.

For models that compute with their mask, or hide queries from the attention call (absorbed MLA, gemma2).
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from pippin.attention.plain import fetch, positional_mask
from pippin.cache.pool import KVPool
from pippin.inputs import Step, padded_step
from pippin.models.seam import Seam
from pippin.types import Work

# How much larger than the real tokens a padded forward may be before the works are split over two.
_MOST_PADDING = 1.5


class PaddedLayer:
    """The cache object that one layer gets for one forward."""

    def __init__(self, layer: int, step: Step, pool: KVPool, masks: dict[int | None, mx.array], grouped: bool) -> None:
        self.offset = step.positions
        self._layer = layer
        self._step = step
        self._pool = pool
        self._masks = masks
        self._grouped = grouped
        shape = pool.shapes[layer]
        self._window = shape.window if shape else None
        self._stored: tuple[mx.array, mx.array] | None = None

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """bool [B, 1, L, context] ([B, 1, 1, L, context] if grouped), made once a window for all layers."""
        window = window_size or self._window
        if window not in self._masks:
            mask = positional_mask(self._step.groups[0], window)
            self._masks[window] = mask[:, None] if self._grouped else mask
        return self._masks[window]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Stores keys and values [B, kv_heads, L, …] and returns the works' whole K and V, padded."""
        slots = self._step.write_slots.reshape(-1)
        flat = [x.transpose(0, 2, 1, 3).reshape(-1, x.shape[1], x.shape[3]) for x in (keys, values)]
        if keys.shape[2] > 1:  # a NaN in scratch would reach everyone: a mask makes a weight 0, and 0 * NaN is NaN
            flat = [mx.where((slots > 0)[:, None, None], x, 0) for x in flat]
        written = self._pool.write(self._layer, slots, flat[0], flat[1], self._step.after)
        group = self._step.groups[0]
        self._stored = fetch(self._pool, self._layer, group, written, lambda: group.head_rows(keys.shape[1]))
        return self._stored

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """What this layer fetched, for layers that share it (Gemma 3n)."""
        if self._stored is None:
            raise LookupError("a layer asked for shared K and V before they were stored")
        return self._stored


class Padded:
    """See the module; ``attention.AttentionBackend`` says what each method owes.

    ``grouped`` is for models whose scores have an axis of query heads a K and V head (gemma2): [B, kv_heads, g, L, n].
    """

    def __init__(self, name: str, grouped: bool) -> None:
        self.name = name
        self._grouped = grouped

    def forwards(self, works: Sequence[Work]) -> list[Sequence[Work]]:
        """Runs of works, in order, each padding its tokens to no more than half as many again."""
        runs: list[list[Work]] = []
        for work in works:
            if runs and _padded_size([*runs[-1], work]) <= _MOST_PADDING * _size([*runs[-1], work]):
                runs[-1].append(work)
            else:
                runs.append([work])
        return list(runs)

    def step(self, works: Sequence[Work], last_token: mx.array, pool: KVPool) -> Step:
        return padded_step(works, last_token, pool.page_size if pool.in_place else None)

    def layers(self, step: Step, pool: KVPool, seam: Seam) -> list[object]:
        masks: dict[int | None, mx.array] = {}
        return [PaddedLayer(i, step, pool, masks, self._grouped) for i in range(len(pool.shapes))]


def _size(works: Sequence[Work]) -> int:
    return sum(w.end - w.start for w in works)


def _padded_size(works: Sequence[Work]) -> int:
    return len(works) * max(w.end - w.start for w in works)
