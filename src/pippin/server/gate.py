"""The door of the server: shut while the model loads, while it is replaced, and once the server is told to stop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

from starlette.types import ASGIApp, Receive, Scope, Send

from pippin.client import EngineClient
from pippin.errors import EngineError
from pippin.messages import Progress
from pippin.server import ui
from pippin.server.http import error_response
from pippin.server.shapes import shape_of

LAST = ("/health", "/metrics", "/abort_request")
"""Answered while the server drains."""

ASIDE = frozenset(
    (
        *LAST, *ui.PAGES, "/ready", "/get_model_info", "/model_info", "/get_server_info", "/server_info",
        "/pippin/stats", "/update_weights_from_disk",
    )
)  # fmt: skip
"""What asks nothing of the model: answered while it is replaced, which doesn't wait for it."""

HURRY_SECONDS = 0.1


class Gate:
    """What listens from the first moment: 503 with how far loading is, until ``app`` is set.

    The web page, if there is one, is there already, and shows it. While ``draining`` nothing new is taken in; ``idle``
    is set while no request is being answered, but for those that ask nothing of the model.
    """

    def __init__(self, client: EngineClient, ui: bool = False) -> None:
        self.app: ASGIApp | None = None
        self.idle = asyncio.Event()
        self.idle.set()
        self.waiting = 0
        """Requests that wait for the model that is being replaced."""
        self._client = client
        self._ui = ui
        self._open, self._stopping = asyncio.Event(), asyncio.Event()
        self._open.set()
        self._answering = 0

    @property
    def draining(self) -> bool:
        return self._stopping.is_set()

    def drain(self) -> None:
        """From here on nothing new is taken in."""
        self._stopping.set()
        self._open.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # uvicorn runs without lifespan events; there are no websockets
            return
        if self.app is None and self._ui and scope["path"] in ui.PAGES and scope["method"] in ("GET", "HEAD"):
            await ui.response(scope["path"])(scope, receive, send)
            return
        if not self._open.is_set() and scope["path"] not in ASIDE:
            await self._wait()
        error = self._refusal(scope["path"])
        if error is not None:
            await error_response(error, shape_of(scope["path"]))(scope, receive, send)
        elif self.app is not None:
            await self._pass(self.app, scope, receive, send)

    def _refusal(self, path: str) -> EngineError | None:
        if self.app is None:
            return EngineError(f"the model is still loading{stage(self._client.progress)}", 503)
        if self.draining and path not in LAST:
            return EngineError("the server is shutting down and takes no more requests", 503)
        if path == "/ready" and not self._open.is_set():
            return EngineError(f"the model is being replaced{stage(self._client.progress)}", 503)
        return None

    async def _wait(self) -> None:
        self.waiting += 1
        try:
            await self._open.wait()
        finally:
            self.waiting -= 1

    async def _pass(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in ASIDE:
            await app(scope, receive, send)
            return
        self._answering += 1
        self.idle.clear()
        try:
            await app(scope, receive, send)
        finally:
            self._answering -= 1
            if not self._answering:
                self.idle.set()

    @asynccontextmanager
    async def alone(self, hurry: Callable[[], None] | None = None) -> AsyncGenerator[None, None]:
        """Begins when all requests that were let in have been answered; those that come wait until it ends.

        ``hurry`` is called now and then until it begins. Raises EngineError (503) if the server is to stop meanwhile.
        """
        self._open.clear()
        try:
            while not self.idle.is_set() and not self.draining:
                if hurry is not None:
                    hurry()
                await self._idle_or_stopping(None if hurry is None else HURRY_SECONDS)
            if self.draining:
                raise EngineError("the server is shutting down", 503)
            yield
        finally:
            self._open.set()

    async def _idle_or_stopping(self, seconds: float | None) -> None:
        waits = [asyncio.create_task(event.wait()) for event in (self.idle, self._stopping)]
        try:
            await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()


def stage(progress: Progress | None) -> str:
    if progress is None:
        return ""
    share = f", {100 * progress.done // progress.total} %" if progress.total else ""
    return f" ({progress.stage}{share})"
