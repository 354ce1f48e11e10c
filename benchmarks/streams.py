"""What the HTTP process costs for each token that it streams, and what a burst of requests waits in it.

``python -m benchmarks.streams``: a server whose engine computes nothing and gives all its streams a token a step, at
a pace; clients that read and throw away. Printed are microseconds of the HTTP process's processor time a token (its
own, whoever else runs), its writes and how late tokens come; and of requests that all come at one moment, when the
engine had the first, the middle and the last of them, and when their clients had a token. ``--bench`` sends bursts by
the client that measures servers instead. ``--profile`` takes py-spy's stacks on the way.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.servers import Server, cpu_seconds, wait_until_healthy
from pippin.bench.serving_api import BACKENDS
from pippin.bench.serving_data import Conversation, Ruler, Turn
from pippin.bench.serving_load import Run, Target, run_load, session
from pippin.config import EngineConfig, ServerConfig
from pippin.messages import Progress, Stats, StepOutput, Submit
from pippin.server.launch import run
from pippin.text.tokenizer import demo_path, load_tokenizer
from tests.fake_core import PYTHONPATH, FakeCore

TEXT = (
    "The river was wide and slow, and nobody in the village could say where it began. On market days the ferryman "
    "told a new story about it, and every story ended with the same three words. "
)
ADDS, PACE = "adds.json", "pace.json"
CHUNK = 2048
SLACK = 0.001  # by which a step that begins late is not behind


class Pace(msgspec.Struct, frozen=True):
    """How fast the engine is: a step takes ``seconds``, and each token of a prompt in it ``prompt_seconds`` more."""

    seconds: float
    prompt_seconds: float = 0.0


class Paced(FakeCore):
    """Each request gets a token of ``words`` a step, once its prompt is through; steps follow each other at a pace.

    A step has ``CHUNK`` tokens of prompts at most, those of whoever came first.
    """

    def __init__(self, pace: Pace, folder: Path) -> None:
        super().__init__(pace.seconds)
        self.pace = pace
        self.unread: dict[str, int] = {}
        self.prompts: list[int] = []
        tokenizer = load_tokenizer(demo_path())
        self.words = tokenizer.encode(TEXT * 3, add_special_tokens=False)
        self.info = msgspec.structs.replace(
            self.info,
            model_path=str(folder),
            tokenizer_path=demo_path(),
            vocab_size=tokenizer.vocab_size,
            context_length=2**15,
            max_running_requests=512,
            max_total_tokens=2**24,
        )
        self.folder, self.adds, self.due = folder, list[float](), 0.0

    @property
    def stats(self) -> Stats:
        return Stats(num_running=len(self.running), steps=self.steps)

    def add(self, submit: Submit) -> None:
        # Some tokens make a FakeCore fail.
        super().add(msgspec.structs.replace(submit, tokens=[0] * len(submit.tokens)))
        self.adds.append(time.perf_counter())
        self.unread[submit.id] = len(submit.tokens)
        if submit.params.max_new_tokens == 1:  # the last of a round: what came before is told
            (self.folder / ADDS).write_text(json.dumps([self.adds[:-1], self.prompts]))
            self.adds, self.prompts = [], []

    def draw(self, submit: Submit, tokens: list[int]) -> int:
        return self.words[len(tokens) % len(self.words)]

    def step(self) -> StepOutput | None:
        read = self._read()
        seconds = self.pace.seconds + sum(read.values()) * self.pace.prompt_seconds
        now = time.perf_counter()
        self.due = max(self.due, now - SLACK) + seconds
        time.sleep(max(0.0, self.due - now))
        self.steps += 1
        outputs, self.notices = self.notices, []
        ready = [self.running[id] for id in self.running if not self.unread.get(id)]
        outputs += [self._advance(submit, tokens) for submit, tokens in ready]
        return StepOutput(outputs, self.stats)

    def _read(self) -> dict[str, int]:
        """How much of which prompts a step computes."""
        read, room = dict[str, int](), CHUNK
        for id, left in list(self.unread.items()):
            if id not in self.running:
                del self.unread[id]
            elif left and room:
                read[id] = min(left, room)
                self.unread[id], room = left - read[id], room - read[id]
        if read:
            self.prompts.append(sum(read.values()))
        return read


def load(config: EngineConfig, progress: Callable[[Progress], None]) -> FakeCore:
    """``model_path`` is a folder, in which a file has the Pace."""
    folder = Path(config.model_path or "")
    return Paced(msgspec.json.decode((folder / PACE).read_bytes(), type=Pace), folder)


@dataclass(slots=True)
class Stream(asyncio.Protocol):
    """One request on a connection of its own; what comes is counted and dropped."""

    request: bytes
    done: asyncio.Future[None]
    sent: float = 0.0
    times: list[float] = field(default_factory=list)
    received: int = 0
    reads: int = 0
    head: bytes = b""
    tail: bytes = b""

    def connection_made(self, transport: Any) -> None:
        self.sent = time.perf_counter()
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.times.append(time.perf_counter())
        self.head = self.head or data[:200]
        self.received += len(data)
        self.tail = (self.tail + data)[-24:]
        if b"data: [DONE]" in self.tail and not self.done.done():
            self.done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(RuntimeError(f"cut short behind {self.head!r}"))


def body_of(path: str, prompt: str, tokens: int) -> dict[str, Any]:
    """A request of a path for exactly so many tokens, streamed."""
    if path == "/generate":
        return {
            "text": prompt,
            "stream": True,
            "sampling_params": {"max_new_tokens": tokens, "ignore_eos": True, "temperature": 0.0},
        }
    asked = {"messages": [{"role": "user", "content": prompt}]} if path.endswith("chat/completions") else {}
    return {
        "model": "m",
        "max_tokens": tokens,
        "stream": True,
        "ignore_eos": True,
        "temperature": 0.0,
        **(asked or {"prompt": prompt}),
    }


def request_of(path: str, prompt: str, tokens: int) -> bytes:
    body = json.dumps(body_of(path, prompt, tokens)).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


@contextmanager
def serving(pace: Pace, folder: Path) -> Iterator[Server]:
    """The server in a process, its engine in another."""
    (folder / PACE).write_bytes(msgspec.json.encode(pace))
    port = folder / "port"
    environment = os.environ | {"PYTHONPATH": PYTHONPATH, "HF_HUB_OFFLINE": "1"}
    log = folder / "log"
    with log.open("wb") as output:
        command = [sys.executable, "-m", "benchmarks.streams", "--serve", str(folder)]
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        until = time.monotonic() + 60
        while not port.exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        server = Server("pippin", f"http://127.0.0.1:{port.read_text()}", "m", process, log)
        wait_until_healthy(server)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


def serve(folder: Path) -> None:
    """The server's own process."""
    config = ServerConfig(host="127.0.0.1", port=0, log_level="warning")
    engine = EngineConfig(model_path=str(folder), tokenizer_path=demo_path())

    def ready(info: object, url: str) -> None:
        partial = folder / "port.new"
        partial.write_text(url.rpartition(":")[2])
        partial.rename(folder / "port")

    run(engine, config, ready, lambda progress: None, core="benchmarks.streams:load")


