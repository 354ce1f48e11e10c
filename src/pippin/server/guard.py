"""What every request passes before its route: where it comes from, how large it is, how fast it is sent; one log line.

A server on loopback is reached by every web page that the user opens, through its browser. So requests must name a host
that is this machine's (or a page's domain could be pointed here: DNS rebinding), and those that a page of another
origin sends are refused unless ``--allowed-origins`` has it.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import time
import uuid
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pippin.config import ServerConfig
from pippin.errors import EngineError, RequestError
from pippin.logs import fields, request_id
from pippin.server.http import error_response
from pippin.server.shapes import shape_of
from pippin.server.turns import Turns

log = logging.getLogger("pippin.access")

HEADER_BYTES = 32 * 2**10
"""Most bytes of a request's head that are accepted."""

BODY_SECONDS = 20.0
"""How long a body may take to come, and a second more for each ``BODY_RATE`` bytes of it."""

BODY_RATE = 20_000.0
BODIES = 8
"""How many bodies of the largest size may be held at once, all requests together."""

QUIET = ("/health", "/ready", "/metrics")
"""Asked every few seconds by programs: no line in the log, unless at level debug."""

LOCAL_NAMES = ("localhost", "host.docker.internal")
REQUEST_ID = re.compile(r"[!-~]{1,128}")


def is_loopback(host: str) -> bool:
    """Whether an address, or a name, reaches this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def warning_of(config: ServerConfig) -> str | None:
    """What to say of a server that others can reach and that asks no key; None if there is nothing to say."""
    if config.api_key or is_loopback(config.host):
        return None
    return (
        f"anyone who reaches {config.host}:{config.port} can use this server, since it asks for no key. "
        "Start it with --api-key KEY, or with --host 127.0.0.1 for this machine alone"
    )


@dataclass(frozen=True)
class Origins:
    """Which hosts a request may name, and which pages may send one."""

    config: ServerConfig

    def check(self, headers: Headers) -> None:
        """Raises RequestError (403) with the flag that would allow it."""
        host = headers.get("host")
        if host is None:  # HTTP/1.0; browsers always send it
            return
        if not self._is_ours(host):
            raise RequestError(
                f"this server is not {host[:200]!r}; to be reached by another name, start it with --allowed-hosts NAME",
                status=403,
            )
        origin = headers.get("origin")
        if origin is None:  # browsers leave it out of pictures, scripts and links
            foreign = headers.get("sec-fetch-site") in ("cross-site", "same-site")
            foreign = foreign and headers.get("sec-fetch-mode") != "navigate"
            origin = "another origin" if foreign else None
        if origin is not None and not self._may_ask(origin, host):
            raise RequestError(
                f"a page of {origin[:200]} may not use this server; to let it, start the server with "
                "--allowed-origins ORIGIN",
                status=403,
            )

    def _is_ours(self, host: str) -> bool:
        allowed = self.config.allowed_hosts or []
        if "*" in allowed or not is_loopback(self.config.host):
            return not allowed or "*" in allowed or name_of(host) in (*allowed, self.config.host)
        name = name_of(host)
        return is_loopback(name) or name in (*LOCAL_NAMES, *allowed)

    def _may_ask(self, origin: str, host: str) -> bool:
        allowed = self.config.allowed_origins or []
        # Pages of programs (editors, desktop apps) have schemes of their own, which no web page can claim.
        parts = urlsplit(origin)
        own = parts.netloc.lower() == host.lower() if parts.scheme in ("http", "https") else bool(parts.scheme)
        return own or "*" in allowed or origin in allowed


def name_of(host: str) -> str:
    """The name in a Host header, without its port."""
    found = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^:\s]*)(?::\d*)?", host.strip())
    return found[1].lower().rstrip(".") if found else ""


@dataclass
class Bodies:
    """How much of requests' bodies is held, all together, and how much may be."""

    most: int
    each: int
    held: int = 0

    @property
    def too_long(self) -> RequestError:
        return RequestError(f"the body is longer than {self.each} bytes (--max-body-mb)", status=413)

    def take(self, size: int, sofar: int) -> None:
        """Counts ``size`` bytes of a body that has ``sofar`` already. Raises RequestError (413), EngineError (503)."""
        if sofar + size > self.each:
            raise self.too_long
        if self.held + size > self.most and self.held > sofar:
            raise EngineError("others' requests fill the memory for bodies; try again in a moment", 503)
        self.held += size


@dataclass
class Guard:
    """The first middleware."""

    app: ASGIApp
    config: ServerConfig

    def __post_init__(self) -> None:
        self._origins = Origins(self.config)
        size = self.config.max_body_mb * 2**20
        self._bodies = Bodies(BODIES * size, size)
        self._turns = Turns()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        turn = await self._turns.take() if scope["method"] == "POST" else 0
        passage = Passage(scope, receive, send, self._bodies, self._turns, turn)
        token = request_id.set(passage.id)
        try:
            try:
                self._check(scope)
            except RequestError as error:
                await error_response(error, shape_of(scope["path"]))(scope, passage.receive, passage.send)
            else:
                await self.app(scope, passage.receive, passage.send)
        finally:
            passage.end()
            request_id.reset(token)

    def _check(self, scope: Scope) -> None:
        """What a request's head says. Raises RequestError."""
        headers = Headers(scope=scope)
        if sum(len(name) + len(value) for name, value in headers.raw) > HEADER_BYTES:
            raise RequestError(f"the request's headers are longer than {HEADER_BYTES} bytes", status=431)
        self._origins.check(headers)
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._bodies.each:
            raise self._bodies.too_long


class Passage:
    """One request on its way, which begins in ``turn``: its body is counted and timed, its answer gets its id."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, bodies: Bodies, turns: Turns, turn: int) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._bodies, self._turns, self._turn = bodies, turns, turn
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        self.id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        self._began = time.monotonic()
        self._size = 0
        self._whole = False
        self._status = 0

    async def receive(self) -> Message:
        if self._whole:
            return await self._receive()
        deadline = self._began + BODY_SECONDS + self._size / BODY_RATE
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                message = await self._receive()
        except TimeoutError:
            self._whole = True
            raise RequestError("the body came too slowly", status=408) from None
        if message["type"] == "http.request":
            size = len(message.get("body", b""))
            self._bodies.take(size, self._size)
            self._size += size
            self._whole = not message.get("more_body", False)
            if self._whole:  # what it asks for is looked at in its turn, another one if it had to be waited for
                self._turn = await self._turns.take(self._turn)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            message["headers"] = [*message.get("headers", []), (b"x-request-id", self.id.encode())]
        await self._send(message)

    def end(self) -> None:
        self._bodies.held -= self._size
        method, path, seconds = self._scope["method"], self._scope["path"], time.monotonic() - self._began
        level = logging.DEBUG if path in QUIET else logging.INFO
        if log.isEnabledFor(level):
            extra = fields(
                method=method, path=path, status=self._status, seconds=round(seconds, 4), body_bytes=self._size
            )
            log.log(level, "%s %s %s %.3f s", method, path, self._status or "-", seconds, extra=extra)
