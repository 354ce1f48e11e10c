"""Tensors across: ``torch_to_mlx`` and ``mlx_to_torch``, without a copy where both sides can hold the same memory.

DLPack carries them. What can be shared: any MLX array with a torch tensor on the CPU, and on Apple silicon, where MLX
runs on Metal, with one on MPS, either way. What can't: a torch tensor on the CPU, since MLX's CPU allocator keeps its
books in front of the data and so adopts no foreign memory; CUDA, which neither shares. These are copied, once.

float8 has no dtype in MLX and crosses as its bytes, uint8; ``mlx_to_torch(..., dtype=torch.float8_e4m3fn)`` reads
them again.

Memory that is shared is written by torch alone: MLX's arrays are values, an update makes another one. What torch
writes in place is seen by every MLX array that shares it, computed or not. Nothing but the GPU itself orders the two
sides, so each crossing waits for the giver's work, under one lock: MLX evaluates what is lazy in the calling thread,
which therefore must be the one that built it.
"""

from __future__ import annotations

import threading
from typing import Any

import mlx.core as mx
import torch

from pippin.errors import PippinError

# Devices as DLPack names them.
CPU, METAL = (1, 0), (8, 0)

# Every dtype that both sides know, and how float8 crosses.
DTYPES: dict[torch.dtype, mx.Dtype] = {
    torch.bool: mx.bool_,
    torch.uint8: mx.uint8,
    torch.uint16: mx.uint16,
    torch.uint32: mx.uint32,
    torch.uint64: mx.uint64,
    torch.int8: mx.int8,
    torch.int16: mx.int16,
    torch.int32: mx.int32,
    torch.int64: mx.int64,
    torch.float16: mx.float16,
    torch.bfloat16: mx.bfloat16,
    torch.float32: mx.float32,
    torch.float64: mx.float64,
    torch.complex64: mx.complex64,
}
FLOAT8 = (
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
)

_lock = threading.Lock()


class BridgeError(PippinError, ValueError):
    """A tensor that can't cross as asked; the message says why and what would help."""


def torch_to_mlx(tensor: torch.Tensor, *, copy: bool | None = None) -> mx.array:
    """``tensor`` as an MLX array of the same shape and dtype (float8: uint8), on MLX's default device.

    ``copy`` is the array API's: None shares memory where that is possible, True always copies, False refuses to.
    Raises BridgeError for a tensor that carries a gradient, a dtype that MLX lacks, a layout that is not strided, and
    where ``copy`` is False and memory can't be shared.
    """
    tensor = _plain(tensor)
    with _lock:
        if _on_metal(tensor) and tensor.numel() and copy is not True:
            torch.mps.synchronize()
            shared: mx.array = mx.from_dlpack(tensor, copy=False)
            return shared
        if copy is False:
            raise BridgeError(f"MLX can't hold the memory of a torch tensor on {tensor.device}: it would be copied")
        return _copied(tensor)


def mlx_to_torch(
    array: mx.array, device: str | torch.device | None = None, *, dtype: Any = None, copy: bool | None = None
) -> torch.Tensor:
    """``array`` as a torch tensor of the same shape and dtype; a lazy array is evaluated first.

    ``device`` None is where memory can be shared: ``mps`` if MLX runs on Metal and torch can, else ``cpu``. ``dtype``
    reads uint8 as a float8. ``copy`` is as in ``torch_to_mlx``. Raises BridgeError for a dtype that is not the array's
    own, and where ``copy`` is False and memory can't be shared.
    """
    if dtype is not None and dtype not in FLOAT8 and DTYPES.get(dtype) != array.dtype:
        raise BridgeError(f"an array of {array.dtype} can't be read as {dtype}: use astype before, or .to() behind")
    if dtype in FLOAT8 and array.dtype != mx.uint8:
        raise BridgeError(f"{dtype} crosses as bytes, mx.uint8, not {array.dtype}")
    place = torch.device(device) if device is not None else _home()
    with _lock:
        mx.eval(array)
        shareable = place.type == "cpu" or (place.type == "mps" and mx.metal.is_available())
        if copy is False and not (shareable and _positive(array)):
            raise BridgeError(f"torch can't hold this array's memory on {place}: it would be copied")
        tensor = _exported(array, place)
        if copy:
            tensor = tensor.clone()
    return tensor.view(dtype) if dtype in FLOAT8 else tensor


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """What is checked and made ready before a crossing: a strided tensor without gradient, of a dtype that MLX has."""
    if tensor.requires_grad:
        raise BridgeError("the tensor carries a gradient, which MLX would not follow: call detach() first")
    if tensor.layout != torch.strided:
        raise BridgeError(f"the tensor's layout is {tensor.layout}: call to_dense() first")
    if tensor.dtype in FLOAT8:
        tensor = tensor.view(torch.uint8)
    if tensor.dtype not in DTYPES:
        raise BridgeError(f"MLX has no {tensor.dtype}: convert it with .to() first")
    return tensor.resolve_conj().resolve_neg()


def _on_metal(tensor: torch.Tensor) -> bool:
    return bool(tensor.device.type == "mps" and mx.metal.is_available())


def _copied(tensor: torch.Tensor) -> mx.array:
    """One copy, done before this returns, so that the tensor may change behind it."""
    array = mx.array(tensor.cpu(), dtype=DTYPES[tensor.dtype])
    mx.eval(array)
    return array


def _home() -> torch.device:
    shared = mx.metal.is_available() and torch.backends.mps.is_available() and mx.default_device() == mx.Device(mx.gpu)
    return torch.device("mps" if shared else "cpu")


def _positive(array: mx.array) -> bool:
    """Whether torch can have its strides: it knows no negative ones (and aborts the process on them)."""
    strides = memoryview(array).strides  # type: ignore[arg-type]  # it has the buffer protocol
    return min(strides or (0,)) >= 0


def _exported(array: mx.array, place: torch.device) -> torch.Tensor:
    if not _positive(array):
        array = mx.contiguous(array)
        mx.eval(array)
    # Of a number inside a buffer torch takes no offset, of a row it does.
    flat = array.reshape(1) if array.ndim == 0 else array
    mx.eval(flat)
    if place.type == "mps" and mx.metal.is_available():
        mx.synchronize()
        return torch.from_dlpack(flat.__dlpack__(dl_device=METAL, copy=False)).reshape(array.shape)
    return torch.from_dlpack(flat.__dlpack__(dl_device=CPU)).reshape(array.shape).to(place)
