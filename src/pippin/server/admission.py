"""How much is taken in at once: answers that run and wait, their prompts' tokens, and how long one may take."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Protocol, TypeVar

from pippin.config import ServerConfig
from pippin.errors import EngineError, PippinError, RequestError
from pippin.messages import ModelInfo, Stats

T = TypeVar("T")

MOST_TOKENS = 4_000_000
"""Of all prompts that run or wait together, where there is more than one: a token takes some 40 bytes here, and as many
in the engine."""


class Client(Protocol):
    """What admission looks at."""

    @property
    def info(self) -> ModelInfo: ...

    @property
    def stats(self) -> Stats: ...

    @property
    def trouble(self) -> PippinError | None: ...


class Admission:
    """Counts what has been taken in, and refuses what would be too much: 503, to be tried again."""

    def __init__(self, client: Client, config: ServerConfig) -> None:
        self._client, self._config = client, config
        self.answers = 0
        self.tokens = 0

    @property
    def most_answers(self) -> int:
        return self._client.info.max_running_requests + self._config.max_queued_requests

    def refusal(self) -> PippinError | None:
        """Why nothing is taken in now; None if something is."""
        if (trouble := self._client.trouble) is not None:
            return trouble
        if self._client.stats.memory_level == "hard" and self.answers:  # looked at only while something runs
            return EngineError("memory is very short; try again in a moment", 503)
        waiting, most = self._client.stats.num_waiting, self._config.max_queued_requests
        if self.answers >= self.most_answers or waiting > most:
            return EngineError(f"{waiting} requests wait already, and {most} may (--max-queued-requests)", 503)
        return None

    @contextmanager
    def admit(self, answers: int, tokens: Sequence[int]) -> Iterator[None]:
        """Takes in prompts of so many ``tokens`` for so many ``answers``, until the block ends.

        Raises EngineError (503) where it must wait, RequestError where it could never be taken.
        """
        if answers > self.most_answers:
            raise RequestError(
                f"{answers} answers at once are more than the {self.most_answers} that may run and wait here "
                "(--max-running-requests, --max-queued-requests); send them in parts"
            )
        if (refusal := self.refusal()) is not None:
            raise refusal
        count = sum(tokens)
        if self.answers + answers > self.most_answers:
            raise EngineError("the queue has no room for so many answers; try again, or send fewer", 503)
        if self.answers and self.tokens + count > MOST_TOKENS:
            raise EngineError(f"prompts of {self.tokens} tokens wait and run already; try again later", 503)
        self.answers += answers
        self.tokens += count
        try:
            yield
        finally:
            self.answers -= answers
            self.tokens -= count


async def in_time(items: AsyncGenerator[T, None], seconds: float | None) -> AsyncGenerator[T, None]:
    """The items, for at most so many seconds in all. Raises EngineError (504) then."""
    deadline = None if seconds is None else asyncio.get_running_loop().time() + seconds
    async with aclosing(items):
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    item = await anext(items)
            except StopAsyncIteration:
                return
            except TimeoutError as error:
                raise too_late(seconds) from error
            yield item


async def in_seconds(work: Awaitable[T], seconds: float | None) -> T:
    """What ``work`` gives, which may take so many seconds. Raises EngineError (504) where it takes longer."""
    try:
        return await asyncio.wait_for(work, seconds)
    except TimeoutError as error:
        raise too_late(seconds) from error


def too_late(seconds: float | None) -> EngineError:
    return EngineError(f"the answer took longer than {seconds:g} seconds (--request-timeout)", 504)
