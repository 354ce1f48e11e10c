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

    ``compiled`` is the grammar at its beginning, to be used by nobody else; ``field`` is named in errors.
    """

    __slots__ = ("_barred", "_compiled", "_field")

    def __init__(self, compiled: LLMatcher, barred: Sequence[Token] = (), field: str = "grammar") -> None:
        self._compiled = compiled
        self._barred = tuple(barred)
        self._field = field

    @property
    def ended(self) -> bool:
        return self._compiled.is_stopped()

    def take(self, token: Token) -> None:
        if not self._compiled.consume_token(token):
            raise self.failure()

    def forced(self) -> list[Token]:
        return self._compiled.compute_ff_tokens()

    def failure(self) -> RequestError:
        """Why it can't go on."""
        said = self._compiled.get_error().strip().splitlines()
        return RequestError(
            f"{self._field}: the answer can't go on ({said[0] if said else 'no token fits'})", self._field
        )


class Masks:
    """Makes masks for a vocabulary of ``vocab_size`` ids, of which the matchers may know ``known`` or more."""

    def __init__(self, vocab_size: int, known: int) -> None:
        self._words = words(vocab_size)
        self._stride = max(self._words, words(known))
        self._last = np.uint32(2 ** ((vocab_size - 1) % 32 + 1) - 1)  # the bits of the last word that are tokens
        self._executor = LLExecutor()
        self._bits = np.zeros((0, self._stride), np.int32)

    def fill(self, matchers: Mapping[int, GrammarMatcher]) -> tuple[RowMasks, dict[int, RequestError]]:
        """The masks of rows, in memory that the next call writes anew.

        Also which rows' matchers found nothing that could come next, and why; those may draw anything.
        """
        if len(matchers) > len(self._bits):
            self._bits = np.zeros((len(matchers), self._stride), np.int32)
        bits = self._bits[: len(matchers)]
        masks = bits.view(np.uint32)[:, : self._words]
        if not matchers:
            return RowMasks((), masks), {}
        fill_next_token_bitmask_par(self._executor, [(m._compiled, i) for i, m in enumerate(matchers.values())], bits)
        masks[:, -1] &= self._last
        failed = {}
        for mask, (row, matcher) in zip(masks, matchers.items(), strict=True):
            _bar(mask, matcher._barred)
            if matcher._compiled.is_error() or not mask.any():
                failed[row] = matcher.failure()
                mask[:] = EVERY
        return RowMasks([*matchers], masks), failed


def _bar(mask: npt.NDArray[np.uint32], tokens: Sequence[Token]) -> None:
    if not tokens:
        return
    kept = mask.copy()
    for token in tokens:
        kept[token // 32] &= np.uint32(EVERY ^ 1 << token % 32)
    if kept.any():
        mask[:] = kept
