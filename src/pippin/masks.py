"""What rows of a step may draw, a bit a token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[np.uint32]

EVERY = 2**32 - 1
"""A word of a mask that allows all."""


class RowMasks(NamedTuple):
    """Masks of some of a step's rows; the others may draw anything.

    ``bits`` uint32 [len(rows), ceil(vocab_size / 32)]: bit t % 32 of word t // 32 says whether token t may be drawn.
    """

    rows: Sequence[int]
    bits: Bits


def words(vocab_size: int) -> int:
    """How many words a row of a mask has."""
    return -(-vocab_size // 32)
