"""Backend ``latent``: where attention is absorbed into latents, single tokens attend to the latents in the pool.

Such models (DeepSeek-V3 and what came of it) store a latent and a turned key a token, shared by all heads. For one
token a row they multiply their queries into the latents' space and attend there: those rows are laid out as in ``rows``
and read the pool by page. For more tokens a row they make keys and values of the latents, which is less work for a
prompt: those run as in ``padded``.

The model computes scores of its turned queries and hands them to attention as a mask, so the attention call never
sees the queries. Given the identity for turned keys, the scores that it computes are its queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import mlx.core as mx
import numpy as np

from pippin.attention.padded import Padded
from pippin.attention.plain import fetch, group_attention
from pippin.attention.rows import RowLayer, flat
from pippin.cache.pool import KVPool
from pippin.errors import ModelError
from pippin.inputs import Group, Step, row_step
from pippin.kernels import Form, latent_decode
from pippin.models.deferred import Part, settled
from pippin.models.seam import Seam
from pippin.types import Work

# Tokens of a work up to which each attends to the latents: making keys and values of a whole context costs more.
_FEW = 4


class LatentLayer(RowLayer):
    """The cache object that one layer gets for a forward of rows."""

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> None:  # type: ignore[override]
        """Nothing, as mlx-lm's own caches say of a single token."""
        if window_size or self._window:
            raise ModelError("its latents have a window")

    def update_and_fetch(self, keys: mx.array | Part, values: mx.array | Part) -> tuple[mx.array, mx.array]:
        """Stores latents [T, 1, 1, dim] and turned keys [T, 1, 1, turned]; returns the latents and the identity."""
        latents, turned = settled(keys), settled(values)
        if latents.shape[1] != 1 or turned.shape[1] != 1:
            raise ModelError("it stores keys of several heads")
        self._stored = latents, turned
        self._seam.own(latents, self)
        self._written = self._write()
        return latents, _identity(turned.shape[3], turned.dtype)

    def attend(self, q: mx.array | Part, scale: float, mask: object, sinks: mx.array | None) -> mx.array:
        """Attention of q [T, heads, 1, dim]; ``mask`` are the turned queries [T, heads, 1, turned], scaled."""
        turned = self.keys_and_values()[1].shape[3]
        if not isinstance(mask, mx.array) or mask.shape != (*q.shape[:3], turned) or sinks is not None:
            raise ModelError("its attention takes no turned queries")
        queries, others = flat(settled(q)), flat(mask)
        parts = [self._attend(queries[g.tokens], others[g.tokens], g, scale) for g in self._step.groups]
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=0)

    def _attend(self, q: mx.array, turned: mx.array, group: Group, scale: float) -> mx.array:
        assert self._written is not None
        if group.pages is not None:
            return self._by_page(q, turned, group, scale)[:, :, None]
        latents, keys = fetch(self._pool, self._layer, group, self._written, lambda: self._head_rows(group))
        whole, keys = mx.concatenate([q * scale, turned], axis=-1), mx.concatenate([latents, keys], axis=-1)
        return group_attention(whole[:, :, None], keys, latents, group, 1.0, None, None)

    def _by_page(self, q: mx.array, turned: mx.array, group: Group, scale: float) -> mx.array:
        """Every token with its own line of the page table."""
        pages, counts = group.pages, group.counts
        assert pages is not None
        if counts is not None:
            lines = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
            pages = self._once((group.first, "pages"), lambda: group.pages[mx.array(lines)])  # type: ignore[index]
        form = Form(self._pool.page_size, scale)
        pools, lengths, after = self._pool.layer(self._layer), self._lengths(group), self._written
        return latent_decode(q, turned, *pools, pages, lengths, form, after=after, longest=group.context)


@lru_cache(maxsize=16)
def _identity(width: int, dtype: mx.Dtype) -> mx.array:
    """[1, 1, width, width], made once: any thread may use it."""
    matrix = mx.eye(width, dtype=dtype)[None, None]
    mx.eval(matrix)
    return matrix


class Latent:
    """See the module; ``attention.AttentionBackend`` says what each method owes."""

    name = "latent"

    def __init__(self) -> None:
        self._prompts = Padded("padded", grouped=False)

    def forwards(self, works: Sequence[Work]) -> list[Sequence[Work]]:
        """Works of few tokens together, others as ``padded`` has them, as far as the order allows.

        A work may read slots that another of this step writes, which begins at an earlier position. Nobody reads what
        a decode writes, so those can all wait for the rest.
        """
        rest = sorted((w for w in works if not w.decodes), key=lambda w: w.start)
        runs: list[list[Work]] = []
        for work in [*rest, *(w for w in works if w.decodes)]:
            if runs and _is_short(runs[-1][0]) == _is_short(work):
                runs[-1].append(work)
            else:
                runs.append([work])
        return [part for run in runs for part in ([run] if _is_short(run[0]) else self._prompts.forwards(run))]

    def step(self, works: Sequence[Work], last_token: mx.array, pool: KVPool) -> Step:
        if not _is_short(works[0]):
            return self._prompts.step(works, last_token, pool)
        return row_step(works, last_token, pool.page_size if pool.in_place else None, _FEW)

    def layers(self, step: Step, pool: KVPool, seam: Seam) -> list[object]:
        if step.tokens.shape[1] > 1:
            return self._prompts.layers(step, pool, seam)
        shared: dict[tuple[int | str, ...], mx.array] = {}
        return pool.layout.nest([LatentLayer(i, step, pool, seam, shared) for i in range(len(pool.shapes))])


def _is_short(work: Work) -> bool:
    return work.end - work.start <= _FEW
