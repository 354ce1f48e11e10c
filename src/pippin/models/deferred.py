"""Values that a model passes on before they are computed, so that one kernel can do what it asks for step by step.

A model asks for a projection, splits it into heads, norms and rotates them, and hands them to its cache: five
operations, of some 6 µs each on a GPU however small they are. Here the projection's hook (``joined``) returns a
``Part``, which only notes what it is asked for; our cache does all of it at once (``kernels.rope_kv_write``). A
``Residual`` likewise waits with a sum until it is normed. Whoever does anything else with one gets a plain array that
MLX has computed as ever; a model that does so where that can't be seen fails in the probe, and is served without.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from pippin import kernels
from pippin.kernels import Norm, Rope

_rms_norm = mx.fast.rms_norm
_layer_norm = mx.fast.layer_norm
_rope = mx.fast.rope
_split = mx.split
_gelu_approx = nn.gelu_approx


@dataclass(frozen=True, slots=True)
class Fusions:
    """Which values a model's forward may defer: the residual sum, projections, ``joined`` by their names, and what
    ``experts`` are chosen and say (``models.routing``)."""

    residual: bool = False
    joined: frozenset[tuple[str, ...]] = frozenset()
    experts: bool = False


class Deferred:
    """What stands in for an array [.., n]; ``array`` computes it."""

    def array(self) -> mx.array:
        raise NotImplementedError

    def __mlx_array__(self) -> mx.array:
        return self.array()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.array(), name)


def _operator(name: str) -> Callable[..., Any]:
    def operate(self: Deferred, *arguments: Any) -> Any:
        return getattr(self.array(), name)(*map(settled, arguments))

    return operate


for _name in ("add", "sub", "mul", "truediv", "matmul", "pow"):
    for _side in ("", "r"):
        setattr(Deferred, f"__{_side}{_name}__", _operator(f"__{_side}{_name}__"))
for _name in ("neg", "getitem", "lt", "le", "gt", "ge"):
    setattr(Deferred, f"__{_name}__", _operator(f"__{_name}__"))


def settled(x: Any) -> Any:
    """``x``, as an array if it is deferred."""
    return x.array() if isinstance(x, Deferred) else x


@dataclass(frozen=True, eq=False)
class Source:
    """A joined projection's output ``y`` [B, L, n], of which parts are passed on."""

    y: mx.array


@dataclass(frozen=True, eq=False)
class Turn:
    """A rotation that was asked for, and by which positions."""

    rope: Rope
    offset: Any


class Stretch(NamedTuple):
    """A head's first ``dims`` numbers are to be multiplied ``by`` this."""

    dims: int
    by: float


class _At:
    """What ``Part.at`` gives."""

    def __init__(self, part: Part, index: Any = None) -> None:
        self._part = part
        self._index = index

    def __getitem__(self, index: Any) -> Any:
        return _At(self._part, index)

    def multiply(self, by: Any) -> Any:
        match self._index:
            case (builtins.Ellipsis, slice(start=None, stop=int(dims), step=None)) if isinstance(by, (int, float)):
                return self._part.stretched(Stretch(min(dims, self._part.dim), float(by)))
        return self._part.array().at[self._index].multiply(by)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part.array().at[self._index], name)


