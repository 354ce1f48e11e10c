"""From a directory or hub id to a ``TorchModelRunner``, for ``--device torch``."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from pippin.attention.padded import Padded
from pippin.cache.layout import CacheLayout, LayerShape
from pippin.config import EngineConfig
from pippin.errors import ConfigError, ModelError
from pippin.memory import device_bytes, limits, plan_memory
from pippin.messages import ModelInfo, Progress
from pippin.models.download import one_line
from pippin.models.load import context_length_of, eos_token_ids_of, find_model, read_config, vocab_size_of
from pippin.models.vocabulary import read_vocabulary
from pippin.probe import Choice
from pippin.torch.bridge import DTYPES
from pippin.torch.mps import add_streams
from pippin.torch.runner import TorchModelRunner
from pippin.torch.store import TorchKVStore, TorchShape
from pippin.types import Batch, Request, SamplingParams, Work

log = logging.getLogger(__name__)

REASON = "transformers' own attention, over contexts gathered from slots; exact in the check at load"
# How far logits may lie from the model's own, as a share of their largest: rounding, and no more.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True, slots=True)
class LoadedTorch:
    """A model of transformers on its device; ``facts`` is its configuration, ``path`` the checkpoint's directory."""

    model: Any
    facts: dict[str, Any]
    path: Path
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def weight_bytes(self) -> int:
        return sum(p.nbytes for p in self.model.parameters())


def load_torch_runner(config: EngineConfig, tell: Callable[[Progress], None]) -> tuple[TorchModelRunner, ModelInfo]:
    """Loads a model of transformers and makes what runs its steps.

    Raises ModelError if transformers can't load it, or it keeps more than a K and a V a token; ConfigError if an option
    can't be met.
    """
    config = config.with_pages(1)
    loaded = load_torch_model(config, tell)
    config, gpu = config.with_pages(1), loaded.device.type != "cpu"
    sizes = limits(config, gpu)
    vocab_size = vocab_size_of(loaded.model, loaded.facts, loaded.path)
    context = context_length_of(loaded.model, loaded.facts, config.context_length)
    tell(Progress("probe", 0, 1))
    shapes = measure_layers(loaded)
    check_exact(loaded, shapes, vocab_size)
    tell(Progress("probe", 1, 1))
    plan = plan_memory(
        config,
        Choice(Padded("padded", grouped=False), REASON, CacheLayout.of(tuple(map(_as_mlx, shapes)))),
        weight_bytes=loaded.weight_bytes,
        activation_bytes=0,  # torch allocates them outside of the share that this divides
        context_length=context,
        max_running=sizes.max_running,
        gpu=gpu,
        device=torch.cuda.mem_get_info()[1] if loaded.device.type == "cuda" else device_bytes(),
    )
    tokenizer = Path(config.tokenizer_path or loaded.path)
    vocabulary = read_vocabulary(tokenizer, vocab_size)
    store = TorchKVStore(shapes, plan.slots + config.page_size, loaded.device)
    runner = TorchModelRunner(loaded.model, store, max_running=sizes.max_running, vocab_size=vocabulary.size)
    info = ModelInfo(
        model_path=config.model_path or loaded.path.name,
        tokenizer_path=str(tokenizer),
        model_type=loaded.facts["model_type"],
        dtype=str(loaded.dtype).removeprefix("torch."),
        quantization=_quantization_of(loaded.facts),
        vocab_size=vocabulary.size,
        context_length=context,
        eos_token_ids=list(dict.fromkeys([*eos_token_ids_of(loaded.facts), *vocabulary.eos_ids])),
        attention_backend=f"transformers ({loaded.model.config._attn_implementation})",
        attention_reason=REASON,
        max_total_tokens=plan.slots,
        max_running_requests=sizes.max_running,
        chunked_prefill_size=sizes.chunk,
        page_size=config.page_size,
        weight_bytes=loaded.weight_bytes,
        pool_bytes=store.nbytes,
        device=f"torch:{loaded.device.type}",
    )
    return runner, info


