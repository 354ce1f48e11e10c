"""bench serving beside guidellm, a load generator that we didn't write: ``python -m benchmarks.load_generators``.

Both load Pippin with the shipped model through a tap that passes everything on and keeps the times. What guidellm says
of its requests, and what bench serving says of its own, stand beside the figures of what the tap saw of the very same
requests, so that a busy machine weighs on both sides alike.

guidellm 0.3.1 installs without torch (0.5.0 and 0.8.1 do not): ``python -m venv V; V/bin/pip install guidellm==0.3.1``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from rich.console import Console
from rich.table import Table

from benchmarks.servers import serve
from pippin.bench.results import read
from pippin.bench.serving_api import Answer, read_chat, read_completions
from pippin.bench.serving_figures import figures
from pippin.bench.serving_load import EventSplitter, clock
from pippin.text.tokenizer import demo_path

PROMPT, OUTPUT = 384, 24
# guidellm's names and ours; its inter_token_latency is a mean over each request's tokens after the first.
LATENCIES = {"time_to_first_token_ms": "ttft", "inter_token_latency_ms": "tpot", "request_latency": "e2e_latency"}
KINDS = ("mean", "median", "p99")
COUNTS = ("total_output_tokens", "request_throughput")
WARM_UP = 0.2  # share of the requests, the first, that count on neither side: guidellm sets up its client in them
Rows = Mapping[str, float]


class Tap:
    """Passes requests on to a server, and keeps an Answer of each stream."""

    def __init__(self, upstream: str) -> None:
        self._upstream = upstream
        self.answers: list[Answer] = []

    async def get(self, request: web.Request) -> web.Response:
        async with aiohttp.ClientSession() as http, http.get(self._upstream + request.path) as response:
            kind = response.content_type
            return web.Response(body=await response.read(), status=response.status, content_type=kind)

    async def post(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        asked = json.loads(body)
        reader = read_chat if "messages" in asked else read_completions
        answer, splitter = Answer(due=clock(), sent=clock()), EventSplitter()
        headers = {"Content-Type": "application/json"}
        passed = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        async with (
            aiohttp.ClientSession() as http,
            http.post(self._upstream + request.path, data=body, headers=headers) as response,
        ):
            await passed.prepare(request)
            async for chunk in response.content.iter_any():
                now = clock()
                await passed.write(chunk)
                for data in splitter.feed(chunk):
                    if data != b"[DONE]":
                        reader(json.loads(data), answer, now)
        answer.end = clock()
        if answer.output_tokens == OUTPUT:  # not the request by which guidellm tries the server
            self.answers.append(answer)
        return passed

    def figures(self, left_out: float = 0.0) -> Rows:
        """Of all requests but the first ones, by that share."""
        counted = self.answers[round(left_out * len(self.answers)) :]
        return numbers(figures(counted, max(a.end for a in counted) - min(a.sent for a in counted), {}))


@contextmanager
def tapped(upstream: str) -> Iterator[tuple[str, Tap]]:
    """A Tap that listens on loopback, in a thread of its own, and its address."""
    tap, loop, ready, stop = Tap(upstream), asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    address: list[str] = []

    async def run() -> None:
        app = web.Application()
        app.router.add_get("/{path:.*}", tap.get)
        app.router.add_post("/{path:.*}", tap.post)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        address.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
        ready.set()
        await stop.wait()
        await runner.cleanup()

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),))
    thread.start()
    ready.wait(20)
    try:
        yield address[0], tap
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(20)


def guidellm(program: Path, url: str, users: int, requests: int, folder: Path) -> Rows:
    """guidellm's own figures of one load, under our names."""
    file = folder / "guidellm.json"
    load = ["--rate-type", "concurrent", "--rate", str(users), "--max-requests", str(requests)]
    data = ["--data", f"prompt_tokens={PROMPT},output_tokens={OUTPUT}", "--processor", demo_path()]
    data += ["--output-path", str(file), "--disable-progress", "--warmup-percent", str(WARM_UP)]
    command = [str(program), "benchmark", "--target", url, *load, *data]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "GUIDELLM__MAX_WORKER_PROCESSES": "1"}
    subprocess.run(command, check=True, capture_output=True, env=environment, timeout=900)
    metrics: dict[str, Any] = json.loads(file.read_text())["benchmarks"][0]["metrics"]
    found: dict[str, float] = {}
    for theirs, mine in LATENCIES.items():
        scale, told = (1000 if theirs == "request_latency" else 1), metrics[theirs]["successful"]
        for kind, value in (("mean", told["mean"]), ("median", told["median"]), ("p99", told["percentiles"]["p99"])):
            found[f"{kind}_{mine}_ms"] = value * scale
    found["total_output_tokens"] = metrics["output_token_count"]["successful"]["total_sum"]
    found["request_throughput"] = metrics["requests_per_second"]["successful"]["mean"]
    return found


def ours(url: str, users: int, requests: int, folder: Path) -> Rows:
    """``pippin bench serving``'s figures of one load."""
    file = folder / "ours.jsonl"
    load = ["--max-concurrency", str(users), "--num-prompts", str(requests), "--output-file", str(file)]
    data = ["--random-input", str(PROMPT), "--random-output", str(OUTPUT), "--random-range-ratio", "1"]
    command = [sys.executable, "-m", "pippin.bench_serving", "--backend", "vllm", "--base-url", url, *load, *data]
    command += ["--warmup-requests", "0"]
    subprocess.run(command, check=True, capture_output=True, timeout=900)
    return numbers(read([file])[-1].figures)


def numbers(found: Mapping[str, object]) -> dict[str, float]:
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}


def compare(title: str, tool: str, told: Rows, seen: Rows) -> float:
    """Prints both and how far the tap's is from the tool's; the largest difference as a share."""
    table = Table("", tool, "the tap", "difference", title=title, title_justify="left", box=None)
    worst = 0.0
    for name in (*(f"{kind}_{mine}_ms" for mine in LATENCIES.values() for kind in KINDS), *COUNTS):
        difference = seen[name] / told[name] - 1
        worst = max(worst, abs(difference))
        table.add_row(name, f"{told[name]:.2f}", f"{seen[name]:.2f}", f"{100 * difference:+.1f} %")
    Console().print(table)
    return worst


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--guidellm", type=Path, required=True, help="its program, in an environment of its own")
    parser.add_argument("--users", type=int, default=4)
    parser.add_argument("--requests", type=int, default=60)
    options = parser.parse_args()
    size = (options.users, options.requests)
    worst = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with serve("pippin", Path(demo_path()), folder / "server.log") as server:
            with tapped(server.url) as (url, tap):
                theirs = guidellm(options.guidellm, url, *size, folder)
            worst.append(compare("guidellm's requests", "guidellm", theirs, tap.figures(WARM_UP)))
            with tapped(server.url) as (url, tap):
                mine = ours(url, *size, folder)
            worst.append(compare("bench serving's requests", "bench serving", mine, tap.figures()))
    print(f"largest difference: {100 * max(worst):.1f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main())
