"""Which experts a token goes to, and the sum of what they say, as values that wait until one kernel can do all of it.

A model takes the largest of a router's logits (``mx.argpartition``), looks up their values, makes shares of these, and
sums its experts' rows by them: ten operations, each a launch. While values are deferred (``models.deferred``), what it
asks for is noted here; ``kernels.experts`` does it in one launch for the choice, and in one for the sum with the
residual and its norm. Whoever does anything else gets a plain array, of the operations that the model asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import wraps
from types import EllipsisType, FunctionType
from typing import Any

import mlx.core as mx

from pippin.kernels import Choice, Norm, Pairs, experts
from pippin.models.deferred import Deferred, Residual, Summand, settled

_argpartition, _take_along_axis, _stop_gradient = mx.argpartition, mx.take_along_axis, mx.stop_gradient
_softmax, _sum, _maximum, _expand_dims = mx.softmax, mx.sum, mx.maximum, mx.expand_dims

_on: ContextVar[bool] = ContextVar("pippin_routing", default=False)
_compiled: Any = type(mx.compile(lambda x: x))
# What a model may add to a sum before it divides by it.
_NEXT_TO_NOTHING = 1e-9


class Softmax(Deferred):
    """A softmax over the last axis of ``x``, or with ``negated`` its negative."""

    def __init__(self, x: mx.array, precise: bool, negated: bool = False) -> None:
        self.x = x
        self.negated = negated
        self._precise = precise
        self._made: mx.array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.x.shape)

    @property
    def ndim(self) -> int:
        return self.x.ndim

    @property
    def dtype(self) -> mx.Dtype:
        return self.x.dtype

    def __neg__(self) -> Softmax:
        return Softmax(self.x, self._precise, not self.negated)

    def array(self) -> mx.array:
        if self._made is None:
            found = _softmax(self.x, axis=-1, precise=self._precise)
            self._made = -found if self.negated else found
        return self._made


class Order(Deferred):
    """``mx.argpartition`` over the last axis of ``keys``."""

    def __init__(self, keys: mx.array | Softmax, kth: int) -> None:
        self._keys = keys
        self._kth = kth

    def __getitem__(self, index: Any) -> Any:
        match index:
            case (EllipsisType(), slice(start=int(first), stop=None, step=None)) if first == self._kth < 0:
                return self._chosen(-first, largest=True)
            case (EllipsisType(), slice(start=None, stop=int(count), step=None)) if count == self._kth + 1 > 0:
                return self._chosen(count, largest=False)
        return self.array()[index]

    def _chosen(self, count: int, largest: bool) -> Chosen:
        """Ends come as a stable sort leaves them: of equal keys the last ones are at the end."""
        keys = self._keys
        if not isinstance(keys, Softmax):
            choice = Choice(count, smallest=not largest, later=largest)
            return Chosen(Route(keys, keys, choice, lambda: self._plain(count, largest)))
        if keys.negated == largest:
            whole = keys.array()
            return Chosen(Route(whole, whole, Choice(count, not largest, largest), lambda: self._plain(count, largest)))
        choice = Choice(count, later=largest, before=True)
        return Chosen(Route(keys.x, keys, choice, lambda: self._plain(count, largest)))

    def _plain(self, count: int, largest: bool) -> mx.array:
        return self.array()[..., -count:] if largest else self.array()[..., :count]

    def array(self) -> mx.array:
        return _argpartition(settled(self._keys), self._kth, axis=-1)


class Route:
    """A choice of columns by ``keys``, and what it was last asked for: ``choice`` among ``values``.

    ``plain`` is what the model asked for.
    """

    def __init__(
        self, keys: mx.array, values: mx.array | Softmax, choice: Choice, plain: Callable[[], mx.array]
    ) -> None:
        self.keys = keys
        self.values = values
        self.choice = choice
        self._plain = plain
        self._indices: mx.array | None = None
        self._made: dict[tuple[int, Choice], mx.array] = {}

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.keys.shape[:-1], self.choice.chosen)

    def indices(self) -> mx.array:
        """As ``shape``; of the launch that also makes the shares, if they have been asked for."""
        if self._indices is None and self.shares(self.values, self.choice) is None:
            self._indices = self._plain()
        assert self._indices is not None
        return self._indices

    def shares(self, values: mx.array | Softmax, choice: Choice) -> mx.array | None:
        """As ``shape``; None where there is no kernel for it."""
        key = id(values), choice
        if key not in self._made:
            raw = self.keys if choice.before else settled(values)
            found = experts.route(self.keys, raw, choice)
            if found is None:
                return None
            indices, self._made[key] = (a.reshape(self.shape) for a in found)
            self._indices = indices if self._indices is None else self._indices
        return self._made[key]


class Chosen(Deferred):
    """The columns that were chosen."""

    def __init__(self, route: Route) -> None:
        self.route = route

    @property
    def shape(self) -> tuple[int, ...]:
        return self.route.shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        size = 1
        for n in self.shape:
            size *= n
        return size

    def array(self) -> mx.array:
        return self.route.indices()

    def values(self, of: mx.array | Softmax) -> Any:
        """What ``of``, a row as the keys', has in these columns."""
        route, known = self.route, self.route.values
        if of is known or (isinstance(of, Softmax) and isinstance(known, Softmax) and of.x is known.x):
            return Shares(route, of, route.choice)
        whole = settled(of)
        if whole.shape != route.keys.shape or whole.dtype != route.keys.dtype or route.choice.before:
            return _take_along_axis(whole, self.array(), axis=-1)
        return Shares(route, whole, route.choice)