def load_torch_model(config: EngineConfig, tell: Callable[[Progress], None] | None = None) -> LoadedTorch:
    """Loads what transformers' AutoModelForCausalLM loads; raises as ``load_torch_runner`` does."""
    if config.quantization:
        raise ConfigError("torch runs checkpoints as they are; leave the option out, or use MLX", "--quantization")
    if config.attention_backend != "mlx":
        raise ConfigError("torch's attention is transformers' own; leave the option out", "--attention-backend")
    device = find_device(config.device)
    path = find_model(config.model_path, config.revision, tell)
    facts = read_config(path)
    if "quantization" in facts:
        raise ModelError(f"{path} is quantized for MLX, which torch can't read: give the checkpoint it was made from")
    dtype = "float32" if config.dtype == "auto" and device.type == "cpu" else config.dtype
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, trust_remote_code=config.trust_remote_code, local_files_only=True
        )
    except Exception as error:
        raise ModelError(
            f"transformers can't load {path} (model_type {facts['model_type']!r}): {one_line(error)}"
        ) from error
    return LoadedTorch(model.to(device).eval(), model.config.to_dict() | facts, path, device)


def find_device(name: str) -> torch.device:
    """``torch`` is the best that torch finds: CUDA, MPS, CPU. Raises ConfigError if the one named isn't there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = name.partition(":")[2] or next(kind for kind, found in there.items() if found)
    if not there[kind]:
        raise ConfigError(f"PyTorch sees no {kind.upper()} here; torch:cpu is always there", "--device")
    if kind == "mps":
        add_streams(torch.mps)
    return torch.device(kind)


def measure_layers(loaded: LoadedTorch) -> tuple[TorchShape, ...]:
    """Runs one token and looks at what each layer's cache holds. Raises ModelError if it is not a K and a V a token."""
    cache = DynamicCache(config=loaded.model.config)
    with torch.inference_mode():
        loaded.model(input_ids=torch.tensor([[1]], device=loaded.device), past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ModelError(f"its layers keep {type(layer).__name__}, which --device torch does not serve")
    return tuple(_shape_of(layer) for layer in cache.layers)


def _shape_of(layer: Any) -> TorchShape:
    """A layer that reads another one's K and V keeps none of its own."""
    if layer.keys is None:
        return TorchShape((0, 0), (0, 0), torch.float32)
    (_, heads, _, dim), (_, value_heads, _, value_dim) = layer.keys.shape, layer.values.shape
    return TorchShape((heads, dim), (value_heads, value_dim), layer.keys.dtype)


def _as_mlx(shape: TorchShape) -> LayerShape:
    """The same bytes a slot, for the memory plan."""
    (heads, dim), (value_heads, value_dim) = shape.key, shape.value
    return LayerShape(1, heads * dim, value_heads * value_dim, DTYPES[shape.dtype])


def check_exact(loaded: LoadedTorch, shapes: Sequence[TorchShape], vocab_size: int) -> None:
    """Compares a ragged step behind a prefix with the model alone. Raises ModelError where they differ."""
    bounds = ((7, 12), (0, 5))
    rows = [[(7919 * (i * 31 + j) + 1) % max(2, vocab_size) for j in range(end)] for i, (_, end) in enumerate(bounds)]
    with torch.inference_mode():
        alone = [loaded.model(input_ids=torch.tensor([r], device=loaded.device)).logits[0, -1].float() for r in rows]
    requests = [Request(f"check-{i}", r, len(r), SamplingParams(), row=i + 1) for i, r in enumerate(rows)]
    for i, request in enumerate(requests):
        request.slots = array("i", range(1 + i, 1 + i + 2 * len(request.tokens), 2))
    store = TorchKVStore(shapes, 2 + 2 * max(map(len, rows)), loaded.device)
    runner = TorchModelRunner(loaded.model, store, max_running=2, vocab_size=vocab_size)
    runner.logits(Batch((Work(requests[0], 0, bounds[0][0], True),)))
    found = runner.logits(Batch(tuple(Work(r, s, e, True) for r, (s, e) in zip(requests, bounds, strict=True))))
    own = np.stack([a.cpu().numpy() for a in alone])
    worst, scale = float(np.abs(np.asarray(found) - own).max()), float(np.abs(own).max())
    if not worst <= _TOLERANCE.get(loaded.dtype, 1e-1) * scale:
        raise ModelError(
            f"--device torch does not serve this model exactly: logits differ by {worst:.2g} of {scale:.2g}"
        )


def _quantization_of(facts: dict[str, Any]) -> str | None:
    found = facts.get("quantization_config")
    return str(found.get("quant_method")) if isinstance(found, dict) else None
