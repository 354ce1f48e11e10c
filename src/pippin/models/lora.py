"""LoRA adapters: low-rank additions to a model's linear layers, several at a time, each for its own requests' rows.

A step knows which rows are whose (``AdapterRows``); a layer that some adapter changes adds each adapter's product to
just those rows. The base model's weights are never touched, so rows without an adapter compute what they always do.
Sources: LoRA (arXiv:2106.09685), rank-stabilised scaling (arXiv:2312.03732), S-LoRA's mixed batches (arXiv:2311.03285).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from pippin.errors import ModelError, RequestError
from pippin.inputs import Step
from pippin.models.deferred import Part, settled
from pippin.models.seam import adapted_now, put_before
from pippin.types import Work

CONFIG = "adapter_config.json"
PEFT, MLX = "adapter_model.safetensors", "adapters.safetensors"


class LowRank(NamedTuple):
    """A layer's addition: x [n, in] @ a [in, rank] @ b [rank, out], the scale being in b."""

    a: mx.array
    b: mx.array


@dataclass(frozen=True, eq=False)
class Adapter:
    """What an adapter adds, by the layer's path in the model. ``key`` is its own, also among those of the same name."""

    name: str
    key: str
    layers: Mapping[str, LowRank]

    @property
    def num_bytes(self) -> int:
        return sum(part.nbytes for pair in self.layers.values() for part in pair)


@dataclass(frozen=True, eq=False)
class AdapterRows:
    """Of the ``total`` flattened rows of a forward, which are whose: int32 [n] each."""

    total: int
    parts: tuple[tuple[Adapter, mx.array], ...]

    def add(self, path: str, x: mx.array, y: mx.array, first: int = 0) -> mx.array:
        """``y`` [.., n], of which a layer's output of ``x`` [.., in] begins at ``first``, with what adapters add."""
        mine = [(adapter.layers[path], rows) for adapter, rows in self.parts if path in adapter.layers]
        if not mine:
            return y
        flat, out = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        if len(flat) != self.total:
            raise ModelError(f"{path} is given other rows than the step's, so no adapter can change it")
        for pair, rows in mine:
            everywhere, width = rows.size == self.total, pair.b.shape[1]
            added = ((flat if everywhere else flat[rows]) @ pair.a @ pair.b).astype(out.dtype)
            if width == out.shape[1]:
                out = out + added if everywhere else out.at[rows].add(added)
            else:
                at = slice(first, first + width)
                out = out.at[:, at].add(added) if everywhere else out.at[rows, at].add(added)
        return out.reshape(y.shape)


def adapter_rows(step: Step, works: Sequence[Work]) -> AdapterRows | None:
    """Whose rows are whose in a step of these works; None if no work has an adapter."""
    found: dict[str, tuple[Adapter, list[range]]] = {}
    for work, last in zip(works, step.lasts, strict=True):
        adapter = work.request.adapter
        if isinstance(adapter, Adapter):
            rows = range(last + 1 - (work.end - work.start), last + 1)
            found.setdefault(adapter.key, (adapter, []))[1].append(rows)
    if not found:
        return None
    parts = [(adapter, mx.array(np.concatenate(rows).astype(np.int32))) for adapter, rows in found.values()]
    return AdapterRows(step.tokens.size, tuple(parts))


class _Adapted(nn.Module):  # type: ignore[misc]  # mlx.nn has no types
    """Put before a layer's own class: adds what the step's adapters say, which joined layers have added already."""

    def __call__(self, x: Any) -> Any:
        y, rows = super().__call__(x), adapted_now()
        return y if rows is None or isinstance(y, Part) else rows.add(self._adapted_path, settled(x), y)


