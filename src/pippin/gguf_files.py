"""GGUF files: a directory with the configuration and tokenizer that lie in one, as other checkpoints have them.

What the fields mean is llama.cpp's gguf specification; the library ``gguf``, which is its makers', reads them. No
weights are read here, and no MLX: the HTTP process asks for the tokenizer too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import numpy.typing as npt

from pippin.errors import ModelError
from pippin.folders import cache_folder

Fields = Mapping[str, Any]

FILE = "described.gguf"
"""What the file is called in the directory that describes it."""

MEND = "take the safetensors that it was made from, with --quantization if need be"
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""mlx-lm's model type by the file's."""

PACKED = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}
"""Bits of what MLX keeps packed, in groups of 32."""

READ = frozenset({"F32", "F16", "BF16", "Q2_K", "Q6_K", *PACKED})
"""Types that MLX reads as llama.cpp does. Not Q4_K: what MLX 0.32 makes of it are other numbers."""

MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYERS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
UNDERSTOOD = frozenset(
    {
        "context_length",
        "embedding_length",
        "block_count",
        "feed_forward_length",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.finetuned",
        "vocab_size",
    }
)
"""An architecture's fields; any other but a zero may change what is computed, so it is refused."""

ROPE_FACTORS = "rope_freqs.weight"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
PLAIN_SPLITS = ("default", "gpt-2")
"""Ways to cut a text into words that are byte-level BPE's own."""

BEGINS = ("llama-bpe", "llama3", "llama-v3")
"""Vocabularies before whose texts llama.cpp puts the beginning's token unless a file says otherwise."""

_FORM = "1"


def gguf_of(path: Path) -> Path | None:
    """The GGUF file that ``path`` is or, in a directory without other weights, holds; None if it is none.

    Raises ModelError if a directory holds several.
    """
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    found = sorted(path.glob("*.gguf")) if path.is_dir() else []
    if not found or (path / FILE).exists() or any(path.glob("model*.safetensors")):
        return None
    if len(found) > 1:
        raise ModelError(f"{path} holds {len(found)} GGUF files ({found[0].name} …): give the path of one.")
    return found[0]


def describe(file: Path) -> Path:
    """A directory with config.json and the tokenizer of a GGUF file, and a link to the file; made once, then found.

    A tokenizer.json beside the file goes before what is in it. Raises ModelError if the file can't be read, or is of a
    kind that isn't served.
    """
    beside = [found for name in TOKENIZER if (found := file.absolute().parent / name).is_file()]
    file = file.resolve()  # the hub's client keeps links
    beside = beside if beside and beside[0].name == TOKENIZER[0] else []
    made = cache_folder() / "gguf" / f"{file.stem}-{_identity([file, *beside])}"
    if made.is_dir():
        return made
    try:
        made.parent.mkdir(parents=True, exist_ok=True)
        new = Path(mkdtemp(dir=made.parent, prefix=".new-"))
    except OSError as error:
        raise ModelError(
            f"{made.parent} can't be written ({error}): that is where GGUF files are described."
        ) from error
    try:
        _write(file, beside, new)
        try:
            new.rename(made)
        except OSError:
            if not made.is_dir():  # else another process was faster
                raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return made


def _identity(files: list[Path]) -> str:
    facts = [f"{f}|{f.stat().st_size}|{f.stat().st_mtime_ns}" for f in files]
    return blake2b("\n".join([_FORM, *facts]).encode(), digest_size=8).hexdigest()


def _write(file: Path, beside: list[Path], to: Path) -> None:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # the library raises nearly every type there is for a broken file
        raise ModelError(f"{file} can't be read as a GGUF file: {error}") from error
    tensors = {t.name: t for t in reader.tensors}
    types = {name: t.tensor_type.name for name, t in tensors.items()}
    _refuse(file, fields, types)
    factors = tensors[ROPE_FACTORS].data if ROPE_FACTORS in tensors else None
    rows = int(tensors["token_embd.weight"].shape[-1])
    (to / "config.json").write_text(json.dumps(config_of(file, fields, types, rows, factors), indent=2))
    for tokenizer in beside:
        shutil.copy(tokenizer, to)
    if not beside:
        _write_tokenizer(file, fields, to)
    (to / FILE).symlink_to(file)


