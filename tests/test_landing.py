"""Places that files are read into: the device sees what lies there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pippin.landing import Landing

TOKENS = 4
PARTS = [((2, 3), mx.bfloat16), ((5,), mx.float32), ((1, 2), mx.float16)]


def bits_of(array: mx.array) -> bytes:
    return np.asarray(mx.contiguous(array).view(mx.uint8)).tobytes()


@given(st.lists(st.sampled_from(PARTS), max_size=3), st.lists(st.integers(0, 5), min_size=1, unique=True), st.data())
def test_rows_are_what_lies_in_the_places(parts: Sequence[Any], places: list[int], data: st.DataObject) -> None:
    landing = Landing(6, TOKENS, parts)
    assert landing.memory.shape == (6, sum(TOKENS * int(np.prod(s)) * d.size for s, d in parts))
    landing.memory[:] = np.random.default_rng(3).integers(0, 60, landing.memory.shape)
    skip = data.draw(st.integers(0, TOKENS * len(places) - 1))
    copy, rows = landing.rows(places, skip)
    mx.eval(copy, rows)
    assert len(rows) == len(parts)
    begin = 0
    for (shape, dtype), found in zip(parts, rows, strict=True):
        each = int(np.prod(shape)) * dtype.size
        end = begin + TOKENS * each
        expected = landing.memory[places, begin:end].reshape(-1, each)[skip:]
        assert found.shape == (len(expected), *shape)
        assert found.dtype == dtype
        assert bits_of(found) == expected.tobytes()
        begin = end


@given(st.lists(st.integers(0, 5), min_size=1, unique=True), st.booleans(), st.data())
def test_rows_are_put_into_their_slots_and_nowhere_else(places: list[int], run: bool, data: st.DataObject) -> None:
    landing, source = Landing(6, TOKENS, PARTS), np.random.default_rng(3)
    landing.memory[:] = source.integers(0, 60, landing.memory.shape)
    skip = data.draw(st.integers(0, TOKENS * len(places) - 1))
    count = TOKENS * len(places) - skip
    slots = [*range(7, 7 + count)] if run else data.draw(st.permutations(range(40)))[:count]
    pools = [mx.zeros((40, *shape), dtype) for shape, dtype in PARTS]
    mx.eval(pools)
    landing.copy(places, slots, pools, skip)
    _, rows = landing.rows(places, skip)
    for pool, part in zip(pools, rows, strict=True):
        expected = mx.zeros(pool.shape, pool.dtype)
        expected[mx.array(slots)] = part
        assert bits_of(pool) == bits_of(expected)


@pytest.mark.parametrize("places", [[0, 1], [1, 0], [1]])
def test_places_are_free_once_their_copy_is_there(places: list[int]) -> None:
    landing = Landing(2, TOKENS, PARTS)
    landing.memory[:] = 1
    copy, rows = landing.rows(places)
    mx.eval(copy)
    landing.memory[:] = 2
    assert {byte for row in rows for byte in bits_of(row)} == {1}