async def load_with(port: int, requests: Sequence[bytes]) -> list[Stream]:
    """Sends all requests at once, each on a connection of its own, and reads their answers."""
    loop = asyncio.get_running_loop()
    streams = [Stream(request, loop.create_future()) for request in requests]
    pairs = [await loop.create_connection(lambda: asyncio.Protocol(), "127.0.0.1", port) for _ in streams]
    for (transport, _), stream in zip(pairs, streams, strict=True):
        transport.set_protocol(stream)
        stream.connection_made(transport)
    await asyncio.gather(*(stream.done for stream in streams))
    for transport, _ in pairs:
        transport.abort()
    return streams


def measure(server: Server, folder: Path, path: str, count: int, tokens: int, characters: int) -> dict[str, Any]:
    """One load of so many streams of so many tokens, all asked for at one moment."""
    port = int(server.url.rpartition(":")[2])
    words = TEXT * (characters // len(TEXT) + 1)
    requests = [request_of(path, f"{i}. {words[:characters]}", tokens) for i in range(count)]
    used, began = cpu_seconds(server) or 0.0, time.perf_counter()
    streams = asyncio.run(load_with(port, requests))
    seconds, used = time.perf_counter() - began, (cpu_seconds(server) or 0.0) - used
    asyncio.run(load_with(port, [request_of("/v1/completions", "enough", 1)]))
    adds, prompts = json.loads((folder / ADDS).read_text())
    start = min(stream.sent for stream in streams)
    return {
        "path": path,
        "streams": count,
        "tokens": count * tokens,
        "seconds": round(seconds, 3),
        "http_cpu_us_per_token": round(1e6 * used / (count * tokens), 2),
        "tokens_per_second": round(count * tokens / seconds),
        "reads_per_token": round(sum(len(stream.times) for stream in streams) / (count * tokens), 3),
        "added_ms": spread(adds, start),
        "prompt_tokens_of_steps": prompts[:10],
        "first_token_ms": spread([stream.times[0] for stream in streams], start),
    }


def measure_bench(server: Server, folder: Path, count: int, tokens: int, bursts: int) -> dict[str, Any]:
    """So many bursts by ``pippin bench serving``'s own client, each when the answers of the one before end.

    Of each: when requests were sent, when the engine had them, and when their clients had a token, from the first one's
    sending on; and the middle one's time to its first token, by its own sending.
    """
    rng, ruler = random.Random(0), Ruler()
    asked = [Conversation((Turn(f"{i}. {ruler.words(rng, 98)}", tokens),)) for i in range(count * bursts)]

    async def load() -> Run:
        target = Target(server.url, BACKENDS["sglang"])
        async with session() as http:
            return await run_load(http, target, asked, [0.0] * len(asked), count)

    answers = sorted(asyncio.run(load()).answers, key=lambda answer: answer.sent)
    asyncio.run(load_with(int(server.url.rpartition(":")[2]), [request_of("/v1/completions", "enough", 1)]))
    adds, prompts = json.loads((folder / ADDS).read_text())
    found: dict[str, Any] = {"streams": count, "prompt_tokens_of_steps": prompts}
    for i in range(bursts):
        some, start = answers[count * i :][:count], answers[count * i].sent
        times = {
            "sent_ms": [answer.sent for answer in some],
            "added_ms": adds[count * i :][:count],
            "first_token_ms": [answer.arrivals[0] for answer in some],
        }
        found |= {f"{name}_{i}": spread(values, start) for name, values in times.items()}
        found[f"median_ttft_ms_{i}"] = round(
            1000 * statistics.median(answer.arrivals[0] - answer.sent for answer in some), 1
        )
    return found


def spread(times: Sequence[float], start: float) -> list[float]:
    """The first, the middle and the last of them, in milliseconds since ``start``."""
    ordered = sorted(times)
    return [round(1000 * (ordered[i] - start), 1) for i in (0, len(ordered) // 2, -1)]


@contextmanager
def profiled(server: Server, file: str | None) -> Iterator[None]:
    """py-spy's stacks of the HTTP process, as text for flame graphs."""
    if file is None:
        yield
        return
    command = [
        "py-spy",
        "record",
        "-g",
        "-r",
        "400",
        "-f",
        "raw",
        "-o",
        file,
        "-d",
        "600",
        "-p",
        str(server.process.pid),
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as spy:
        time.sleep(1)
        yield
        spy.send_signal(signal.SIGINT)


PATHS = ("/v1/chat/completions", "/v1/completions", "/generate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=400, help="of each stream")
    parser.add_argument("--rate", type=float, default=140.0, help="tokens a second of a stream; 0: as fast as can be")
    parser.add_argument("--prefill", type=float, default=0.0, help="tokens of prompts a second; 0: they take no time")
    parser.add_argument("--characters", type=int, default=1000, help="of each prompt")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--paths", nargs="+", default=PATHS)
    parser.add_argument(
        "--bench", type=int, default=0, help="bursts by `pippin bench serving`'s client, in their place"
    )
    parser.add_argument("--profile", help="a file for py-spy's stacks")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        serve(options.serve)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pace = Pace(*(1 / rate if rate else 0.0 for rate in (options.rate, options.prefill)))
        with serving(pace, folder) as server:
            size = (options.streams, options.tokens, options.characters)
            measure(server, folder, options.paths[0], options.streams, 5, options.characters)  # everything is loaded
            with profiled(server, options.profile):
                if options.bench:
                    print(json.dumps(measure_bench(server, folder, options.streams, options.tokens, options.bench)))
                    return
                for path in options.paths:
                    rows = [measure(server, folder, path, *size) for _ in range(options.repeat)]
                    middle = statistics.median(row["http_cpu_us_per_token"] for row in rows)
                    print(json.dumps(next(row for row in rows if row["http_cpu_us_per_token"] >= middle)), flush=True)


if __name__ == "__main__":
    main()
