"""The tensor bridge: every dtype, shape and stride crosses unchanged, and memory is shared where it is said to be."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pippin.torch.bridge import DTYPES, FLOAT8, BridgeError, mlx_to_torch, torch_to_mlx

DTYPE = st.sampled_from(sorted(DTYPES, key=str))
SHAPE = st.lists(st.integers(0, 4), max_size=4).map(tuple)


def bits(values: Any) -> bytes:
    """The elements in order, as bytes, of an array of either side."""
    if isinstance(values, mx.array):
        flat = mx.contiguous(values.reshape(-1))
        return bytes(memoryview(flat).cast("B")) if flat.size else b""  # type: ignore[arg-type]
    flat = torch.empty(values.numel(), dtype=values.dtype)
    flat.view(values.shape).copy_(values)
    return bytes(flat.view(torch.uint8).numpy().tobytes())


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any bit pattern that the dtype has (a bool has two), NaN and infinities with them."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.random.default_rng(seed).integers(0, 2 if dtype == torch.bool else 256, size, np.uint8)
    return torch.from_numpy(raw).view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)


@st.composite
def cuts(draw: st.DrawFn, shape: tuple[int, ...], backwards: bool) -> tuple[Any, tuple[int, ...]]:
    """A slice of every axis, and an order of the axes: views with offsets, steps and permuted strides."""
    steps = [1, 2, 3, -1, -2] if backwards else [1, 2, 3]
    slices = []
    for n in shape:
        start = draw(st.integers(0, max(0, n - 1)))
        slices.append(slice(start, None, draw(st.sampled_from(steps))))
    return tuple(slices), tuple(draw(st.permutations(range(len(shape)))))


@given(st.data(), DTYPE, SHAPE, st.integers(0, 99))
def test_torch_to_mlx_keeps_every_bit_of_every_view(
    data: st.DataObject, dtype: torch.dtype, shape: tuple[int, ...], seed: int
) -> None:
    slices, order = data.draw(cuts(shape, backwards=False))
    tensor = random_tensor(shape, dtype, seed)[slices].permute(order)
    array = torch_to_mlx(tensor)
    assert (array.dtype, array.shape) == (DTYPES[dtype], tuple(tensor.shape))
    assert bits(array) == bits(tensor)


@given(st.data(), DTYPE, SHAPE, st.integers(0, 99))
def test_mlx_to_torch_keeps_every_bit_of_every_view(
    data: st.DataObject, dtype: torch.dtype, shape: tuple[int, ...], seed: int
) -> None:
    slices, order = data.draw(cuts(shape, backwards=True))
    array = torch_to_mlx(random_tensor(shape, dtype, seed))[slices].transpose(order)  # lazy until it crosses
    tensor = mlx_to_torch(array)
    assert (tensor.dtype, tuple(tensor.shape)) == (dtype, array.shape)
    assert bits(tensor) == bits(array)


@given(DTYPE, SHAPE, st.integers(0, 99), st.sampled_from([None, True]))
def test_there_and_back_is_the_same(dtype: torch.dtype, shape: tuple[int, ...], seed: int, copy: bool | None) -> None:
    tensor = random_tensor(shape, dtype, seed)
    again = mlx_to_torch(torch_to_mlx(tensor, copy=copy), copy=copy)
    assert (again.dtype, again.shape, bits(again)) == (tensor.dtype, tensor.shape, bits(tensor))


@given(st.sampled_from(FLOAT8), SHAPE, st.integers(0, 99))
def test_float8_crosses_as_its_bytes(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> None:
    tensor = random_tensor(shape, dtype, seed)
    array = torch_to_mlx(tensor)
    assert (array.dtype, array.shape) == (mx.uint8, tuple(shape))
    again = mlx_to_torch(array, dtype=dtype)
    assert (again.dtype, again.shape, bits(again)) == (dtype, tensor.shape, bits(tensor))


# --- sharing ---


@pytest.mark.parametrize("view", ["whole", "transposed", "sliced", "broadcast", "scalar"])
def test_torch_writes_what_mlx_sees(view: str) -> None:
    base = mx.arange(12, dtype=mx.float32).reshape(3, 4)
    array = {
        "whole": base,
        "transposed": base.T,
        "sliced": base[1:, ::2],
        "broadcast": mx.broadcast_to(base[0], (2, 4)),
        "scalar": base[1, 2],
    }[view]
    tensor = mlx_to_torch(array, copy=False)
    assert tensor.flatten().tolist() == np.array(array).flatten().tolist()
    lazy = array + 1  # computed after torch has written
    tensor[(0,) * tensor.ndim] = 77
    assert np.array(array).flatten()[0] == 77
    assert np.array(lazy).flatten()[0] == 78


def test_a_copy_is_nobody_elses() -> None:
    array = mx.zeros((3,))
    mlx_to_torch(array, copy=True).fill_(5)
    assert array.tolist() == [0, 0, 0]
    tensor = torch.zeros(3)
    copied = torch_to_mlx(tensor)  # on the CPU MLX adopts no memory: what it says of copy=False is true
    tensor.fill_(5)
    assert copied.tolist() == [0, 0, 0]


def test_mlx_updates_make_another_array_and_leave_torchs_alone() -> None:
    array = mx.zeros((3,))
    tensor = mlx_to_torch(array)
    array[0] = 9
    array = array + 1
    mx.eval(array)
    assert tensor.tolist() == [0, 0, 0]


def test_the_memory_lives_as_long_as_either_side() -> None:
    tensor = mlx_to_torch(mx.ones((4096,)))
    others = [mx.full((4096,), 7.0) for _ in range(30)]
    mx.eval(others)
    assert tensor.sum() == 4096


def test_what_cannot_be_shared_is_refused_where_a_copy_is_forbidden() -> None:
    with pytest.raises(BridgeError, match="torch tensor on cpu: it would be copied"):
        torch_to_mlx(torch.ones(3), copy=False)
    with pytest.raises(BridgeError, match="it would be copied"):
        mlx_to_torch(mx.arange(6)[::-1], copy=False)


# --- what does not cross ---


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(3, requires_grad=True), "gradient.*detach"),
        (torch.ones(3, requires_grad=True) * 2, "gradient.*detach"),
        (torch.ones(3, dtype=torch.complex128), r"MLX has no torch.complex128.*\.to\(\)"),
        (torch.eye(3).to_sparse(), "to_dense"),
    ],
    ids=["leaf", "computed", "complex128", "sparse"],
)
def test_a_tensor_that_mlx_cannot_hold_says_what_would_help(tensor: torch.Tensor, message: str) -> None:
    with pytest.raises(BridgeError, match=message):
        torch_to_mlx(tensor)


@pytest.mark.parametrize(
    ("dtype", "message"),
    [(torch.float64, "can't be read as torch.float64"), (torch.float8_e5m2, "crosses as bytes, mx.uint8, not")],
)
def test_an_array_is_not_read_as_what_it_is_not(dtype: torch.dtype, message: str) -> None:
    with pytest.raises(BridgeError, match=message):
        mlx_to_torch(mx.ones((2,)), dtype=dtype)


def test_conjugates_and_negatives_cross_as_what_they_mean() -> None:
    numbers = torch.tensor([1 + 2j, 3 - 4j])
    assert torch_to_mlx(numbers.conj()).tolist() == [1 - 2j, 3 + 4j]
    assert torch_to_mlx(numbers.conj().imag).tolist() == [-2, 4]


def test_detached_tensors_cross() -> None:
    assert torch_to_mlx(torch.ones(2, requires_grad=True).detach()).tolist() == [1, 1]


# --- threads ---


def test_threads_cross_at_once() -> None:
    start = threading.Barrier(4)

    def there_and_back(seed: int) -> bool:
        start.wait()
        for i in range(40):
            tensor = random_tensor((5, 7), torch.bfloat16, 100 * seed + i)
            array = torch_to_mlx(tensor)
            doubled = mlx_to_torch(array + array)  # lazy, built in this thread
            if bits(mlx_to_torch(array)) != bits(tensor) or not torch.equal(
                doubled.nan_to_num(), (tensor + tensor).nan_to_num()
            ):
                return False
        mx.synchronize()
        mx.clear_streams()
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(there_and_back, range(4)))


def test_an_evaluated_array_crosses_in_another_thread() -> None:
    array = mx.arange(4) * 2
    mx.eval(array)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: mlx_to_torch(array).tolist()).result() == [0, 2, 4, 6]
