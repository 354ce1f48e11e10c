"""Where Pippin meets mlx-lm's model classes, which run unmodified.

A model hands a cache object to every layer, calls ``scaled_dot_product_attention``, and ends in a head as wide as the
vocabulary. These three are all that is replaced: caches of ours go in, the attention function looks whether the
keys come from one of them, and the head is given only the rows whose logits somebody wants.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from types import FunctionType
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import activations, base, gemma3_text, gemma4_text
from mlx_lm.models.activations import SwigluOAI
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwiGLU, SwitchGLU, SwitchLinear

from pippin import kernels
from pippin.errors import ModelError
from pippin.kernels import Pairs, Routed, cpu, experts
from pippin.kernels.turns import rotating
from pippin.models.deferred import Attended, Fusions, Part, Residual, deferring, joined_gelu, joined_swiglu, settled
from pippin.models.early import EarlyQueue
from pippin.models.routing import Said, open_to_routing, routing

NO_FUSIONS = Fusions()


class LayerAttention(Protocol):
    """Attends for the layer that stored the keys: q [T, heads, 1, dim] to [T, heads, 1, value_dim]."""

    def attend(self, q: mx.array | Part, scale: float, mask: object, sinks: mx.array | None) -> mx.array | Attended: ...


class Adapted(Protocol):
    """What adapters add to some rows of a forward; see ``models.lora``."""

    def add(self, path: str, x: mx.array, y: mx.array, first: int = 0) -> mx.array: ...


class Seam:
    """What the hooks know of the forward under way.

    ``owners`` maps the identity of a keys array to the layer that stored it: layers that share another's K and V pass
    that layer's arrays and, some of them, no cache. ``selected`` [n] int32 are the flattened rows for the head.
    ``fusions`` says which values are deferred. ``pooled`` [m] int32 are flattened rows whose hidden states, as the head
    would get them, are to be kept in ``hidden`` [m, n]. ``adapted`` are adapters' rows, if there are any. ``early`` is
    told of each layer's attention, where a forward is begun before all of it is built.
    """

    def __init__(
        self,
        selected: mx.array | None,
        fusions: Fusions = NO_FUSIONS,
        pooled: mx.array | None = None,
        adapted: Adapted | None = None,
        early: EarlyQueue | None = None,
    ) -> None:
        self.owners: dict[int, tuple[mx.array | Part, LayerAttention]] = {}
        self.selected = selected
        self.fusions = fusions
        self.pooled = pooled
        self.hidden: mx.array | None = None
        self.adapted = adapted
        self.early = early

    def own(self, keys: mx.array | Part, layer: LayerAttention) -> None:
        """Claims ``keys``; holds the array too, so that its identity stays its own."""
        self.owners[id(keys)] = (keys, layer)

    def take(self, x: mx.array) -> mx.array:
        """Rows that the head is to see: [.., hidden] to [n, 1, hidden]."""
        if self.selected is None:
            return x
        rows = x.reshape(-1, 1, x.shape[-1])
        if self.pooled is not None:
            self.hidden = rows[self.pooled, 0]
        return rows[self.selected]


_active: ContextVar[Seam | None] = ContextVar("pippin_seam", default=None)
_one_expert: ContextVar[bool] = ContextVar("pippin_one_expert", default=False)
# What 1 and the next number are apart.
_LAST_BIT = {mx.bfloat16: 2**-7, mx.float16: 2**-10}
_off_by_a_rounding: ContextVar[bool] = ContextVar("pippin_off_by_a_rounding", default=False)
_original = base.scaled_dot_product_attention
_original_swiglu = activations.swiglu
_original_geglu = gemma4_text.geglu
_original_sum = gemma3_text.clip_residual


@contextmanager
def active(seam: Seam) -> Iterator[None]:
    """Sends the attention and the head of any model called inside through ``seam``."""
    token = _active.set(seam)
    try:
        with (
            deferring() if seam.fusions != NO_FUSIONS else rotating() if on_cpu() else nullcontext(),
            routing() if seam.fusions.experts else nullcontext(),
        ):
            yield
    finally:
        _active.reset(token)
        seam.owners.clear()  # layers and seam refer to each other: K and V would wait for the cycle collector


@contextmanager
def one_expert() -> Iterator[None]:
    """All tokens go to each layer's first expert, by the sum of the weights that they would give to theirs.

    For comparing forwards: where two experts are nearly as good, rounding decides, and numbers are no longer alike.
    """
    token = _one_expert.set(True)
    try:
        yield
    finally:
        _one_expert.reset(token)


@contextmanager
def off_by_a_rounding() -> Iterator[None]:
    """Attention of models that run by themselves is off by the last bit of 16, each number up or down.

    What that does to logits says how far other orders of the same operations may move them.
    """
    token = _off_by_a_rounding.set(True)
    try:
        yield
    finally:
        _off_by_a_rounding.reset(token)


def on_cpu() -> bool:
    """Whether what is built now runs on the CPU."""
    return bool(mx.default_device() == mx.Device(mx.cpu))


def fusing_now() -> bool:
    """Whether the forward under way puts operations together."""
    seam = _active.get()
    return seam is not None and seam.fusions != NO_FUSIONS


def adapted_now() -> Adapted | None:
    """The adapters' rows of the forward under way."""
    seam = _active.get()
    return None if seam is None else seam.adapted