class Shares(Deferred):
    """What each of those chosen counts for: ``values`` in their columns, and what is to be done with them."""

    def __init__(self, route: Route, values: mx.array | Softmax, choice: Choice) -> None:
        self._route = route
        self._values = values
        self._choice = choice
        route.values, route.choice = values, choice

    @property
    def shape(self) -> tuple[int, ...]:
        return self._route.shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> mx.Dtype:
        return self._values.dtype

    def _raw(self) -> bool:
        return not (self._choice.soft or self._choice.divided or self._choice.factor != 1.0)

    def softmax(self, precise: bool) -> Any:
        if not self._raw() or self._choice.before:
            return _softmax(self.array(), axis=-1, precise=precise)
        return Shares(self._route, self._values, replace(self._choice, soft=True))

    def sum(self, axis: Any = None, keepdims: bool = False) -> Any:
        return Total(self) if axis in (-1, self.ndim - 1) and keepdims else self.array().sum(axis, keepdims)

    def divided(self) -> Any:
        """Divided by their sum."""
        return Shares(self._route, self._values, replace(self._choice, divided=True))

    def __truediv__(self, other: Any) -> Any:
        if isinstance(other, Total) and other.shares is self and self._raw():
            return self.divided()
        return self.array() / settled(other)

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, (int, float)):
            return Shares(self._route, self._values, replace(self._choice, factor=self._choice.factor * other))
        return self.array() * settled(other)

    __rmul__ = __mul__

    def __getitem__(self, index: Any) -> Any:
        return Spread(self) if index == (Ellipsis, None) else self.array()[index]

    def astype(self, dtype: mx.Dtype) -> Any:
        return self if dtype == self.dtype else self.array().astype(dtype)

    def array(self) -> mx.array:
        found = self._route.shares(self._values, self._choice)
        if found is not None:
            return found
        shares = _take_along_axis(settled(self._values), self._route.indices(), axis=-1)
        if self._choice.soft:
            shares = _softmax(shares, axis=-1, precise=True)
        if self._choice.divided:
            shares = shares / shares.sum(axis=-1, keepdims=True)
        return shares if self._choice.factor == 1.0 else shares * self._choice.factor


