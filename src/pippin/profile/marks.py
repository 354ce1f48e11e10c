"""What an engine notes of its steps while a profile runs: integers in a list, since its own time is what is measured.

A mark is its kind, then so many integers as ``LENGTH`` says; times are nanoseconds of ``time.perf_counter_ns``.
``replay`` makes spans of them, in the HTTP process or when a profile has ended.
"""

from __future__ import annotations

from typing import NamedTuple

from pippin.profile.files import Stage

FORWARD, SAMPLING_DONE, QUEUE, BUILD_AHEAD, WAIT, AHEAD = range(1, 7)
"""Laps of launching a step: when each was done."""
STEP = 7
"""When choosing a step's work began and ended (0 if nobody chose), when its launch began, its number, its ``Label``."""
OTHER = 8
"""A step that is not recorded was launched: when it began."""
BUILT = 9
"""When a launch ended whose runner told no ``forward``, or that failed."""
DRAW = 10
"""When queueing a step's masks and draws began."""
DRAWN = 11
"""A step's number, and when that ended."""
READ = 12
"""A step's number, and when it was asked for and on the host."""
FINISHED = 13
"""When giving a step's tokens to their requests began and ended."""
RESET = 14
"""Steps that were not read never will be."""

LAPS = {
    "forward": FORWARD,
    "sampling": SAMPLING_DONE,
    "queue": QUEUE,
    "build ahead": BUILD_AHEAD,
    "wait": WAIT,
    "ahead": AHEAD,
}
"""``timeline.Lap``'s words."""

LENGTH = {
    **dict.fromkeys(LAPS.values(), 1),
    STEP: 8,
    OTHER: 1,
    BUILT: 1,
    DRAW: 1,
    DRAWN: 2,
    READ: 3,
    FINISHED: 2,
    RESET: 0,
}


class Label(NamedTuple):
    """What a step computes: works, tokens of prompts and of answers, and prompt tokens that the cache spared it."""

    rows: int
    prefill: int
    decode: int
    cached: int

    def __str__(self) -> str:
        parts = [f"prefill {self.prefill}"] if self.prefill else []
        parts += [f"decode {self.decode}"] if self.decode else []
        return " + ".join(parts) + (f" (cached {self.cached})" if self.cached else "")

    @property
    def stage(self) -> Stage:
        """A step that computes any prompt tokens is a prefill."""
        return "EXTEND" if self.prefill else "DECODE"

    @property
    def args(self) -> dict[str, str | int | float | bool]:
        return {
            "batch": str(self),
            "stage": self.stage,
            "rows": self.rows,
            "prefill_tokens": self.prefill,
            "decode_tokens": self.decode,
            "cached_tokens": self.cached,
        }