def joins_now(names: tuple[str, ...]) -> bool:
    """Whether the forward under way takes parts of the joined projections of these names."""
    seam = _active.get()
    return seam is not None and names in seam.fusions.joined


def attention(
    queries: mx.array | Part,
    keys: mx.array | Part,
    values: mx.array | Part,
    cache: object,
    scale: float,
    mask: object = None,
    sinks: mx.array | None = None,
) -> mx.array | Attended:
    """Stands in for mlx-lm's ``scaled_dot_product_attention``, with its arguments."""
    seam = _active.get()
    out = _attention(seam, queries, keys, values, cache, scale, mask, sinks)
    if seam is not None and seam.early is not None:
        seam.early.built(out)
    return out


def _attention(
    seam: Seam | None,
    queries: mx.array | Part,
    keys: mx.array | Part,
    values: mx.array | Part,
    cache: object,
    scale: float,
    mask: object,
    sinks: mx.array | None,
) -> mx.array | Attended:
    owned = seam.owners.get(id(keys)) if seam is not None else None
    if owned is not None:
        return owned[1].attend(queries, scale, mask, sinks)
    if seam is not None and seam.owners:
        raise ModelError("its keys are changed between the cache and the attention call")
    arrays = settled(queries), settled(keys), settled(values)
    out: mx.array = _original(*arrays, cache=cache, scale=scale, mask=mask, sinks=sinks)
    if _off_by_a_rounding.get() and out.dtype in _LAST_BIT:
        bit = _LAST_BIT[out.dtype]
        out = out * mx.where(mx.arange(out.shape[-1]) % 2, 1 - bit / 2, 1 + bit).astype(out.dtype)
    return out


def swiglu(gate: mx.array | Part, x: mx.array | Part) -> mx.array:
    """Stands in for mlx-lm's ``swiglu``: of joined projections at once; on the CPU, float32 by ``kernels.cpu``."""
    if isinstance(gate, Part) and isinstance(x, Part):
        whole = joined_swiglu(gate, x)
        if whole is not None:
            return whole
    a: mx.array = settled(gate)
    b: mx.array = settled(x)
    if a.dtype == b.dtype == mx.float32 and on_cpu():
        return cpu.swiglu(a, b)
    out: mx.array = _original_swiglu(a, b)
    return out


def geglu(gate: mx.array | Part, x: mx.array | Part) -> mx.array:
    """Stands in for Gemma 4's function of that name, which is compiled and so takes arrays alone."""
    if isinstance(gate, Part):
        return joined_gelu(gate, x)
    out: mx.array = _original_geglu(gate, settled(x))
    return out


def sum_of_layers(x: mx.array | Residual, y: mx.array) -> mx.array | Residual:
    """Stands in for Gemma 3's ``clip_residual``, which is a sum but in float16."""
    if isinstance(x, Residual) and x.dtype != mx.float16:
        return x + y
    out: mx.array = _original_sum(settled(x), settled(y))
    return out


