"""Bring a lazily loaded model into memory in the wanted form: as it is, cast, or quantized.

mlx-lm hands over weights that nobody has read yet. Each layer is cast and quantized while its weights are
still promises, then evaluated, then its sources are dropped: what is in memory at any time is the finished
part of the model and the few layers in the making.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from pippin.messages import Progress

logger = logging.getLogger(__name__)

GROUP_SIZE = 64
BITS = {"mlx_q4": 4, "mlx_4bit": 4, "mlx_q8": 8, "mlx_8bit": 8}
READ_AT_ONCE = 64 * 2**20
"""Bytes of weights evaluated together: enough to keep a disk busy, little beside a model."""


@dataclass(frozen=True, slots=True)
class Form:
    """What weights become: ``dtype`` None keeps the checkpoint's, ``bits`` None quantizes nothing."""

    dtype: mx.Dtype | None = None
    bits: int | None = None
    group_size: int = GROUP_SIZE


def materialize(model: nn.Module, form: Form, progress: Callable[[Progress], None] | None = None) -> None:
    """Evaluate all parameters of ``model`` in place, cast and quantized as ``form`` says.

    A class's ``cast_predicate`` (parameters that keep their dtype) and ``quant_predicate`` (layers that stay
    whole or get other bits) are honoured; layers whose rows don't divide by the group stay whole and are
    logged. ``progress`` gets the checkpoint's bytes done (stage ``load`` or ``quantize``).
    """
    stage, at_once = ("quantize", 2**20) if form.bits else ("load", READ_AT_ONCE)
    done, total = 0, weight_bytes(model)
    pending: list[Any] = []
    size = 0
    if progress:
        progress(Progress(stage, 0, total))
    for parameters, nbytes in _converted(model, form):
        pending.append(parameters)
        size += nbytes
        if size > at_once or done + size == total:
            mx.eval(pending)
            pending.clear()
            mx.clear_cache()  # the sources' buffers: freed, but kept by MLX for reuse
            done, size = done + size, 0
            if progress:
                progress(Progress(stage, done, total))
    mx.eval(model.parameters())


def convert_lazily(model: nn.Module, form: Form) -> None:
    """As ``materialize``, but all of it stays to be computed: for sizes alone."""
    for _ in _converted(model, form):
        pass


def _converted(model: nn.Module, form: Form) -> Iterator[tuple[Any, int]]:
    """Replace parameters by cast and quantized ones, still lazy; yield them with the bytes of their sources.

    Leaf modules come first, one at a time and leaving no reference behind, since that would keep the source
    in memory; then what their parents hold themselves (sinks, biases of routers), which is small.
    """
    cast, quantized = _caster(model, form.dtype), _quantizer(model, form)
    leaves = deque(tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module))
    done: set[str] = set()
    while leaves:
        path, module = leaves.popleft()
        nbytes = weight_bytes(module)
        arrays = {key: cast(f"{path}.{key}", a) for key, a in tree_flatten(module.parameters())}
        module.update(tree_unflatten(list(arrays.items())))
        del arrays
        module = quantized(path, module)
        model.update_modules(tree_unflatten([(path, module)]))
        done.update(f"{path}.{key}" for key, _ in tree_flatten(module.parameters()))
        yield module.parameters(), nbytes
    rest = [(key, a) for key, a in tree_flatten(model.parameters()) if key not in done]
    cast_rest = [(key, cast(key, a)) for key, a in rest]
    if rest:
        model.update(tree_unflatten(cast_rest))
        yield [a for _, a in cast_rest], sum(a.nbytes for _, a in rest)


def _caster(model: nn.Module, dtype: mx.Dtype | None) -> Callable[[str, mx.array], mx.array]:
    """A function of a parameter's path and value that casts what may be cast.

    Packed weights are integers and so stay; affine scales and biases are cast. nvfp4's tensor scale is
    float32 by definition.
    """
    allowed: Callable[[str], bool] = getattr(model, "cast_predicate", lambda _: True)

    def cast(path: str, array: mx.array) -> mx.array:
        if dtype is None or not mx.issubdtype(array.dtype, mx.floating):
            return array
        return array.astype(dtype) if allowed(path) and not path.endswith(".global_scale") else array

    return cast


def _quantizer(model: nn.Module, form: Form) -> Callable[[str, nn.Module], nn.Module]:
    """A function of a leaf module's path and itself that gives its quantized form, or itself to stay whole."""
    choose: Callable[[str, nn.Module], bool | dict[str, Any]] = getattr(model, "quant_predicate", lambda *_: True)

    def quantized(path: str, module: nn.Module) -> nn.Module:
        if form.bits is None or not hasattr(module, "to_quantized") or not (choice := choose(path, module)):
            return module
        settings = {"group_size": form.group_size, "bits": form.bits} | (choice if isinstance(choice, dict) else {})
        if (width := module.weight.shape[-1]) % settings["group_size"]:
            logger.warning(
                "%s stays unquantized: its rows of %d don't divide by %d", path, width, settings["group_size"]
            )
            return module
        smaller: nn.Module = module.to_quantized(**settings)
        return smaller

    return quantized


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, evaluated or not."""
    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))


def quantization_of(model: nn.Module) -> str | None:
    """How layers are quantized, e.g. ``4-bit affine, group 64``: what most bytes are; None if none is."""
    kinds: Counter[str] = Counter()
    for _, module in model.named_modules():
        if "scales" in module and hasattr(module, "bits"):
            kinds[f"{module.bits}-bit {module.mode}, group {module.group_size}"] += module.weight.nbytes
        elif type(module).__name__ == "BitLinear":
            kinds["bitnet"] += module.weight.nbytes
    return kinds.most_common(1)[0][0] if kinds else None