class Total(Deferred):
    """The sum of shares [.., 1]."""

    def __init__(self, shares: Shares) -> None:
        self.shares = shares

    def __add__(self, other: Any) -> Any:
        little = isinstance(other, (int, float)) and abs(other) < _NEXT_TO_NOTHING
        return self if little else self.array() + settled(other)

    def array(self) -> mx.array:
        return self.shares.array().sum(axis=-1, keepdims=True)


class Spread(Deferred):
    """Shares [.., k, 1]."""

    def __init__(self, shares: Shares) -> None:
        self.shares = shares

    def array(self) -> mx.array:
        return self.shares.array()[..., None]


class Said(Deferred):
    """What experts say of tokens [.., k, n]: ``pairs``, whose biases are still to be added."""

    def __init__(self, pairs: Pairs, lead: Sequence[int]) -> None:
        self.pairs = pairs
        self.lead = tuple(lead)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.lead, self.pairs.y.shape[-1])

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> mx.Dtype:
        return self.pairs.y.dtype

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, Spread) and other.shares.shape == self.lead:
            return Weighed(self, other.shares)
        if isinstance(other, mx.array) and other.shape == (*self.lead, 1):
            return Weighed(self, other[..., 0])
        return self.array() * settled(other)

    __rmul__ = __mul__

    def array(self) -> mx.array:
        return self.pairs.in_order().reshape(self.shape)


class Weighed(Deferred):
    """What experts say, times their shares [.., k]."""

    def __init__(self, said: Said, shares: Shares | mx.array) -> None:
        self._said = said
        self._shares = shares

    @property
    def shape(self) -> tuple[int, ...]:
        return self._said.shape

    @property
    def ndim(self) -> int:
        return self._said.ndim

    @property
    def dtype(self) -> mx.Dtype:
        wide = mx.float32 in (self._said.dtype, self._shares.dtype)
        return mx.float32 if wide else self._said.dtype

    def sum(self, axis: Any = None, keepdims: bool = False) -> Any:
        if axis not in (-2, self.ndim - 2) or keepdims or self._shares.dtype not in (self._said.dtype, mx.float32):
            return self.array().sum(axis, keepdims)
        return Sum(self._said, self._shares, self.dtype)

    def array(self) -> mx.array:
        y: mx.array = self._said.array() * settled(self._shares)[..., None]
        return y


class Sum(Summand):
    """The sum of what experts say by their shares [.., n], as ``dtype``."""

    def __init__(self, said: Said, shares: Shares | mx.array, dtype: mx.Dtype) -> None:
        self._said = said
        self._shares = shares
        self._dtype = dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self._said.lead[:-1], self._said.shape[-1])

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> mx.Dtype:
        return self._dtype

    @property
    def _whole(self) -> bool:
        """Whether it is asked for as experts' own type, which is what kernels make."""
        return self._dtype == self._said.dtype

    def astype(self, dtype: mx.Dtype) -> Any:
        if dtype in (self._dtype, self._said.dtype):
            return Sum(self._said, self._shares, dtype)
        return self.array().astype(dtype)

    def _rows_of_shares(self) -> mx.array:
        found: mx.array = settled(self._shares).reshape(-1, self._said.lead[-1])
        return found

    def _summed(self, plus: mx.array | None) -> mx.array | None:
        if not self._whole:
            return None
        rows = None if plus is None else plus.reshape(-1, plus.shape[-1])
        found = experts.weighed_sum(self._said.pairs, self._rows_of_shares(), rows)
        return None if found is None else found.reshape(self.shape)

    def __add__(self, other: Any) -> Any:
        return other + self if isinstance(other, Residual) else self.added_to(settled(other))

    __radd__ = __add__

    def added_to(self, x: Any) -> mx.array:
        found = None
        if isinstance(x, mx.array) and tuple(x.shape) == self.shape and x.dtype == self._dtype:
            found = self._summed(x)
        return self.array() + x if found is None else found

    def normed_with(self, x: mx.array, norm: Norm) -> tuple[mx.array, mx.array] | None:
        if not self._whole or tuple(x.shape) != self.shape:
            return None
        return experts.add_weighed_rms_norm(x, self._said.pairs, self._rows_of_shares(), norm)

    def array(self) -> mx.array:
        found = self._summed(None)
        if found is None:
            found = Weighed(self._said, self._shares).array().sum(axis=-2).astype(self._dtype)
        return found