class Adapters:
    """The adapters of one model, by name. A request holds its own, so one that is removed serves until it is done.

    ``room`` is how many bytes those that come from now on may have; None: as many as they like.
    """

    def __init__(self, model: nn.Module) -> None:
        self.paths: dict[str, str] = {}
        self.room: int | None = None
        self._model = model
        self._modules = dict(model.named_modules())
        self._loaded: dict[str, Adapter] = {}
        self._numbers = count(1)

    def find(self, name: str) -> Adapter:
        """Raises RequestError (404) if there is none of that name."""
        if name not in self._loaded:
            have = ", ".join(self._loaded) or "none"
            raise RequestError(f"there is no LoRA adapter {name!r} here; loaded: {have}", "lora_path", 404)
        return self._loaded[name]

    def load(self, name: str, path: str) -> Adapter:
        """Reads an adapter from a directory.

        Raises RequestError if the name is taken, ModelError if it doesn't fit this model, or memory.
        """
        if name in self._loaded:
            raise RequestError(f"a LoRA adapter {name!r} is loaded already", "lora_name")
        adapter = Adapter(name, f"{name}#{next(self._numbers)}", dict(self._read(Path(path).expanduser())))
        if self.room is not None:
            self._take_room(adapter)
        mx.eval([part for pair in adapter.layers.values() for part in pair])
        for at in adapter.layers:
            put_before(self._modules[at], _Adapted)
            object.__setattr__(self._modules[at], "_adapted_path", at)
        self._loaded[name], self.paths[name] = adapter, path
        return adapter

    def unload(self, name: str) -> None:
        """Forgets a name; raises as ``find``."""
        adapter = self.find(name)
        if self.room is not None:
            self.room += adapter.num_bytes
        del self._loaded[name], self.paths[name]

    def measure(self, path: str) -> int:
        """Bytes that an adapter will take, of which nothing but names and shapes is read; raises as ``load``."""
        return Adapter("", "", dict(self._read(Path(path).expanduser()))).num_bytes

    def _take_room(self, adapter: Adapter) -> None:
        room = self.room or 0
        if adapter.num_bytes > room:
            raise ModelError(
                f"the adapter takes {adapter.num_bytes / 1e6:.1f} MB, and {room / 1e6:.1f} MB are left beside what was"
                " planned at start: unload another, or start with this one in --lora-paths"
            )
        self.room = room - adapter.num_bytes

    def _read(self, path: Path) -> Iterator[tuple[str, LowRank]]:
        form = next((file for file in (PEFT, MLX) if (path / file).exists()), None)
        if form is None or not (path / CONFIG).exists():
            raise ModelError(f"{path} holds no LoRA adapter: it needs {CONFIG}, and {PEFT} (PEFT) or {MLX} (mlx-lm)")
        try:
            config = json.loads((path / CONFIG).read_text())
            weights: Any = mx.load(str(path / form))
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError(f"{path}: the adapter can't be read: {error}") from error
        pairs = _peft(config, dict(weights)) if form == PEFT else _mlx(config, dict(weights))
        found = list(pairs)
        if not found:
            raise ModelError(f"{path / form} changes no layer")
        for name, pair in found:
            yield self._place(name), self._fitting(self._place(name), pair)

    def _place(self, name: str) -> str:
        """The model's own path of a layer that an adapter calls ``name``."""
        for path in (name, f"language_model.{name}", f"model.{name}"):
            if isinstance(self._modules.get(path), (nn.Linear, nn.QuantizedLinear)):
                return path
        raise ModelError(f"the adapter changes {name}, which is no linear layer of this model")

    def _fitting(self, path: str, pair: LowRank) -> LowRank:
        layer = self._modules[path]
        width = layer.weight.shape[0]
        inner = layer.weight.shape[1] * (32 // layer.bits if isinstance(layer, nn.QuantizedLinear) else 1)
        (a_in, a_rank), (b_rank, b_out) = pair.a.shape, pair.b.shape
        if (a_in, b_out) != (inner, width) or a_rank != b_rank:
            raise ModelError(f"the adapter's {path} is {a_in} to {b_out}, and the model's {inner} to {width}")
        if path.rpartition(".")[2] in ("lm_head", "embed_tokens"):
            raise ModelError(f"the adapter changes {path}; heads and embeddings can't be changed a request")
        dtype = layer.scales.dtype if isinstance(layer, nn.QuantizedLinear) else layer.weight.dtype
        return LowRank(pair.a.astype(dtype), pair.b.astype(dtype))


def _peft(config: Mapping[str, Any], weights: dict[str, mx.array]) -> Iterator[tuple[str, LowRank]]:
    """PEFT's form: ``base_model.model.PATH.lora_A.weight`` [rank, in] and ``lora_B.weight`` [out, rank]."""
    if config.get("peft_type", "LORA") != "LORA":
        raise ModelError(f"the adapter is of PEFT's kind {config['peft_type']}; only LORA is served")
    for name, bad in (("use_dora", True), ("fan_in_fan_out", True)):
        if config.get(name) is bad:
            raise ModelError(f"the adapter has {name}, which isn't served")
    names = [n.removeprefix("base_model.model.") for n in weights]
    arrays = dict(zip(names, weights.values(), strict=True))
    if other := [n for n in names if not n.endswith((".lora_A.weight", ".lora_B.weight"))]:
        raise ModelError(f"the adapter brings {other[0]}; only low-rank parts of linear layers are served")
    for name in (n.removesuffix(".lora_A.weight") for n in names if n.endswith(".lora_A.weight")):
        a, b = arrays[f"{name}.lora_A.weight"].T, arrays[f"{name}.lora_B.weight"].T
        rank = _of_layer(config.get("rank_pattern"), name, config.get("r", a.shape[1]))
        alpha = _of_layer(config.get("alpha_pattern"), name, config.get("lora_alpha", rank))
        yield name, LowRank(a, b * (alpha / (rank**0.5 if config.get("use_rslora") else rank)))


def _of_layer(pattern: Any, name: str, default: Any) -> float:
    """A layer's own setting, which PEFT lists by the ends of names, or that of all."""
    own = [v for key, v in (pattern or {}).items() if name == key or name.endswith(f".{key}")]
    return float(own[0] if own else default)


def _mlx(config: Mapping[str, Any], weights: dict[str, mx.array]) -> Iterator[tuple[str, LowRank]]:
    """mlx-lm's form: ``PATH.lora_a`` [in, rank] and ``PATH.lora_b`` [rank, out]."""
    if (kind := config.get("fine_tune_type", "lora")) != "lora":
        raise ModelError(f"the adapter's fine_tune_type is {kind}; only lora is served")
    if other := [n for n in weights if not n.endswith((".lora_a", ".lora_b"))]:
        raise ModelError(f"the adapter brings {other[0]}; only low-rank parts of linear layers are served")
    scale = (config.get("lora_parameters") or {}).get("scale", 20.0)
    for name in (n.removesuffix(".lora_a") for n in weights if n.endswith(".lora_a")):
        yield name, LowRank(weights[f"{name}.lora_a"], weights[f"{name}.lora_b"] * float(scale))
