"""A fingerprint of (prefix, position) for every slot of the pool, checked before each step reads.

Plain Python and numpy, beside the pool: what it knows of a slot is what the last step that wrote there meant to write.
So it finds slots that two owners share, that the tree gives for other tokens than it has them for, that were given
away too early, or that a step reads before anything wrote them. What kernels make of right slots is not its subject.
The name is SGLang's.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

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

    ``writer`` is who wrote there last, and which of its tokens; None if nobody did.
    """

    request: Request
    position: int
    slot: Slot
    writer: tuple[str, int] | None

    def __str__(self) -> str:
        held = "nothing" if self.writer is None else f"token {self.writer[1]} of request {self.writer[0]}"
        return f"slot {self.slot} is to hold token {self.position} of request {self.request.id}, and holds {held}"


@dataclass(frozen=True, slots=True)
class _Unseen:
    """A token that was written before the host has seen which one it is."""

    request: Request
    position: int
    slot: Slot
    ticket: int


class KVCanary:
    """Fingerprints of ``num_slots`` slots. ``check`` every batch before it is launched, in order."""

    def __init__(self, num_slots: int) -> None:
        self.num_mismatches = 0
        """Requests that would have read a wrong slot."""
        self._prints = np.zeros(num_slots, np.uint64)
        self._writers: list[tuple[str, int] | None] = [None] * num_slots
        self._prefixes: WeakKeyDictionary[Request, Prefixes] = WeakKeyDictionary()
        self._unseen: list[_Unseen] = []
        self._tickets = _UNSEEN

    def reset(self) -> None:
        """Nothing is in the pool any more."""
        self._prints[:] = 0
        self._writers = [None] * len(self._writers)
        self._unseen.clear()

    def check(self, batch: Batch) -> list[Mismatch]:
        """Takes a step's writes in, and then looks at all that it reads; the first wrong slot of each request.

        Each layer writes all rows before any is read, so a work may read what another of the same step writes.
        """
        self._see()
        for work in batch.works:
            self._write(work)
        found = [m for work in batch.works if (m := self._read(work)) is not None]
        self.num_mismatches += len(found)
        return found

    def restored(self, tokens: Sequence[Token], begin: int, slots: Sequence[Slot]) -> None:
        """tokens[begin:] were written to ``slots`` from elsewhere."""
        end = begin + len(slots)
        self._prints[list(slots)] = Prefixes().upto(tokens, end)[begin:]
        for position, slot in enumerate(slots, begin):
            self._writers[slot] = "(restored)", position

    def _see(self) -> None:
        """What the step before drew has been seen by now, or its request has ended without."""
        for unseen in self._unseen:
            if self._prints[unseen.slot] == unseen.ticket:
                known = len(unseen.request.tokens) > unseen.position
                self._prints[unseen.slot] = self._expected(unseen.request, unseen.position + 1)[-1] if known else 0
        self._unseen.clear()

    def _expected(self, request: Request, end: int) -> Prints:
        return self._prefixes.setdefault(request, Prefixes()).upto(request.tokens, end)

    def _write(self, work: Work) -> None:
        request, seen = work.request, min(work.end, len(work.request.tokens))
        slots = request.slots[work.start : work.end].tolist()
        self._prints[slots[: seen - work.start]] = self._expected(request, seen)[work.start :]
        for position, slot in enumerate(slots, work.start):
            self._writers[slot] = request.id, position
        if seen < work.end:
            self._tickets += 1
            self._prints[slots[-1]] = self._tickets
            self._unseen.append(_Unseen(request, work.end - 1, slots[-1], self._tickets))

    def _read(self, work: Work) -> Mismatch | None:
        request, seen = work.request, min(work.end, len(work.request.tokens))
        slots = np.array(request.slots[: work.end], np.int64)
        wrong = np.flatnonzero(self._prints[slots[:seen]] != self._expected(request, seen))
        at = int(wrong[0]) if len(wrong) else None
        if at is None and seen < work.end and not any(u.ticket == self._prints[slots[-1]] for u in self._mine(request)):
            at = work.end - 1
        return None if at is None else Mismatch(request, at, int(slots[at]), self._writers[slots[at]])

    def _mine(self, request: Request) -> list[_Unseen]:
        return [u for u in self._unseen if u.request is request]
