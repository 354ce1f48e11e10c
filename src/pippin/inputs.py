"""From works to arrays: everything that a layer may know of a step, laid out once on the host.

Two layouts. **Rows**: every token is a row of its own, ``[T, 1]``, with its own position, whoever it belongs to.
**Padded**: every work is a row, ``[B, L]``, filled up on the right; padding is written to scratch slot 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from pippin.cache.state import OpenStates
from pippin.cache.windows import WindowTable
from pippin.pieces import Pieces
from pippin.types import Work
from pippin.uploads import upload

Ints = npt.NDArray[np.int32]

# Smaller inputs of a Metal kernel are of another address space, and so of another variant of it.
LEAST_INPUT = 8


@dataclass(frozen=True, slots=True)
class Group:
    """``count`` works of ``rows`` tokens each that lie one after the other and attend together.

    ``slots`` [count, context] int32 are the slots of tokens 0 … context-1, filled up with 0; ``starts`` [count] int32
    is the position of each work's first token. In windowed layers both may count from a later token than the first.
    ``ragged`` says that some contexts are shorter than the longest.
    ``pages`` [count, n] int32 are page numbers instead, where a kernel reads the pool by page; ``slots`` is None then.
    ``counts`` are each work's tokens, ``rows`` at most, where a kernel takes several of each at once; None: ``rows``.
    With ``tiles`` [n, 3] int32 (``kernels.tile_rows``) it does so too, and what else is said of works is said of rows:
    ``count`` of one token each, ``starts`` their positions (-1: padding); but ``pages`` has a line a work.
    """

    first: int
    count: int
    rows: int
    context: int
    ragged: bool
    slots: mx.array | None
    starts: mx.array
    pages: mx.array | None = None
    counts: tuple[int, ...] | None = None
    tiles: mx.array | None = None

    @property
    def tokens(self) -> slice:
        """Where the group's tokens lie in the step's."""
        return slice(self.first, self.first + (sum(self.counts) if self.counts else self.count * self.rows))

    def head_rows(self, kv_heads: int) -> mx.array:
        """Where the pool, seen as lines of one head each, has the context's heads: int32 [count, kv_heads, context]."""
        assert self.slots is not None
        return self.slots[:, None] * kv_heads + mx.arange(kv_heads, dtype=mx.int32)[:, None]

    @property
    def positions(self) -> mx.array:
        """Positions of the group's tokens, [count, rows] int32."""
        return self.starts[:, None] + mx.arange(self.rows, dtype=mx.int32)[None]

    def lengths(self) -> mx.array:
        """How many tokens each row attends to, int32 [tokens], of groups whose works have a row each, or ``counts``."""
        if self.counts is None:
            return self.starts + 1
        owners = np.repeat(np.arange(self.count, dtype=np.int32), self.counts)
        within = np.concatenate([np.arange(1, n + 1, dtype=np.int32) for n in self.counts])
        return self.starts[upload(owners)] + upload(within)


