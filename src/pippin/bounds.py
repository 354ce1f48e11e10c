"""How large a step may be after one found no memory: half of it at once, and more again while all goes well."""

from __future__ import annotations

LEAST_TOKENS = 32
"""Prompt tokens of a step that are not cut any further."""

CALM_STEPS = 64
"""Steps that go well before twice as much is tried again."""

OUT_OF_MEMORY = "out of memory"


def kind_of(error: Exception) -> str:
    """What an error of the device is called: ``OUT_OF_MEMORY``, in whatever words it comes, or its class' name."""
    said = str(error).lower()
    short = isinstance(error, MemoryError) or "unable to allocate" in said or "attempting to allocate" in said
    return OUT_OF_MEMORY if short or "out of memory" in said or "outofmemory" in said else type(error).__name__


class StepBounds:
    """At most ``rows`` requests run, and compute ``tokens`` of prompts in a step."""

    def __init__(self, rows: int, tokens: int) -> None:
        self._most = rows, tokens
        self._calm = 0
        self.rows, self.tokens = rows, tokens

    def shrink(self, rows: int, tokens: int) -> bool:
        """A step of so many found no memory; False if a smaller one makes no sense."""
        self._calm = 0
        if rows <= 1 and tokens <= LEAST_TOKENS:
            return False
        self.rows = max(1, min(self.rows, rows // 2))
        self.tokens = max(min(LEAST_TOKENS, self._most[1]), min(self.tokens, tokens // 2))
        return True

    def went_well(self) -> None:
        """A step did."""
        if (self.rows, self.tokens) == self._most:
            return
        self._calm += 1
        if self._calm >= CALM_STEPS:
            self._calm = 0
            self.rows, self.tokens = min(self._most[0], 2 * self.rows), min(self._most[1], 2 * self.tokens)
