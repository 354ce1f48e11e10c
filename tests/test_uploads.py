"""What the host lays out reaches a GPU's own memory, and nothing changes on the way."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from pippin import kernels
from pippin.uploads import upload, upload_together

ARRAYS = [
    np.arange(-5, 900, dtype=np.int32),
    np.array([[0, 2**32 - 1]], np.uint32),
    np.array([np.inf, -2.5], np.float32),
]


def address(array: mx.array) -> int:
    return int(np.array(array, copy=False).__array_interface__["data"][0])


@pytest.mark.parametrize("backend", [None, "metal", "cuda"])
@pytest.mark.parametrize("values", ARRAYS, ids=lambda v: str(v.dtype))
def test_arrays_arrive_as_they_were(
    monkeypatch: pytest.MonkeyPatch, values: npt.NDArray[np.generic], backend: str | None
) -> None:
    monkeypatch.setattr(kernels, "backend", lambda: backend)
    sent = upload(values)
    assert np.array_equal(np.array(sent), values)
    assert sent.dtype == mx.array(values).dtype


def test_on_cuda_the_copy_has_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize("backend", [None, "metal", "cuda"])
def test_several_arrive_as_they_were(monkeypatch: pytest.MonkeyPatch, backend: str | None) -> None:
    monkeypatch.setattr(kernels, "backend", lambda: backend)
    arrays = [*ARRAYS, np.zeros((3, 0), np.float32), np.array([[1.5], [2.5]], np.float32)]
    for values, sent in zip(arrays, upload_together(arrays), strict=True):
        assert np.array_equal(np.array(sent), values)
        assert (sent.shape, sent.dtype) == (values.shape, mx.array(values).dtype)
