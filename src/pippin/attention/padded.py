"""Backend ``padded``: works are rows padded to the longest, K and V are gathered, the model attends by itself.

For models that compute with their mask, or hide queries from the attention call (absorbed MLA, gemma2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from pippin.attention.plain import fetch, positional_mask
from pippin.cache.pool import KVPool
from pippin.inputs import Step, padded_step
from pippin.models.seam import Seam
from pippin.types import Work

# How much larger than the real ones a forward's padded tokens, and its gathered contexts, may be before works are split
# over two: another forward reads all weights again. So many gathered tokens never matter.
_MOST_PADDING = 1.5
_MOST_GATHERED = 4
_FREELY_GATHERED = 1 << 14


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
        self._places = step.places(pool.is_windowed(layer))
        self._stored: tuple[mx.array, mx.array] | None = None
        # Some models set these, so that a cache that they read only in part is evaluated (DeepSeek V3.2).
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """bool [B, 1, L, context] ([B, 1, 1, L, context] if grouped), made once a window for all layers."""
        window = window_size or self._window
        if window not in self._masks:
            mask = positional_mask(self._step.groups[0], window)
            self._masks[window] = mask[:, None] if self._grouped else mask
        return self._masks[window]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Stores keys and values [B, kv_heads, L, …] and returns the works' whole K and V, padded."""
        slots = self._places.write_slots.reshape(-1)
        flat = [x.transpose(0, 2, 1, 3).reshape(-1, x.shape[1], x.shape[3]) for x in (keys, values)]
        if keys.shape[2] > 1:  # a NaN in scratch would reach everyone: a mask makes a weight 0, and 0 * NaN is NaN
            flat = [mx.where((slots > 0)[:, None, None], x, 0) for x in flat]
        written = self._pool.write(self._layer, slots, flat[0], flat[1], self._step.after)
        group = self._places.groups[0]
        self._stored = fetch(self._pool, self._layer, group, written, lambda: group.head_rows(keys.shape[1]))
        self.keys, self.values = self._stored
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
        """Runs that pad little: single tokens by context, then the rest as given.

        A prefix may be written in the step that reads it. Its writer starts at an earlier position than its readers,
        so in order of their starts no work comes before one that it stands on.
        """
        runs = _runs(sorted(works, key=_size_key))
        if len(runs) > 1 and _share_new_slots(works):
            runs = _runs(sorted(works, key=lambda w: w.start))
        return [run.works for run in runs]

    def step(self, works: Sequence[Work], last_token: mx.array, pool: KVPool) -> Step:
        return padded_step(works, last_token, pool.page_size if pool.in_place else None, pool.windows)

    def layers(self, step: Step, pool: KVPool, seam: Seam) -> list[object]:
        masks: dict[int | None, mx.array] = {}
        return pool.layout.nest([PaddedLayer(i, step, pool, masks, self._grouped) for i in range(len(pool.shapes))])


@dataclass(slots=True)
class _Run:
    """Works of one forward; the tokens and the contexts that they have, and the longest of each."""

    works: list[Work] = field(default_factory=list)
    tokens: int = 0
    contexts: int = 0
    rows: int = 0
    context: int = 0

    def takes(self, work: Work) -> bool:
        """Whether ``work`` may join: the first may, others if padding stays bearable."""
        count, tokens, rows = len(self.works) + 1, work.end - work.start, max(self.rows, work.end - work.start)
        gathered = count * max(self.context, work.end)
        return count == 1 or (
            count * rows <= _MOST_PADDING * (self.tokens + tokens)
            and gathered <= max(_MOST_GATHERED * (self.contexts + work.end), _FREELY_GATHERED)
        )

    def add(self, work: Work) -> None:
        self.works.append(work)
        self.tokens += work.end - work.start
        self.contexts += work.end
        self.rows, self.context = max(self.rows, work.end - work.start), max(self.context, work.end)


def _runs(works: Sequence[Work]) -> list[_Run]:
    """Cuts works, in order, into runs."""
    runs = [_Run()]
    for work in works:
        if not runs[-1].takes(work):
            runs.append(_Run())
        runs[-1].add(work)
    return runs


def _size_key(work: Work) -> tuple[bool, int]:
    single = work.end - work.start == 1
    return (not single, work.end if single else 0)


def _share_new_slots(works: Sequence[Work]) -> bool:
    """Whether any work's prefix is written by another in this step."""
    slots = [np.frombuffer(w.request.slots, np.int32)[: w.end] for w in works]
    written = np.zeros(1 + max(int(s.max()) for s in slots), np.bool_)
    for work, mine in zip(works, slots, strict=True):
        written[mine[work.start :]] = True
    return any(bool(written[mine[: work.start]].any()) for work, mine in zip(works, slots, strict=True))
