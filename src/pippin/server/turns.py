"""Requests that come at one moment are taken up one after the other, so that streams go on between them."""

from __future__ import annotations

import asyncio
from collections import deque
from itertools import count


class Turns:
    """One turn in each pass of the event loop, in the order in which they were asked for; a lone one doesn't wait.

    What is done in a turn without waiting (routes are found, a body is parsed, a template rendered, a text encoded)
    takes a millisecond or so. Between two of them the loop looks what the engine says.
    """

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[int]] = deque()
        self._numbers = count(1)
        self._turn = 0  # of this pass; 0: nobody has it

    async def take(self, turn: int = 0) -> int:
        """Returns when it is the caller's turn: its number. At once if that is ``turn``, which it has had since."""
        if turn and turn == self._turn:
            return turn
        loop = asyncio.get_running_loop()
        if self._turn:
            mine: asyncio.Future[int] = loop.create_future()
            self._waiting.append(mine)
            return await mine
        self._turn = next(self._numbers)
        loop.call_soon(self._pass_on, loop)
        return self._turn

    def _pass_on(self, loop: asyncio.AbstractEventLoop) -> None:
        while self._waiting:
            mine = self._waiting.popleft()
            if not mine.done():  # else whoever waited is gone
                self._turn = next(self._numbers)
                mine.set_result(self._turn)
                loop.call_soon(self._pass_on, loop)  # behind whoever waited
                return
        self._turn = 0
