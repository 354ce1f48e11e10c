"""Clients who ask for anything and leave at any time, against a server in processes of its own.

Lengths, priorities, grammars and ways to go are drawn; so are flushes. Beside them a few fixed requests are asked
again and again, whose answers must stay what they were. What each was told, if it is not what may be, is an error.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

LONGEST = 500
"""Tokens of the longest prompt."""

CHAT = (
    "What is 2 + 2?",
    "Name a colour.",
    "Write a long story about a ship, and do not stop before it has reached the harbour.",
    "List ten animals as JSON.",
)
Json = dict[str, Any]


def resident(pid: int) -> int:
    """Bytes of a process that are in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def children(pid: int) -> list[int]:
    """Processes that a process has begun and that have not ended."""
    found = list[int]()
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += map(int, (task / "children").read_text().split())
    return found


@dataclass(frozen=True, slots=True)
class Sample:
    """What the server holds while nobody asks, the cache emptied."""

    seconds: float
    server: int
    engine: int
    arrays: int


@dataclass(slots=True)
class Churn:
    """The clients of one server, and what they saw."""

    url: str
    http: aiohttp.ClientSession
    source: random.Random
    trunks: list[list[int]] = field(default_factory=list)
    known: dict[int, str] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    asked: int = 0
    """Tokens that the requests of this moment may come to have together."""
    most_asked: int = 0

    def __post_init__(self) -> None:
        self.trunks = [[self.source.randrange(5, 1000) for _ in range(LONGEST)] for _ in range(6)]

    # --- what is asked ---

    def prompt(self) -> list[int]:
        """Often the beginning of one that others have, too."""
        source = self.source
        begun = source.choice(self.trunks)[: source.choice([0, 8, 64, source.randrange(LONGEST)])]
        return (begun + [source.randrange(5, 1000) for _ in range(source.randrange(1, 60))])[:LONGEST]

    def sampling(self) -> Json:
        """Any parameters that may come together, a grammar in one of four."""
        source = self.source
        params: Json = {
            "max_new_tokens": source.choice([1, 4, 16, 16, 60, 150]),
            "temperature": source.choice([0.0, 0.8, 1.2]),
            "top_p": source.choice([1.0, 0.9]),
            "frequency_penalty": source.choice([0.0, 0.3]),
            "ignore_eos": source.random() < 0.7,
        }
        match source.randrange(12):
            case 0:
                params["regex"] = f"[a-{source.choice('cfmz')}]{{{source.randrange(1, 9)},40}}"
            case 1:
                self.with_schema(params)
            case 2:
                params["ebnf"] = f'root ::= "{source.randrange(10**6)}" [a-z ]+'
        return params

    def with_schema(self, params: Json) -> Json:
        """Adds a JSON schema that nobody had before."""
        source = self.source
        names = [f"name{source.randrange(10**6)}" for _ in range(source.randrange(1, 4))]
        properties = {name: {"type": source.choice(["string", "integer", "boolean"])} for name in names}
        params["json_schema"] = json.dumps(
            {"type": "object", "properties": properties, "required": names, "additionalProperties": False}
        )
        return params

    def generate(self) -> tuple[str, Json]:
        tokens, params = self.prompt(), self.sampling()
        body: Json = {"input_ids": tokens, "sampling_params": params, "priority": self.source.choice([0, 0, 0, 1, -2])}
        if self.source.random() < 0.15:
            body |= {"return_logprob": True, "top_logprobs_num": 2, "logprob_start_len": self.source.choice([-1, 0])}
        return "/generate", body

    def chat(self) -> tuple[str, Json]:
        messages = [{"role": "user", "content": self.source.choice(CHAT)}]
        if self.source.random() < 0.5:
            messages += [{"role": "assistant", "content": "x " * self.source.randrange(60)}, messages[0]]
        body: Json = {
            "messages": messages,
            "max_tokens": self.source.choice([1, 8, 40]),
            "n": self.source.choice([1, 3]),
        }
        if self.source.random() < 0.2:
            body["response_format"] = {"type": "json_object"}
        return "/v1/chat/completions", body

    def wrong(self) -> tuple[str, Json]:
        """What must be refused."""
        asked: list[tuple[str, Json]] = [
            ("/generate", {"input_ids": [5] * 100_000}),
            ("/generate", {"input_ids": [10**9]}),
            ("/generate", {"input_ids": [5], "sampling_params": {"regex": "["}}),
            ("/v1/chat/completions", {"messages": "hello"}),
            ("/v1/completions", {"prompt": "a", "no_such_field": 1}),
        ]
        return self.source.choice(asked)

    # --- how they go ---

    async def client(self, end: float) -> None:
        """One request after the other until ``end``, on the clock of ``time.monotonic``."""
        ways = (self.whole, self.streamed, self.leaves, self.aborts, self.refused, self.flushes, self.again)
        while time.monotonic() < end:
            (way,) = self.source.choices(ways, (4, 6, 4, 3, 1, 1, 2))
            self.counts[way.__name__] += 1
            try:
                async with asyncio.timeout(300):
                    await way()
            except Exception as error:
                self.errors.append(f"{way.__name__}: {error!r}")

    def drawn(self) -> tuple[str, Json]:
        return self.generate() if self.source.random() < 0.8 else self.chat()

    async def ask(self, path: str, body: Json, expected: int = 200) -> str:
        """A whole answer's text."""
        size = self.size_of(body)
        self.asked += size
        self.most_asked = max(self.most_asked, self.asked)
        try:
            async with self.http.post(self.url + path, json=body) as answer:
                text = await answer.text()
        finally:
            self.asked -= size
        if answer.status != expected:
            self.errors.append(f"{path}: {answer.status} {text[:300]} for {str(body)[:300]}")
        return text

    @staticmethod
    def size_of(body: Json) -> int:
        return len(body.get("input_ids", ())) + int(body.get("sampling_params", {}).get("max_new_tokens", 0))

    async def events(self, path: str, body: Json, most: int = 10**9) -> list[str]:
        """A stream's events; after ``most`` of them the connection is closed."""
        found, size = list[str](), self.size_of(body)
        self.asked += size
        self.most_asked = max(self.most_asked, self.asked)
        try:
            async with self.http.post(self.url + path, json=body | {"stream": True}) as answer:
                if answer.status != 200:
                    self.errors.append(f"{path}: {answer.status} {(await answer.text())[:300]}")
                async for line in answer.content:
                    if line.startswith(b"data: "):
                        found.append(line[6:].decode().strip())
                    if len(found) >= most:
                        answer.close()
                        break
        finally:
            self.asked -= size
        self.errors += [f"{path}: {event[:300]}" for event in found if event.startswith('{"error"')]
        return found

    async def whole(self) -> None:
        await self.ask(*self.drawn())

    async def streamed(self) -> None:
        events = await self.events(*self.drawn())
        if events[-1:] != ["[DONE]"]:
            self.errors.append(f"a stream ended with {events[-1:]}")

    async def leaves(self) -> None:
        """Closes the connection, before the first event or after a few, or while a whole answer is made."""
        path, body = self.drawn()
        if self.source.random() < 0.5:
            await self.events(path, body, self.source.randrange(1, 20))
        else:
            with suppress(TimeoutError):
                async with asyncio.timeout(self.source.random()):
                    await self.ask(path, body)

    async def aborts(self) -> None:
        """Ends a request of its own by name; it has an answer all the same."""
        path, body = self.generate()
        body["rid"] = f"rid{self.source.getrandbits(60)}"
        asked = asyncio.create_task(self.ask(path, body))
        await asyncio.sleep(self.source.random())
        await self.ask("/abort_request", {"rid": body["rid"]})
        await asked

    async def refused(self) -> None:
        await self.ask(*self.wrong(), expected=400)

    async def flushes(self) -> None:
        async with self.http.post(self.url + "/flush_cache") as answer:
            if answer.status not in (200, 409):
                self.errors.append(f"/flush_cache: {answer.status}")

    async def again(self) -> None:
        """One of the fixed requests: greedy or seeded, the answer is what it was when nobody else asked."""
        number = self.source.randrange(len(self.trunks) * 2)
        text = await self.fixed(number)
        if self.known.setdefault(number, text) != text:
            self.errors.append(f"request {number} had another answer: {text[:200]}, not {self.known[number][:200]}")

    async def fixed(self, number: int) -> str:
        params = {"max_new_tokens": 30, "temperature": float(number % 2), "sampling_seed": number, "ignore_eos": True}
        tokens = self.trunks[number // 2][: 10 + 30 * (number % 5)]
        told = json.loads(await self.ask("/generate", {"input_ids": tokens, "sampling_params": params}))
        return str(told.get("text"))

    # --- what the server holds ---

    async def stats(self) -> Json:
        async with self.http.get(self.url + "/get_server_info") as answer:
            return dict((await answer.json())["internal_states"][0])

    async def rest(self, pid: int, began: float) -> Sample:
        """Waits until nothing runs, empties the cache, sees that every slot is free, and looks at memory."""
        async with asyncio.timeout(120):
            while (flushed := await self.http.post(self.url + "/flush_cache")).status == 409:
                flushed.release()
                await asyncio.sleep(0.05)
        assert flushed.status == 200
        flushed.release()
        stats = await self.stats()
        assert (stats["num_running"], stats["num_waiting"], stats["slots_cached"]) == (0, 0, 0)
        assert stats["slots_free"] == stats["slots_total"], "a slot is lost"
        assert stats["kv_canary_mismatches"] == stats["restarts"] == 0
        (engine,) = children(pid)
        return Sample(time.monotonic() - began, resident(pid), resident(engine), stats["memory_bytes"])

    async def compile(self, grammars: int) -> None:
        """Asks for so many grammars that nobody has asked for: the engine keeps the latest 256, of some 100 kB each."""
        for begin in range(0, grammars, 20):
            bodies = [
                {"input_ids": [5], "sampling_params": self.with_schema({"max_new_tokens": 1})}
                for _ in range(begin, min(grammars, begin + 20))
            ]
            await asyncio.gather(*(self.ask("/generate", body) for body in bodies))

    async def run(self, pid: int, seconds: float, each: float, clients: int, grammars: int = 0) -> list[Sample]:
        """So many clients for ``seconds`` or more, with a rest after ``each`` so many.

        Before, so many ``grammars`` are compiled, so that the cache of these is full where memory is to be flat.
        """
        await self.compile(grammars)
        for number in range(len(self.trunks) * 2):
            self.known[number] = await self.fixed(number)
        began, samples = time.monotonic(), list[Sample]()
        while (now := time.monotonic()) - began < seconds:
            end = now + each
            await asyncio.gather(*(self.client(end) for _ in range(clients)))
            samples.append(await self.rest(pid, began))
            print(samples[-1], dict(self.counts), f"{len(self.errors)} errors", flush=True)
        return samples
