"""Writes checkpoints as GGUF files with the library of llama.cpp's makers, as their own converter lays them out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import numpy.typing as npt

from pippin.gguf_files import LAYERS, MODULES
from pippin.models.load import SAFETENSORS

NAMES = {module: name for name, module in (MODULES | LAYERS).items()}
FIELDS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}


def name_of(weight: str) -> str:
    """What llama.cpp calls a weight of mlx-lm."""
    module, _, part = weight.rpartition(".")
    if module in NAMES:
        return f"{NAMES[module]}.{part}"
    _, _, layer, own = module.split(".", 3)
    return f"blk.{layer}.{NAMES[own]}.{part}"


def interleaved(array: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """As llama.cpp lays out the rows of Llama's queries and keys: the halves of a head take turns."""
    shape = array.shape
    return array.reshape(heads, 2, -1, *shape[1:]).swapaxes(1, 2).reshape(shape)


def write_gguf(checkpoint: Path, file: Path, kind: str = "F32", **fields: Any) -> Path:
    """The checkpoint's weights as ``file``, matrices as ``kind``; the checkpoint's become what those stand for.

    ``fields`` are added or, None, left out, ``__`` for a dot; ``tensors`` are added, by their names.
    """
    config = json.loads((checkpoint / "config.json").read_text())
    tensors: dict[str, npt.NDArray[Any]] = fields.pop("tensors", {})
    architecture = fields.pop("architecture", config["model_type"])
    found = {name: config[own] for name, own in FIELDS.items()}
    if "head_dim" in config:
        found |= {"attention.key_length": config["head_dim"], "attention.value_length": config["head_dim"]}
    if architecture == "llama" and "head_dim" in config:
        found["rope.dimension_count"] = config["head_dim"]
    found = {f"{architecture}.{name}": value for name, value in found.items()} | {"tokenizer.ggml.eos_token_id": 2}
    found |= {name.replace("__", "."): value for name, value in fields.items()}
    writer = gguf.GGUFWriter(file, architecture)
    for name, value in found.items():
        if value is not None:
            _add(writer, name, value)
    (source,) = checkpoint.glob(SAFETENSORS)
    stand_for = {name: _write(writer, name, array, kind, config) for name, array in _arrays(source).items()}
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    mx.save_safetensors(str(source), {name: mx.array(array) for name, array in stand_for.items()})
    return file


def _add(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(name, value)
        case int():
            writer.add_uint32(name, value)
        case float():
            writer.add_float32(name, value)
        case list():
            writer.add_array(name, value)
        case _:
            writer.add_string(name, value)


def _arrays(source: Path) -> dict[str, npt.NDArray[np.float32]]:
    arrays = mx.load(str(source))
    assert isinstance(arrays, dict)
    return {name: np.array(array) for name, array in arrays.items()}


def _write(
    writer: gguf.GGUFWriter, name: str, array: npt.NDArray[np.float32], kind: str, config: dict[str, Any]
) -> npt.NDArray[np.float32]:
    """Adds one weight, and says which numbers it has become."""
    used = gguf.GGMLQuantizationType[kind if array.ndim > 1 else "F32"]
    packed = gguf.quants.quantize(array, used)
    numbers = np.asarray(gguf.quants.dequantize(packed, used), np.float32).reshape(array.shape)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    count = heads.get(name.split(".")[-2]) if config["model_type"] == "llama" else None
    if count is not None:
        packed = gguf.quants.quantize(interleaved(array, count), used)
    writer.add_tensor(name_of(name), packed, raw_dtype=used)
    return numbers
