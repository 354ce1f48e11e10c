"""Two ways to reach a worker, with one face: a child process, or a thread of this one."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import os
import queue
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec
import zmq

from pippin.backend import leave_thread
from pippin.config import EngineConfig
from pippin.errors import EngineError
from pippin.messages import Command, Event, Fatal, Ready, Shutdown
from pippin.recorder import Record
from pippin.worker import CORE, SAID_WHY, Hello, Load, run

LAST_WORDS = 5.0
"""Seconds that a dead child's reason may take to arrive on a busy machine."""

OnEvent = Callable[[Event], None]
OnEnd = Callable[[str], None]
"""Called once, when the worker has ended, with how it ended."""


class Transport(Protocol):
    """A way to a worker. All is called, and calls back, in the event loop that called ``open``."""

    async def open(self, on_event: OnEvent, on_end: OnEnd) -> None: ...

    def send(self, command: Command) -> None:
        """Hand over a command without waiting; dropped if the worker has ended."""

    def trouble(self) -> EngineError | None:
        """Why requests are refused now, though the worker may come back; None if they are not."""

    async def close(self, patience: float) -> None:
        """Ask the worker to end; one that can be made to end is, after ``patience`` seconds. No more is heard of it."""


class ThreadTransport:
    """A worker in a thread of this process, for ``Engine`` and for tests."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._ended = asyncio.Event()
        self._on_event: OnEvent = lambda event: None
        self._on_end: OnEnd = lambda how: None
        self._closed = False

    async def open(self, on_event: OnEvent, on_end: OnEnd) -> None:
        self._on_event, self._on_end = on_event, on_end
        self._start(self._load, on_event, lambda how: self._on_end(how))

    def _start(self, load: Load, on_event: OnEvent, on_end: OnEnd) -> None:
        loop, commands, ended = asyncio.get_running_loop(), self._commands, asyncio.Event()

        def call(function: Callable[..., None], *arguments: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed under us: nobody listens any more
                loop.call_soon_threadsafe(function, *arguments)

        def end() -> None:
            ended.set()
            on_end("the engine's thread ended")

        def receive(seconds: float) -> Command | None:
            try:
                return commands.get(seconds > 0, seconds if seconds < math.inf else None)
            except queue.Empty:
                return None

        def work() -> None:
            run(load, receive, lambda event: call(on_event, event))
            leave_thread()
            call(end)

        self._ended = ended
        self._thread = threading.Thread(target=work, name="pippin-engine", daemon=True)
        self._thread.start()

    async def replace(self, load: Load) -> Ready | Fatal:
        """Ends the thread and starts one over what ``load`` makes; where that fails, one as before, and says why.

        Not while requests run: they would be lost. What is sent meanwhile waits for the engine that comes.
        """
        leaving, self._commands = self._commands, queue.SimpleQueue()
        self._on_end, told = (lambda how: None), self._on_end
        leaving.put(Shutdown())
        await self._join()
        self._on_end = told
        found = await self._try(load)
        if isinstance(found, Ready):
            self._load = load
        elif isinstance(again := await self._try(self._load), Fatal):
            self._on_event(again)
        return found

    async def _try(self, load: Load) -> Ready | Fatal:
        """A new thread; it has ended where it can't serve."""
        tried: asyncio.Future[Ready | Fatal] = asyncio.get_running_loop().create_future()

        def hear(event: Event) -> None:
            if isinstance(event, Ready | Fatal) and not tried.done():
                tried.set_result(event)
            if not isinstance(event, Fatal) or isinstance(tried.result(), Ready):
                self._on_event(event)

        def end(how: str) -> None:
            if not tried.done():
                tried.set_result(Fatal("EngineError", how))
            elif isinstance(tried.result(), Ready):
                self._on_end(how)

        gc.collect()  # what the last one held, before there is a second
        if self._closed:
            return Fatal("EngineError", "the engine was shut down")
        self._start(load, hear, end)
        found = await tried
        if isinstance(found, Fatal):
            await self._join()
        return found

    async def _join(self) -> None:
        await self._ended.wait()
        if self._thread is not None:
            self._thread.join()

    def send(self, command: Command) -> None:
        self._commands.put(command)

    def trouble(self) -> EngineError | None:
        return None

    async def close(self, patience: float) -> None:
        self._closed = True
        if self._thread is not None:
            self.send(Shutdown())
            await self._join()


