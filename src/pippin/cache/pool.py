"""The one place where K and V live: an array each per layer, a row a slot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from pippin import kernels
from pippin.cache.layout import CacheLayout, LayerShape, is_within
from pippin.cache.state import StateStore
from pippin.cache.windows import WindowTable
from pippin.kernels import Form, PackedPool, Pool, storage


@dataclass(frozen=True, slots=True, eq=False)
class Attending:
    """How a layer attends: its query heads, what it computes, its sinks [heads] and what it stores."""

    heads: int
    form: Form
    sinks: mx.array | None
    shape: LayerShape | None

    @property
    def key(self) -> tuple[object, ...]:
        """The same for layers that kernels can't tell apart."""
        return self.heads, self.form, self.sinks is not None, self.shape


class KVPool:
    """K [slots, kv_heads, key_dim] and V [slots, kv_heads, value_dim] for each layer; slot 0 is scratch.

    Where a layer's shape says so they are quantized: lines of words that read as such arrays (``kernels.packing``).

    ``in_place``: a kernel of ours writes, behind MLX's back: whoever reads must take what ``write`` returned, and the
    next step's ``write`` something that this step computed from its reads. Otherwise MLX's own indexed update does, in
    place as long as nothing else holds the buffer: each array is written once in a step, before it is read, and
    nobody outside keeps a reference. Slots are not checked here, nor by MLX: the runner does, on the host.

    ``rows_by_page`` is the most rows of one sequence that attend to the pool itself together; more gather first.

    ``states`` holds what the model keeps beside K and V, None for most; ``layout`` says how all of it is arranged.
    ``attending`` says how layers attend, once they have; ``tile_rows`` is the most rows of a tile that
    ``kernels.paged_extend`` takes in every layer, None until each has attended.
    ``windows``: layers that look back no further than its reach have so many slots as it says, and other ones.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape | None],
        num_slots: int,
        page_size: int = 1,
        layout: CacheLayout | None = None,
        states: StateStore | None = None,
        windows: WindowTable | None = None,
    ) -> None:
        self.shapes = tuple(shapes)
        self.layout = layout or CacheLayout.of(self.shapes)
        self.states = states or (StateStore(self.layout.states) if self.layout.states else None)
        self.num_slots = num_slots
        self.page_size = page_size
        self.windows = windows
        self._layers = [_arrays_of(s, self.slots_of(i)) if s else None for i, s in enumerate(self.shapes)]
        mx.eval(self.arrays)
        stored = [layer for layer in self._layers if layer]
        self.in_place = all(kernels.writes_in_place(*layer) for layer in stored)
        self.rows_by_page = min((kernels.rows_by_page(*layer) for layer in stored), default=1) if self.in_place else 1
        self.tile_rows: int | None = None
        self.attending: dict[int, Attending] = {}

    @property
    def arrays(self) -> list[mx.array]:
        """Every array, to hand to ``mx.async_eval`` with a step: a write that nobody evaluates piles up."""
        return [storage(pool) for layer in self._layers if layer for pool in layer]

    @property
    def nbytes(self) -> int:
        return sum(s.bytes_per_slot * self.slots_of(i) for i, s in enumerate(self.shapes) if s)

    def is_windowed(self, index: int) -> bool:
        """Whether a layer's slots are others than those that requests hold."""
        return self.windows is not None and is_within(self.shapes[index], self.windows.reach)

    def slots_of(self, index: int) -> int:
        """How many slots a layer has."""
        return self.windows.num_slots if self.windows is not None and self.is_windowed(index) else self.num_slots

    def layer(self, index: int) -> tuple[Pool, Pool]:
        """K and V of the model's cache ``index``; LookupError if the model stored nothing there when measured."""
        layer = self._layers[index]
        if layer is None:
            raise LookupError(f"layer {index} stored nothing when the model was measured")
        return layer

    def note(self, index: int, heads: int, form: Form, sinks: mx.array | None) -> None:
        """A layer attends so; no one knows before it does."""
        if index not in self.attending:
            layers = [(i, layer[0]) for i, layer in enumerate(self._layers) if layer]
            self.attending[index] = Attending(heads, form, sinks, self.shapes[index])
            if len(self.attending) == len(layers):
                each = [(self.attending[i].heads, k) for i, k in layers]
                self.tile_rows = min(kernels.rows_per_tile(heads, k.shape[1], k.dtype) for heads, k in each)

    def stores_as_it_attends(self, index: int) -> bool:
        """Whether attention may store the newest K and V itself: quantizing them takes a launch of its own."""
        return not isinstance(self.layer(index)[0], PackedPool)

    def write(self, index: int, slots: mx.array, k: mx.array, v: mx.array, after: mx.array | None) -> mx.array:
        """Stores k [n, kv_heads, key_dim] and v [n, kv_heads, value_dim] at ``slots`` [n] int32.

        Returns what readers of this step pass on as ``after``.
        """
        return kernels.kv_write(*self.layer(index), k, v, slots, after=after)

    def gather_pages(self, index: int, pages: mx.array, after: mx.array) -> tuple[mx.array, mx.array]:
        """K and V of whole ``pages`` [b, n] int32, as attention wants them: [b, kv_heads, n * page_size, …].

        Where writes are ``in_place`` this is the only way to gather: MLX orders its own operations by what they are
        known to write, and does not know of these.
        """
        return kernels.kv_gather(*self.layer(index), pages, page_size=self.page_size, after=after)

    def stored(self, windowed: bool) -> list[int]:
        """The layers of one kind that store any K and V."""
        return [i for i, layer in enumerate(self._layers) if layer and self.is_windowed(i) == windowed]

    def read_slots(self, slots: Sequence[int], after: mx.array, windowed: bool = False) -> list[mx.array]:
        """K [n, kv_heads, key_dim] and V of whole pages of ``slots``, of each layer of that kind; lazy."""
        found: list[mx.array] = []
        stored = self.stored(windowed)
        if self.in_place:
            pages = mx.array([[slot // self.page_size for slot in slots[:: self.page_size]]], dtype=mx.int32)
            for index in stored:
                found += [rows[0].transpose(1, 0, 2) for rows in self.gather_pages(index, pages, after)]
            return found
        lines = mx.array([*slots], dtype=mx.int32)
        for index in stored:
            found += [rows[lines] for rows in self.layer(index)]
        return found

    def write_slots(
        self, slots: Sequence[int], rows: Sequence[mx.array], after: mx.array, windowed: bool = False
    ) -> list[mx.array]:
        """Stores what ``read_slots`` read; returns what readers are to wait for."""
        lines, layers = mx.array([*slots], dtype=mx.int32), self.stored(windowed)
        begin, end = slots[0], slots[0] + len(slots)
        if not self.in_place and [*slots] == [*range(begin, end)]:  # six times as fast as one by one, on a CPU
            for at, k, v in zip(layers, rows[::2], rows[1::2], strict=True):
                for pool, part in zip(self.layer(at), (k, v), strict=True):
                    storage(pool)[begin:end] = part
            return []
        return [self.write(at, lines, k, v, after) for at, k, v in zip(layers, rows[::2], rows[1::2], strict=True)]

    def gather_slots(self, index: int, slots: mx.array, rows: Callable[[], mx.array]) -> tuple[mx.array, mx.array]:
        """K and V of ``slots`` [b, n] int32 as attention wants them, [b, kv_heads, n, key_dim or value_dim].

        ``rows`` gives lines of an array of one head each, ``slot * kv_heads + head`` [b, kv_heads, n] int32: those come
        out in their places. Quantized slots are read whole, and turned.
        """
        keys, values = self.layer(index)
        if isinstance(keys, PackedPool) or isinstance(values, PackedPool):
            return keys[slots].transpose(0, 2, 1, 3), values[slots].transpose(0, 2, 1, 3)
        lines = rows()
        return keys.reshape(-1, keys.shape[-1])[lines], values.reshape(-1, values.shape[-1])[lines]


def _arrays_of(shape: LayerShape, num_slots: int) -> tuple[Pool, Pool]:
    if shape.packing is not None:
        keys, values = (PackedPool.zeros(num_slots, part, shape.dtype) for part in shape.lines(shape.packing))
        return keys, values
    rows = num_slots, shape.kv_heads
    return mx.zeros((*rows, shape.key_dim), shape.dtype), mx.zeros((*rows, shape.value_dim), shape.dtype)
