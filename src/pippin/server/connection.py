"""Connections that say nothing, or too slowly, or read nothing: uvicorn's own have no limit but memory."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Callable
from typing import Any

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol, RequestResponseCycle

from pippin.errors import RequestError
from pippin.server.http import PIECES, encode, error_body
from pippin.server.writes import Gathered, Writes

HEAD_SECONDS = 10.0
"""How long a request's head may take to come."""

STALL_SECONDS = 60.0
"""How long a client may leave an answer unread once the buffers between are full."""

SPARE_FILES = 64
"""Open files that connections leave to everything else."""

FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: text/plain\r\nretry-after: 1\r\nconnection: close\r\n"
    b"content-length: 21\r\n\r\ntoo many connections\n"
)


def raise_file_limit(wanted: int) -> int:
    """Lets this process open ``wanted`` files, if it may; how many it can."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        except (OSError, ValueError):  # macOS has a limit of its own
            soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return soft


class Connections:
    """All connections of a server, at most ``most``. Those without a whole request yet make room for new ones.

    So a crowd that connects and says nothing harms nobody: who speaks at once is served.
    """

    def __init__(self, most: int) -> None:
        self.most = max(1, min(most, raise_file_limit(most + SPARE_FILES) - SPARE_FILES))
        self.open: set[Connection] = set()
        self.waiting: dict[Connection, None] = {}  # oldest first
        self._writes: Writes | None = None

    def protocol(self) -> Callable[..., Connection]:
        """What uvicorn makes a connection of."""

        def make(**parts: Any) -> Connection:
            return Connection(self, **parts)

        return make

    def writes(self, loop: asyncio.AbstractEventLoop) -> Writes:
        """What all connections write through, in the loop that they live in."""
        self._writes = self._writes or Writes(loop)
        return self._writes

    def add(self, connection: Connection) -> bool:
        """Takes a connection in; False if there is no room for it."""
        if len(self.open) >= self.most:
            oldest = next(iter(self.waiting), None)
            if oldest is None:
                return False
            oldest.drop()
        self.open.add(connection)
        self.waiting[connection] = None
        return True

    def remove(self, connection: Connection) -> None:
        self.open.discard(connection)
        self.waiting.pop(connection, None)


class Connection(H11Protocol):
    """uvicorn's, with deadlines for a request's head and for the reading of an answer."""

    def __init__(self, all: Connections, **parts: Any) -> None:
        super().__init__(**parts)
        self._all = all
        self._head: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._routes, self.app = self.app, self._answer

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(Gathered(transport, self._all.writes(self.loop)))
        if not self._all.add(self):
            self.transport.write(FULL)
            self.transport.close()
            return
        self._head = self.loop.call_later(HEAD_SECONDS, self.drop)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The app, which may send pieces of a body straight to us."""
        scope["extensions"] = {PIECES: Pieces(self.cycle)}
        await self._routes(scope, receive, send)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._head is None and not self._busy:
            self._head = self.loop.call_later(HEAD_SECONDS, self.drop)
        super().data_received(data)
        if self._busy:
            self._head = cancelled(self._head)
            if not self.cycle.more_body:
                self._all.waiting.pop(self, None)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._busy and self in self._all.open:
            self._all.waiting[self] = None

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stall is None:
            self._stall = self.loop.call_later(STALL_SECONDS, self.drop)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stall = cancelled(self._stall)

    def connection_lost(self, exc: Exception | None) -> None:
        self._head, self._stall = cancelled(self._head), cancelled(self._stall)
        self._all.remove(self)
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What can't be understood is refused in JSON too, and no more is read."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        body = encode(error_body(RequestError("the request is not HTTP, or its head is too long"))[1])
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        head = h11.Response(status_code=400, headers=headers, reason=STATUS_PHRASES[400])
        for event in (head, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def drop(self) -> None:
        """Ends the connection at once, whatever is unsaid."""
        self._all.remove(self)
        self.transport.abort()

    @property
    def _busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete


class Pieces:
    """Sends pieces of one response's body, whose length its head did not tell, framed as h11 would, and no faster
    than the client reads. h11 looks at every piece anew, though none changes what may follow.
    """

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._chunked = cycle.scope["http_version"] == "1.1"  # before that, the end of the connection is the body's

    async def __call__(self, piece: bytes) -> None:
        cycle = self._cycle
        if cycle.flow.write_paused and not cycle.disconnected:
            await cycle.flow.drain()
        if cycle.disconnected or not piece:
            return
        cycle.transport.write(b"%x\r\n%b\r\n" % (len(piece), piece) if self._chunked else piece)


def cancelled(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """Stops a timer; returns what stands in its place: none."""
    if timer is not None:
        timer.cancel()
    return None
