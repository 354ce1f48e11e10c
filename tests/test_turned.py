"""What the CPU does once for what others do in every layer: rotations, and the order in which weights lie."""

from __future__ import annotations

import gc
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pippin.garbage import loaded_left_alone
from pippin.kernels import turns
from pippin.kernels.turns import Rotations, rotating
from pippin.models.seam import Seam, active
from pippin.models.turned import turn_weights
from tests.checkpoints import build_model, family_config, random_weights


@st.composite
def ropes(draw: st.DrawFn) -> tuple[tuple[int, ...], dict[str, object]]:
    """A shape of heads, and how they are rotated."""
    shape = draw(st.sampled_from([1, 3])), draw(st.sampled_from([1, 2, 40])), draw(st.sampled_from([1, 5]))
    dims, rest = draw(st.sampled_from([(64, 0), (64, 16), (2, 0), (10, 2)]))
    count = shape[0]
    offsets: list[object] = [draw(st.integers(0, 5000)), mx.array(draw(st.integers(0, 5000)))]
    offsets.append(mx.array(draw(st.lists(st.integers(0, 5000), min_size=count, max_size=count))))
    periods = mx.random.uniform(1, 1e4, (dims // 2,), key=mx.random.key(draw(st.integers(0, 9))))
    own = draw(st.booleans())
    return (*shape, dims + rest), {
        "dims": dims,
        "traditional": draw(st.booleans()),
        "base": None if own else draw(st.sampled_from([1e4, 5e5])),
        "scale": draw(st.sampled_from([1.0, 0.25])),
        "offset": draw(st.sampled_from(offsets)),
        "freqs": periods if own else None,
    }


@given(ropes(), st.integers(0, 9), st.booleans())
def test_rotated_as_mlx_does_bit_for_bit(
    rope: tuple[tuple[int, ...], dict[str, object]], seed: int, by_product: bool
) -> None:
    shape, how = rope
    rotations = Rotations(few=1 << 20 if by_product else 0)
    for key in mx.random.split(mx.random.key(seed), 2):  # the second is by the table that the first made
        x = mx.random.normal(shape, key=key)
        expected, got = np.asarray(mx.fast.rope(x, **how)), np.asarray(rotations.rope(x, **how))  # type: ignore[arg-type]
        assert np.array_equal(expected, got)


def test_each_rotation_has_a_table_of_its_own() -> None:
    x, rotations = mx.random.normal((2, 3, 1, 8)), Rotations()
    usual: dict[str, Any] = {
        "dims": 8,
        "traditional": False,
        "base": 1e4,
        "scale": 1.0,
        "offset": mx.array([7, 900]),
        "freqs": None,
    }
    others: list[dict[str, Any]] = [
        {"dims": 4},
        {"traditional": True},
        {"base": 1e5},
        {"scale": 0.5},
        {"offset": 7},
        {"offset": 8},
        {"offset": mx.array([7, 901])},
        {"base": None, "freqs": mx.arange(1.0, 5.0)},
        {"base": None, "freqs": mx.arange(2.0, 6.0)},
    ]
    for other in [{}, *others, {}]:
        how = usual | other
        got, expected = rotations.rope(x, **how), mx.fast.rope(x, **how)
        assert mx.array_equal(got, expected).item(), other
    long = mx.random.normal((2, 3, 4, 8))
    assert mx.array_equal(rotations.rope(long, **usual), mx.fast.rope(long, **usual)).item()


def test_one_forward_asks_mlx_once_for_all_of_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(family_config("qwen3"))
    model.load_weights(list(random_weights(model, 1).items()), strict=False)
    tokens = mx.array([[5, 9, 2]])
    asked: list[mx.array] = []
    exact = turns._rope

    def counted(x: mx.array, *rest: object, **options: object) -> mx.array:
        asked.append(x)
        return exact(x, *rest, **options)  # type: ignore[arg-type]

    expected = np.asarray(model(tokens))
    monkeypatch.setattr(turns, "_rope", counted)
    with active(Seam(None)):
        got = np.asarray(model(tokens))
    assert len(asked) == 1
    assert np.array_equal(got, expected)
    assert mx.fast.rope is exact


def test_what_it_does_not_know_goes_to_mlx() -> None:
    half = mx.random.normal((2, 3, 1, 8)).astype(mx.float16)
    with rotating():
        got = mx.fast.rope(half, 8, traditional=False, base=1e4, scale=1.0, offset=3)
    assert mx.array_equal(got, mx.fast.rope(half, 8, traditional=False, base=1e4, scale=1.0, offset=3)).item()


def test_turned_weights_are_what_they_were_and_lie_by_column() -> None:
    layers = [nn.Linear(96, 160), nn.Linear(160, 32, bias=False)]
    model = nn.Sequential(*layers)
    x = mx.random.normal((3, 1, 96))
    before, expected = [np.array(layer.weight) for layer in layers], np.asarray(model(x))
    turn_weights(model)
    turn_weights(model)
    for layer, weight in zip(layers, before, strict=True):
        assert np.array_equal(np.array(layer.weight), weight)
        assert memoryview(layer.weight).strides == (4, 4 * weight.shape[0])
    assert np.allclose(np.asarray(model(x)), expected, atol=1e-5)


def test_weights_of_other_dtypes_lie_as_they_did() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    model.set_dtype(mx.float16)
    turn_weights(model)
    assert memoryview(model.layers[0].weight).strides == (16, 2)


def test_what_is_loaded_is_not_searched_meanwhile() -> None:
    before = gc.get_freeze_count()
    with loaded_left_alone():
        assert gc.get_freeze_count() > before
    assert gc.get_freeze_count() == 0
