"""What a compiled step takes: shapes that steps are padded to, and how works are laid out in one array on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from pippin.cache.windows import WindowTable
from pippin.inputs import lay_out
from pippin.kernels import tile_rows
from pippin.sampler import power_of_two
from pippin.types import Request, Work

Ints = npt.NDArray[np.int32]

LINES = 5
_LEAST_WIDTH = 256
_FINE_WIDTH = 4096
# Steps with more than single tokens are compiled for fewer lengths: each costs a trace for each of their shapes.
_LEAST_EXTENDED = 1024
# Works of such a step: a few short prompts, or as many as it has rows, most of which then decode.
_FEW_WORKS = 4
_LEAST_ROWS = 16
_LEAST_MIXED = 64


class StepShape(NamedTuple):
    """A step is padded to ``rows`` tokens of ``works`` works, cut into ``tiles`` (0: each work is one decode)."""

    rows: int
    works: int
    tiles: int = 0


class WindowInputs(NamedTuple):
    """What windowed layers take in place of ``StepInputs``' own.

    ``pages`` [works, n] begin where the window of each work's first token does, ``positions`` [rows] count from there.
    """

    positions: mx.array
    slots: mx.array
    pages: mx.array


class StepInputs(NamedTuple):
    """A step's arrays, int32; padding is all zeros.

    Of each token [rows]: ``known`` is it, 0 where ``unseen`` is 1: that is in the device table's line ``rows``; its
    ``positions`` and ``slots``. ``lasts`` [works] are the rows that draw, ``drawn`` [works] the lines of the device
    table that get it; ``tiles`` [tiles, 3] as ``kernels.tile_rows`` cuts rows, None for decodes, all of which draw;
    ``pages`` [works, n]. ``windowed`` is for layers whose pool is another.
    """

    known: mx.array
    unseen: mx.array
    rows: mx.array
    positions: mx.array
    slots: mx.array
    lasts: mx.array | None
    drawn: mx.array
    tiles: mx.array | None
    pages: mx.array
    windowed: WindowInputs | None = None


def unpacked(packed: mx.array, shape: StepShape, windows: WindowTable | None = None) -> StepInputs:
    """The inputs as they lie in one array, which is one copy to the device in place of eight."""
    if windows is None:
        return _unpacked(packed, shape)
    end, rows = len(packed) - _window_size(shape, windows), shape.rows
    positions, slots, pages = packed[end : end + rows], packed[end + rows : end + 2 * rows], packed[end + 2 * rows :]
    own = WindowInputs(positions, slots, pages.reshape(shape.works, -1))
    return _unpacked(packed[:end], shape)._replace(windowed=own)


def _unpacked(packed: mx.array, shape: StepShape) -> StepInputs:
    known, unseen, rows, positions, slots = (packed[i * shape.rows : (i + 1) * shape.rows] for i in range(LINES))
    at = LINES * shape.rows
    if not shape.tiles:
        return StepInputs(known, unseen, rows, positions, slots, None, rows, None, packed[at:].reshape(shape.works, -1))
    first, cut, end = at + shape.works, at + 2 * shape.works, at + 2 * shape.works + 3 * shape.tiles
    tiles, pages = packed[cut:end].reshape(-1, 3), packed[end:].reshape(shape.works, -1)
    return StepInputs(known, unseen, rows, positions, slots, packed[at:first], packed[first:cut], tiles, pages)


def packed_size(shape: StepShape, width: int, windows: WindowTable | None = None) -> int:
    """How many numbers a step's inputs are, with a page table ``width`` wide."""
    cuts = 2 * shape.works + 3 * shape.tiles if shape.tiles else 0
    return LINES * shape.rows + cuts + shape.works * width + _window_size(shape, windows)


