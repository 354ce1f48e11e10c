"""HTTP's side of it: bodies in, JSON and event streams out, clients that go away, errors in OpenAI's shape."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pippin.errors import EngineError, RequestError
from pippin.server.protocol import Body, build, read

log = logging.getLogger(__name__)

T = TypeVar("T")
S = TypeVar("S", bound=Body)

encode = msgspec.json.Encoder().encode

MOST_CONTAINERS = 250_000
"""Lists and objects of a body, and brackets in its texts: five million take ten seconds, and hold up everyone."""

OFF_LOOP = 4_000
"""Characters of a text, or tokens, with which a thread deals. The tokenizer lets others run meanwhile."""

RETRY_SECONDS = "1"

CLIENT_CLOSED = 499  # nginx's; nobody will read it


class JsonResponse(Response):
    """A response of JSON, encoded by msgspec."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return encode(content)


async def read_body(request: Request, kind: type[S]) -> S:
    """The request's JSON as its struct, as long as ``guard`` lets it be. Raises RequestError (415: not plain JSON)."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # A web page can send anything but this type to a server of another origin without asking it first.
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise RequestError("send JSON, with the header `Content-Type: application/json`", status=415)
    packed = request.headers.get("content-encoding", "identity")
    if packed.lower() != "identity":
        raise RequestError(f"send the body as it is, without Content-Encoding, not {packed}", status=415)
    body = await request.body()
    if body.count(b"[") + body.count(b"{") > MOST_CONTAINERS:
        raise RequestError(f"the body holds more than {MOST_CONTAINERS} lists and objects", status=413)
    return read(body, kind)


def read_query(request: Request, kind: type[S]) -> S:
    """What stands behind the path, as a struct; a list is a name several times, or ``name[]``. Raises RequestError."""
    found: dict[str, Any] = {}
    for name, value in request.query_params.multi_items():
        found.setdefault(name.removesuffix("[]"), []).append(value)
    given = {name: values[0] if len(values) == 1 else values for name, values in found.items()}
    return build(given, kind, strict=False)


async def gone(receive: Receive) -> None:
    """Return when the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass


@asynccontextmanager
async def while_there(receive: Receive) -> AsyncGenerator[None, None]:
    """A block that is cancelled where it waits once the client has gone away; ClientDisconnect is raised then."""
    patience = asyncio.timeout(None)

    def leave(watch: asyncio.Task[None]) -> None:
        patience.reschedule(0.0)

    watch = asyncio.create_task(gone(receive))
    try:
        async with patience:
            watch.add_done_callback(leave)
            try:
                yield
            finally:
                watch.remove_done_callback(leave)
    except TimeoutError as error:
        if patience.expired():
            raise ClientDisconnect from error
        raise
    finally:
        await cancel(watch)


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The work's result; a client that goes away cancels the work, and ClientDisconnect is raised.

    The work begins at once, in the task that asks: what it tells the engine waits for nobody else's request.
    """
    async with while_there(request.receive):
        return await work
    raise AssertionError  # mypy takes the block for one that may swallow errors


async def next_of(items: AsyncIterator[T]) -> T:
    return await anext(items)


async def primed(request: Request, items: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """The items, as soon as there is one: what fails before that can still have an HTTP status."""
    try:
        first = await unless_gone(request, next_of(items))
    except BaseException:
        await items.aclose()
        raise

    async def chained() -> AsyncGenerator[T, None]:
        async with aclosing(items):
            yield first
            async for item in items:
                yield item

    return chained()


async def off_loop(size: int, function: Callable[..., T], *arguments: Any) -> T:
    """Call it, in a thread if there is much to do: a long text must not hold up everyone's streams."""
    return await asyncio.to_thread(function, *arguments) if size > OFF_LOOP else function(*arguments)


async def cancel(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def event(content: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + encode(content) + b"\n\n"


DONE = b"data: [DONE]\n\n"

PIECES = "pippin.pieces"
"""An ASGI extension of our connections: takes a piece of the body straight there, once the response has started, past
all middleware. Whoever must see the body takes it out of the scope."""


class EventStream(Response):
    """Server-sent events, or lines of JSON. The client's going away, or a failure to send, closes ``events`` at once.

    An error after the first event can't change the status any more: it is sent as an event, and ends the stream.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        on_error: Callable[[Exception], bytes] = lambda error: event(error_body(error)[1]),
        media_type: str = "text/event-stream",
    ) -> None:
        self.status_code = 200
        self.background = None
        self.media_type = media_type
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._events = events
        self._on_error = on_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # In a task of its own: each token would pass all that stands between the route and the socket, else.
        sender, watch = asyncio.create_task(self._send(scope, send)), asyncio.create_task(gone(receive))
        try:
            await asyncio.wait((sender, watch), return_when=asyncio.FIRST_COMPLETED)
            if sender.done():
                sender.result()
        finally:
            await cancel(sender, watch)
            await self._events.aclose()

    async def _send(self, scope: Scope, send: Send) -> None:
        async def pass_on(chunk: bytes) -> None:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        with contextlib.suppress(OSError):
            await self._send_events(scope.get("extensions", {}).get(PIECES, pass_on))
        await send({"type": "http.response.body", "body": b""})

    async def _send_events(self, send: Callable[[bytes], Awaitable[None]]) -> None:
        failed = False
        while not failed:
            try:
                chunk = await anext(self._events)
            except StopAsyncIteration:
                return
            except Exception as error:
                chunk, failed = self._on_error(error), True
            await send(chunk)


def error_parts(error: Exception) -> tuple[int, str, str | None]:
    """HTTP status, message and field of an error. What we did not foresee is logged, and told to nobody."""
    if isinstance(error, RequestError):
        return error.status, error.message, error.field
    if isinstance(error, EngineError):
        return error.status, error.message, None
    log.error("a request failed", exc_info=error)
    return 500, "the server failed on this request", None


def error_body(error: Exception) -> tuple[int, dict[str, Any]]:
    """The HTTP status and OpenAI's JSON of an error."""
    status, message, field = error_parts(error)
    code = {401: "invalid_api_key", 404: "model_not_found" if field == "model" else "not_found"}.get(status)
    kind = "invalid_request_error" if status < 500 else "server_error"
    return status, {"error": {"message": message, "type": kind, "param": field, "code": code}}


ErrorJson = Callable[[Exception], tuple[int, dict[str, Any]]]


def error_response(error: Exception, shape: ErrorJson = error_body) -> JsonResponse:
    """An error as a whole answer, in an API's shape."""
    status, body = shape(error)
    headers = {401: {"www-authenticate": "Bearer"}, 503: {"retry-after": RETRY_SECONDS}}.get(status)
    if isinstance(error, EngineError) and error.retry_after is not None:
        headers = {"retry-after": str(max(1, math.ceil(error.retry_after)))}
    return JsonResponse(body, status, headers)
