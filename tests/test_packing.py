"""Quantized slots in plain MLX: how near the numbers stay, what a slot takes, and what is not a number."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pippin.kernels.packing import PACKINGS, PackedPool, Packing, line

dims = st.sampled_from([8, 16, 24, 64, 80, 96, 128, 192, 256, 512])


def numbers(heads: int, dim: int, seed: int, size: float, middle: float = 0.0) -> mx.array:
    """Three tokens of numbers round ``middle`` and about ``size`` large."""
    drawn = np.random.default_rng(seed).standard_normal((3, heads, dim), np.float32)
    return mx.array(middle + size * drawn)


def steps(packing: Packing, x: mx.array, group: int) -> mx.array:
    """How far apart two codes may be at each number of x, as x."""
    groups = x.reshape(-1, group)
    if packing == "int4":
        wide = mx.max(groups, axis=1) - mx.min(groups, axis=1)
        # Both numbers of a scale's word have 8 bits of mantissa.
        apart = (wide / 15 + mx.max(mx.abs(groups), axis=1) / 128 / 15) * (1 + 1 / 100)
        return mx.broadcast_to(apart[:, None], groups.shape).reshape(x.shape)
    most = mx.max(mx.abs(groups), axis=1, keepdims=True)
    if packing == "int8":
        return mx.broadcast_to(most / 127, groups.shape).reshape(x.shape)
    return mx.maximum(mx.abs(groups) / 8, most / 448 / 512).reshape(x.shape)


@pytest.mark.parametrize("packing", PACKINGS)
@given(
    heads=st.integers(1, 5),
    dim=dims,
    seed=st.integers(0, 99),
    size=st.sampled_from([1e-4, 1.0, 300.0]),
    middle=st.sampled_from([0.0, 0.5, -7.0]),
)
def test_numbers_come_back_within_half_a_step(
    packing: Packing, heads: int, dim: int, seed: int, size: float, middle: float
) -> None:
    x, layout = numbers(heads, dim, seed, size, middle), line(packing, heads, dim)
    lines = layout.pack(x)
    assert (lines.dtype, lines.shape) == (mx.uint32, (3, layout.words))
    near = layout.unpack(lines, mx.float32)
    assert mx.all(mx.abs(near - x) <= 0.501 * steps(packing, x, layout.group) + 1e-30)
    again = layout.unpack(layout.pack(near), mx.float32)
    assert mx.allclose(again, near, rtol=1e-5) or packing == "int4"  # its least number is rounded each time


@pytest.mark.parametrize("packing", PACKINGS)
def test_no_worse_than_mlxs_own(packing: Packing) -> None:
    """MLX's affine numbers of as many bits, which take a scale and a bias for each 32, or its fp8 without any scale."""
    x, layout = numbers(4, 128, 3, 1.0), line(packing, 4, 128)
    own = mx.from_fp8(mx.to_fp8(x), mx.float32)
    if packing != "fp8":
        own = mx.dequantize(*mx.quantize(x, 32, layout.bits), 32, layout.bits)
    near = layout.unpack(layout.pack(x), mx.float32)
    mine, theirs = (float(np.sqrt(np.mean(np.array(y - x) ** 2))) for y in (near, own))
    # A head of 128 shares a scale, which reaches further than one of 32.
    assert mine <= theirs * {"int8": 2.0, "fp8": 1.1, "int4": 1.05}[packing]


@pytest.mark.parametrize("packing", PACKINGS)
def test_equal_numbers_come_back_as_they_are(packing: Packing) -> None:
    layout = line(packing, 2, 64)
    for value in (0.0, 1.0, -2.5):
        x = mx.full((1, 2, 64), value)
        assert mx.allclose(layout.unpack(layout.pack(x), mx.float32), x, rtol=1e-6)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_a_number_spoils_its_group_and_no_other(packing: Packing, bad: float) -> None:
    x, layout = mx.contiguous(numbers(3, 64, 1, 1.0)), line(packing, 3, 64)
    x[1, 1, 5] = bad
    near = np.array(layout.unpack(layout.pack(x), mx.float32))
    spoilt = np.zeros(near.shape, bool)
    spoilt[1, 1, : layout.group] = True
    assert not np.isfinite(near[1, 1, 5])
    assert np.isfinite(near[~spoilt]).all()


@pytest.mark.parametrize(("packing", "words"), [("int8", 264), ("fp8", 264), ("int4", 160)])
def test_a_slot_of_8_heads_of_128(packing: Packing, words: int) -> None:
    """2048 bytes as bfloat16: int8 and fp8 take 52 % of it, int4 31 %."""
    layout = line(packing, 8, 128)
    assert layout.words == words
    assert layout.nbytes == 4 * words


@pytest.mark.parametrize("packing", PACKINGS)
@given(slots=st.lists(st.integers(0, 20), min_size=1, max_size=6, unique=True), seed=st.integers(0, 9))
def test_a_pool_stores_rows_and_touches_nothing_else(packing: Packing, slots: list[int], seed: int) -> None:
    layout = line(packing, 2, 40)
    pool = PackedPool.zeros(21, layout, mx.bfloat16)
    x = mx.array(np.random.default_rng(seed).standard_normal((len(slots), 2, 40), np.float32)).astype(mx.bfloat16)
    pool[mx.array(slots)] = x
    everything = pool[mx.arange(21)]
    assert (pool.shape, everything.dtype) == ((21, 2, 40), mx.bfloat16)
    assert mx.array_equal(pool[mx.array(slots)], layout.unpack(layout.pack(x), mx.bfloat16))
    others = [s for s in range(21) if s not in slots]
    assert not mx.any(everything[mx.array(others)])