def _order_of(x: Any, kth: int, axis: int | None = -1, **options: Any) -> Any:
    plain = settled(x) if not isinstance(x, Softmax) else x
    last = axis in (-1, plain.ndim - 1)
    if not last or options or plain.ndim < 2 or not experts.may_route(plain.shape[-1], plain.dtype):
        return _argpartition(settled(x), kth, axis=axis, **options)
    return Order(plain, kth)


def _values_at(x: Any, indices: Any, axis: int | None = None, **options: Any) -> Any:
    if isinstance(indices, Chosen) and axis in (-1, indices.ndim - 1) and not options:
        return indices.values(x)
    return _take_along_axis(settled(x), settled(indices), axis=axis, **options)


def _without_gradient(x: Any, **options: Any) -> Any:
    return x if isinstance(x, Deferred) else _stop_gradient(x, **options)


def _softmax_of(x: Any, axis: Any = None, precise: bool = False, **options: Any) -> Any:
    if axis in (-1, x.ndim - 1) and not options:
        if isinstance(x, Shares):
            return x.softmax(precise)
        if isinstance(x, mx.array) and precise and x.ndim > 1 and experts.may_route(x.shape[-1], x.dtype):
            return Softmax(x, precise)
    return _softmax(settled(x), axis=axis, precise=precise, **options)


def _sum_of(x: Any, axis: Any = None, keepdims: bool = False, **options: Any) -> Any:
    if isinstance(x, (Shares, Weighed)) and not options:
        return x.sum(axis=axis, keepdims=keepdims)
    return _sum(settled(x), axis=axis, keepdims=keepdims, **options)


def _larger_of(x: Any, y: Any, **options: Any) -> Any:
    little = isinstance(y, (int, float)) and abs(y) < _NEXT_TO_NOTHING
    return x if isinstance(x, Total) and little else _maximum(settled(x), settled(y), **options)


def _with_axis(x: Any, axis: Any, **options: Any) -> Any:
    if isinstance(x, Shares) and axis in (-1, x.ndim):
        return x[..., None]
    return _expand_dims(settled(x), axis, **options)


_STAND_INS: dict[str, tuple[Any, Any]] = {
    "argpartition": (_argpartition, _order_of),
    "take_along_axis": (_take_along_axis, _values_at),
    "stop_gradient": (_stop_gradient, _without_gradient),
    "softmax": (_softmax, _softmax_of),
    "sum": (_sum, _sum_of),
    "maximum": (_maximum, _larger_of),
    "expand_dims": (_expand_dims, _with_axis),
}


@contextmanager
def routing() -> Iterator[None]:
    """Lets these functions of MLX's return what waits; for all else they are what they were."""
    whole: Any = mx
    token = _on.set(True)
    for name, (_, stand_in) in _STAND_INS.items():
        setattr(whole, name, stand_in)
    try:
        yield
    finally:
        for name, (own, _) in _STAND_INS.items():
            setattr(whole, name, own)
        _on.reset(token)


def open_to_routing(function: Any) -> Any:
    """``function``; one that is compiled and chooses experts runs as it was written, while what it returns may wait."""
    if type(function) is not _compiled or not set(function.__code__.co_names) & set(_STAND_INS):
        return function
    code, parts = function.__code__, (function.__name__, function.__defaults__, function.__closure__)
    written = FunctionType(code, function.__globals__, *parts)
    written.__kwdefaults__ = function.__kwdefaults__

    @wraps(written)
    def either(*arguments: Any, **options: Any) -> Any:
        return (written if _on.get() else function)(*arguments, **options)

    return either
