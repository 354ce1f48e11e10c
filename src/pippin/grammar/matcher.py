"""Places in grammars, and the masks of what may come next. llguidance does the work, in native threads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher
from llguidance.numpy import fill_next_token_bitmask_par

from pippin.errors import RequestError
from pippin.masks import EVERY, RowMasks, words
from pippin.types import Token


class GrammarMatcher:
    """A ``types.Matcher`` for one answer. ``barred`` tokens may not come while anything else may.

    ``compiled`` is the grammar at its beginning, to be used by nobody else; ``field`` is named in errors. ``taken``
    counts tokens: with the same count, the mask is the same.
    """

    __slots__ = ("_ahead", "_barred", "_compiled", "_field", "taken")

    def __init__(self, compiled: LLMatcher, barred: Sequence[Token] = (), field: str = "grammar") -> None:
        self._compiled = compiled
        self._barred = tuple(barred)
        self._field = field
        self._ahead: Token | None = None
        self.taken = 0

    @property
    def ended(self) -> bool:
        return self._compiled.is_stopped()

    def take(self, token: Token) -> None:
        ahead, self._ahead = self._ahead, None
        if ahead != token and not self._compiled.consume_token(token):
            raise self.failure()
        self.taken += 1

    def forced(self) -> list[Token]:
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
        self._executor = LLExecutor()
        self._bits = np.zeros((0, self._stride), np.int32)
        self._made: dict[GrammarMatcher, tuple[int, int]] = {}
        self.computed = 0

    def take(self, tokens: Sequence[tuple[GrammarMatcher, Token]]) -> None:
        """Moves matchers on, all at once, by what each of them is given to ``take`` next."""
        moved = self._executor.consume_token_par([(m._compiled, token) for m, token in tokens])
        for (matcher, token), good in zip(tokens, moved, strict=True):
            matcher._ahead = token if good else None

    def begin(self, matchers: Sequence[GrammarMatcher]) -> None:
        """Makes masks that ``fill`` is likely to be asked for."""
        self._made = {}
        self._make(matchers)

    def fill(self, matchers: Mapping[int, GrammarMatcher]) -> tuple[RowMasks, dict[int, RequestError]]:
        """The masks of rows, in memory that the next call writes anew.

        Also which rows' matchers found nothing that could come next, and why; those may draw anything.
        """
        begun = self._made
        self._made = {m: begun[m] for m in matchers.values() if m in begun and begun[m][1] == m.taken}
        self._make([m for m in matchers.values() if m not in self._made])
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
        for line, matcher in enumerate(matchers, first):
            mask = self._bits[line].view(np.uint32)[: self._words]
            mask[-1] &= self._last
            _bar(mask, matcher._barred)
            self._made[matcher] = line, matcher.taken


def _bar(mask: npt.NDArray[np.uint32], tokens: Sequence[Token]) -> None:
    if not tokens:
        return
    kept = mask.copy()
    for token in tokens:
        kept[token // 32] &= np.uint32(EVERY ^ 1 << token % 32)
    if kept.any():
        mask[:] = kept
