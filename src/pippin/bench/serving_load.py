"""Sends conversations to a server when they are due, and records when what came back. Errors are records too."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, repeat

import aiohttp
import msgspec

from pippin.bench.serving_api import Answer, Backend, BadEvent, ErrorEvent, Json, request_body
from pippin.bench.serving_data import Conversation, Prompt, Turn

clock = time.perf_counter

# What reading an answer of another form raises.
MALFORMED = (BadEvent, msgspec.DecodeError, UnicodeError, RecursionError, LookupError, TypeError, AttributeError)


@dataclass(frozen=True, slots=True)
class Target:
    """A server, and how it is asked; ``extra`` is added to each body."""

    url: str
    backend: Backend
    model: str = ""
    stream: bool = True
    to_length: bool = True
    timeout: float = 21600.0
    extra: Json = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Run:
    """What a load came to: all answers that ended, how many had not when it was stopped, and its seconds."""

    answers: list[Answer]
    unfinished: int
    seconds: float
    stopped: bool = False


@dataclass(slots=True)
class Watch:
    """What is going on now, for who shows it."""

    total: int = 0
    done: int = 0
    failed: int = 0
    running: int = 0
    tokens: int = 0


def arrivals(number: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds from the start at which each of ``number`` conversations is due; the first at 0.

    Intervals are gamma distributed with shape ``burstiness`` and mean 1 / ``rate``: 1 gives a Poisson process, less
    comes in bursts. An infinite rate gives zeros.
    """
    if rate == float("inf"):
        return [0.0] * number
    rng = random.Random(seed)
    steps = (rng.gammavariate(burstiness, 1 / (rate * burstiness)) for _ in range(number - 1))
    return list(accumulate(steps, initial=0.0))


def session(api_key: str | None = None) -> aiohttp.ClientSession:
    """A client without a bound on connections, nor timeouts of its own: a request has one.

    Idle connections are kept shorter than servers keep them (uvicorn: 5 s), so that none is closed as it is used again.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2),
        timeout=aiohttp.ClientTimeout(total=None),
        headers=headers,
        read_bufsize=2**20,
    )


async def run_load(
    http: aiohttp.ClientSession,
    target: Target,
    conversations: Sequence[Conversation],
    due: Sequence[float],
    max_concurrency: int | None = None,
    watch: Watch | None = None,
) -> Run:
    """Runs all conversations, each from its time on, at most ``max_concurrency`` of them at once.

    A conversation keeps its place while its user thinks: the bound is on users. Cancelled, it gives what there is.
    """
    load = Load(http, target, watch or Watch(), asyncio.Semaphore(max_concurrency or len(conversations) or 1))
    load.watch.total = sum(len(c.turns) for c in conversations)
    began = clock()
    tasks = [asyncio.create_task(load.converse(c, began + t)) for c, t in zip(conversations, due, strict=True)]
    stopped = False
    try:
        await asyncio.gather(*tasks)
    except asyncio.CancelledError:
        stopped = True
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if current := asyncio.current_task():
            current.uncancel()
    return Run(load.answers, load.watch.running, clock() - began, stopped)


@dataclass(slots=True)
class Load:
    """A load in progress."""

    http: aiohttp.ClientSession
    target: Target
    watch: Watch
    seats: asyncio.Semaphore
    answers: list[Answer] = field(default_factory=list)

    async def converse(self, conversation: Conversation, due: float) -> None:
        """One user: waits for the time and for a place, then sends message after message. Ends at the first error."""
        await asyncio.sleep(max(0.0, due - clock()))
        said: list[Prompt] = []
        async with self.seats:
            for turn in conversation.turns:
                await asyncio.sleep(turn.pause)
                said.append(turn.prompt)
                answer = await self._ask(said, turn, due if turn is conversation.turns[0] else clock())
                if answer.error is not None:
                    self._give_up(len(conversation.turns) - (len(said) + 1) // 2)
                    return
                said.append(answer.text)

    async def _ask(self, said: Sequence[Prompt], turn: Turn, due: float) -> Answer:
        answer = Answer(due=due, warm=turn.warm)
        self.watch.running += 1
        await ask(self.http, self.target, said, turn.output_len, answer)
        self.watch.running -= 1  # not where it was cancelled: those are unfinished
        self.watch.done += 1
        self.watch.failed += answer.error is not None
        self.watch.tokens += answer.output_tokens or sum(answer.counts)
        self.answers.append(answer)
        return answer

    def _give_up(self, turns: int) -> None:
        """What would have followed an answer that did not come is not asked."""
        self.watch.total -= turns


async def ask(
    http: aiohttp.ClientSession, target: Target, said: Sequence[Prompt], output_len: int, answer: Answer
) -> None:
    """One request, recorded in ``answer``. Raises nothing but CancelledError."""
    stream, to_length = target.stream, target.to_length
    body = request_body(target.backend, target.model, said, output_len, stream=stream, to_length=to_length)
    content = msgspec.json.encode(merged(body, target.extra))
    answer.sent = clock()
    try:
        async with asyncio.timeout(target.timeout):
            await _exchange(http, target, content, answer)
    except TimeoutError as error:
        answer.fail("timeout", error)
    except aiohttp.ClientConnectorError as error:
        answer.fail("no connection", error)
    except (aiohttp.ClientError, OSError) as error:
        answer.fail("connection lost", f"{type(error).__name__} {error}")
    except ErrorEvent as error:
        answer.fail("error event", error)
    except MALFORMED as error:
        answer.fail("malformed answer", f"{type(error).__name__}: {error}")
    answer.end = clock()
    if answer.error is None and not answer.arrivals:
        answer.fail("empty answer", "no text came")


def merged(body: Json, extra: Json) -> Json:
    """With ``extra``'s fields; objects are merged, so that one sampling parameter can be added."""
    both = {k: merged(body[k], extra[k]) for k in body.keys() & extra.keys() if _are_objects(body[k], extra[k])}
    return body | extra | both


