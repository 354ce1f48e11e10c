"""Weights that PyTorch pickled (``pytorch_model.bin``, ``.pt``), read without running what a pickle may hold."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import torch

from pippin.errors import ModelError
from pippin.messages import Progress
from pippin.models.download import one_line
from pippin.torch.bridge import BridgeError, torch_to_mlx

INDEX = "pytorch_model.bin.index.json"
# Under one of these a training script's file keeps the weights, beside other things.
NESTED = ("state_dict", "model")


def write_safetensors(
    path: Path, files: Sequence[Path], into: Path, progress: Callable[[Progress], None] | None = None
) -> None:
    """Writes the weights in ``files`` of checkpoint ``path`` as safetensors to ``into``, with its other small files.

    One file is in memory at a time. ``progress`` hears of stage ``unpack``, in bytes. Raises ModelError if a file is
    missing, can't be read, or holds more than tensors and plain values.
    """
    _check_complete(path, files)
    for small in (*path.glob("*.json"), *path.glob("*.py")):
        if small.name != INDEX:
            shutil.copyfile(small, into / small.name)
    total, done = sum(f.stat().st_size for f in files), 0
    for i, file in enumerate(files, 1):
        if progress:
            progress(Progress("unpack", done, total))
        arrays = dict(_arrays(file))
        target = into / f"model-{i:05d}-of-{len(files):05d}.safetensors"
        mx.save_safetensors(str(target), arrays, metadata={"format": "pt"})
        done += file.stat().st_size
    if progress:
        progress(Progress("unpack", done, total))


def _check_complete(path: Path, files: Sequence[Path]) -> None:
    index = path / INDEX
    if not index.exists():
        return
    try:
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"{index} can't be read: {one_line(error)}") from error
    if missing := sorted(named - {f.name for f in files}):
        raise ModelError(f"{path} lacks {', '.join(missing)}, which {INDEX} names: download it again.")


def _arrays(file: Path) -> Iterator[tuple[str, mx.array]]:
    for name, value in _tensors(file).items():
        if isinstance(value, torch.Tensor):
            tensor = value.detach().to_dense() if value.layout != torch.strided else value.detach()
            try:
                yield name, torch_to_mlx(tensor.float() if tensor.dtype == torch.float64 else tensor)
            except BridgeError as error:
                raise ModelError(f"{file}: {name} can't be read: {error}") from error


def _tensors(file: Path) -> dict[str, Any]:
    """What a file maps names to; files that are no zip archives are those of torch before 1.6."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:
        raise ModelError(
            f"{file} was not loaded: it is damaged, or holds code besides tensors, which is not run. {one_line(error)}"
        ) from error
    for name in NESTED:
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
    if not isinstance(found, dict) or not any(isinstance(v, torch.Tensor) for v in found.values()):
        raise ModelError(f"{file} holds no table of named tensors.")
    return found
