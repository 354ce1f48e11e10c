"""What transformers makes of a tiny random model: a checkpoint on disk and the logits that it should give."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.architectures import OWN, small_config
from tests.checkpoints import COMMON, FAMILIES, HYBRIDS

LENGTH = 48
SHARED = 20
"""The second sequence begins with this many tokens of the first."""

PUBLISHED: dict[str, tuple[tuple[str, str], ...]] = {
    "bailing_hybrid": ((r"layers\.([02])\.attention\.dense", r"layers.\1.attention.o_proj"),)
}
"""Weights that transformers 5 does not save by the names that the family's makers give them: pattern, replacement."""

PARTS = {"gemma3n_text": "gemma3n"}
"""Text models that are published as a part of another, which transformers builds only with what sees and hears."""

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Reference:
    """A checkpoint as transformers saved it, token sequences [n, LENGTH], and their logits [n, LENGTH, vocab]."""

    path: Path
    tokens: list[list[int]]
    logits: Logits

    @property
    def scale(self) -> float:
        return float(np.abs(self.logits).max())


def build_reference(path: Path, family: str, **overrides: Any) -> Reference:
    """Draws a model's weights, saves it under ``path`` as transformers does, and runs it in float64.

    Float32 is what is compared with it, and transformers' own is further from the truth than ours for some models.
    """
    settings = _settings(family) | overrides
    settings.pop("model_type", None)
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)  # some initial values are drawn, and what is drawn here is added to them
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(family, **settings),
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",  # others take no float64
        ).eval()
        for name, parameter in model.state_dict(keep_vars=True).items():  # what is saved: other buffers are constants
            _draw(name, parameter, generator)
    if family == "gpt_oss":
        _save_packed(model, path)
    else:
        model.save_pretrained(path)
    if family in PUBLISHED:
        _rename(path / "model.safetensors", PUBLISHED[family])
    if family in PARTS:
        _nest(path, PARTS[family])
    if family == "qwen3_5_moe_text":
        _stack_experts(path / "model.safetensors", settings["num_experts"])
    tokens = torch.randint(3, settings["vocab_size"], (5, LENGTH), generator=generator)
    tokens[1, :SHARED] = tokens[0, :SHARED]
    with torch.no_grad():
        logits = model.double()(tokens, use_cache=False).logits
    return Reference(path, tokens.tolist(), np.asarray(logits.tolist(), np.float32))


def _settings(family: str) -> dict[str, Any]:
    if family in PARTS:
        text: dict[str, Any] = small_config(PARTS[family])["text_config"]
        return text
    return small_config(family) if family in OWN else COMMON | (FAMILIES | HYBRIDS).get(family, {})


def _nest(path: Path, whole: str) -> None:
    """Makes a text model the part of ``whole`` as which it is published, other parts left out.

    Layers that use others' K and V are published with projections of their own, which nobody reads.
    """
    facts = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({"model_type": whole, "text_config": facts}))
    weights = load_file(path / "model.safetensors")
    named = {re.sub(r"^model\.", "model.language_model.", name): value for name, value in weights.items()}
    for layer in range(facts["num_hidden_layers"] - facts["num_kv_shared_layers"], facts["num_hidden_layers"]):
        for part in ("k_proj", "v_proj", "k_norm"):
            place = f"model.language_model.layers.{{}}.self_attn.{part}.weight"
            named[place.format(layer)] = np.ones_like(named[place.format(0)])
    save_file(named, path / "model.safetensors", metadata={"format": "pt"})


def _draw(name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
    """Weights that keep activations near 1; norms, biases and sinks far enough from their defaults to matter."""
    noise = torch.randn(parameter.shape, generator=generator)
    if not parameter.ndim:
        return
    if parameter.ndim == 1:
        parameter.add_(0.3 * noise)
    elif "embed" in name:
        parameter.copy_(noise)
    else:
        parameter.copy_(2.0 * noise / parameter.shape[-1] ** 0.5)


def _rename(file: Path, names: tuple[tuple[str, str], ...]) -> None:
    weights = load_file(file)
    for pattern, replacement in names:
        weights = {re.sub(pattern, replacement, name): value for name, value in weights.items()}
    save_file(weights, file, metadata={"format": "pt"})


def _stack_experts(file: Path, count: int) -> None:
    """Experts as a Qwen3.5 is published: gates and ups of all in one array, and downs in one."""
    weights = load_file(file)
    first = ".experts.0.gate_proj.weight"
    for prefix in [name.removesuffix(first) for name in weights if name.endswith(first)]:
        parts = {
            part: np.stack([weights.pop(f"{prefix}.experts.{i}.{part}.weight") for i in range(count)])
            for part in ("gate_proj", "up_proj", "down_proj")
        }
        weights[f"{prefix}.experts.gate_up_proj"] = np.concatenate([parts["gate_proj"], parts["up_proj"]], axis=1)
        weights[f"{prefix}.experts.down_proj"] = parts["down_proj"]
    save_file(weights, file, metadata={"format": "pt"})


def _save_packed(model: Any, path: Path) -> None:
    """Saves a gpt-oss with its experts in mxfp4, as it is published (mlx-lm reads no other form of transformers').

    The model's own experts become what transformers unpacks from that, so that both run the same weights.
    """
    packed: dict[str, npt.NDArray[Any]] = {}
    for name, parameter in model.named_parameters():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            # transformers keeps [experts, in, out] in memory, but packs rows of inputs.
            rows = mx.array(parameter.detach().numpy().swapaxes(1, 2))
            weight, scales, *_ = mx.quantize(rows, group_size=32, bits=4, mode="mxfp4")
            packed[f"{name}_blocks"] = np.asarray(weight.view(mx.uint8)).reshape(*scales.shape, 16)
            packed[f"{name}_scales"] = np.asarray(scales)
            blocks, exponents = (torch.from_numpy(packed[f"{name}_{part}"]) for part in ("blocks", "scales"))
            parameter.data.copy_(convert_moe_packed_tensors(blocks, exponents, dtype=torch.float32))
    model.config.quantization_config = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    model.save_pretrained(path)
    del model.config.quantization_config
    file = path / "model.safetensors"
    kept = {name: value for name, value in load_file(file).items() if f"{name}_blocks" not in packed}
    save_file(kept | packed, file, metadata={"format": "pt"})
