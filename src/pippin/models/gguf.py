"""Weights of a GGUF file under mlx-lm's names and in its order."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx

from pippin.gguf_files import FILE, ROPE_FACTORS, module_of


def hollow(path: Path, to: Path) -> None:
    """What mlx-lm wants to find in a checkpoint's directory, less the weights, which ``weights_of`` brings."""
    shutil.copy(path / "config.json", to)
    mx.save_safetensors(str(to / "model.safetensors"), {})


def weights_of(path: Path, facts: dict[str, Any]) -> dict[str, mx.array]:
    """All weights of the file that ``path`` describes, packed ones packed (affine, groups of 32).

    Norms and biases are of float32 in most files, whatever the rest is of.
    """
    arrays = mx.load(str(path / FILE))
    assert isinstance(arrays, dict)
    arrays.pop(ROPE_FACTORS, None)
    heads = {"q_proj": facts["num_attention_heads"], "k_proj": facts["num_key_value_heads"]}
    found: dict[str, mx.array] = {}
    for name, array in arrays.items():
        stem, _, part = name.rpartition(".")
        module = module_of(stem)
        if facts["model_type"] == "llama" and module is not None:
            count = heads.get(module.rpartition(".")[2])
            array = array if count is None else halves(array, count)
        found[f"{module}.{part}"] = array
    return found


def halves(array: mx.array, heads: int) -> mx.array:
    """Rows of pairs that turn side by side, [heads x size, ...], as mlx-lm has them: first ones, then second ones.

    llama.cpp interleaves the rows of Llama's queries and keys when it writes a file.
    """
    rest = array.shape[1:]
    return array.reshape(heads, -1, 2, *rest).swapaxes(1, 2).reshape(-1, *rest)
