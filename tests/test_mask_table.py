"""Masks reach the device as they are, and each once."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pippin import mask_table
from pippin.mask_table import MaskTable
from pippin.masks import EVERY, RowMasks, words


def drawn(vocab_size: int, seed: int) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    return np.random.default_rng(seed).integers(0, 2**32, words(vocab_size), np.uint32)


@given(
    vocab_size=st.sampled_from([1, 31, 33, 64, 1000]),
    lines=st.integers(2, 9),
    steps=st.lists(st.lists(st.none() | st.integers(0, 11), min_size=1, max_size=7), min_size=1, max_size=12),
    spare=st.integers(0, 2),
    alike=st.booleans(),
)
def test_every_row_gets_its_mask(
    vocab_size: int, lines: int, steps: list[list[int | None]], spare: int, alike: bool
) -> None:
    """Whatever is known, whatever has to go, and where the numbers of all masks are the same; rows without one draw
    anything, and so does padding."""
    table = MaskTable(vocab_size, lines)
    if alike:
        table._weights[:] = 0
    for step in steps:
        masked = [row for row, mask in enumerate(step) if mask is not None]
        bits = np.zeros((len(masked), words(vocab_size)), np.uint32)
        for i, row in enumerate(masked):
            bits[i] = drawn(vocab_size, step[row] or 0)
        given_bits = bits.copy()
        found = table.rows(RowMasks(masked, given_bits), len(step) + spare)
        given_bits[:] = 7  # the next step's are written there while this one is queued
        expected = np.full((len(step) + spare, words(vocab_size)), EVERY, np.uint32)
        expected[masked] = bits
        assert np.array_equal(np.asarray(found), expected)


def test_what_the_device_knows_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of masks that are known sends a number a row, as long as they are the last to have been used."""
    sizes: list[int] = []

    def counted(values: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> mx.array:
        sizes.append(values.nbytes)
        return mx.array(values)

    monkeypatch.setattr(mask_table, "upload", counted)
    table = MaskTable(3200, lines=5)

    def send(*seeds: int) -> int:
        before = table.sent
        sizes.clear()
        table.rows(RowMasks(range(len(seeds)), np.array([drawn(3200, s) for s in seeds])), len(seeds))
        return table.sent - before

    assert send(1, 2, 1, 1) == 2
    assert sum(sizes) == 2 * 400 + 2 * 4 + 4 * 4
    assert send(2, 2, 1, 2, 1, 1) == 0
    assert sum(sizes) == 6 * 4
    assert send(3, 1, 4) == 2
    assert send(5) == 1  # in place of 2
    assert send(1, 3, 4, 5) == 0
    assert send(2) == 1
    table.reset()
    assert send(1) == 1