def _are_objects(*values: object) -> bool:
    return all(isinstance(value, dict) for value in values)


async def _exchange(http: aiohttp.ClientSession, target: Target, content: bytes, answer: Answer) -> None:
    api = target.backend.api
    headers = {"Content-Type": "application/json"}
    async with http.post(target.url + api.path, data=content, headers=headers) as response:
        if response.status != 200:
            answer.fail(f"HTTP {response.status}", (await response.read()).decode(errors="replace"))
            return
        if not target.stream:
            whole = await response.read()
            api.read(msgspec.json.decode(whole), answer, clock())
            return
        if not await _read_stream(response, api.read, answer):
            answer.fail("stream cut short", "it ended without [DONE] and without a finish_reason")


async def _read_stream(
    response: aiohttp.ClientResponse, read: Callable[[Json, Answer, float], None], answer: Answer
) -> bool:
    """Reads events as they come; whether the stream came to its end."""
    async for now, data in events_of(response):
        if data == b"[DONE]":
            return True
        read(msgspec.json.decode(data), answer, now)
    return answer.finished


async def events_of(response: aiohttp.ClientResponse) -> AsyncIterator[tuple[float, bytes]]:
    """The data of each server-sent event, and when it came."""
    splitter = EventSplitter()
    async for chunk in response.content.iter_any():
        for time_and_data in zip(repeat(clock()), splitter.feed(chunk)):
            yield time_and_data


class EventSplitter:
    """Cuts bytes as they come into lines, and gives what ``data:`` lines hold; all other lines are left out."""

    def __init__(self) -> None:
        self._rest: list[bytes] = []

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """What is complete with this chunk. A line's end may be LF or CRLF."""
        *lines, rest = chunk.split(b"\n")
        if lines:
            lines[0] = b"".join([*self._rest, lines[0]])
            self._rest = []
        if rest:
            self._rest.append(rest)
        for line in lines:
            if line.startswith(b"data:"):
                yield line.removeprefix(b"data:").strip()
