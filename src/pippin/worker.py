"""The engine's side of the queue: commands in, events out, one message a step.

The same loop runs in a child process (``python -m pippin.worker``, over ZeroMQ) and in a thread. Whatever
touches MLX, loading too, happens in the thread that calls ``run``.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import os
import pkgutil
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Protocol

import msgspec
import zmq

from pippin.backend import leave_torch_out
from pippin.bounds import unqueued
from pippin.config import EngineConfig
from pippin.errors import PippinError, RequestError
from pippin.garbage import leave_loaded_alone
from pippin.logs import configure
from pippin.messages import (
    Abort,
    AdaptersChanged,
    Command,
    Event,
    Fatal,
    Flush,
    Flushed,
    LoadAdapter,
    Marks,
    ModelInfo,
    Output,
    Ping,
    Pong,
    ProfileStarted,
    Progress,
    Ready,
    Shutdown,
    StartProfile,
    Stats,
    StepOutput,
    StopProfile,
    Submit,
    UnloadAdapter,
)
from pippin.recorder import Recorder
from pippin.rest import Rest
from pippin.types import Finish

log = logging.getLogger(__name__)


class Core(Protocol):
    """What the loop needs of an engine; ``core.EngineCore`` is the real one."""

    @property
    def info(self) -> ModelInfo: ...

    @property
    def stats(self) -> Stats: ...

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has anything to do; while it hasn't, the loop sleeps until the next command."""

    def add(self, submit: Submit) -> None:
        """Queue a request. Raises RequestError if it can't be served as asked."""

    def abort(self, id: str) -> None:
        """End a request; the next ``step`` reports it. Unknown ids are ignored."""

    def step(self) -> StepOutput | None:
        """Do one step. What fails there fails requests, with a Finish, and does not raise."""

    def flush(self) -> None:
        """Empty the prefix cache. Raises RequestError while requests run."""

    def watch(self, note: Callable[[Sequence[str]], None]) -> None:
        """From here on ``note`` is told the ids of each step's requests before it is queued."""

    def change_adapters(self, command: LoadAdapter | UnloadAdapter) -> AdaptersChanged:
        """Load or forget a LoRA adapter. Raises nothing."""

    def profile(self, command: StartProfile | StopProfile, tell: Callable[[ProfileStarted | Marks], None]) -> None:
        """Begin to record steps, or end it; ``tell`` hears the answer, and spans as they come. Raises nothing."""

    def close(self) -> None:
        """End threads; what waits to be written is. Called once, after the last step, whatever ended it."""


Receive = Callable[[float], Command | None]
"""The next command; None if there is none within so many seconds: 0 looks and doesn't wait, infinity waits for ever."""

Send = Callable[[Event], None]
Load = Callable[[Callable[[Progress], None]], Core]
"""Makes the engine, reporting progress on the way."""

SAID_WHY = 70
"""Exit status of a child that has sent Fatal (BSD's EX_SOFTWARE; Python itself ends with 1)."""

CORE = "pippin.loading:load_core"
"""Where a child finds its engine: a callable of (EngineConfig, progress) -> Core."""


class Hello(msgspec.Struct, frozen=True):
    """What a child reads from its standard input: one line of JSON. The input's end is the parent's end."""

    commands: str
    events: str
    config: EngineConfig
    core: str = CORE
    log_level: str = "warning"
    log_format: str = "text"
    record: str | None = None
    parent: int | None = None


def run(load: Load, receive: Receive, send: Send, recorder: Recorder | None = None) -> bool:
    """Load, say Ready, and serve until Shutdown. False, after a Fatal, if the engine could not start or go on."""
    try:
        core = load(send)
        with closing(core):
            if recorder is not None:
                core.watch(recorder.step)
            send(StepOutput([], core.stats))  # so that the pool's size is known before the first step
            send(Ready(core.info))
            serve(core, receive, send, recorder)
    except Exception as error:
        if not isinstance(error, PippinError):
            log.exception("the engine stopped")
        send(Fatal(type(error).__name__, str(error) or type(error).__name__))
        return False
    return True


