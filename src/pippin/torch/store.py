"""K and V by slots, in torch tensors, and the cache that transformers' models take for one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from pippin.types import Work


@dataclass(frozen=True, slots=True)
class Rows:
    """One forward over works of any lengths, as padded rows.

    A row is a work's context, which ends where every row's does, then its new tokens, filled up on the right:
    columns ``past - start … past`` and ``past … past + count``. ``table`` int64 [B, past + longest] has the slot of
    each column, 0 (scratch) where there is none; ``attended`` bool, the same shape, is False left of the context.
    ``tokens`` and ``positions`` int64 [B, longest]. ``written`` int64 [n] are the slots of all new tokens, row by row,
    and ``rows`` and ``columns`` int64 [n] where in ``tokens`` these lie.
    """

    past: int
    table: torch.Tensor
    attended: torch.Tensor
    tokens: torch.Tensor
    positions: torch.Tensor
    written: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor


def lay_out(works: Sequence[Work], last_token: Sequence[int], device: torch.device) -> Rows:
    """``last_token`` has, by row of the device tables, the tokens that the host may not have seen yet."""
    counts = [w.end - w.start for w in works]
    past, longest = max(w.start for w in works), max(counts)
    table = np.zeros((len(works), past + longest), np.int64)
    attended = np.ones_like(table, np.bool_)
    tokens = np.zeros((len(works), longest), np.int64)
    positions = np.array([w.start for w in works])[:, None] + np.arange(longest)
    for i, (work, count) in enumerate(zip(works, counts, strict=True)):
        table[i, past - work.start : past + count] = work.request.slots[: work.end]
        attended[i, : past - work.start] = False
        new = work.request.tokens[work.start : work.end]
        tokens[i, :count] = [*new, last_token[work.request.row]][:count]
    rows, columns = np.nonzero(np.arange(longest) < np.array(counts)[:, None])
    written = table[rows, past + columns]
    arrays = (table, attended, tokens, positions, written, rows, columns)
    return Rows(past, *(torch.from_numpy(a).to(device) for a in arrays))


@dataclass(frozen=True, slots=True)
class TorchShape:
    """What one layer stores for a token: K [key_heads, key_dim] and V [value_heads, value_dim]."""

    key: tuple[int, int]
    value: tuple[int, int]
    dtype: torch.dtype

    @property
    def bytes_per_slot(self) -> int:
        return (self.key[0] * self.key[1] + self.value[0] * self.value[1]) * int(self.dtype.itemsize)


class TorchKVStore:
    """K and V of every layer, [slots, heads, dim] each; slot 0 is scratch and stays 0."""

    def __init__(self, shapes: Sequence[TorchShape], num_slots: int, device: torch.device) -> None:
        self.shapes = tuple(shapes)
        self.num_slots = num_slots
        self.device = device
        self.layers = [
            (
                torch.zeros((num_slots, *s.key), dtype=s.dtype, device=device),
                torch.zeros((num_slots, *s.value), dtype=s.dtype, device=device),
            )
            for s in self.shapes
        ]

    @property
    def nbytes(self) -> int:
        return self.num_slots * sum(s.bytes_per_slot for s in self.shapes)

    def cache(self, rows: Rows) -> Cache:
        """What a model takes as ``past_key_values`` for one forward over ``rows``."""
        return Cache(layers=[SlotLayer(keys, values, rows) for keys, values in self.layers])


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers carries no types
    """One layer's part of a forward: stores the new K and V in their slots, then gathers every row's context.

    All rows write before any reads, so a row may read what another one of the same forward writes. Layers with a window
    keep everything too: the models mask by position.
    """

    is_sliding = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, rows: Rows) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.is_initialized = True
        self._rows = rows

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the store was made when the model was loaded."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of new K and V [B, heads, longest, dim], the whole contexts [B, heads, past + longest, dim]."""
        return self._through(self.keys, key_states), self._through(self.values, value_states)

    def _through(self, stored: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        rows = self._rows
        stored[rows.written] = new.transpose(1, 2)[rows.rows, rows.columns]
        return stored[rows.table].transpose(1, 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._rows.past + query_length, 0

    def get_seq_length(self) -> int:
        return self._rows.past

    def get_max_length(self) -> int:
        return -1
