"""Lets the device begin a large step while the host still builds the rest of it."""

from __future__ import annotations

import mlx.core as mx

from pippin.models.deferred import Deferred, settled

LEAST_TOKENS = 256
"""A step of fewer tokens is queued as a whole."""

# Layers times tokens that are queued early. What is queued while the forward is built is held until that is done, a
# projection's output a layer: some 0.4 GB of an 8B model. And that is milliseconds of work, longer than building takes.
_MOST = 1 << 15


class EarlyQueue:
    """Queues the attention of some of the first layers of a forward of so many ``tokens``, and all that is before it.

    Building a step of 36 layers takes some 10 ms, for which a device that gets it as a whole has nothing to do. Layers
    are queued by powers of two, so that the first is at once and there are few: each ends a buffer of the device.
    """

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._built = 0

    def built(self, attended: mx.array | Deferred) -> None:
        """A layer's attention is built, to the last operation."""
        self._built += 1
        before = self._built - 1
        if not self._built & before and before * self._tokens <= _MOST:
            mx.async_eval(settled(attended))  # type: ignore[no-untyped-call]
