"""Projections of one input as one product: q, k and v, or gate and up.

Which ones are found by watching a forward: layers side by side in one module that are called with the same array, one
after the other; and single ones whose output the model splits by itself. Their weights become rows of one array, of
which each keeps its own, so nothing is stored twice and each alone computes what it did. While a forward defers values
(``seam.Seam.fusions``), the first of them computes all, and each passes on its part.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from pippin.models.deferred import Part, Source, settled
from pippin.models.seam import adapted_now, fusing_now, joins_now, put_before


class Group:
    """Layers whose weights are rows of one: ``whole`` computes them all, ``firsts`` says where each begins.

    ``paths`` are the layers' in the model, ``names`` the ends of these.
    """

    def __init__(self, paths: tuple[str, ...], whole: nn.Module, firsts: Sequence[int], widths: Sequence[int]) -> None:
        self.names = tuple(path.rpartition(".")[2] for path in paths)
        self._paths = paths
        self.whole = whole
        self._parts = list(zip(firsts, widths, strict=True))
        self._input: mx.array | None = None
        self._source: Source | None = None

    def part(self, index: int, x: mx.array) -> Part:
        """What layer ``index`` makes of ``x``: the product is asked for once an x, and forgotten after the last."""
        if self._source is None or self._input is not x:
            self._input, self._source = x, Source(self._product(x))
        part = Part(self._source, *self._parts[index])
        if index == len(self._parts) - 1:
            self._input = self._source = None
        return part

    def _product(self, x: mx.array) -> mx.array:
        y: mx.array = self.whole(x)
        if (adapted := adapted_now()) is not None:
            for path, (first, _) in zip(self._paths, self._parts, strict=True):
                y = adapted.add(path, x, y, first)
        return y


class _Joining(nn.Module):  # type: ignore[misc]  # mlx.nn has no types
    """Put before a layer's own class: while values are deferred, its output is a part of its group's."""

    def __call__(self, x: Any) -> Any:
        group, index = self._place
        if joins_now(group.names):
            return group.part(index, settled(x))
        return super().__call__(settled(x))


def join(model: nn.Module, forward: Callable[[], object]) -> frozenset[tuple[str, ...]]:
    """Joins what ``forward``, a run of the model, shows to belong together; returns the names of what was joined."""
    found = set()
    paths = {id(m): path for path, m in model.named_modules()}
    calls, split = _calls(model, forward)
    groups = _groups(paths, calls, split)
    calls.clear()  # what was not computed holds the weights that are replaced, and classes wait for the cycle collector
    for layers in groups:
        places = tuple(paths[id(layer)] for layer in layers)
        found.add(tuple(place.rpartition(".")[2] for place in places))
        if all(isinstance(layer, _Joining) for layer in layers):
            continue
        whole, firsts, widths = _joined(layers)
        _turn(whole)
        group = Group(places, whole, firsts, widths)
        for i, layer in enumerate(layers):
            put_before(layer, _Joining)
            object.__setattr__(layer, "_place", (group, i))
    for _, layer in model.named_modules():
        if not isinstance(layer, _Joining):
            _turn(layer)
        _add_one_ahead(layer)
    return frozenset(found)


def wholes(model: nn.Module) -> list[nn.Module]:
    """The layers that compute joined ones together, each once."""
    groups = {id(m._place[0]): m._place[0] for _, m in model.named_modules() if isinstance(m, _Joining)}
    return [group.whole for group in groups.values()]


class _Summed(nn.Module):  # type: ignore[misc]  # mlx.nn has no types
    """Put before the class of a norm by 1 + weight (Gemma's): that sum is kept, not made each time."""

    def __call__(self, x: Any) -> Any:
        return mx.fast.rms_norm(x, self._sum, self.eps) if fusing_now() else super().__call__(x)


def _add_one_ahead(norm: nn.Module) -> None:
    """Whether a module is such a norm is seen from what it makes of some numbers."""
    weight, arguments = norm.get("weight"), inspect.signature(type(norm).__call__).parameters
    if not isinstance(weight, mx.array) or weight.ndim != 1 or "eps" not in vars(norm) or len(arguments) != 2:
        return
    x = mx.random.normal((1, weight.size), key=mx.random.key(5)).astype(weight.dtype)
    added = 1.0 + weight
    if type(norm) is not nn.RMSNorm and mx.array_equal(norm(x), mx.fast.rms_norm(x, added, norm.eps)).item():
        put_before(norm, _Summed)
        object.__setattr__(norm, "_sum", added)


class _Turned(nn.Module):  # type: ignore[misc]  # mlx.nn has no types
    """Put before a linear layer's own class: its weight is kept as the product takes it, not transposed each time."""

    def __call__(self, x: Any) -> Any:
        if not fusing_now():
            return super().__call__(x)
        x, weight = settled(x), self._turned
        return mx.addmm(self["bias"], x, weight) if "bias" in self else x @ weight


def _turn(layer: nn.Module) -> None:
    if type(layer).__call__ is nn.Linear.__call__:
        turned = layer.weight.T
        mx.eval(turned)
        put_before(layer, _Turned)
        object.__setattr__(layer, "_turned", turned)


class _Call(NamedTuple):
    """A layer was called with ``x`` and gave ``y``."""

    layer: nn.Module
    x: Any
    y: Any


class _Watching(nn.Module):  # type: ignore[misc]  # mlx.nn has no types
    """Put before a layer's own class: notes who is called with what, for a moment."""

    seen: list[_Call]

    def __call__(self, x: Any) -> Any:
        y = super().__call__(x)
        self.seen.append(_Call(self, x, y))
        return y


def _calls(model: nn.Module, forward: Callable[[], object]) -> tuple[list[_Call], list[nn.Module]]:
    """Calls of layers that can be joined, in order, and the layers whose outputs the model splits."""
    seen: list[_Call] = []
    cut: list[Any] = []
    split, whole = mx.split, cast(Any, mx)

    def noted(x: Any, *arguments: Any, **options: Any) -> Any:
        cut.append(x)
        return split(x, *arguments, **options)

    watched = [m for _, m in model.named_modules() if isinstance(m, (nn.Linear, nn.QuantizedLinear))]
    classes = {id(m): m.__class__ for m in watched}
    for m in watched:
        m.__class__ = type("Watched", (_Watching, m.__class__), {"seen": seen})
    whole.split = noted
    try:
        forward()
    finally:
        whole.split = split
        for m in watched:
            m.__class__ = classes[id(m)]
    ids = {id(x) for x in cut}
    return seen, [call.layer for call in seen if id(call.y) in ids]


def _groups(paths: dict[int, str], calls: Sequence[_Call], split: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """Runs of different layers of one module that take the same array and differ only in how wide their output is.

    Layers in ``split`` stand for some that are joined already.
    """
    runs: list[tuple[Any, Any, list[nn.Module]]] = []
    used: set[int] = set()
    for layer, x, _ in calls:
        if id(layer) in used:
            continue
        used.add(id(layer))
        kind = (paths[id(layer)].rpartition(".")[0], _kind(layer))
        if runs and runs[-1][0] is x and runs[-1][1] == kind:
            runs[-1][2].append(layer)
        else:
            runs.append((x, kind, [layer]))
    alone = {id(layer) for layer in split}
    return [layers for _, _, layers in runs if len(layers) > 1 or id(layers[0]) in alone]


def _kind(layer: nn.Module) -> tuple[object, ...]:
    """What two layers must share to be rows of one: class, settings, and all parameters' shapes but the first axis."""
    settings = sorted((k, repr(v)) for k, v in vars(layer).items() if not k.startswith("_"))
    parameters = sorted((name, a.shape[1:], str(a.dtype)) for name, a in tree_flatten(layer.parameters()))
    return layer.__class__, tuple(settings), tuple(parameters)


def _joined(layers: Sequence[nn.Module]) -> tuple[nn.Module, list[int], list[int]]:
    """(one layer of all rows, where each begins, how many it has); the layers' own arrays become views of it."""
    whole = copy.copy(layers[0])
    widths = [layer.weight.shape[0] for layer in layers]
    firsts = [sum(widths[:i]) for i in range(len(widths))]
    for name, _ in tree_flatten(layers[0].parameters()):
        rows = mx.concatenate([layer[name] for layer in layers])
        mx.eval(rows)
        whole[name] = rows
        for layer, first, width in zip(layers, firsts, widths, strict=True):
            layer[name] = rows[first : first + width]
        mx.eval([layer[name] for layer in layers])
    return whole, firsts, widths