@dataclass(frozen=True, slots=True)
class Places:
    """Where the layers of one kind write K and V, ``write_slots`` as in ``Step``, and what they read."""

    write_slots: mx.array
    groups: tuple[Group, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One forward of the model.

    ``tokens`` int32: [T, 1] or [B, L], as the layout has it. ``positions`` int32: [T] each token's, or [B] each
    work's first. ``write_slots`` int32 [T] or [B, L]. ``lasts`` says where each work's last token lies in the flattened
    tokens, in the order in which the works were given. ``after`` is something that all steps before have computed: what
    writes the pool in place waits for it. ``decodes`` says that all works are (``Work.decodes``). ``states`` are the
    works' recurrent states, in the order in which the tokens lie. ``windowed`` is for layers whose pool is another.
    """

    tokens: mx.array
    positions: mx.array
    write_slots: mx.array
    groups: tuple[Group, ...]
    lasts: tuple[int, ...]
    after: mx.array | None = None
    decodes: bool = False
    states: OpenStates | None = None
    windowed: Places | None = None

    def places(self, windowed: bool) -> Places:
        """Where layers write and read, windowed ones or all others."""
        if windowed and self.windowed is not None:
            return self.windowed
        return Places(self.write_slots, self.groups)

    @property
    def stores_as_it_attends(self) -> bool:
        """Whether one kernel can do both: no row reads what another row of this step writes."""
        return self.decodes and all(g.pages is not None for g in self.groups)


def lay_out(works: Sequence[Work], lines: Ints) -> list[int]:
    """Writes the works' tokens one after the other into ``lines`` [5, T], zeros before; returns each one's last row.

    The lines are: tokens, 0 where the host has not seen the one; 1 where it hasn't; the works' device rows; positions;
    slots.
    """
    if all(w.end - w.start == 1 for w in works):
        _lay_out_singles(works, lines)
        return list(range(len(works)))
    at, lasts = 0, []
    for work in works:
        here, at = slice(at, at + work.end - work.start), at + work.end - work.start
        lines[0, here] = _known_tokens(work)
        lines[1, at - 1] = work.end > len(work.request.tokens)
        lines[2, here] = work.request.row
        lines[3, here] = np.arange(work.start, work.end)
        lines[4, here] = _slots_of(work)[work.start :]
        lasts.append(at - 1)
    return lasts


def _lay_out_singles(works: Sequence[Work], lines: Ints) -> None:
    """The same for single tokens, without an array a work."""
    n, requests, starts = len(works), [w.request for w in works], [w.start for w in works]
    seen = [at < len(r.tokens) for r, at in zip(requests, starts, strict=True)]
    lines[0, :n] = [r.tokens[at] if s else 0 for r, at, s in zip(requests, starts, seen, strict=True)]
    lines[1, :n] = [not s for s in seen]
    lines[2, :n] = [r.row for r in requests]
    lines[3, :n] = starts
    lines[4, :n] = [r.slots[at] for r, at in zip(requests, starts, strict=True)]


def row_step(
    works: Sequence[Work],
    last_token: mx.array,
    page_size: int | None = None,
    several: int = 1,
    windows: WindowTable | None = None,
) -> Step:
    """The step in the rows layout; ``last_token`` [rows] int32 holds what the host has not seen yet.

    With ``page_size``, groups name pages, for kernels that read the pool. All single tokens are one group then, and
    all works of up to ``several`` tokens another; on CUDA works are cut (``Pieces``), and then a work's tokens need not
    lie one after the other, unless more than its last row is asked for. With ``windows``, the groups of windowed layers
    begin where the window of each piece's first token does: positions count from there, as a mask does too.
    """
    cut = Pieces.of(several if page_size is not None else 1)
    pieces = cut.parts(works)
    ordered = [piece for _, piece in pieces]
    lines = np.zeros((5, sum(w.end - w.start for w in works)), np.int32)
    ends = zip(pieces, lay_out(ordered, lines), strict=True)
    lasts = {i: last for (i, piece), last in ends if piece.end == works[i].end}
    windowed = None
    if windows is not None:
        groups = _groups(ordered, page_size, cut, _Tails(windows))
        windowed = Places(upload(windows.slots(lines[4])), tuple(groups))
    return Step(
        tokens=_with_unseen(lines[0], lines[1] * lines[2], last_token)[:, None],
        positions=upload(lines[3]),
        write_slots=upload(lines[4]),
        groups=tuple(_groups(ordered, page_size, cut)),
        lasts=tuple(lasts[i] for i in range(len(works))),
        decodes=all(w.decodes for w in works),
        windowed=windowed,
    )


def padded_step(
    works: Sequence[Work], last_token: mx.array, page_size: int | None = None, windows: WindowTable | None = None
) -> Step:
    """The step in the padded layout, one group for all works; the arguments are ``row_step``'s.

    The groups of windowed layers are as wide as all others, since models hand one mask to layers of both kinds: what
    lies behind a window is read from scratch.
    """
    rows = max(w.end - w.start for w in works)
    shape = (len(works), rows)
    tokens, slots, unseen = (np.zeros(shape, np.int32) for _ in range(3))
    for i, work in enumerate(works):
        n = work.end - work.start
        tokens[i, :n] = _known_tokens(work)
        slots[i, :n] = _slots_of(work)[work.start :]
        if work.end > len(work.request.tokens):
            unseen[i, n - 1] = work.request.row
    windowed = None
    if windows is not None:
        written, real = np.zeros(shape, np.int32), slots > 0
        written[real] = windows.slots(slots[real])
        windowed = Places(upload(written), (_group(works, 0, rows, page_size, _Tails(windows, whole=True)),))
    return Step(
        tokens=_with_unseen(tokens, unseen, last_token),
        positions=upload(np.array([w.start for w in works], np.int32)),
        write_slots=upload(slots),
        groups=(_group(works, 0, rows, page_size),),
        lasts=tuple(i * rows + w.end - w.start - 1 for i, w in enumerate(works)),
        windowed=windowed,
    )


@dataclass(frozen=True, slots=True)
class _Contexts:
    """What layers read that see everything: tokens 0 … end-1 of each work."""

    def begin(self, work: Work, stride: int) -> int:
        """The token of the table's first slot."""
        return 0

    def slots(self, work: Work, stride: int) -> Ints:
        """Every ``stride``-th slot from there on."""
        return _slots_of(work)[::stride]


@dataclass(frozen=True, slots=True)
class _Tails:
    """What windowed layers read: from the window of each work's first token on; ``whole``: in its old place."""

    windows: WindowTable
    whole: bool = False

    def begin(self, work: Work, stride: int) -> int:
        return 0 if self.whole else self._first(work, stride)

    def slots(self, work: Work, stride: int) -> Ints:
        first = self._first(work, stride)
        slots = self.windows.slots(_slots_of(work)[first::stride])
        return np.concatenate([np.zeros(first // stride, np.int32), slots]) if self.whole else slots

    def _first(self, work: Work, stride: int) -> int:
        first = self.windows.first(work.start)
        return first - first % stride


_ALL = _Contexts()


def _groups(works: Sequence[Work], page_size: int | None, cut: Pieces, read: _Contexts | _Tails = _ALL) -> list[Group]:
    """Cuts works, as ``Pieces.parts`` orders them, into runs that can attend together.

    Singles are padded to the longest of their run, at most to twice the shortest (short ones pad for free); longer
    works attend together only where both their rows and their contexts are equal, which needs no mask.
    """
    groups: list[Group] = []
    first = at = 0
    while at < len(works):
        head = works[at]
        rows, stop = head.end - head.start, at + 1
        few = page_size is not None and rows > 1 and cut.are_few(head)
        while stop < len(works) and _fits(head, works[stop], page_size is not None, cut if few else None):
            stop += 1
        if rows > 1 and not few:
            stop = at + cut.together(stop - at)
        counts = [w.end - w.start for w in works[at:stop]]
        group = _group(works[at:stop], first, max(counts), page_size, read)
        groups.append(replace(group, counts=tuple(counts)) if few else group)
        first += sum(counts)
        at = stop
    return groups


def _fits(head: Work, work: Work, paged: bool, few: Pieces | None) -> bool:
    if few is not None:
        return few.are_few(work)
    if work.end - work.start != head.end - head.start:
        return False
    if head.end - head.start == 1:
        return paged or work.end <= max(2 * head.end, 256)
    return work.end == head.end


def _group(
    works: Sequence[Work], first: int, rows: int, page_size: int | None, read: _Contexts | _Tails = _ALL
) -> Group:
    """Slots of what is read, or with ``page_size`` the pages: every page's first slot tells which it is."""
    stride = page_size or 1
    begins = [read.begin(w, stride) for w in works]
    contexts = [w.end - begin for w, begin in zip(works, begins, strict=True)]
    context = max(contexts)
    width = -(-context // stride)
    table = np.zeros((len(works), width if page_size is None else max(width, LEAST_INPUT)), np.int32)
    for i, work in enumerate(works):
        slots = read.slots(work, stride)
        table[i, : len(slots)] = slots // stride
    return Group(
        first=first,
        count=len(works),
        rows=rows,
        context=context,
        ragged=any(c != context for c in contexts),
        slots=upload(table) if page_size is None else None,
        starts=upload(np.array([w.start - begin for w, begin in zip(works, begins, strict=True)], np.int32)),
        pages=upload(table) if page_size is not None else None,
    )


def _known_tokens(work: Work) -> Ints:
    """tokens[start:end], 0 where the host has not seen the last one."""
    known = np.zeros(work.end - work.start, np.int32)
    seen = work.request.tokens[work.start : work.end]
    known[: len(seen)] = np.fromiter(seen, np.int32, len(seen))
    return known


def _slots_of(work: Work) -> Ints:
    """Slots of tokens 0 … end-1: a view, to be copied before the request goes on."""
    return np.frombuffer(work.request.slots, np.int32)[: work.end]


def _with_unseen(tokens: Ints, rows: Ints, last_token: mx.array) -> mx.array:
    """``tokens``, with ``last_token[rows]`` wherever ``rows`` is not 0 (row 0 is scratch)."""
    if not rows.any():
        return upload(tokens)
    where = upload(rows)
    return mx.where(where > 0, last_token[where], upload(tokens))
