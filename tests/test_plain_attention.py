"""The CPU's attention and activations against MLX's own and against float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pippin.attention.plain import group_attention, positional_mask
from pippin.inputs import Group
from pippin.kernels import cpu
from pippin.models import seam


def test_exp_is_as_close_as_its_docstring_says() -> None:
    x = np.linspace(-87, 80, 200_001, dtype=np.float32)
    exact = np.exp(x.astype(np.float64))
    error = np.abs(np.asarray(cpu.exp(mx.array(x))) - exact) / exact
    assert error.max() < 4e-6
    assert error[np.abs(x) < 8].max() < 1e-6
    assert 0 < np.asarray(cpu.exp(mx.array([-1e30]))).max() < 2e-38


@pytest.mark.parametrize("shape", [(1, 1, 8), (300, 1, 1536), (2, 7, 96), (3, 200_000)])
def test_swiglu_is_mlx_lms(shape: tuple[int, ...]) -> None:
    gate, x = mx.random.normal(shape, key=mx.random.key(1)) * 30, mx.random.normal(shape, key=mx.random.key(2))
    expected = np.asarray(seam._original_swiglu(gate, x))
    np.testing.assert_allclose(np.asarray(cpu.swiglu(gate, x)), expected, rtol=1e-5, atol=1e-5)


def test_swiglu_is_in_place_of_mlx_lms_only_for_float32_on_the_cpu() -> None:
    half = mx.random.normal((4, 8)).astype(mx.float16)
    assert mx.array_equal(seam.swiglu(half, half), seam._original_swiglu(half, half))


@st.composite
def groups(draw: st.DrawFn) -> Group:
    """Decodes of unlike lengths, or prompts of one length behind a prefix."""
    count = draw(st.integers(1, 4))
    rows = draw(st.sampled_from([1, 1, 3, 70]))
    if rows == 1:
        ends = draw(st.lists(st.integers(1, 90), min_size=count, max_size=count))
    else:
        ends = [rows + draw(st.integers(0, 50))] * count
    context = max(ends)
    starts = mx.array([end - rows for end in ends], dtype=mx.int32)
    return Group(0, count, rows, context, any(e != context for e in ends), mx.zeros((count, context), mx.int32), starts)


@given(groups(), st.sampled_from([None, 1, 5, 40]), st.booleans(), st.sampled_from([(4, 2), (6, 6), (8, 1)]))
def test_attention_by_products_is_mlxs(
    group: Group, window: int | None, has_sinks: bool, heads: tuple[int, int]
) -> None:
    key = iter(mx.random.split(mx.random.key(group.context), 4))
    q = mx.random.normal((group.count * group.rows, heads[0], 1, 16), key=next(key))
    keys = mx.random.normal((group.count, heads[1], group.context, 16), key=next(key))
    values = mx.random.normal((group.count, heads[1], group.context, 24), key=next(key))
    sinks = mx.random.normal((heads[0],), key=next(key)) if has_sinks else None
    own = group_attention(q, keys, values, group, 0.3, window, sinks)
    ordered = q.reshape(group.count, group.rows, heads[0], 16).transpose(0, 2, 1, 3)
    expected = mx.fast.scaled_dot_product_attention(
        ordered, keys, values, scale=0.3, mask=positional_mask(group, window), sinks=sinks
    )
    expected = expected.transpose(0, 2, 1, 3).reshape(own.shape)
    np.testing.assert_allclose(np.asarray(own), np.asarray(expected), rtol=1e-4, atol=2e-5)
