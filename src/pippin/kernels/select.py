"""The launch that finds how far down a row of tokens the limits of top_k and top_p reach."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx

from pippin.kernels.launch import Launch, Launcher, Source, nothing, ready

BOUNDARY = Source("boundary", "boundary", ("bits", "mass", "most", "target"), ("boundary", "last"), headers=("select",))

_THREADS = 512
_MOST_TOKENS = 1 << 24  # as many passes as the kernel makes at most suffice for


class Limits(NamedTuple):
    """What may lie before a kept token: fewer than ``tokens`` tokens (int32), less than ``mass`` (float32).

    [S] or [S, 1], or None: no such limit.
    """

    tokens: mx.array | None
    mass: mx.array | None

    def column(self) -> Limits:
        """Both as [S, 1]."""
        return Limits(*(None if a is None else a.reshape(-1, 1) for a in self))

    def allow(self, count: mx.array, mass: mx.array | None) -> mx.array:
        """Whether a token with this before it is kept; int32 and uint32 of any shape that fits the limits'."""
        allowed = mx.array(True)
        if self.tokens is not None:
            allowed = count < self.tokens
        if self.mass is not None and mass is not None:
            allowed = allowed & (mass.astype(mx.float32) < self.mass)
        return allowed


def takes(bits: mx.array) -> bool:
    """Whether the kernel takes rows of this length: from two packs of 16 bytes on."""
    return 8 <= bits.shape[1] <= _MOST_TOKENS


def boundary(
    launch: Launcher, bits: mx.array, mass: mx.array | None, limits: Limits, signed: bool = False
) -> tuple[mx.array, mx.array]:
    """See ``kernels.boundary``."""
    rows = bits.shape[0]
    inputs = [
        bits,
        nothing(mx.uint32) if mass is None else mass,
        nothing(mx.int32) if limits.tokens is None else limits.tokens.reshape(-1),
        nothing(mx.float32) if limits.mass is None else limits.mass.reshape(-1),
    ]
    found, last = launch(_launch(rows, limits.tokens is not None, limits.mass is not None, signed), inputs)
    return found[:, None], last[:, None]


@lru_cache(maxsize=1024)
def _launch(rows: int, count: bool, mass: bool, signed: bool) -> Launch:
    constants = (("COUNT", count), ("MASS", mass), ("SIGNED", signed), ("THREADS", _THREADS))
    return Launch(BOUNDARY, constants, (rows, 1), _THREADS, (((rows,), mx.uint32), ((rows,), mx.int32)))


def tokens_up_to(bits: mx.array, boundary: mx.array, last: mx.array) -> mx.array:
    """Which tokens lie up to a boundary, bool [S, n]: ``bits`` uint32 [S, n], ``boundary`` and ``last`` [S, 1]."""
    ids = _ids(bits.shape[1])
    return (bits < boundary) | ((bits == boundary) & (ids <= last))


@lru_cache(maxsize=16)
def _ids(n: int) -> mx.array:
    return ready(mx.arange(n, dtype=mx.int32))
