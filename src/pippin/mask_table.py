"""Masks on their way to the device: what it has already is not sent again.

At 151 936 tokens a mask has 19 kB, but 32 requests in the strings of a JSON answer have two or three different ones
between them, and nearly always those of the step before. So the device keeps a table of masks, and a step sends what
is new and one number a row.
"""

from __future__ import annotations

from collections import OrderedDict

import mlx.core as mx
import numpy as np

from pippin.masks import EVERY, Bits, RowMasks, words
from pippin.uploads import upload

LINES = 256
"""Masks that are kept on the device, and beside it for comparison: 5 MB each at 151 936 tokens."""


class MaskTable:
    """The masks of a vocabulary of ``vocab_size`` ids that the device knows; the first line allows all.

    ``sent`` counts masks that were sent. ``reset`` after a step that failed: what it sent may not have arrived.
    """

    def __init__(self, vocab_size: int, lines: int = LINES) -> None:
        self._words = words(vocab_size)
        self._lines = lines
        source = np.random.default_rng()  # not to be known to who writes grammars
        self._weights = source.integers(1, 2**63, self._words + self._words % 2 >> 1, np.int64)
        self.sent = 0
        self.reset()

    def reset(self) -> None:
        """Forgets what the device knows."""
        self._known: OrderedDict[int, int] = OrderedDict()
        self._host: Bits | None = None
        self._device: mx.array | None = None

    def warm(self) -> None:
        """Compiles what ``rows`` runs, where MLX compiles that when it first comes up."""
        mx.eval(self.rows(RowMasks((0,), np.full((1, self._words), EVERY, np.uint32)), 1))

    def rows(self, masks: RowMasks, size: int) -> mx.array:
        """Lazy: uint32 [size, words], the mask of each row."""
        if self._device is None or self._host is None:
            self._host = np.full((self._lines, self._words), EVERY, np.uint32)
            self._device = mx.full(self._host.shape, EVERY, mx.uint32)
        index = np.zeros(size, np.int32)
        found = self._find(masks.bits, self._host)
        if found is None:
            index[[*masks.rows]] = np.arange(1, len(masks.rows) + 1)
            self.sent += len(masks.bits)
            all_of_them = np.concatenate([np.full((1, self._words), EVERY, np.uint32), masks.bits])
            return upload(all_of_them)[upload(index)]
        lines, new = found
        index[[*masks.rows]] = lines
        if new:
            self.sent += len(new)
            self._device[upload(np.array(new, np.int32))] = upload(self._host[new])
        return self._device[upload(index)]

    def _find(self, bits: Bits, host: Bits) -> tuple[list[int], list[int]] | None:
        """Each mask's line, and which lines are new; None if they don't fit, or two can't be told apart."""
        keys = self._keys(bits)
        if len({*keys}) >= self._lines:
            return None
        lines, new = [], []
        for key, mask in zip(keys, bits, strict=True):
            line = self._known.get(key)
            if line is None:
                line = len(self._known) + 1 if len(self._known) + 1 < self._lines else self._known.popitem(False)[1]
                host[line] = mask
                new.append(line)
            elif not np.array_equal(host[line], mask):
                self.reset()
                return None
            self._known[key] = line
            self._known.move_to_end(key)
            lines.append(line)
        return lines, new

    def _keys(self, bits: Bits) -> list[int]:
        """A number for each mask: sums of its words with random weights."""
        even = bits if self._words % 2 == 0 else np.pad(bits, ((0, 0), (0, 1)))
        found: list[int] = (np.ascontiguousarray(even).view(np.int64) @ self._weights).tolist()
        return found
