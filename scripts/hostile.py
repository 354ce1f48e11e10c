"""Slow, silent and malicious clients against a server of the demo model, on loopback: what each costs, and others.

Starts the server, attacks it in each way, and prints a line of JSON an attack: the largest memory of the HTTP process,
and how long another client's short requests took meanwhile. ``--scale 0.05`` is for a quick look. Linux alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
PROBE = json.dumps({"prompt": "What is 2 + 2?", "max_tokens": 4, "temperature": 0}).encode()
SECONDS = 600.0

Address = tuple[str, int]
Attack = Callable[[Address, float], Awaitable[None]]


async def ask(address: Address, body: bytes, head: bytes = HEAD) -> int:
    """One request on a connection of its own; its status, 0 if the server hung up."""
    reader, writer = await asyncio.open_connection(*address)
    try:
        with suppress(ConnectionError):
            writer.write(head + b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body)
            await writer.drain()
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            return int((await reader.readuntil(b"\r\n")).split()[1])
        return 0
    finally:
        writer.close()


async def many(address: Address, count: int, first: bytes, then: bytes = b"", seconds: float = 3.0) -> None:
    """Connections that say ``first``, then ``then`` byte by byte, and stay. The server may close them."""
    writers: list[asyncio.StreamWriter] = []
    for begin in range(0, count, 100):
        made = [asyncio.open_connection(*address) for _ in range(min(100, count - begin))]
        for one in await asyncio.gather(*made, return_exceptions=True):
            if not isinstance(one, BaseException):
                writers.append(one[1])
                one[1].write(first)
    end = time.monotonic() + seconds
    at = 0
    while time.monotonic() < end:
        for writer in writers:
            if then and not writer.is_closing():
                writer.write(then[at % len(then) : at % len(then) + 1])
        at += 1
        await asyncio.sleep(0.25)
    for writer in writers:
        writer.transport.abort()


async def slow_loris(address: Address, scale: float) -> None:
    await many(address, int(2000 * scale), b"POST /v1/completions HTTP/1.1\r\n", b"X-a: b\r\n", 15 * scale)


async def slow_bodies(address: Address, scale: float) -> None:
    await many(address, int(2000 * scale), HEAD + b"Content-Length: 100000\r\n\r\n{", b" ", 15 * scale)


async def ten_thousand_connections(address: Address, scale: float) -> None:
    await many(address, int(10_000 * scale), b"", seconds=5 * scale)


async def huge_headers(address: Address, scale: float) -> None:
    for _ in range(int(200 * scale) or 1):
        await ask(address, PROBE, HEAD + b"X-Junk: " + b"a" * 2**20 + b"\r\n")


async def huge_bodies(address: Address, scale: float) -> None:
    """Bodies that announce nothing and go on for ever: as far as the server reads."""

    async def one() -> None:
        _, writer = await asyncio.open_connection(*address)
        with suppress(ConnectionError):
            writer.write(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
            for _ in range(64):
                writer.write(b"100000\r\n" + b"[" * 2**20 + b"\r\n")
                await writer.drain()
        writer.transport.abort()

    for _ in range(int(10 * scale) or 1):
        await asyncio.gather(*(one() for _ in range(8)))


async def million_tokens(address: Address, scale: float) -> None:
    text = json.dumps({"prompt": "hello world this is a test " * 170_000, "max_tokens": 1}).encode()
    ids = json.dumps({"prompt": [5] * 1_000_000, "max_tokens": 1}).encode()
    for _ in range(int(20 * scale) or 1):
        assert set(await asyncio.gather(*(ask(address, body) for body in (text, ids)))) <= {400, 503}


async def invalid_utf8(address: Address, scale: float) -> None:
    for i in range(int(1000 * scale) or 1):
        assert await ask(address, b'{"prompt": "' + bytes([0x80 + i % 128, 0xFF]) + b'", "max_tokens": 1}') == 400


async def deep_json(address: Address, scale: float) -> None:
    for opening in (b"[", b'{"a":'):
        for _ in range(int(20 * scale) or 1):
            assert await ask(address, b'{"prompt": ' + opening * 200_000) == 400


async def wide_json(address: Address, scale: float) -> None:
    body = b'{"prompt": [' + b"[]," * 5_000_000 + b"[]]}"
    for _ in range(int(5 * scale) or 1):
        assert await ask(address, body) == 413


async def flood(address: Address, scale: float) -> None:
    """Far more streams than may run and wait."""
    body = json.dumps({"prompt": "tell me", "max_tokens": 200, "n": 100, "stream": True}).encode()
    await many(
        address, int(300 * scale) or 1, HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body, seconds=10 * scale
    )


ATTACKS: tuple[Attack, ...] = (
    slow_loris,
    slow_bodies,
    ten_thousand_connections,
    huge_headers,
    huge_bodies,
    million_tokens,
    invalid_utf8,
    deep_json,
    wide_json,
    flood,
)


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def forget_peak(pid: int) -> None:
    """From here on ``most_resident`` is of what comes."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def most_resident(pid: int) -> int:
    """The kernel's own high-water mark: what is there between two looks counts, too."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


def open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


async def measure(attack: Attack, address: Address, pid: int, scale: float) -> dict[str, object]:
    """The attack, and beside it a client that asks as others do, one request after the other."""
    before, files, times, statuses = resident(pid), 0, list[float](), dict[int, int]()
    forget_peak(pid)
    done = asyncio.Event()

    async def attacking() -> None:
        try:
            async with asyncio.timeout(SECONDS):
                await attack(address, scale)
        finally:
            done.set()

    task = asyncio.create_task(attacking())
    while not done.is_set() or not times:
        began = time.monotonic()
        async with asyncio.timeout(SECONDS):
            status = await ask(address, PROBE)
        times.append(time.monotonic() - began)
        statuses[status] = statuses.get(status, 0) + 1
        files = max(files, open_files(pid))
        await asyncio.sleep(0.05)
    await task
    await asyncio.sleep(0.5)
    times.sort()
    return {
        "attack": attack.__name__,
        "memory_before_mib": before >> 20,
        "memory_peak_mib": most_resident(pid) >> 20,
        "memory_after_mib": resident(pid) >> 20,
        "open_files": files,
        "others": statuses,
        "others_median_ms": round(1000 * times[len(times) // 2]),
        "others_worst_ms": round(1000 * times[-1]),
    }


@contextmanager
def served(*options: str, log: IO[bytes] | None = None) -> Iterator[tuple[Address, int]]:
    """A server of the demo model in a process of its own: where it listens, and its process id.

    Its errors go to ``log``, or where this process' own go.
    """
    command = [sys.executable, "-m", "pippin", "serve", "--port", "0", "--log-level", "error", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        found = None
        while found is None:
            line = process.stdout.readline()
            assert line, "the server did not start"
            found = re.match(r"Pippin serves .* at http://127\.0\.0\.1:(\d+)", line)
        yield ("127.0.0.1", int(found[1])), process.pid
        assert process.poll() is None, "the server died"
    finally:
        process.kill()
        process.communicate()


async def warmed(address: Address) -> None:
    for _ in range(5):
        assert await ask(address, PROBE) == 200


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the connections, requests and seconds")
    parser.add_argument("--only", nargs="*", default=[], help="names of attacks")
    options = parser.parse_args()
    with served() as (address, pid):
        asyncio.run(warmed(address))
        for attack in ATTACKS:
            if not options.only or attack.__name__ in options.only:
                print(json.dumps(asyncio.run(measure(attack, address, pid, options.scale))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