def _refuse(file: Path, fields: Fields, types: Mapping[str, str]) -> None:
    """Raises ModelError, with the name of what isn't read."""
    kind = fields.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise ModelError(
            f"{file} is of architecture {kind!r}; of GGUF files only {', '.join(ARCHITECTURES)} are read: {MEND}."
        )
    if fields.get("split.count", 0) > 1:
        raise ModelError(f"{file} is one of {fields['split.count']} files; join them (`gguf-split --merge`) or {MEND}.")
    if unread := {name: t for name, t in types.items() if t not in READ}:
        name, kept = next(iter(unread.items()))
        raise ModelError(
            f"{file}: {name} is of type {kept}, which MLX doesn't read rightly"
            f" (it reads {', '.join(sorted(READ))}): {MEND}."
        )
    for name in types:
        if name != ROPE_FACTORS and module_of(name.rpartition(".")[0]) is None:
            raise ModelError(f"{file} has a tensor {name}, which {kind} models don't have: {MEND}.")
    if "token_embd.weight" not in types:
        raise ModelError(f"{file} has no token_embd.weight, so it isn't a whole model: {MEND}.")
    for name, value in fields.items():
        own = name.removeprefix(f"{kind}.")
        if own != name and own not in UNDERSTOOD and value:
            raise ModelError(f"{file}: {name} is {value!r}, which isn't understood: {MEND}.")


def module_of(name: str) -> str | None:
    """mlx-lm's name of what a GGUF file calls ``blk.0.attn_q`` and the like; None if there is none."""
    parts = name.split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[1].isdigit() and parts[2] in LAYERS:
        return f"model.layers.{parts[1]}.{LAYERS[parts[2]]}"
    return MODULES.get(name)


