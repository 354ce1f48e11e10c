"""What Pippin promises, put to the proof on ``pippin serve`` as users start it: the shipped model, real processes and
sockets, the official client."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.waiting import SECONDS, until

MIB = 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@dataclass(slots=True)
class Served:
    """A server that answers; ``seconds`` is how long it took to come up."""

    process: subprocess.Popen[bytes]
    url: str
    seconds: float

    @property
    def pids(self) -> list[int]:
        """The server and all processes below it."""
        found = [self.process.pid]
        for pid in found:
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                found += map(int, children.read_text().split())
        return found

    @property
    def resident(self) -> int:
        """Bytes of memory that its processes hold together."""
        pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in self.pids]
        return sum(pages) * os.sysconf("SC_PAGE_SIZE")

    @property
    def stats(self) -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(f"{self.url}/get_server_info").json()["internal_states"][0]
        return found

    def flush(self) -> None:
        assert httpx.post(f"{self.url}/flush_cache").status_code == 200

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)


@contextmanager
def serving() -> Iterator[Served]:
    """``pippin serve`` on a free port, ready; killed at the end if it still runs."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "pippin", "serve", "--port", str(port)])
    url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: answers(f"{url}/v1/models"))
        yield Served(process, url, time.monotonic() - began)
    finally:
        process.kill()
        process.wait()


def answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be noticed does not."""
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as found:
        yield found


@linux
def test_it_is_ready_soon_and_small(served: Served, record_property: Callable[[str, object], None]) -> None:
    """Five seconds on a machine that does nothing else; only the processor time can be told apart from its load."""
    ticks = [Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split() for pid in served.pids]
    processor = sum(int(t[11]) + int(t[12]) for t in ticks) / os.sysconf("SC_CLK_TCK")
    print(f"ready after {served.seconds:.1f} s, {processor:.1f} s of processor, {served.resident / 1e6:.0f} MB")
    assert served.resident < 700e6
    assert processor < 10


def test_the_line_of_the_readme_answers(served: Served) -> None:
    line = """-H "Content-Type: application/json" -d '{"model": "TinyLlama", "prompt": "Hello, how are you?"}'"""
    if shutil.which("curl") is None:
        pytest.skip("no curl here")
    out = subprocess.check_output(f"curl -sf {served.url}/v1/completions {line}", shell=True, text=True)
    assert '"text_completion"' in out


def wishes() -> list[dict[str, Any]]:
    """Sixteen chats, half of them sampled, each with its own settings."""
    source = random.Random(3)
    asked = [f"How much is {source.randrange(100)} + {source.randrange(100)}?" for _ in range(6)]
    asked += [f"Tell me a story about a {animal}." for animal in ("fox", "hen", "mole", "crow", "snail")]
    asked += [f"Spell the word {word}." for word in ("apple", "orchard", "seed", "branch", "blossom")]
    found: list[dict[str, Any]] = []
    for i, text in enumerate(asked):
        sampled = {"temperature": 0.9, "top_p": 0.95, "seed": i} if i % 2 else {"temperature": 0}
        messages = [{"role": "user", "content": text}]
        found.append({"messages": messages, "model": "any", "max_tokens": 24, "logprobs": True, **sampled})
    return found


def test_sixteen_streams_together_equal_sixteen_alone_token_for_token(served: Served) -> None:
    async def stream(client: openai.AsyncOpenAI, wish: dict[str, Any]) -> tuple[list[str], str]:
        tokens, text = [], ""
        async for chunk in await client.chat.completions.create(**wish, stream=True):
            for choice in chunk.choices:
                text += choice.delta.content or ""
                tokens += [p.token for p in choice.logprobs.content] if choice.logprobs else []
        return tokens, text

    async def all_of(together: bool) -> list[tuple[list[str], str]]:
        async with served.async_client() as client:
            if together:
                return await asyncio.gather(*(stream(client, wish) for wish in wishes()))
            return [await stream(client, wish) for wish in wishes()]

    served.flush()
    before = served.stats["steps"]
    together = asyncio.run(all_of(True))
    assert served.stats["steps"] - before < sum(len(tokens) for tokens, _ in together) / 3, "they ran together"
    served.flush()
    assert together == asyncio.run(all_of(False))
    assert all(tokens and text for tokens, text in together)


@linux
@pytest.mark.parametrize("max_tokens", [1, 4])
def test_500_requests_leave_memory_where_50_left_it(served: Served, max_tokens: int) -> None:
    async def ask(client: httpx.AsyncClient, numbers: Sequence[int]) -> None:
        for number in numbers:
            prompt = f"{number} {max_tokens} Name the number, please."
            body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0.5}
            answer = await client.post("/v1/completions", json=body)
            assert answer.json()["usage"]["prompt_tokens"] > 5

    async def requests(first: int, count: int) -> None:
        async with httpx.AsyncClient(base_url=served.url, timeout=SECONDS) as client:
            await asyncio.gather(*(ask(client, range(first + i, first + count, 10)) for i in range(10)))

    asyncio.run(requests(0, 50))
    before = served.resident
    asyncio.run(requests(50, 450))
    print(f"{before / MIB:.0f} MiB after 50 requests, {served.resident / MIB:.0f} after 500")
    assert served.resident < 1.05 * before


def test_a_chat_of_five_turns_reads_again_only_what_is_new(served: Served) -> None:
    questions = ("How much is 12 + 30?", "And 7 + 8?", "Spell the word apple.", "Which is larger, 5 or 9?", "Thanks!")
    messages: list[Any] = []
    known = 0
    with served.client() as client:
        for question in questions:
            messages.append({"role": "user", "content": question})
            answer = client.chat.completions.create(model="any", messages=messages, temperature=0, max_tokens=40)
            messages.append({"role": "assistant", "content": answer.choices[0].message.content})
            assert answer.usage is not None
            assert answer.usage.prompt_tokens_details is not None
            assert (answer.usage.prompt_tokens_details.cached_tokens or 0) >= known - 1, "a page has one token"
            known = answer.usage.total_tokens


def test_a_short_request_does_not_wait_for_a_long_prompt_before_it(served: Served) -> None:
    """Three long ones, so that there is something to wait for even if the short one is late to ask."""
    source = random.Random(1)
    first: dict[str, float] = {}

    async def ask(client: openai.AsyncOpenAI, name: str, count: int) -> None:
        prompt = [source.randrange(300, 4000) for _ in range(count)]
        stream = await client.completions.create(model="any", prompt=prompt, max_tokens=4, stream=True)
        async for _ in stream:
            first.setdefault(name, time.monotonic())

    async def both() -> None:
        async with served.async_client() as client:
            before = served.stats["prefill_tokens"]
            long = [asyncio.create_task(ask(client, f"long {i}", 2600)) for i in range(3)]
            while served.stats["prefill_tokens"] == before:
                await asyncio.sleep(0.001)
            assert len(first) < 3, "a long prompt was to be under way"
            await ask(client, "short", 5)
            await asyncio.gather(*long)

    asyncio.run(both())
    assert first.pop("short") < max(first.values())


def test_a_client_that_goes_away_frees_its_slots(served: Served) -> None:
    body = {"model": "any", "prompt": "Once upon a time", "max_tokens": 3000, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=SECONDS) as stream:
        lines = stream.iter_lines()
        assert '"finish_reason":null' in next(lines)
        assert served.stats["num_running"] == 1
    until(lambda: served.stats["num_running"] == 0)
    stats = served.stats
    assert stats["slots_free"] + stats["slots_cached"] == stats["slots_total"]
    served.flush()
    assert served.stats["slots_free"] == stats["slots_total"]


def ends(doomed: Served, number: signal.Signals, code: int) -> None:
    pids = doomed.pids
    assert len(pids) == 2
    doomed.process.send_signal(number)
    assert doomed.process.wait(SECONDS) == code
    until(lambda: not any(map(alive, pids)))


@linux
def test_an_engine_does_not_outlive_a_server_that_is_killed() -> None:
    with serving() as doomed:
        ends(doomed, signal.SIGKILL, -signal.SIGKILL)


@linux
def test_an_interrupt_ends_all_of_its_processes(served: Served) -> None:
    """The last test of the shared server; tests/server/test_lifecycle.py has SIGTERM too."""
    ends(served, signal.SIGINT, 0)
