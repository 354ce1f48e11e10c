"""Memory that files are read into and that the device reads: nothing is copied in between.

On a GPU with memory of its own pages would move there, and back when the next file is read into them, some at a time
behind a fault. So they stay with the host (``uploads.keep_with_host``), and the GPU reads them over the bus.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from pippin import kernels
from pippin.uploads import keep_with_host

Part = tuple[tuple[int, ...], mx.Dtype]
"""Shape of what a token has in one array of a file, and its dtype."""

_BITS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}
_WORD = 8  # bytes that are copied at once: over the bus few small reads are slow


class Landing:
    """``count`` places of a file's ``parts`` each, of ``tokens`` tokens. ``memory`` uint8 [count, bytes] is theirs."""

    def __init__(self, count: int, tokens: int, parts: Sequence[Part]) -> None:
        self._tokens = tokens
        self._parts = parts
        self._item = min((dtype.size for _, dtype in parts), default=1)
        sizes = [tokens * prod(shape) * dtype.size // self._item for shape, dtype in parts]
        self._ends = np.cumsum([0, *sizes]).tolist()
        nbytes = self._ends[-1] * self._item
        self._blocks = mx.array(np.zeros((count, max(1, -(-nbytes // _WORD))), np.uint64))
        memory: npt.NDArray[np.generic] = np.asarray(self._blocks)
        self.memory = memory.view(np.uint8)[:, :nbytes]
        self.stays = kernels.backend() == "cuda" and keep_with_host(memory)
        """Whether a GPU with memory of its own reads it where it is."""

    def copy(self, places: Sequence[int], slots: Sequence[int], pools: Sequence[mx.array], skip: int = 0) -> None:
        """Puts what lies in ``places``, but for its first ``skip`` tokens, into ``slots`` of each part's pool.

        For pools in the host's memory that nobody reads meanwhile: ten times as fast as by MLX's operations.
        """
        for (shape, dtype), begin, end, pool in zip(self._parts, self._ends[:-1], self._ends[1:], pools, strict=True):
            bits: npt.NDArray[np.generic] = np.asarray(pool.view(_BITS[dtype.size]))
            for i, place in enumerate(places):
                first, last = max(0, i * self._tokens - skip), (i + 1) * self._tokens - skip
                if last <= 0:
                    continue
                lines = self.memory[place, begin * self._item : end * self._item].view(bits.dtype)
                where = slots[first:last]
                run = [*where] == [*range(where[0], where[0] + len(where))]
                bits[slice(where[0], where[-1] + 1) if run else [*where]] = lines.reshape(-1, *shape)[first - last :]

    def rows(self, places: Sequence[int], skip: int = 0) -> tuple[mx.array, list[mx.array]]:
        """Lazy: a copy of ``places``, which are free when it has been evaluated, and each part's rows in their order
        without the first ``skip``: [tokens, …]."""
        # No gather: MLX compiles those on CUDA when they are first wanted, in front of the first token after a restart.
        found = [self._blocks[place : place + 1] for place in places]
        blocks = mx.concatenate(found) if len(found) > 1 else mx.maximum(found[0], found[0])  # either copies
        rows, items = [], blocks.view(_BITS[self._item])
        for (shape, dtype), begin, end in zip(self._parts, self._ends[:-1], self._ends[1:], strict=True):
            *outer, last = shape
            part = items[:, begin:end].reshape(-1, *outer, last * dtype.size // self._item)[skip:]
            rows.append(part.view(dtype))
        return blocks, rows