def config_of(
    file: Path, fields: Fields, types: Mapping[str, str], rows: int, factors: npt.NDArray[np.float32] | None
) -> dict[str, Any]:
    """config.json of a file of ``ARCHITECTURES``. ``types`` are its tensors', ``rows`` those of the embedding.

    ``factors`` divide the rotation's frequencies, as Llama 3.1's do. Raises ModelError for what isn't understood.
    """
    kind = fields["general.architecture"]

    def own(name: str, default: Any = None) -> Any:
        value = fields.get(f"{kind}.{name}", default)
        if not isinstance(value, int | float | str):
            raise ModelError(f"{file}: {kind}.{name} is {value!r}, not one number for all layers: {MEND}.")
        return value

    heads, width = own("attention.head_count"), own("embedding_length")
    size = own("attention.key_length", own("rope.dimension_count", width // heads))
    turned = own("rope.dimension_count", size)
    if own("attention.value_length", size) != size or turned != size or (kind == "qwen2" and size * heads != width):
        raise ModelError(
            f"{file}: its heads' keys are of {size}, of which {turned} turn, which {kind} doesn't do: {MEND}."
        )
    theta = float(own("rope.freq_base", 10000.0))
    ends = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    config = {
        "model_type": ARCHITECTURES[kind],
        "hidden_size": width,
        "intermediate_size": own("feed_forward_length"),
        "num_hidden_layers": own("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": own("attention.head_count_kv", heads),
        "head_dim": size,
        "rms_norm_eps": own("attention.layer_norm_rms_epsilon"),
        "vocab_size": rows,
        "max_position_embeddings": own("context_length"),
        "rope_theta": theta,
        "rope_scaling": _scaling(file, kind, fields, size, theta, factors),
        "attention_bias": kind == "llama" and "blk.0.attn_q.bias" in types,
        "mlp_bias": "blk.0.ffn_gate.bias" in types,
        "tie_word_embeddings": "output.weight" not in types,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": [int(end) for end in dict.fromkeys(ends) if end is not None],
    }
    if bits := {module_of(name.rpartition(".")[0]): PACKED[t] for name, t in types.items() if t in PACKED}:
        layers = {module: {"group_size": 32, "bits": b} for module, b in bits.items()}
        config["quantization"] = {"group_size": 32, "bits": 4, **layers}
    return config


def _scaling(
    file: Path, kind: str, fields: Fields, size: int, theta: float, factors: npt.NDArray[np.float32] | None
) -> dict[str, Any] | None:
    """``rope_scaling`` as config.json has it."""
    scaled = {n: fields.get(f"{kind}.rope.scaling.{n}") for n in ("type", "factor", "original_context_length")}
    way = scaled["type"] or "none"
    if factors is not None:
        if way == "none" and (found := _llama3(np.asarray(factors, np.float64), size, theta)) is not None:
            return found
        raise ModelError(
            f"{file}: {ROPE_FACTORS} holds other factors than Llama 3.1's, which aren't understood: {MEND}."
        )
    if way == "none":
        return None
    if way == "linear" and scaled["factor"]:
        return {"rope_type": "linear", "factor": scaled["factor"]}
    if way == "yarn" and scaled["factor"] and scaled["original_context_length"]:
        original = scaled["original_context_length"]
        return {"rope_type": "yarn", "factor": scaled["factor"], "original_max_position_embeddings": original}
    raise ModelError(f"{file}: {kind}.rope.scaling is {scaled}, which isn't understood: {MEND}.")


def _llama3(factors: npt.NDArray[np.float64], size: int, theta: float) -> dict[str, Any] | None:
    """The settings of Llama 3.1 under which its rotation divides frequencies by ``factors``; None if none does."""
    low, high, original, factor = 1.0, 4.0, 8192, float(factors.max())
    turns = original / (2 * np.pi * theta ** (np.arange(0, size, 2) / size))
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    if factors.shape != turns.shape or not np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
        return None
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _write_tokenizer(file: Path, fields: Fields, to: Path) -> None:
    """The tokenizer in the file as transformers rebuilds it, with its chat template."""
    found = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items()}
    kind, split = found.get("model"), found.get("pre", "default")
    if kind is None:
        return  # the model may be used by token ids, or with --tokenizer-path
    try:
        from transformers import PreTrainedTokenizerFast
        from transformers.integrations.gguf.gguf_tokenizer_mapping import (
            GGUF_PRE_TOKENIZER_SPLITS,
            convert_gguf_tokenizer,
        )

        if kind == "gpt2" and split not in (*PLAIN_SPLITS, *GGUF_PRE_TOKENIZER_SPLITS):
            raise ValueError(f"tokenizer.ggml.pre is {split!r}, which isn't known")
        facts = found | {"tokenizer_type": kind, "pre_tokenizer_type": split}
        fast, _ = convert_gguf_tokenizer(fields["general.architecture"], facts)
        names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
        ids = {name: found.get(f"{role}_token_id") for name, role in names.items()}
        begins = found.get("add_bos_token", kind == "llama" or split in BEGINS)
        PreTrainedTokenizerFast(
            tokenizer_object=fast,
            chat_template=fields.get("tokenizer.chat_template"),
            add_bos_token=bool(begins) and ids["bos_token"] is not None,
            add_eos_token=bool(found.get("add_eos_token", False)),
            **{name: found["tokens"][i] if i is not None else None for name, i in ids.items()},
        ).save_pretrained(to)
    except Exception as error:  # transformers and tokenizers raise nearly every type there is
        raise ModelError(
            f"{file}: no tokenizer could be made of what it holds ({error}): put the model's tokenizer.json beside it."
        ) from error