_STAND_INS: dict[int, Any] = {
    id(_original): attention,
    id(_original_swiglu): swiglu,
    id(_original_geglu): geglu,
    id(_original_sum): sum_of_layers,
}


def install(model: nn.Module, vocab_size: int) -> None:
    """Hooks a loaded model: attention, ``swiglu`` and the like in every file of models imported by now, quantized
    layers, head.

    Without an active seam, attention and head do exactly what they did. Installing twice changes nothing.
    """
    for namespace in _namespaces(model):
        for key, value in list(namespace.items()):
            namespace[key] = _STAND_INS.get(id(value)) or open_to_routing(value)
    for _, module in model.named_modules():
        if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
            put_before(module, _Flattening)
        if isinstance(module, (MultiLinear, QuantizedMultiLinear)):
            put_before(module, _ByHead)
        if isinstance(module, SwitchGLU):
            put_before(module, _Routing)
        if isinstance(module, (nn.Embedding, nn.QuantizedEmbedding)):
            put_before(module, _Deferring)
        if _is_head(module, vocab_size):
            put_before(module, _Selecting)


_classes: dict[tuple[type, type], type] = {}


def put_before(module: nn.Module, cls: type) -> None:
    """Gives a module a class that looks things up in ``cls`` first: one for all of a class, so that they stay alike."""
    own: type = type(module)
    if not isinstance(module, cls):
        name = f"{cls.__name__.strip('_')}{own.__name__}"
        module.__class__ = _classes.setdefault((cls, own), type(name, (cls, own), {}))


def _namespaces(model: nn.Module) -> list[dict[str, Any]]:
    """Globals of mlx-lm's model files and of the model's own: a checkpoint's file is not among ``sys.modules``."""
    found = [vars(module) for name, module in list(sys.modules.items()) if name.startswith("mlx_lm.models.")]
    classes = {cls for _, module in model.named_modules() for cls in type(module).__mro__}
    calls = [vars(cls).get("__call__") for cls in classes]
    found += [call.__globals__ for call in calls if isinstance(call, FunctionType)]
    return [namespace for namespace in found if namespace is not globals()]  # a hooked head's class is of this file


def _is_head(module: nn.Module, vocab_size: int) -> bool:
    weight = module.get("weight")
    return isinstance(weight, mx.array) and weight.ndim == 2 and weight.shape[0] == vocab_size


class _Selecting(nn.Module):  # type: ignore[misc]  # mlx.nn has no types
    """Put before a head's own class: a projection to the vocabulary computes the selected rows only."""

    def __call__(self, x: Any) -> Any:
        seam = _active.get()
        if seam is not None and mx.issubdtype(x.dtype, mx.floating):
            x = seam.take(x)
        return super().__call__(x)

    def as_linear(self, x: Any) -> Any:
        seam = _active.get()
        return super().as_linear(seam.take(x) if seam is not None else x)


class _Deferring(nn.Module):  # type: ignore[misc]  # mlx.nn has no types
    """Put before an embedding's own class: what it returns is where a residual sum begins."""

    def __call__(self, x: Any) -> Any:
        out, seam = super().__call__(x), _active.get()
        return Residual(out) if seam is not None and seam.fusions.residual else out


class _Flattening(nn.Module):  # type: ignore[misc]  # mlx.nn has no types
    """Put before a quantized layer's own class: its product gets rows [n, in], whatever lies around them.

    MLX's CUDA backend takes [n, 1, in] as n products of one row: 2.7 ms in place of 0.12 for 128 rows of 4096 by 12288.
    """

    def __call__(self, x: Any) -> Any:
        if not mx.issubdtype(x.dtype, mx.floating):
            return super().__call__(x)
        out = self._product(x)
        return out + self["bias"] if "bias" in self else out

    def as_linear(self, x: Any) -> Any:
        return self._product(x)

    def _product(self, x: Any) -> mx.array:
        out = kernels.quantized_product(x.reshape(-1, x.shape[-1]), weights_of(self))
        return out.reshape(*x.shape[:-1], -1) if x.ndim != 2 else out


