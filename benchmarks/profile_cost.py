"""What a timeline costs while it is recorded: ``python -m benchmarks.profile_cost [--http]``.

One engine decodes a batch of the shipped model; blocks of steps with a profile and without follow each other, so that
whatever else the machine does weighs on both. A line of JSON for each batch: medians of a step's time in either kind of
block, and of the ratios of neighbouring blocks, with their quartiles; and the processor time that the engine's thread
takes for a step, which a busy machine changes less.

With ``--http`` the same through Pippin's server, whose rows on a CPU are 32, however many ask: streams go on, and a
profile is started and stopped every second. There are no processor times then.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import mlx.core as mx

from benchmarks.servers import Server, serve, stream
from pippin.config import EngineConfig
from pippin.core import EngineCore
from pippin.demo import demo_model_path
from pippin.loading import load_core
from pippin.messages import Marks, ProfileStarted, StartProfile, StopProfile, Submit
from pippin.types import SamplingParams

PROMPT, LONGEST = 16, 1900
Seconds = tuple[float, float | None]
"""A step's, and of these the engine's thread's on a processor."""
UNSETTLED = 2  # steps of a block that do not count: the first is not overlapped


def engine_blocks(
    core: EngineCore, batch: int, pairs: int, steps: int, folder: Path
) -> tuple[list[Seconds], list[Seconds]]:
    """Medians of the steps of each block, seconds, without a profile and with one."""
    off, on = list[Seconds](), list[Seconds]()
    params = SamplingParams(temperature=0.0, max_new_tokens=LONGEST, ignore_eos=True)
    for i in range(batch):
        core.add(Submit(f"cost-{i}", [(7 * i + j) % 3000 + 300 for j in range(PROMPT)], PROMPT, params))
    for _ in range(8):
        core.step()
    for pair in range(pairs):
        for recorded in (False, True) if pair % 2 else (True, False):
            (on if recorded else off).append(block(core, steps, str(folder / f"{batch}-{pair}") if recorded else None))
    for i in range(batch):
        core.abort(f"cost-{i}")
    while core.has_work:
        core.step()
    return off, on


def block(core: EngineCore, steps: int, stem: str | None) -> Seconds:
    """The median step of a block, recorded if ``stem`` says where."""

    def tell(event: ProfileStarted | Marks) -> None:
        if isinstance(event, ProfileStarted) and event.error:
            raise RuntimeError(event.error)

    if stem is None:
        core.profile(StopProfile("none"), tell)  # reads the step in flight, as the start of a profile does
    else:
        core.profile(StartProfile(id="cost", stem=stem), tell)
    times, own = list[float](), list[float]()
    for _ in range(steps + UNSETTLED):
        began, used = time.perf_counter(), time.thread_time()
        core.step()
        times.append(time.perf_counter() - began)
        own.append(time.thread_time() - used)
    core.profile(StopProfile("cost"), tell)
    return statistics.median(times[UNSETTLED:]), statistics.median(own[UNSETTLED:])


async def server_blocks(server: Server, batch: int, pairs: int, folder: Path) -> tuple[list[Seconds], list[Seconds]]:
    """Seconds a step of each block of a second, from the engine's own counters."""
    off, on = list[Seconds](), list[Seconds]()
    async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=httpx.Limits(max_connections=None)) as client:
        streams = [
            asyncio.create_task(stream(client, server.model, f"{i} once upon a time", LONGEST)) for i in range(batch)
        ]
        await asyncio.sleep(1)
        for pair in range(pairs):
            for recorded in (False, True) if pair % 2 else (True, False):
                if any(task.done() for task in streams):
                    break
                if recorded:
                    await post(client, "/start_profile", {"output_dir": str(folder)})
                (on if recorded else off).append(await step_seconds(client))
                if recorded:
                    await post(client, "/stop_profile", {})
        for task in streams:
            task.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    return off, on


async def step_seconds(client: httpx.AsyncClient) -> Seconds:
    """Time a step over a second in which nothing else is asked."""
    await asyncio.sleep(0.1)
    first, began = await counted(client)
    await asyncio.sleep(1)
    last, ended = await counted(client)
    return (ended - began) / max(1, last - first), None


async def counted(client: httpx.AsyncClient) -> tuple[int, float]:
    """The engine's steps so far, and when that was."""
    info = (await client.get("/get_server_info")).json()
    return int(info["internal_states"][0]["steps"]), time.perf_counter()


async def post(client: httpx.AsyncClient, path: str, body: dict[str, str]) -> None:
    (await client.post(path, json=body)).raise_for_status()


def told(where: str, batch: int, off: Sequence[Seconds], on: Sequence[Seconds]) -> dict[str, object]:
    """Microseconds a step, and how much longer one takes that is recorded, in percent and by the thread's own time."""
    pairs = list(zip(off, on, strict=False))
    low, middle, high = statistics.quantiles([100 * (b / a - 1) for (a, _), (b, _) in pairs], n=4)
    own = [(a, b) for (_, a), (_, b) in pairs if a is not None and b is not None]
    thread = (
        {
            "thread_off_us": round(1e6 * statistics.median(a for a, _ in own), 1),
            "thread_more_us": round(1e6 * statistics.median(b - a for a, b in own), 1),
        }
        if own
        else {}
    )
    return {
        "benchmark": "profile_cost",
        "where": where,
        "device": str(mx.default_device()),
        "batch": batch,
        "blocks": len(pairs),
        "off_us": round(1e6 * statistics.median(a for (a, _), _ in pairs), 1),
        "on_us": round(1e6 * statistics.median(b for _, (b, _) in pairs), 1),
        "cost_percent": round(middle, 2),
        "quartiles": [round(low, 2), round(high, 2)],
        **thread,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--steps", type=int, default=16, help="of a block")
    parser.add_argument("--http", action="store_true", help="through the server, in place of the engine alone")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.http:
            with serve("pippin", demo_model_path(), folder / "log") as server:
                for batch in args.batch:
                    off, on = asyncio.run(server_blocks(server, batch, args.pairs, folder))
                    print(json.dumps(told("http", batch, off, on)), flush=True)
            return
        most = max(args.batch)
        slots = most * (PROMPT + LONGEST + 32)
        core = load_core(EngineConfig(max_running_requests=most, max_total_tokens=slots))
        for batch in args.batch:
            off, on = engine_blocks(core, batch, args.pairs, args.steps, folder)
            print(json.dumps(told("engine", batch, off, on)), flush=True)
        core.close()


if __name__ == "__main__":
    main()
