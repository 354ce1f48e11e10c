"""Writes to sockets, gathered: what one pass of the event loop says to a connection leaves in one piece, behind the
pass's work for all of them.

A step of the engine gives every stream a token at one moment. Were each written where it is made, the reader would be
woken, and might take the processor, between any two; and an answer's head, body and end would be three calls of the
system.
"""

from __future__ import annotations

import asyncio
from typing import Any

MOST_WAITING = 128
"""Connections whose words may wait for the others': with more than this, those that wait go first."""


class Writes:
    """What all connections of an event loop have said and not sent yet; it is sent as soon as the loop comes round."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: list[Gathered] = []

    def add(self, transport: Gathered) -> None:
        """It has something to send."""
        if not self._waiting:
            self._loop.call_soon(self.send)
        elif len(self._waiting) >= MOST_WAITING:
            self.send()
        self._waiting.append(transport)

    def send(self) -> None:
        """Sends all there is."""
        waiting, self._waiting = self._waiting, []
        for transport in waiting:
            transport.send()


class Gathered(asyncio.Transport):
    """A transport whose writes wait for ``Writes``; all else goes to the real one, behind what was written before."""

    def __init__(self, transport: asyncio.Transport, writes: Writes) -> None:
        self._transport, self._writes = transport, writes
        self._unsent: list[bytes] = []

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not data or self._transport.is_closing():
            return
        if not self._unsent:
            self._writes.add(self)
        self._unsent.append(bytes(data))

    def send(self) -> None:
        """Hands over what was written; of a transport that was closed meanwhile, nothing is left."""
        unsent, self._unsent = self._unsent, []
        if unsent and not self._transport.is_closing():
            self._transport.write(b"".join(unsent) if len(unsent) > 1 else unsent[0])

    def close(self) -> None:
        self.send()
        self._transport.close()

    def abort(self) -> None:
        self._unsent = []
        self._transport.abort()

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._transport.resume_reading()
