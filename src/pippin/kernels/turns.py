"""Rotary embedding on a CPU: what rotates a step's tokens is computed once, and used by every layer's queries and keys.

MLX's CPU backend makes ``mx.fast.rope`` of some twenty operations, sines and cosines among them: 44 µs a call however
few the tokens are, and a call for the queries and one for the keys of each layer. Here one such call makes a table, and
each of the others is a product with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx

_rope = mx.fast.rope
# Up to so many numbers one product with a permutation is faster than two slices and what joins them.
_FEW = 1 << 13


@dataclass(frozen=True, slots=True)
class Table:
    """What heads [.., rows, dim] are multiplied with: themselves by ``same``, their partners in a pair by ``other``.

    Both [n, 1, rows, dim] float32; the partner's sign is in ``other``, which is 0 for what is not rotated.
    """

    same: mx.array
    other: mx.array


class Rotations:
    """Stands in for ``mx.fast.rope`` during one forward; ``few`` numbers are swapped by a product, more by slices."""

    def __init__(self, few: int = _FEW) -> None:
        self._few = few
        self._tables: dict[tuple[object, ...], tuple[Table, object, object]] = {}

    def rope(
        self,
        x: mx.array,
        dims: int,
        *,
        traditional: bool,
        base: float | None,
        scale: float,
        offset: Any,
        freqs: mx.array | None = None,
        **options: Any,
    ) -> mx.array:
        """``mx.fast.rope`` of heads x [n, heads, rows, dim]; the same numbers, bit for bit."""
        if x.dtype != mx.float32 or x.ndim != 4 or options:
            return _rope(
                x, dims, traditional=traditional, base=base, scale=scale, offset=offset, freqs=freqs, **options
            )
        by = offset if isinstance(offset, int) else id(offset)
        key = x.shape[-2], x.shape[-1], dims, traditional, base, scale, by, id(freqs)
        found = self._tables.get(key)
        if found is None:  # holds offset and freqs: their identities stay theirs
            count = 1 if isinstance(offset, int) or offset.ndim == 0 else x.shape[0]
            unit = mx.broadcast_to(_units(dims, x.shape[-1], traditional), (count, 1, *x.shape[-2:]))
            turned = _rope(unit, dims, traditional=traditional, base=base, scale=scale, offset=offset, freqs=freqs)
            found = self._tables[key] = _table(turned, dims, traditional), offset, freqs
        table = found[0]
        return x * table.same + self._partners(x, dims, traditional) * table.other

    def _partners(self, x: mx.array, dims: int, traditional: bool) -> mx.array:
        """Each number's partner, as x; whatever for numbers that have none."""
        if x.size <= self._few:
            return x @ _swaps(dims, x.shape[-1], traditional)
        if traditional:
            pairs = x[..., :dims].reshape(*x.shape[:-1], dims // 2, 2)
            swapped = [pairs[..., ::-1].reshape(*x.shape[:-1], dims)]
        else:
            swapped = [x[..., dims // 2 : dims], x[..., : dims // 2]]
        return mx.concatenate([*swapped, x[..., dims:]] if dims < x.shape[-1] else swapped, axis=-1)


@cache
def _units(dims: int, dim: int, traditional: bool) -> mx.array:
    """[dim] with 1 for the first number of each pair, and beyond all pairs: rotated, a pair is (cos, sin)."""
    half = dims // 2
    pairs = [1.0, 0.0] * half if traditional else [1.0] * half + [0.0] * half
    return _kept(pairs + [1.0] * (dim - dims))


def _table(turned: mx.array, dims: int, traditional: bool) -> Table:
    half = dims // 2
    rest = turned[..., dims:]
    if traditional:
        pairs = turned[..., :dims].reshape(*turned.shape[:-1], half, 2)
        cos, sin = pairs[..., :1], pairs[..., 1:]
        shape = *turned.shape[:-1], dims
        same, other = (mx.concatenate(two, axis=-1).reshape(shape) for two in ([cos, cos], [-sin, sin]))
    else:
        cos, sin = turned[..., :half], turned[..., half:dims]
        same, other = (mx.concatenate(two, axis=-1) for two in ([cos, cos], [-sin, sin]))
    if dims < turned.shape[-1]:
        same, other = mx.concatenate([same, rest], axis=-1), mx.concatenate([other, mx.zeros_like(rest)], axis=-1)
    return Table(same, other)


@cache
def _swaps(dims: int, dim: int, traditional: bool) -> mx.array:
    """[dim, dim]: a product with it swaps the numbers of each pair, and gives 0 for those beyond."""
    half = dims // 2
    first = range(0, dims, 2) if traditional else range(half)
    apart = 1 if traditional else half
    matrix = [[0.0] * dim for _ in range(dim)]
    for i in first:
        matrix[i][i + apart] = matrix[i + apart][i] = 1.0
    return _kept(matrix)


def _kept(values: list[Any]) -> mx.array:
    """An array that is there already: a lazy one could not be used in another thread."""
    array = mx.array(values)
    mx.eval(array)
    return array


@contextmanager
def rotating() -> Iterator[None]:
    """Lets ``mx.fast.rope`` share what it computes, for the length of one forward."""
    fast: Any = mx.fast
    was, fast.rope = fast.rope, Rotations().rope
    try:
        yield
    finally:
        fast.rope = was