def _window_size(shape: StepShape, windows: WindowTable | None) -> int:
    if windows is None:
        return 0
    more = -(-shape.rows // windows.page_size) if shape.tiles else 0  # that a work may fill behind its first token's
    return 2 * shape.rows + shape.works * (windows.span + more)


def padded_length(tokens: int, extended: bool = False) -> int:
    """The context that a step is compiled for: a power of two, of four where it is long, so that there are few."""
    length = power_of_two(max(tokens, _LEAST_EXTENDED if extended else _LEAST_WIDTH))
    fine = length <= _FINE_WIDTH and not extended
    return length if fine or length.bit_length() % 2 else 2 * length


def padded_lengths(most: int, extended: bool = False) -> list[int]:
    """All of them, for contexts of up to ``most`` tokens."""
    found = [padded_length(1, extended)]
    while found[-1] < most:
        found.append(padded_length(found[-1] + 1, extended))
    return found


def least_length(length: int, extended: bool = False) -> int:
    """The shortest context that a step is compiled for ``length``, one of ``padded_lengths``, for."""
    return max((shorter + 1 for shorter in padded_lengths(length, extended) if shorter < length), default=1)


def decode_sizes(most: int) -> list[int]:
    """The rows that steps of decodes are padded to: powers of two, and the most there may be."""
    return sorted({min(1 << i, most) for i in range(most.bit_length() + 1)})


def extend_sizes(most_rows: int, most_works: int) -> list[tuple[int, int]]:
    """(rows, works) that all other steps are padded to, the smallest first.

    Rows are powers of two from 16 up to ``most_rows``. Up to four works may come with any number of rows; more of them,
    as where others decode, from 64 on.
    """
    found = []
    rows = _LEAST_ROWS
    while rows <= most_rows:
        found.append((rows, min(_FEW_WORKS, most_works)))
        if rows >= _LEAST_MIXED and most_works > _FEW_WORKS:
            found.append((rows, min(rows, power_of_two(most_works))))
        rows *= 2
    return found


def example(
    token: int, at: int, shape: StepShape, width: int, page_size: int, windows: WindowTable | None, rows_of_tile: int
) -> Ints:
    """Inputs of a step that may be run at any time: every row is ``token`` at position ``at``, and all works draw.

    All read the scratch page alone, and write the same to its first slot, so that the order of writes changes nothing:
    no row is padding, which would write there what happens to lie in memory.
    """
    packed = np.zeros(packed_size(shape, width, windows), np.int32)
    lines = packed[: LINES * shape.rows].reshape(LINES, -1)
    lines[0], lines[2], lines[3] = token, 1, at
    if shape.tiles:
        first, cut, end = LINES * shape.rows + np.cumsum([0, 2 * shape.works, 3 * shape.tiles])
        counts = np.diff(np.linspace(0, shape.rows, shape.works + 1).astype(int))
        packed[first:cut].reshape(2, -1)[:] = np.cumsum(counts) - 1, np.ones(shape.works)
        packed[cut:end] = tile_rows(counts.tolist(), rows_of_tile, shape.tiles).reshape(-1)
    if windows is not None:
        own = len(packed) - _window_size(shape, windows)
        packed[own : own + shape.rows] = at - windows.first(at) // page_size * page_size
    return packed


class StepTable:
    """Lays steps out, by what has changed since the step before: mostly, a new page now and then.

    A request's line of page numbers is kept by its device row. It is taken as it was if the request was in the step
    before, and now decodes the next token: whatever else happens to a request may give it other slots.
    """

    def __init__(self, page_size: int, windows: WindowTable | None = None) -> None:
        self._page_size = page_size
        self._windows = windows
        self._lines = np.zeros((0, 0), np.int32)
        self._owners: list[Request | None] = []
        self._ends = np.zeros(0, np.int64)
        self._steps = np.zeros(0, np.int64)
        self._step = 0

    def forget(self) -> None:
        """To be called when a step that isn't laid out here has run: slots may be others."""
        self._step += 2

    def decodes(self, works: Sequence[Work], shape: StepShape) -> Ints:
        """The arrays of ``StepInputs`` for works of one token each, one after the other."""
        width = self._width(max(w.end for w in works), extended=False)
        packed = np.zeros(packed_size(shape, width, self._windows), np.int32)
        lines = packed[: LINES * shape.rows].reshape(LINES, -1)
        lay_out(works, lines)
        self._put_tables(works, shape, lines, packed[LINES * shape.rows :], width)
        return packed

    def extends(self, works: Sequence[Work], shape: StepShape, rows_of_tile: int) -> Ints:
        """The same for works of any number of tokens; those that sample draw, in order."""
        width = self._width(max(w.end for w in works), extended=True)
        packed = np.zeros(packed_size(shape, width, self._windows), np.int32)
        at = LINES * shape.rows
        lines = packed[:at].reshape(LINES, -1)
        lasts = lay_out(works, lines)
        drawn = [(last, work.request.row) for last, work in zip(lasts, works, strict=True) if work.samples]
        cut, end = at + 2 * shape.works, at + 2 * shape.works + 3 * shape.tiles
        if drawn:
            packed[at:cut].reshape(2, -1)[:, : len(drawn)] = np.array(drawn).T
        packed[cut:end] = tile_rows([w.end - w.start for w in works], rows_of_tile, shape.tiles).reshape(-1)
        self._put_tables(works, shape, lines, packed[end:], width)
        return packed

    def _put_tables(self, works: Sequence[Work], shape: StepShape, lines: Ints, rest: Ints, width: int) -> None:
        """Fills in the works' page tables, windowed layers' too."""
        end, rows = shape.works * width, shape.rows
        table = rest[:end].reshape(shape.works, width)
        self._put_pages(works, table)
        if self._windows is None:
            return
        n, counts = sum(w.end - w.start for w in works), [w.end - w.start for w in works]
        first = np.array([self._windows.first(w.start) // self._page_size for w in works])
        rest[end : end + n] = lines[3, :n] - np.repeat(first, counts) * self._page_size
        rest[end + rows : end + rows + n] = self._windows.slots(lines[4, :n])
        own = rest[end + 2 * rows :].reshape(shape.works, -1)[: len(works)]
        at = first[:, None] + np.arange(own.shape[1])
        read = at <= np.array([(w.end - 1) // self._page_size for w in works])[:, None]
        pages = np.take_along_axis(table[: len(works)], np.where(read, at, 0), axis=1)[read]
        own[read] = self._windows.slots(pages * self._page_size) // self._page_size

    def _width(self, longest: int, extended: bool) -> int:
        return -(-padded_length(longest, extended) // self._page_size)

    def _put_pages(self, works: Sequence[Work], table: Ints) -> None:
        """Writes the works' pages into ``table`` [≥ works, width], zeros before."""
        self._step += 1
        requests = [w.request for w in works]
        rows, starts = np.array([r.row for r in requests]), np.array([w.start for w in works])
        self._make_room(int(rows.max()) + 1, table.shape[1])
        owners, page = self._owners, self._page_size
        kept = np.array([owners[r.row] is r for r in requests]) & np.array([w.decodes for w in works])
        kept &= (self._ends[rows] == starts) & (self._steps[rows] == self._step - 1)
        for i in np.flatnonzero(kept & (starts % page == 0)).tolist():
            self._lines[rows[i], starts[i] // page] = requests[i].slots[starts[i]] // page
        for i in np.flatnonzero(~kept).tolist():
            first = np.frombuffer(requests[i].slots, np.int32)[: works[i].end : page]
            line = self._lines[rows[i]]
            line[:] = 0
            line[: len(first)] = first // page
            owners[rows[i]] = requests[i]
        self._ends[rows], self._steps[rows] = [w.end for w in works], self._step
        table[: len(works)] = self._lines[rows, : table.shape[1]]

    def _make_room(self, rows: int, width: int) -> None:
        """Lines for device rows up to ``rows``, of ``width`` pages at least."""
        more, wider = rows - self._lines.shape[0], width - self._lines.shape[1]
        if more > 0 or wider > 0:
            more, wider = max(more, 0), max(wider, 0)
            self._lines = np.pad(self._lines, ((0, more), (0, wider)))
            self._ends, self._steps = np.pad(self._ends, (0, more)), np.pad(self._steps, (0, more))
            self._owners += [None] * more