@dataclass(slots=True, eq=False)
class Part(Deferred):
    """``width`` numbers of each row of a source, from ``first`` on, and what is to be done with them.

    ``heads`` is 0 until they are split into heads [B, L, heads, dim]; ``swapped`` if heads come before tokens.
    """

    source: Source
    first: int
    width: int
    heads: int = 0
    swapped: bool = False
    norm: Norm | None = None
    stretch: Stretch | None = None
    turn: Turn | None = None

    def _copy(self) -> Part:
        """Another one to change: ``dataclasses.replace`` would take a tenth of the time that building a step takes."""
        return Part(self.source, self.first, self.width, self.heads, self.swapped, self.norm, self.stretch, self.turn)

    @property
    def dim(self) -> int:
        return self.width // max(1, self.heads)

    @property
    def shape(self) -> tuple[int, ...]:
        batch, rows = self.source.y.shape[:2]
        if not self.heads:
            return batch, rows, self.width
        return (batch, self.heads, rows, self.dim) if self.swapped else (batch, rows, self.heads, self.dim)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> mx.Dtype:
        return self.source.y.dtype

    def reshape(self, *shape: Any) -> Any:
        given = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
        batch, rows = self.source.y.shape[:2]
        if not self.heads and len(given) == 4 and given[:2] == (batch, rows):
            heads = given[2] if given[2] != -1 else self.width // given[3]
            if heads > 0 and self.width % heads == 0 and given[3] in (-1, self.width // heads):
                split = self._copy()
                split.heads = heads
                return split
        return self.array().reshape(*shape)

    def transpose(self, *axes: Any) -> Any:
        given = tuple(axes[0]) if len(axes) == 1 and isinstance(axes[0], (tuple, list)) else axes
        if self.heads and not self.swapped and given == (0, 2, 1, 3):
            swapped = self._copy()
            swapped.swapped = True
            return swapped
        return self.array().transpose(*axes)

    def swapaxes(self, first: int, second: int) -> Any:
        return self.transpose(0, 2, 1, 3) if {first, second} == {1, 2} else self.array().swapaxes(first, second)

    def astype(self, dtype: mx.Dtype) -> Any:
        return self if dtype == self.dtype else self.array().astype(dtype)

    def normed(self, weight: mx.array | None, eps: float) -> Any:
        """This, normed over a head; an array if that is not what is asked for."""
        plain = self.heads and self.norm is None and self.stretch is None and self.turn is None
        if plain and weight is not None and weight.shape == (self.dim,) and weight.dtype == self.dtype:
            normed = self._copy()
            normed.norm = Norm(weight, eps)
            return normed
        return _rms_norm(self.array(), weight, eps)

    def turned(self, turn: Turn) -> Part | None:
        """This, rotated; None if only an array can be."""
        fits = self.swapped and self.turn is None and turn.rope.dims <= self.dim and self.source.y.shape[1] == 1
        if not fits or (self.stretch is not None and self.stretch.dims != turn.rope.dims):
            return None
        turned = self._copy()
        turned.turn, turned.stretch = turn, None
        if self.stretch is not None:
            turned.turn = replace(turn, rope=replace(turn.rope, length=self.stretch.by))
        return turned

    @property
    def at(self) -> Any:
        """``mx.array.at``, of which the stretching of what will be rotated is noted."""
        return _At(self) if self.heads and self.stretch is None and self.turn is None else self.array().at

    def split(self, bounds: Sequence[int]) -> list[Part]:
        """What lies between these numbers of each row, which has no heads yet."""
        return [Part(self.source, self.first + a, b - a) for a, b in pairwise([0, *bounds, self.width])]

    def stretched(self, stretch: Stretch) -> Part:
        """This with its heads' first numbers multiplied."""
        longer = self._copy()
        longer.stretch = stretch
        return longer

    def array(self) -> mx.array:
        x = self.source.y[..., self.first : self.first + self.width]
        if self.heads:
            x = x.reshape(*x.shape[:2], self.heads, -1)
        if self.norm is not None:
            x = _rms_norm(x, *self.norm)
        if self.swapped:
            x = x.transpose(0, 2, 1, 3)
        if self.stretch is not None:
            x = x.at[..., : self.stretch.dims].multiply(self.stretch.by)
        if self.turn is not None:
            rope = self.turn.rope
            if rope.length != 1:
                x = x.at[..., : rope.dims].multiply(rope.length)
            x = _rope(
                x,
                rope.dims,
                traditional=rope.traditional,
                base=rope.base,
                scale=rope.scale,
                offset=self.turn.offset,
                freqs=rope.periods,
            )
        return x


@dataclass(frozen=True, eq=False)
class Attended(Deferred):
    """What attention gave, ``y`` [T, 1, heads * dim]: seen as [T, heads, 1, dim] until heads are joined again."""

    y: mx.array
    heads: int
    swapped: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        rows, dim = self.y.shape[0], self.y.shape[2] // self.heads
        return (rows, 1, self.heads, dim) if self.swapped else (rows, self.heads, 1, dim)

    @property
    def dtype(self) -> mx.Dtype:
        return self.y.dtype

    def transpose(self, *axes: Any) -> Any:
        given = tuple(axes[0]) if len(axes) == 1 and isinstance(axes[0], (tuple, list)) else axes
        return replace(self, swapped=not self.swapped) if given == (0, 2, 1, 3) else self.array().transpose(*axes)

    def swapaxes(self, first: int, second: int) -> Any:
        return self.transpose(0, 2, 1, 3) if {first, second} == {1, 2} else self.array().swapaxes(first, second)

    def reshape(self, *shape: Any) -> Any:
        given = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
        joined = len(given) == 3 and given[:2] == self.y.shape[:2] and given[2] in (-1, self.y.shape[2])
        return self.y if joined else self.array().reshape(*shape)

    def array(self) -> mx.array:
        return self.y.reshape(self.shape)


class Summand(Deferred):
    """What may be added to a residual sum and normed with it at once."""

    @property
    def shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def dtype(self) -> mx.Dtype:
        raise NotImplementedError

    def added_to(self, x: mx.array) -> mx.array:
        """x + this."""
        raise NotImplementedError

    def normed_with(self, x: mx.array, norm: Norm) -> tuple[mx.array, mx.array] | None:
        """(x + this, that normed); None where that is no single kernel."""
        raise NotImplementedError


class Residual(Deferred):
    """A sum that may still wait to be computed together with its norm."""

    def __init__(self, x: mx.array, r: mx.array | Summand | None = None) -> None:
        self._x = x
        self._r = r

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._x.shape)

    @property
    def ndim(self) -> int:
        return self._x.ndim

    @property
    def dtype(self) -> mx.Dtype:
        return self._x.dtype

    def array(self) -> mx.array:
        if self._r is not None:
            r, self._r = self._r, None
            self._x = r.added_to(self._x) if isinstance(r, Summand) else self._x + r
        return self._x

    def normed(self, weight: mx.array | None, eps: float) -> mx.array:
        if self._r is None or weight is None or self._r.shape != self._x.shape:
            return _rms_norm(self.array(), weight, eps)
        norm, r = Norm(weight, eps), self._r
        made = r.normed_with(self._x, norm) if isinstance(r, Summand) else None
        self._x, out = made if made is not None else kernels.add_rms_norm(self._x, settled(r), norm)
        self._r = None
        return out

    def __mul__(self, other: Any) -> Residual:
        return Residual(self.array() * settled(other))

    __rmul__ = __mul__

    def __add__(self, other: Any) -> Residual:
        if isinstance(other, Summand) and other.dtype == self.dtype:
            return Residual(self.array(), other)
        more = settled(other)
        return Residual(self.array(), more) if isinstance(more, mx.array) else Residual(self.array() + more)

    __radd__ = __add__


