"""What a model keeps for the tokens that it has seen: a K and a V a token in its attention layers, states in others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import mlx.core as mx
from mlx_lm.models.cache import CacheList

from pippin.errors import ModelError
from pippin.kernels.packing import Line, Packing, line


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one cache of the model stores for a token, and how far back its layer looks.

    ``window`` is the number of latest tokens attended to (the token itself included), None for all of them.
    ``dtype`` is what K and V are computed in; ``packing`` says how their slots are quantized, None: they are not.
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: mx.Dtype
    window: int | None = None
    packing: Packing | None = None

    @property
    def bytes_per_slot(self) -> int:
        return self.bytes_in_full if self.packing is None else sum(part.nbytes for part in self.lines(self.packing))

    @property
    def bytes_in_full(self) -> int:
        """Of a token's K and V as they are computed, whatever its slot takes."""
        return self.kv_heads * (self.key_dim + self.value_dim) * int(self.dtype.size)

    def lines(self, packing: Packing) -> tuple[Line, Line]:
        """How a slot's K and its V lie when quantized."""
        return line(packing, self.kv_heads, self.key_dim), line(packing, self.kv_heads, self.value_dim)

    def quantized(self, packing: Packing) -> LayerShape:
        """This with quantized slots; as it is, if its numbers are no fractions or heads no multiple of 8 wide."""
        fits = all(dim and dim % 8 == 0 for dim in (self.key_dim, self.value_dim))
        return replace(self, packing=packing) if fits and mx.issubdtype(self.dtype, mx.floating) else self


@dataclass(frozen=True, slots=True)
class StateShape:
    """One recurrent cache of the model: shape (without the batch axis) and dtype of each array; None if never set."""

    arrays: tuple[tuple[tuple[int, ...], mx.Dtype] | None, ...]

    @property
    def nbytes(self) -> int:
        return sum(prod(a[0]) * int(a[1].size) for a in self.arrays if a)


@dataclass(frozen=True, slots=True)
class Leaf:
    """Which of the flat caches stands here: the ``index``-th K and V, or the ``index``-th state."""

    index: int
    recurrent: bool = False


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """What a model's ``make_cache()`` returns, flattened: what each K and V, and each state is like.

    ``tree`` has an entry for each cache that the model is given: a part, or several for mlx-lm's ``CacheList``.
    """

    tree: tuple[Leaf | tuple[Leaf, ...], ...]
    shapes: tuple[LayerShape | None, ...]
    states: tuple[StateShape, ...] = ()

    @classmethod
    def of(cls, shapes: Sequence[LayerShape | None]) -> CacheLayout:
        """Of a model that keeps a K and a V a layer, and nothing else."""
        return cls(tuple(map(Leaf, range(len(shapes)))), tuple(shapes))

    @property
    def state_bytes(self) -> int:
        """Bytes of one request's states, whatever its length."""
        return sum(s.nbytes for s in self.states)

    @property
    def dtypes(self) -> list[mx.Dtype]:
        """The floating dtypes of all that is kept."""
        states = [a[1] for s in self.states for a in s.arrays if a]
        return [d for d in (*(s.dtype for s in self.shapes if s), *states) if mx.issubdtype(d, mx.floating)]

    def quantized(self, packing: Packing) -> CacheLayout:
        """This with quantized slots, in each layer where that is possible; states stay what they are."""
        return replace(self, shapes=tuple(s and s.quantized(packing) for s in self.shapes))

    def reach(self, context_length: int) -> int | None:
        """The longest window that is shorter than the context; None if there is none: all layers may see all of it."""
        windows = [s.window for s in self.shapes if s and s.window]
        return max((w for w in windows if w < context_length), default=None)

    def nest(self, layers: Sequence[object], states: Sequence[object] = ()) -> list[object]:
        """The caches in the model's own arrangement. Raises ModelError if it has states and none are given."""
        if self.states and not states:
            raise ModelError("it keeps recurrent state")

        def pick(part: Leaf) -> object:
            return states[part.index] if part.recurrent else layers[part.index]

        return [CacheList(*map(pick, part)) if isinstance(part, tuple) else pick(part) for part in self.tree]


def bytes_per_slot(shapes: Sequence[LayerShape | None]) -> int:
    """Bytes that one token takes in all layers together."""
    return sum(s.bytes_per_slot for s in shapes if s)


def is_within(shape: LayerShape | None, reach: int | None) -> bool:
    """Whether a layer looks back no further than ``reach`` tokens: its slots are those of the windowed layers' pool."""
    return shape is not None and shape.window is not None and reach is not None and shape.window <= reach