class _Sockets:
    """Our ends of the two queues. Raises zmq.ZMQError if there are no files left for them."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        try:
            self.commands = self._context.socket(zmq.PUSH)
            self.events = self._context.socket(zmq.PULL)
        except BaseException:
            self._context.destroy(linger=0)
            raise

    def bind(self, directory: str) -> tuple[str, str]:
        """Binds both in a directory; returns their addresses."""
        addresses = f"ipc://{directory}/commands", f"ipc://{directory}/events"
        for socket, address in zip((self.commands, self.events), addresses, strict=True):
            socket.set_hwm(0)
            socket.bind(address)
        return addresses

    def close(self) -> None:
        self.commands.close(linger=0)
        self.events.close(linger=0)
        self._context.term()


class ProcessTransport:
    """A worker in a child process: two ZeroMQ sockets in a directory that only this user can open.

    ``core`` names the engine's loader as ``module:function`` (see ``worker.CORE``).
    """

    def __init__(
        self, config: EngineConfig, core: str = CORE, log_level: str = "warning", log_format: str = "text"
    ) -> None:
        self._config, self._core, self._log_level, self._log_format = config, core, log_level, log_format
        self._encoder, self._decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(Event)
        self._sockets: _Sockets | None = None
        self._directory: Path | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._watch: asyncio.Task[None] | None = None
        self._on_event: OnEvent = lambda event: None
        self._record: Record | None = None
        self._heard_why = False

    @property
    def pid(self) -> int | None:
        """The child's process id; None before ``open``."""
        return self._process.pid if self._process else None

    async def open(self, on_event: OnEvent, on_end: OnEnd) -> None:
        """Raises OSError or zmq.ZMQError if there is no process to be had; nothing is left behind then."""
        try:
            await self._open(on_event, on_end)
        except BaseException:
            await self.close(0.0)
            raise

    async def _open(self, on_event: OnEvent, on_end: OnEnd) -> None:
        self._on_event = on_event
        sockets = self._sockets = _Sockets()
        commands, events = sockets.bind(self._new_directory())
        asyncio.get_running_loop().add_reader(sockets.events.fileno(), self.drain)
        # -P: a `random.py` in the user's directory must not shadow the library's.
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "pippin.worker", stdin=asyncio.subprocess.PIPE
        )
        assert self._process.stdin is not None
        hello = Hello(commands, events, self._config, self._core, self._log_level, self._log_format)
        hello = msgspec.structs.replace(hello, record=self._new_record(), parent=os.getpid())
        self._process.stdin.write(msgspec.json.encode(hello) + b"\n")
        self._watch = asyncio.create_task(self._wait(self._process, on_end))

    def _new_directory(self) -> str:
        directory = tempfile.mkdtemp(prefix="pippin-")  # mode 0700
        if len(directory) > 80:  # a socket's path may have 103 bytes on macOS
            shutil.rmtree(directory)
            directory = tempfile.mkdtemp(prefix="pippin-", dir="/tmp")
        self._directory = Path(directory)
        return directory

    def _new_record(self) -> str:
        assert self._directory is not None
        path = self._directory / "record"
        self._record = Record(path)
        return str(path)

    def drain(self) -> None:
        """Read all there is: the descriptor only wakes us when the queue was empty before."""
        while self._sockets is not None:
            try:
                message = self._sockets.events.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            event: Event = self._decoder.decode(message)
            if isinstance(event, Ready):
                self._forget()
            self._heard_why |= isinstance(event, Fatal)
            self._on_event(event)

    def _forget(self) -> None:
        """Both ends are connected, so the paths have done their service: nothing is left behind, however we end."""
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    async def _wait(self, process: asyncio.subprocess.Process, on_end: OnEnd) -> None:
        code = await process.wait()
        # Its last words may still be between the kernel and our socket; where there are some, they are waited for.
        until = time.monotonic() + (LAST_WORDS if code == SAID_WHY else 0.0)
        while True:
            await asyncio.sleep(0.05)
            self.drain()
            if self._heard_why or time.monotonic() >= until:
                break
        on_end(describe_exit(code))

    def send(self, command: Command) -> None:
        if self._sockets is not None and self._process is not None and self._process.returncode is None:
            with contextlib.suppress(zmq.Again):  # no one is connected: it ends, or is too young to listen
                self._sockets.commands.send(self._encoder.encode(command), zmq.NOBLOCK)

    def trouble(self) -> EngineError | None:
        return None

    def worked_on(self) -> frozenset[str] | None:
        """The requests of the steps that the child works on, or worked on when it died; None if that is not known."""
        return self._record.read() if self._record is not None else None

    def kill(self) -> None:
        """End a child that doesn't answer; it ends as any that dies."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def close(self, patience: float) -> None:
        if self._watch is not None and self._process is not None:
            self._watch.cancel()
            self.send(Shutdown())
            await self._end(self._process, patience)
        sockets, self._sockets = self._sockets, None
        if sockets is not None:
            asyncio.get_running_loop().remove_reader(sockets.events.fileno())
            sockets.close()
        self._forget()
        if self._record is not None:
            self._record.close()
            self._record = None

    async def _end(self, process: asyncio.subprocess.Process, patience: float) -> None:
        try:
            await asyncio.wait_for(process.wait(), patience)
        except TimeoutError:
            self.kill()
            await process.wait()


def describe_exit(code: int) -> str:
    """How a process ended, in words: its exit status, or the signal that killed it."""
    if code >= 0:
        return f"the engine process ended with status {code}"
    name = signal.Signals(-code).name
    hint = {"SIGKILL": " (out of memory?)", "SIGABRT": " (out of GPU memory?)"}.get(name, "")
    return f"the engine process was killed by {name}{hint}"