def serve(core: Core, receive: Receive, send: Send, recorder: Recorder | None = None, rest: Rest | None = None) -> None:
    """Obey commands and step while there is work; sleep in ``receive`` while there is none."""
    rest = rest or Rest()
    while True:
        while (command := receive(rest.patience(core.has_work))) is not None:
            if isinstance(command, Shutdown):
                return
            if isinstance(command, StartProfile | StopProfile):
                core.profile(command, send)
                continue
            if isinstance(command, LoadAdapter | UnloadAdapter):
                send(core.change_adapters(command))
                continue
            if recorder is not None and isinstance(command, Submit):
                recorder.take_in(command.id)
            for event in obey(core, command):
                send(event)
            if recorder is not None and isinstance(command, Submit):
                recorder.take_in()
        if core.has_work and (output := core.step()) is not None:
            send(output)


def obey(core: Core, command: Submit | Abort | Flush | Ping) -> Iterator[Event]:
    """Carry out one command; yields what can't wait for the next step."""
    match command:
        case Submit():
            if (finish := add(core, command)) is not None:
                yield StepOutput([Output(command.id, finish=finish)], core.stats)
        case Abort(id):
            core.abort(id)
        case Ping():
            yield Pong()
        case Flush(id):
            try:
                core.flush()
            except RequestError as error:
                yield Flushed(id, False, error.message)
            else:
                yield StepOutput([], core.stats)
                yield Flushed(id, True)


def add(core: Core, submit: Submit) -> Finish | None:
    """Queue a request. One that can't be served ends here, and is no other request's trouble."""
    try:
        core.add(submit)
    except RequestError as error:
        return Finish("error", None, error.message, error.field, error.status)
    except Exception as error:
        log.exception("request %s could not be queued", submit.id)
        return unqueued(error)
    return None


# --- the child process ---


def main() -> int:
    """The child: connect to the parent's two sockets, run, and die with the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    with open(0, "rb", buffering=0, closefd=False) as pipe:
        hello = msgspec.json.decode(pipe.readline(), type=Hello)
    die_with_parent(hello.parent)
    recorder = Recorder(Path(hello.record)) if hello.record is not None else None
    if not hello.config.device.startswith("torch"):
        leave_torch_out()
    configure(hello.log_level, hello.log_format, text="%(levelname)s: %(name)s: %(message)s")
    context = zmq.Context()
    commands, events = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    for socket, address in ((commands, hello.commands), (events, hello.events)):
        socket.set_hwm(0)
        socket.connect(address)
    encoder, decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(Command)

    def receive(seconds: float) -> Command | None:
        if 0 < seconds < math.inf and not commands.poll(math.ceil(1000 * seconds)):
            return None
        try:
            message = commands.recv(zmq.NOBLOCK if seconds < math.inf else 0)
        except zmq.Again:
            return None
        command: Command = decoder.decode(message)
        return command

    def send(event: Event) -> None:
        events.send(encoder.encode(event))

    def load(progress: Callable[[Progress], None]) -> Core:
        make: Callable[[EngineConfig, Callable[[Progress], None]], Core] = pkgutil.resolve_name(hello.core)
        core = make(hello.config, progress)
        leave_loaded_alone()
        return core

    ok = run(load, receive, send, recorder)
    commands.close(linger=0)
    events.close(linger=2000)
    context.term()
    return 0 if ok else SAID_WHY


def die_with_parent(parent: int | None = None) -> None:
    """Leave no engine behind: the parent, process ``parent``, holds our standard input open for as long as it lives.

    Linux also kills us while native code keeps the watching thread from running; on macOS the kernel also tells of the
    parent's end if another process has inherited the pipe.
    """

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if parent is None:
        return
    if sys.platform == "darwin":
        threading.Thread(target=exit_after, args=(parent,), name="parent-exit", daemon=True).start()
    if os.getppid() != parent:  # it ended before we asked to be told
        os._exit(1)


if sys.platform == "darwin":

    def exit_after(parent: int) -> None:
        """Wait for the end of a process, and end."""
        queue = select.kqueue()
        end = select.kevent(parent, select.KQ_FILTER_PROC, select.KQ_EV_ADD, select.KQ_NOTE_EXIT)
        with contextlib.suppress(ProcessLookupError):  # it has ended
            queue.control([end], 1)
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
