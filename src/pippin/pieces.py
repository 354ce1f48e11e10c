"""How works are cut for attention where every new shape of it costs more than another launch does.

On CUDA MLX's attention is cuDNN's for numbers of 16 bits, and that plans anew for each number of works, rows and
context that comes up, while the engine waits; prompts have all lengths. So works are cut until few shapes are left.
Short ones attend by page, all in one launch whatever their lengths. Of a longer one the tokens between multiples of
``unit`` have K and V gathered, and those before and behind attend by page. Works of one shape gather together by powers
of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from pippin import kernels
from pippin.types import Work

# So many rows by page are said of kernels that multiply matrices, which are those for numbers of 16 bits.
_OF_MATRICES = 64


@dataclass(frozen=True, slots=True)
class Pieces:
    """What attends by page and what gathers; a piece of a work is a Work.

    Works of up to ``several`` tokens attend by page wherever a kernel does that; all else holds only where shapes are
    ``planned``, which makes twice as many worth it.
    """

    several: int
    planned: bool

    @staticmethod
    def of(several: int) -> Pieces:
        """As this machine's attention wants it; ``several`` is 1 where none attend by page."""
        return Pieces(several, several >= _OF_MATRICES and kernels.backend() == "cuda")

    @property
    def unit(self) -> int:
        """What rows and contexts that gather are multiples of."""
        return 2 * self.several

    @property
    def farthest(self) -> int:
        """The longest context that works are cut for: behind more, their ends by page may take longer than a plan."""
        return 64 * self.several

    def are_few(self, work: Work) -> bool:
        """Whether it attends by page: a few tokens, or more of them with little to see."""
        rows = work.end - work.start
        if not self.planned:
            return rows <= self.several
        return rows <= self.unit or rows * work.end <= (4 * self.several) ** 2

    def parts(self, works: Sequence[Work]) -> list[tuple[int, Work]]:
        """The works, or their pieces, each with its work's number, as they are to lie in the step.

        A work of which more than the last row is asked for has its rows in order, one after the other: it is cut only
        if it is alone, and pieces of that are not moved.
        """
        if len(works) == 1:
            return [(0, piece) for piece in self._pieces(works[0])]
        found = [(i, p) for i, w in enumerate(works) for p in ([w] if _asks_for_rows(w) else self._pieces(w))]
        return sorted(found, key=lambda piece: self._order(piece[1]))

    def together(self, count: int) -> int:
        """How many of so many works of one shape gather together."""
        return 1 << count.bit_length() - 1 if self.planned else count

    def _pieces(self, work: Work) -> list[Work]:
        if not self.planned or self.are_few(work) or work.end > self.farthest:
            return [work]
        first, last = -(-work.start // self.unit) * self.unit, work.end // self.unit * self.unit
        bounds = sorted({work.start, min(first, work.end), max(last, work.start), work.end})
        return [work._replace(start=a, end=b, samples=work.samples and b == work.end) for a, b in pairwise(bounds)]

    def _order(self, work: Work) -> tuple[int, int, int]:
        """Single tokens first, shortest context first, so that neighbours pad little; then works of few; then the rest,
        those of one shape together."""
        rows = work.end - work.start
        if rows == 1:
            return 0, work.end, 0
        return (1, 0, 0) if self.are_few(work) else (2, work.end, rows)


def _asks_for_rows(work: Work) -> bool:
    return work.logprobs_from is not None or work.pools_from is not None or work.request.adapter is not None
