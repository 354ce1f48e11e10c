"""Places in grammars, and the masks of what may come next. llguidance does the work, in native threads."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher
from llguidance.numpy import fill_next_token_bitmask_par

from pippin.errors import RequestError
from pippin.masks import EVERY, RowMasks, words
from pippin.types import Token

# That make masks. A step waits for its slowest mask, which is often one of a few, so more would only have to be woken.
_THREADS = 4


class GrammarMatcher:
    """A ``types.Matcher`` for one answer. ``barred`` tokens may not come while anything else may.

    ``compiled`` is the grammar at its beginning, to be used by nobody else; ``field`` is named in errors. ``moves``
    counts steps on and back: with the same count, the mask is the same.
    """

    __slots__ = ("_ahead", "_barred", "_compiled", "_field", "_forced", "moves")

    def __init__(self, compiled: LLMatcher, barred: Sequence[Token] = (), field: str = "grammar") -> None:
        self._compiled = compiled
        self._barred = tuple(barred)
        self._field = field
        self._ahead: Token | None = None
        self._forced: tuple[int, list[Token]] | None = None
        self.moves = 0

    @property
    def ended(self) -> bool:
        self.settle()
        return self._compiled.is_stopped()

    def take(self, token: Token) -> None:
        if self._ahead == token:
            self._ahead = None
        else:
            self.settle()
            if not self._compiled.consume_token(token):
                raise self.failure()
            self.moves += 1

    def settle(self) -> None:
        """Goes back from a token that was taken ahead and then not given to ``take``: its step failed, say."""
        if self._ahead is not None:
            self._compiled.rollback(1)
            self._ahead = None
            self.moves += 1

    def forced(self) -> list[Token]:
        self.settle()
        if self._forced is not None and self._forced[0] == self.moves:
            return self._forced[1]
        return self._compiled.compute_ff_tokens()

    def failure(self) -> RequestError:
        """Why it can't go on."""
        said = self._compiled.get_error().strip().splitlines()
        return RequestError(
            f"{self._field}: the answer can't go on ({said[0] if said else 'no token fits'})", self._field
        )


class Masks:
    """Makes masks for a vocabulary of ``vocab_size`` ids, of which the matchers may know ``known`` or more.

    ``computed`` counts them.
    """

    def __init__(self, vocab_size: int, known: int) -> None:
        self._words = words(vocab_size)
        self._stride = max(self._words, words(known))
        self._last = np.uint32(2 ** ((vocab_size - 1) % 32 + 1) - 1)  # the bits of the last word that are tokens
        self._executor = LLExecutor(max(1, min(_THREADS, (os.cpu_count() or 1) - 1)))
        self._taking = LLExecutor(1)  # a token takes a matcher less time than it takes to wake a thread
        self._bits = np.zeros((0, self._stride), np.int32)
        self._made: dict[GrammarMatcher, tuple[int, int]] = {}
        self.computed = 0

    def take(self, tokens: Sequence[tuple[GrammarMatcher, Token]]) -> None:
        """Moves matchers on, all at once, by what each of them is given to ``take`` next; some may have been moved."""
        left = [(m, token) for m, token in tokens if m._ahead != token]
        for matcher, _ in left:
            matcher.settle()
        if not left:
            return
        moved = self._taking.consume_token_par([(m._compiled, token) for m, token in left])
        for (matcher, token), good in zip(left, moved, strict=True):
            matcher._ahead = token if good else None
            matcher.moves += 1

    def follow(self, tokens: Sequence[tuple[GrammarMatcher, Token]]) -> None:
        """Takes what was drawn, and begins what those that go on will be asked for."""
        self.take(tokens)
        self.begin([m for m, token in tokens if m._ahead == token and not m._compiled.is_stopped()])

    def begin(self, matchers: Sequence[GrammarMatcher]) -> None:
        """Makes masks that ``fill`` is likely to be asked for, and finds what is forced."""
        self._make(self._missing(matchers))
        single = _single(self._bits.view(np.uint32)[[self._made[m][0] for m in matchers], : self._words])
        for matcher, one in zip(matchers, single.tolist(), strict=True):
            # Where something is forced, its first token is all that the mask allows.
            matcher._forced = matcher.moves, matcher._compiled.compute_ff_tokens() if one else []

    def ready(self, matchers: Sequence[GrammarMatcher]) -> bool:
        """Whether the masks of all of these are made, for where they are by what ``take`` was given."""
        for matcher in matchers:
            matcher.settle()
        return not self._missing(matchers)

    def _missing(self, matchers: Sequence[GrammarMatcher]) -> list[GrammarMatcher]:
        """Which of these have no mask yet; masks of any others are forgotten."""
        made = self._made
        self._made = {m: made[m] for m in matchers if m in made and made[m][1] == m.moves}
        return [m for m in matchers if m not in self._made]

    def fill(self, matchers: Mapping[int, GrammarMatcher]) -> tuple[RowMasks, dict[int, RequestError]]:
        """The masks of rows, in memory that the next call writes anew.

        Also which rows' matchers found nothing that could come next, and why; those may draw anything.
        """
        for matcher in matchers.values():
            matcher.settle()
        self._make(self._missing([*matchers.values()]))
        lines = [self._made[m][0] for m in matchers.values()]
        bits = self._bits.view(np.uint32)[:, : self._words]
        masks = bits[: len(lines)] if lines == [*range(len(lines))] else bits[lines]
        failed = {}
        for mask, (row, matcher) in zip(masks, matchers.items(), strict=True):
            if matcher._compiled.is_error() or not mask.any():
                failed[row] = matcher.failure()
                mask[:] = EVERY
        self._made = {}
        return RowMasks([*matchers], masks), failed

    def _make(self, matchers: Sequence[GrammarMatcher]) -> None:
        """Makes masks in lines that ``_made`` leaves free."""
        if not matchers:
            return
        first = max((line for line, _ in self._made.values()), default=-1) + 1
        if first + len(matchers) > len(self._bits):
            more = np.zeros((first + len(matchers) - len(self._bits), self._stride), np.int32)
            self._bits = np.concatenate([self._bits, more])
        wanted = [(m._compiled, line) for line, m in enumerate(matchers, first)]
        fill_next_token_bitmask_par(self._executor, wanted, self._bits)
        self.computed += len(matchers)
        masks = self._bits[first : first + len(matchers)].view(np.uint32)[:, : self._words]
        masks[:, -1] &= self._last
        for barred in {m._barred for m in matchers if m._barred}:
            _bar(masks, [m._barred == barred for m in matchers], barred)
        for line, matcher in enumerate(matchers, first):
            self._made[matcher] = line, matcher.moves


def _bar(masks: npt.NDArray[np.uint32], which: Sequence[bool], tokens: Sequence[Token]) -> None:
    """Takes ``tokens`` out of those masks that allow something else."""
    bits = np.array([[token // 32, 1 << token % 32] for token in tokens], np.uint32)
    rows = np.flatnonzero(np.array(which) & (masks[:, bits[:, 0]] & bits[:, 1]).any(axis=1))
    if not len(rows):
        return
    kept = masks[rows]
    for word, bit in bits:
        kept[:, word] &= ~bit
    others = kept.any(axis=1)
    masks[rows[others]] = kept[others]


def _single(masks: npt.NDArray[np.uint32]) -> npt.NDArray[np.bool_]:
    """Which of these allow one token and no other."""
    single: npt.NDArray[np.bool_] = np.count_nonzero(masks, axis=1) == 1
    if single.any():
        words = masks[single].max(axis=1)
        single[single] = words & (words - np.uint32(1)) == 0
    return single
