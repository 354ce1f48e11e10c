"""What the host lays out reaches a GPU's own memory, and nothing changes on the way."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pippin import kernels, uploads
from pippin.uploads import Lines, upload, upload_together

ARRAYS = [
    np.arange(-5, 900, dtype=np.int32),
    np.array([[0, 2**32 - 1]], np.uint32),
    np.array([np.inf, -2.5], np.float32),
]


def address(array: mx.array) -> int:
    return int(np.array(array, copy=False).__array_interface__["data"][0])


@pytest.fixture(params=["lines", "none"])
def cuda(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A machine with CUDA, whose driver keeps memory on the host, or does not."""
    lines = Lines(mx.array(np.zeros((3, 1000), np.uint32))) if request.param == "lines" else None
    monkeypatch.setattr(kernels, "backend", lambda: "cuda")
    monkeypatch.setattr(uploads, "_lines", lambda: lines)


@pytest.mark.parametrize("backend", [None, "metal"])
@pytest.mark.parametrize("values", ARRAYS, ids=lambda v: str(v.dtype))
def test_arrays_arrive_as_they_were(
    monkeypatch: pytest.MonkeyPatch, values: npt.NDArray[np.generic], backend: str | None
) -> None:
    monkeypatch.setattr(kernels, "backend", lambda: backend)
    sent = upload(values)
    assert np.array_equal(np.array(sent), values)
    assert sent.dtype == mx.array(values).dtype


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("values", [*ARRAYS, np.zeros(0, np.int32), np.arange(1001), np.arange(1001, dtype=np.uint32)])
def test_on_cuda_arrays_arrive_as_they_were(values: npt.NDArray[np.generic]) -> None:
    sent = upload(values)
    assert np.array_equal(np.array(sent), values)
    assert (sent.shape, sent.dtype) == (values.shape, mx.array(values).dtype)


@given(st.lists(st.lists(st.integers(0, 2**31 - 2), min_size=1, max_size=9), max_size=12), st.data())
def test_a_line_is_written_again_when_it_has_been_read(rows: list[list[int]], data: st.DataObject) -> None:
    """Nobody sees what came later, however late what he asked for is computed."""
    lines = Lines(mx.array(np.zeros((3, 9), np.uint32)))
    sent: list[mx.array] = []
    for row in rows:
        sent.append(lines.send(np.array(row, np.int32)) + 1)
        if data.draw(st.booleans()):
            some = data.draw(st.sampled_from(sent))
            mx.async_eval(some)  # type: ignore[no-untyped-call]
    for row, array in zip(rows, sent, strict=True):
        assert array.tolist() == [n + 1 for n in row]


def test_on_cuda_the_copy_has_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "_lines", lambda: None)
    given: list[mx.array] = []
    make = mx.array

    def noted(values: object) -> mx.array:
        given.append(make(values))  # type: ignore[arg-type]
        return given[-1]

    monkeypatch.setattr(kernels, "backend", lambda: "cuda")
    monkeypatch.setattr(mx, "array", noted)
    sent = upload(ARRAYS[0])
    monkeypatch.setattr(mx, "array", make)
    at = address(given.pop())  # nothing here holds it any more
    mx.eval(sent)
    assert address(sent) != at


@pytest.mark.parametrize("backend", [None, "metal"])
def test_several_arrive_as_they_were(monkeypatch: pytest.MonkeyPatch, backend: str | None) -> None:
    monkeypatch.setattr(kernels, "backend", lambda: backend)
    check_together()


@pytest.mark.usefixtures("cuda")
def test_on_cuda_several_arrive_as_they_were() -> None:
    check_together()


def check_together() -> None:
    arrays = [*ARRAYS, np.zeros((3, 0), np.float32), np.array([[1.5], [2.5]], np.float32)]
    for values, sent in zip(arrays, upload_together(arrays), strict=True):
        assert np.array_equal(np.array(sent), values)
        assert (sent.shape, sent.dtype) == (values.shape, mx.array(values).dtype)


class Driver:
    """libcuda.so.1 as far as it is asked, ``told`` what it is told."""

    def __init__(self, answer: int) -> None:
        self.told: list[tuple[int, ...]] = []
        driver = self

        class Advise:
            argtypes: Sequence[Any] = ()

            def __call__(self, *told: int) -> int:
                driver.told.append(told)
                return answer

        self.cuMemAdvise = Advise()

    def cuCtxGetDevice(self, device: Any) -> int:
        ctypes.cast(device, ctypes.POINTER(ctypes.c_int))[0] = 3
        return 0


@pytest.mark.parametrize("answer", [0, 1])
def test_pages_stay_with_the_host_and_the_gpu_reads_them_there(answer: int) -> None:
    memory, driver = np.zeros((2, 5), np.uint64), Driver(answer)
    assert uploads.keep_with_host(memory, lambda name: driver if name == "libcuda.so.1" else None) == (not answer)  # type: ignore[arg-type, return-value]
    where = (memory.ctypes.data, 80)
    assert driver.told == [(*where, 3, -1), (*where, 5, 3)][: 1 if answer else 2]


def test_without_a_driver_pages_go_where_they_like() -> None:
    def missing(name: str) -> ctypes.CDLL:
        raise OSError(f"{name}: cannot open shared object file")

    assert not uploads.keep_with_host(np.zeros(4), missing)
