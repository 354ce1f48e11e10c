"""Requests that come at one moment are taken up one after the other, so that streams go on between them."""

from __future__ import annotations

import asyncio
from collections import deque


class Turns:
    """One turn in each pass of the event loop, in the order in which they were asked for; a lone one doesn't wait.

    What is done in a turn without waiting (a body is parsed, a template rendered, a text encoded) takes a millisecond
    or so. Between two of them the loop looks what the engine says.
    """

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._taken = False  # somebody has the turn of this pass

    async def take(self) -> None:
        """Returns when it is the caller's turn."""
        loop = asyncio.get_running_loop()
        if self._taken:
            turn = loop.create_future()
            self._waiting.append(turn)
            await turn
        else:
            self._taken = True
            loop.call_soon(self._pass_on, loop)

    def _pass_on(self, loop: asyncio.AbstractEventLoop) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # else whoever waited is gone
                turn.set_result(None)
                loop.call_soon(self._pass_on, loop)
                return
        self._taken = False