class Gelu(Deferred):
    """A part's gelu, in its tanh form, until it is multiplied with another part."""

    def __init__(self, gate: Part) -> None:
        self._gate = gate

    @property
    def shape(self) -> tuple[int, ...]:
        return self._gate.shape

    @property
    def dtype(self) -> mx.Dtype:
        return self._gate.dtype

    def array(self) -> mx.array:
        out: mx.array = _gelu_approx(self._gate.array())
        return out

    def __mul__(self, other: Any) -> mx.array:
        return joined_gelu(self._gate, other)

    __rmul__ = __mul__


def joined_gelu(gate: Part, up: Any) -> mx.array:
    """gelu(gate) * up, in its tanh form."""
    if isinstance(up, Part) and _are_whole(gate, up):
        return kernels.geglu(gate.source.y)
    out: mx.array = _gelu_approx(gate.array()) * settled(up)
    return out


def joined_swiglu(gate: Part, up: Part) -> mx.array | None:
    """silu(gate) * up, if the two are a whole source, gate first; None otherwise."""
    return kernels.swiglu(gate.source.y) if _are_whole(gate, up) else None


def _are_whole(gate: Part, up: Part) -> bool:
    width = gate.width
    places = (gate.first, up.first, up.width, gate.source.y.shape[-1])
    return gate.source is up.source and places == (0, width, width, 2 * width) and not gate.heads and not up.heads


def _norm_of_rows(x: Any, weight: mx.array | None, eps: float, **options: Any) -> Any:
    return x.normed(weight, eps) if isinstance(x, (Part, Residual)) else _rms_norm(x, weight, eps, **options)


def _layer_norm_of_rows(x: Any, *arguments: Any, **options: Any) -> mx.array:
    return _layer_norm(settled(x), *arguments, **options)


def _rope_of_heads(
    x: Any,
    dims: int,
    *,
    traditional: bool,
    base: float | None,
    scale: float,
    offset: Any,
    freqs: mx.array | None = None,
    **options: Any,
) -> Any:
    if isinstance(x, Part):
        turned = x.turned(Turn(Rope(dims, traditional, base, scale, freqs), offset))
        if turned is not None:
            return turned
    return _rope(
        settled(x), dims, traditional=traditional, base=base, scale=scale, offset=offset, freqs=freqs, **options
    )


def _gelu_of_part(x: Any) -> Any:
    return Gelu(x) if isinstance(x, Part) and not x.heads else _gelu_approx(settled(x))


def _split_parts(x: Any, parts: int | Sequence[int], axis: int = 0, **options: Any) -> Any:
    if not isinstance(x, Part) or x.heads or axis not in (-1, x.ndim - 1):
        return _split(settled(x), parts, axis, **options)
    if not isinstance(parts, int):
        return x.split(parts)
    if x.width % parts:
        return _split(x.array(), parts, axis, **options)
    return x.split(range(x.width // parts, x.width, x.width // parts))


@contextmanager
def deferring() -> Iterator[None]:
    """Lets ``mx.fast``'s norms and rotation, ``mx.split`` and gelu take deferred values; for all else they stay."""
    fast: Any = mx.fast
    whole: Any = mx
    fast.rms_norm, fast.layer_norm, fast.rope = _norm_of_rows, _layer_norm_of_rows, _rope_of_heads
    whole.split, nn.gelu_approx = _split_parts, _gelu_of_part
    try:
        yield
    finally:
        fast.rms_norm, fast.layer_norm, fast.rope = _rms_norm, _layer_norm, _rope
        whole.split, nn.gelu_approx = _split, _gelu_approx
