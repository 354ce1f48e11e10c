"""Pippin's server and mlx_lm.server as subprocesses on loopback, and a client that speaks to both alike."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

# mlx_lm.server with the same BLAS in front of MLX as Pippin takes, and a listen queue as long as Pippin's: its own is 5
# long, and some of 16 clients that connect at once are reset.
MLX_LM = """
from http.server import ThreadingHTTPServer
from pippin.backend import prepare
prepare()
from mlx_lm.server import main
ThreadingHTTPServer.request_queue_size = 128
main()
"""
LONGEST_START = 120.0
LONGEST_ANSWER = 600.0


@dataclass(frozen=True, slots=True)
class Server:
    """A running server; ``process`` is the one that speaks HTTP."""

    name: str
    url: str
    model: str
    process: subprocess.Popen[bytes]
    log: Path

    def error(self, what: str) -> RuntimeError:
        """That and the end of its log."""
        state = "" if self.process.poll() is None else f", exit status {self.process.returncode}"
        return RuntimeError(f"{self.name}'s server {what}{state}:\n{self.log.read_text(errors='replace')[-2000:]}")


@contextmanager
def serve(name: str, checkpoint: Path, log: Path) -> Iterator[Server]:
    """Starts ``pippin`` or ``mlx-lm`` on a free port, waits until it answers, and ends it afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = ["--host", "127.0.0.1", "--port", port]
    if name == "pippin":
        arguments = ["-m", "pippin", "serve", "--model-path", str(checkpoint), "--dtype", "float32", *common]
        arguments += ["--max-total-tokens", "16384"]
    else:
        arguments = ["-c", MLX_LM, "--model", str(checkpoint), *common]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen([sys.executable, *arguments], stdout=output, stderr=output, env=environment)
    server = Server(name, f"http://127.0.0.1:{port}", str(checkpoint), process, log)
    try:
        wait_until_healthy(server)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_healthy(server: Server) -> None:
    """Returns when the server answers. Raises RuntimeError if it stops or takes too long."""
    until = time.monotonic() + LONGEST_START
    while server.process.poll() is None and time.monotonic() < until:
        try:
            if httpx.get(server.url + "/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise server.error("did not start")


@dataclass(frozen=True, slots=True)
class Answer:
    """Arrival times of the chunks with text, seconds after the request was sent, and what usage reported."""

    arrivals: list[float]
    tokens: int
    cached: int
    seconds: float


def ask_all(server: Server, prompts: Sequence[str], max_tokens: int) -> tuple[float, list[Answer]]:
    """Sends all prompts at once and streams the answers; seconds until the last is complete, and the answers.

    Raises RuntimeError if the server fails one of them.
    """

    async def ask() -> tuple[float, list[Answer]]:
        limits = httpx.Limits(max_connections=len(prompts))
        async with httpx.AsyncClient(base_url=server.url, timeout=LONGEST_ANSWER, limits=limits) as client:
            began = time.perf_counter()
            answers = await asyncio.gather(*(stream(client, server.model, p, max_tokens) for p in prompts))
            return time.perf_counter() - began, list(answers)

    try:
        return asyncio.run(ask())
    except httpx.HTTPError as error:
        raise server.error(f"failed a request ({type(error).__name__})") from error


async def stream(client: httpx.AsyncClient, model: str, prompt: str, max_tokens: int) -> Answer:
    """One greedy completion of exactly ``max_tokens`` tokens; id 0, the end, is ruled out by its bias."""
    body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0.0}
    body |= {"stream": True, "stream_options": {"include_usage": True}, "logit_bias": {"0": -100}}
    arrivals, usage = [], dict[str, Any]()
    began = time.perf_counter()
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"HTTP {response.status_code}: {(await response.aread()).decode(errors='replace')}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            usage = event.get("usage") or usage
            if any(choice.get("text") for choice in event["choices"]):
                arrivals.append(time.perf_counter() - began)
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    return Answer(arrivals, usage["completion_tokens"], cached, time.perf_counter() - began)


def cpu_seconds(server: Server) -> float | None:
    """CPU time that the HTTP process alone has used, children not counted; None where /proc does not tell.

    All of its threads' that live, to the nanosecond: the ticks of /proc/PID/stat are samples, and miss much of what a
    timer sets off.
    """
    stats = [*Path(f"/proc/{server.process.pid}/task").glob("*/schedstat")]
    return sum(int(stat.read_text().split()[0]) for stat in stats) / 1e9 if stats else None