class _ByHead(nn.Module):  # type: ignore[misc]  # mlx.nn has no types
    """Put before the class of a layer with a matrix a head: single tokens [T, heads, 1, in] are rows of its products.

    As they lie, each of them is a product of one row for each head.
    """

    def __call__(self, x: Any, transpose: bool = True) -> Any:
        if x.ndim != 4 or x.shape[2] != 1 or min(x.shape[:2]) == 1:
            return super().__call__(x, transpose)
        return super().__call__(x.transpose(2, 1, 0, 3), transpose).transpose(2, 1, 0, 3)


class _Routing(nn.Module):  # type: ignore[misc]  # mlx.nn has no types
    """Put before the class of a layer of experts: few rows go straight to their experts' weights, without a sort."""

    def __call__(self, x: Any, indices: Any) -> Any:
        seam, lead = _active.get(), indices.shape
        x, chosen = settled(x), settled(indices)
        if _one_expert.get():
            chosen = mx.zeros_like(chosen)
        pairs = self._said(x, chosen) if all(map(takes_pairs, (self.up_proj, self.gate_proj, self.down_proj))) else None
        if pairs is None:
            out = super().__call__(x, chosen)
            pairs = Pairs(out.reshape(-1, out.shape[-1]), chosen.reshape(-1).astype(mx.int32))
        said = Said(pairs, lead)
        return said if seam is not None and seam.fusions.experts else said.array()

    def _said(self, x: mx.array, chosen: mx.array) -> Pairs | None:
        each, indices = chosen.shape[-1], chosen.reshape(-1).astype(mx.int32)
        rows, bias = x.reshape(-1, x.shape[-1]), self.down_proj.get("bias")
        y = self._multiplied(rows, Routed(indices), each)
        if y is not None:
            return Pairs(y, indices, bias)
        order = experts.sort_pairs(indices, each, x.dtype)
        y = None if order is None else self._multiplied(rows[order.rows], Routed(order.experts, ordered=True), 1)
        return None if y is None or order is None else Pairs(y, indices, bias, order.places)

    def _multiplied(self, x: mx.array, routed: Routed, each: int) -> mx.array | None:
        """What the experts' last product makes of x, but for its bias; None where MLX wants another order."""
        inner = self._gated(x, routed, each)
        return None if inner is None else experts.product(inner, weights_of(self.down_proj), routed, 1)

    def _gated(self, x: mx.array, routed: Routed, each: int) -> mx.array | None:
        """What the experts' last product takes."""
        layers, form = (self.gate_proj, self.up_proj), gate_of(self.activation)
        gate, up = (weights_of(layer) for layer in layers)
        biases = tuple(layer["bias"] for layer in layers if "bias" in layer)
        if form is not None and gate.like(up) and len(biases) in (0, 2):
            made = experts.gated_product(x, kernels.Gated(gate, up, biases or None, form), routed, each)
            if made is not None:
                return made
        found = [experts.product(x, weights, routed, each) for weights in (gate, up)]
        both, of = zip(found, layers, strict=True), routed.indices
        pairs = [Pairs(y, of, layer.get("bias")) for y, layer in both if y is not None]
        if len(pairs) < 2:
            return None
        made = None if form is None else experts.expert_gate(pairs[0], pairs[1], form)
        return self.activation(*(p.in_order() for p in reversed(pairs))) if made is None else made


def gate_of(activation: object) -> kernels.Gate | None:
    """What a kernel knows to do as ``activation`` does, None for what it doesn't."""
    if isinstance(activation, SwigluOAI):
        return kernels.Gate(True, float(activation._alpha), float(activation._limit))
    return kernels.Gate() if type(activation) is SwiGLU else None


def takes_pairs(layer: nn.Module) -> bool:
    """Whether a layer of experts is a matrix for each, and perhaps a bias, without a scale of a whole tensor."""
    if type(layer) is QuantizedSwitchLinear:
        return layer.global_scale is None
    return type(layer) is SwitchLinear


def weights_of(layer: nn.Module) -> kernels.Weights:
    """A linear layer's matrix, or one's of experts, as the products of ``kernels`` take it."""
    if "scales" not in layer:
        return kernels.Weights(layer["weight"])
    found = layer["weight"], layer["scales"], layer.get("biases"), layer.bits, layer.group_size, layer.mode
    return kernels.Weights(*found)
