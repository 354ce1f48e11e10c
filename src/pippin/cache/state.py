"""What a model keeps that is not a K and a V a token: recurrent states, one for each running request, and snapshots.

Nothing is written in place. A step's states are new arrays, one stack for all the rows that ran together, and a row is
a line of its stack: while the same requests decode, the next step takes the stack as it is, without a copy. A
snapshot at a chunk's end is that chunk's own arrays: keeping it costs no time. Whoever still holds an array, a step in
flight for one, has what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache

from pippin.cache.layout import StateShape
from pippin.types import Work

Arrays = list[list[mx.array | None]]


@dataclass(frozen=True, slots=True, eq=False)
class _Stack:
    """Arrays [count, …] of each recurrent cache, for ``count`` rows that ran together."""

    arrays: Arrays
    count: int

    def take(self, lines: Sequence[int]) -> _Stack:
        """The stack of those lines only."""
        if list(lines) == list(range(self.count)):
            return self
        if len(lines) == 1:
            return self.map(lambda x: x[lines[0] : lines[0] + 1], 1)
        index = mx.array([*lines], dtype=mx.int32)
        return self.map(lambda x: x[index], len(lines))

    def map(self, change: Callable[[mx.array], mx.array], count: int) -> _Stack:
        return _Stack([[None if x is None else change(x) for x in cache] for cache in self.arrays], count)


@dataclass(frozen=True, slots=True, eq=False)
class OpenStates:
    """The states of one forward's works, as the model's caches; it leaves the new ones in them."""

    works: tuple[Work, ...]
    caches: tuple[ArraysCache, ...]


class StateStore:
    """States of running requests by row, and snapshots by id; see the module. A ``snapshots.StateKeeper``."""

    def __init__(self, shapes: Sequence[StateShape]) -> None:
        self.shapes = tuple(shapes)
        self._rows: dict[int, tuple[_Stack, int]] = {}
        self._kept: dict[int, _Stack] = {}
        self._new: list[mx.array] = []

    @property
    def num_kept(self) -> int:
        return len(self._kept)

    def open(self, works: Sequence[Work]) -> OpenStates:
        """The states that works begin with, in this order. Works that begin a prompt come one at a time.

        Raises AssertionError for a work that goes on with what its row does not have.
        """
        caches = [ArraysCache(len(shape.arrays)) for shape in self.shapes]
        if works[0].start or len(works) > 1:
            stack = _gather([self._source(work) for work in works])
            for cache, arrays in zip(caches, stack.arrays, strict=True):
                cache.cache = list(arrays)
        return OpenStates(tuple(works), tuple(caches))

    def close(self, opened: OpenStates) -> None:
        """Takes the states that a forward left in its caches, and keeps the snapshots that its works ask for."""
        stack = _Stack([list(cache.cache) for cache in opened.caches], len(opened.works))
        if opened.works[0].end - opened.works[0].start > 1:
            stack = stack.map(mx.contiguous, stack.count)  # a view of the whole chunk would keep all of it alive
        self._new += _arrays(stack)
        for line, work in enumerate(opened.works):
            self._rows[work.request.row] = stack, line
            if work.save is not None:
                self._keep(work.save, stack, line)

    def keep(self, row: int, id: int) -> None:
        self._keep(id, *self._rows[row])

    def drop(self, id: int) -> None:
        self._kept.pop(id, None)

    def release(self, row: int) -> None:
        self._rows.pop(row, None)

    def take_new(self) -> list[mx.array]:
        """Arrays that were made since the last call, to be queued with the step."""
        new, self._new = self._new, []
        return new

    def reset(self) -> None:
        self._rows.clear()
        self._kept.clear()
        self._new.clear()

    def _keep(self, id: int, stack: _Stack, line: int) -> None:
        if stack.count > 1:  # a copy: a view would keep the whole stack
            stack = stack.take([line]).map(mx.contiguous, 1)
            self._new += _arrays(stack)
        self._kept[id] = stack

    def _source(self, work: Work) -> tuple[_Stack, int]:
        if work.restore is not None:
            return self._kept[work.restore], 0
        if not work.start or work.request.row not in self._rows:
            raise AssertionError(f"{work.request.id} goes on from token {work.start}, and its row has no state")
        return self._rows[work.request.row]


def _gather(sources: Sequence[tuple[_Stack, int]]) -> _Stack:
    """One stack of lines of others, in order; without a copy if it is one of them."""
    lines: dict[_Stack, list[int]] = {}
    for stack, line in sources:
        lines.setdefault(stack, []).append(line)
    parts = [stack.take(mine) for stack, mine in lines.items()]
    if len(parts) == 1:
        return parts[0]
    starts = dict(zip(lines, accumulate([p.count for p in parts], initial=0), strict=False))
    order = []
    for stack, _ in sources:
        order.append(starts[stack])
        starts[stack] += 1
    return _concatenated(parts).take(order)


def _concatenated(parts: Sequence[_Stack]) -> _Stack:
    arrays: Arrays = []
    for caches in zip(*(p.arrays for p in parts), strict=True):
        columns = zip(*caches, strict=True)
        arrays.append([None if c[0] is None else mx.concatenate([x for x in c if x is not None]) for c in columns])
    return _Stack(arrays, sum(p.count for p in parts))


def _arrays(stack: _Stack) -> list[mx.array]:
    return [x for cache in stack.arrays for x in cache if x is not None]
