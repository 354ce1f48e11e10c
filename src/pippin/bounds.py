"""How large a step may be after one found no memory: half of it at once, and more again while all goes well."""

from __future__ import annotations

from pippin.types import Finish

LEAST_TOKENS = 32
"""Prompt tokens of a step that are not cut any further."""

CALM_STEPS = 64
"""Steps that go well before twice as much is tried again."""

OUT_OF_MEMORY = "out of memory"
_SHORT = (OUT_OF_MEMORY, "outofmemory", "unable to allocate", "attempting to allocate", "can't start new thread")


def unqueued(error: Exception) -> Finish:
    """How a request ends that could not be taken in, for a reason that is not the request's own."""
    kind = kind_of(error)
    status = 503 if kind == OUT_OF_MEMORY else 500
    return Finish("error", None, f"the engine could not queue the request ({kind})", status=status)


def kind_of(error: Exception) -> str:
    """What an error of the device or the system is called: ``OUT_OF_MEMORY``, however it is put, or its class' name."""
    said = str(error).lower()
    short = isinstance(error, MemoryError) or any(words in said for words in _SHORT)
    return OUT_OF_MEMORY if short else type(error).__name__


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
