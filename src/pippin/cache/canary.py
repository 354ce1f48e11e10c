"""A fingerprint of (prefix, position) for every slot of the pool, checked before each step reads.

Plain Python and numpy, beside the pool: what it knows of a slot is what the last step that wrote there meant to write.
So it finds slots that two owners share, that the tree gives for other tokens than it has them for, that were given
away too early, or that a step reads before anything wrote them. What kernels make of right slots is not its subject.
The name is SGLang's.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from pippin.cache.windows import WindowTable
from pippin.types import Batch, Request, Slot, Token, Work

_MASK = (1 << 61) - 1
_UNSEEN = 1 << 62  # and above: a written token that the host has not seen; no fingerprint is as large

Prints = npt.NDArray[np.uint64]


class Prefixes:
    """The fingerprint of each beginning of a sequence, as far as it was asked for."""

    def __init__(self) -> None:
        self._prints: array[int] = array("Q")

    def upto(self, tokens: Sequence[Token], end: int) -> Prints:
        """Fingerprints of tokens[:1], tokens[:2], … tokens[:end]: uint64 [end]. ``tokens`` only ever grow."""
        prints = self._prints
        last = prints[-1] if prints else 1
        for token in tokens[len(prints) : end]:
            last = (last * 1_000_003 + token * 7919 + 12345) * 2_654_435_761 & _MASK
            prints.append(last)
        return np.array(prints[:end], np.uint64)


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A slot that a request was about to read, and that does not hold its token.

    ``writer`` is who wrote there last, and which of its tokens; None if nobody did. ``windowed``: of windowed layers.
    """

    request: Request
    position: int
    slot: Slot
    writer: tuple[str, int] | None
    windowed: bool = False

    def __str__(self) -> str:
        held = "nothing" if self.writer is None else f"token {self.writer[1]} of request {self.writer[0]}"
        slot = f"slot {self.slot}{' of windowed layers' if self.windowed else ''}"
        return f"{slot} is to hold token {self.position} of request {self.request.id}, and holds {held}"


@dataclass(frozen=True, slots=True)
class _Unseen:
    """A token that was written before the host has seen which one it is."""

    request: Request
    position: int
    slot: Slot
    ticket: int


class _Slots:
    """What one pool's slots are to hold; ``windows`` if it is that of windowed layers."""

    def __init__(self, num_slots: int, windows: WindowTable | None = None) -> None:
        self.prints = np.zeros(num_slots, np.uint64)
        self.writers: list[tuple[str, int] | None] = [None] * num_slots
        self.unseen: list[_Unseen] = []
        self.windows = windows

    def reset(self) -> None:
        self.prints[:] = 0
        self.writers = [None] * len(self.writers)
        self.unseen.clear()

    def first(self, work: Work) -> int:
        """The first token that the work reads."""
        return self.windows.first(work.start) if self.windows is not None else 0

    def of(self, request: Request, begin: int, end: int) -> npt.NDArray[np.int32]:
        """The slots of tokens[begin:end]."""
        slots = np.array(request.slots[begin:end], np.int32)
        return self.windows.slots(slots) if self.windows is not None else slots


class KVCanary:
    """Fingerprints of ``num_slots`` slots, and of those that ``windows`` has.

    ``check`` every batch before it is launched, in order.
    """

    def __init__(self, num_slots: int, windows: WindowTable | None = None) -> None:
        self.num_mismatches = 0
        """Requests that would have read a wrong slot."""
        self._pools = [_Slots(num_slots), *([_Slots(windows.num_slots, windows)] if windows is not None else [])]
        self._prefixes: WeakKeyDictionary[Request, Prefixes] = WeakKeyDictionary()
        self._tickets = _UNSEEN

    def reset(self) -> None:
        """Nothing is in the pool any more."""
        for pool in self._pools:
            pool.reset()

    def check(self, batch: Batch) -> list[Mismatch]:
        """Takes a step's writes in, and then looks at all that it reads; the first wrong slot of each request.

        Each layer writes all rows before any is read, so a work may read what another of the same step writes.
        """
        wrong: dict[Request, Mismatch] = {}
        for pool in self._pools:
            self._see(pool)
            for work in batch.works:
                self._write(pool, work)
            for work in batch.works:
                found = self._read(pool, work)
                if found is not None:
                    wrong.setdefault(work.request, found)
        self.num_mismatches += len(wrong)
        return [*wrong.values()]

    def restored(
        self, tokens: Sequence[Token], begin: int, slots: Sequence[Slot], windowed: Mapping[int, Slot] | None = None
    ) -> None:
        """tokens[begin:] were written to ``slots`` from elsewhere, and those at some positions to windowed layers'."""
        self._restored(self._pools[0], tokens, dict(enumerate(slots, begin)))
        if windowed:
            self._restored(self._pools[1], tokens, windowed)

    def _restored(self, pool: _Slots, tokens: Sequence[Token], slots: Mapping[int, Slot]) -> None:
        at = [*slots]
        pool.prints[[*slots.values()]] = Prefixes().upto(tokens, max(at, default=-1) + 1)[at]
        for position, slot in slots.items():
            pool.writers[slot] = "(restored)", position

    def _see(self, pool: _Slots) -> None:
        """What the step before drew has been seen by now, or its request has ended without."""
        for unseen in pool.unseen:
            if pool.prints[unseen.slot] == unseen.ticket:
                known = len(unseen.request.tokens) > unseen.position
                pool.prints[unseen.slot] = self._expected(unseen.request, unseen.position + 1)[-1] if known else 0
        pool.unseen.clear()

    def _expected(self, request: Request, end: int) -> Prints:
        return self._prefixes.setdefault(request, Prefixes()).upto(request.tokens, end)

    def _write(self, pool: _Slots, work: Work) -> None:
        request, seen = work.request, min(work.end, len(work.request.tokens))
        slots = pool.of(request, work.start, work.end).tolist()
        pool.prints[slots[: seen - work.start]] = self._expected(request, seen)[work.start :]
        for position, slot in enumerate(slots, work.start):
            pool.writers[slot] = request.id, position
        if seen < work.end:
            self._tickets += 1
            pool.prints[slots[-1]] = self._tickets
            pool.unseen.append(_Unseen(request, work.end - 1, slots[-1], self._tickets))

    def _read(self, pool: _Slots, work: Work) -> Mismatch | None:
        request, seen, first = work.request, min(work.end, len(work.request.tokens)), pool.first(work)
        slots = pool.of(request, first, work.end)
        wrong = np.flatnonzero(pool.prints[slots[: seen - first]] != self._expected(request, seen)[first:])
        at = first + int(wrong[0]) if len(wrong) else None
        mine = [u.ticket for u in pool.unseen if u.request is request]
        if at is None and seen < work.end and pool.prints[slots[-1]] not in mine:
            at = work.end - 1
        if at is None:
            return None
        slot = int(slots[at - first])
        return Mismatch(request, at, slot, pool.writers[slot], pool.windows is not None)
