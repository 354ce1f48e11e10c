"""A transport to an engine that comes back: watches the child, restarts it, and gives it again what had not ended.

Whoever asks sees one engine that is slow for a while. What was asked and answered is in ``journal`` and ``carried``;
here is the life of one child after another.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Protocol

import msgspec

from pippin.carried import RESTARTING, Carried
from pippin.errors import EngineError
from pippin.journal import Journal
from pippin.messages import (
    Abort,
    Command,
    Event,
    Fatal,
    Flush,
    LoadAdapter,
    Output,
    Ping,
    Pong,
    Progress,
    Ready,
    StartProfile,
    Stats,
    StepOutput,
    Submit,
    UnloadAdapter,
)
from pippin.restarts import Restarts, Supervision, Watchdog
from pippin.transport import OnEnd, OnEvent, Transport
from pippin.types import Finish

log = logging.getLogger(__name__)

RELOAD = 3.0
"""How many times as long as the first one a load may go on without a word, beside the watchdog's own bound."""

LEAVE_SECONDS = 60.0
"""How long an engine that is replaced may take to end: what waits for the disk is written."""


class Child(Transport, Protocol):
    """A transport to a process that can be ended; ``transport.ProcessTransport`` is the real one."""

    @property
    def pid(self) -> int | None: ...

    def drain(self) -> None:
        """Hand on what has come, now."""

    def worked_on(self) -> frozenset[str] | None:
        """The requests of the steps that it worked on when it died; None if that is not known."""

    def kill(self) -> None: ...


Make = Callable[[], Child]


class Supervisor:
    """A Transport over one child after another; ``make`` makes the transport to a new one.

    Requests that come while there is none wait for the next. After too many restarts everything that waits fails, with
    503, and so does what comes, until the window lets another try begin (``trouble``). A child that fails in its first
    load is not replaced, and none is if ``max_restarts`` is 0.
    """

    def __init__(
        self,
        make: Make,
        supervision: Supervision | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.supervision = supervision or Supervision()
        self.journal = Journal()
        self._make, self._clock = make, clock
        asked = self.supervision
        self._restarts = Restarts(asked.max_restarts, asked.restart_window, asked.back_off)
        self._watchdog = Watchdog(asked.watchdog_timeout)
        self._carried = Carried()
        self._child: Child | None = None
        self._ready = self._pinged = self._killed = False
        self._trial: asyncio.Future[Ready | Fatal] | None = None  # of a child that replaces another, while it loads
        self._settled = asyncio.Event()  # there is an engine, or will be none for a while
        self._began = 0.0
        self._load_seconds: float | None = None  # of the first load; None until it is done
        self._said = ""
        self._down = ""
        self._until = 0.0
        self._stats = Stats()
        self._num_restarts = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._on_event: OnEvent = lambda event: None
        self._on_end: OnEnd = lambda how: None

    @property
    def pid(self) -> int | None:
        """The child's process id; None while there is none."""
        return self._child.pid if self._child is not None else None

    async def open(self, on_event: OnEvent, on_end: OnEnd) -> None:
        self._on_event, self._on_end = on_event, on_end
        await self._start(self._make())
        self._spawn(self._look())

    def trouble(self) -> EngineError | None:
        """Why requests are refused now; None while they are taken, though they may have to wait for a restart."""
        if not self._down:
            return None
        return EngineError(self._down, 503, max(1.0, self._until - self._clock()))

    def send(self, command: Command) -> None:
        match command:
            case Submit(id):
                self._submit(command)
            case Abort(id):
                self._abort(id)
            case Flush() | LoadAdapter() | UnloadAdapter() | StartProfile():
                answer = self._carried.ask(command, self._ready)
                if answer is not None:
                    self._tell(answer)
                elif self._down:
                    self._tell_all(self._carried.give_up(self._down))
                else:
                    self._pass(command)
            case _:
                self._pass(command)

    async def close(self, patience: float) -> None:
        child, self._child = self._child, None
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if child is not None:
            await child.close(patience)

    # --- requests ---

    def _pass(self, command: Command) -> None:
        if self._ready and self._child is not None:
            self._child.send(command)

    def _tell(self, event: Event) -> None:
        """Hands on an event in a while: whoever sends does not expect answers meanwhile."""
        asyncio.get_running_loop().call_soon(self._on_event, event)

    def _tell_all(self, events: list[Event]) -> None:
        for event in events:
            self._tell(event)

    def _submit(self, submit: Submit) -> None:
        if self._down:
            self._tell(self._ends(submit.id, Finish("error", None, self._down, status=503)))
            return
        self.journal.add(submit)
        self._give_out()

    def _abort(self, id: str) -> None:
        if self.journal.abort(id):
            self._pass(Abort(id))
        elif id in self.journal:
            self.journal.end(id)
            self._tell(self._ends(id, Finish("abort")))

    def _give_out(self) -> None:
        """Gives the engine what may go to it now."""
        if self._ready and self._child is not None:
            for submit in self.journal.next():
                self._child.send(submit)

    def _ends(self, id: str, finish: Finish) -> StepOutput:
        return StepOutput([Output(id, finish=finish)], self._counted(self._stats))

    # --- what the child says ---

    def _hear(self, child: Child, event: Event) -> None:
        if child is not self._child:
            return
        self._watchdog.heard(isinstance(event, StepOutput))
        match event:
            case StepOutput(outputs, stats):
                self._stats = stats
                new = [output for output in map(self.journal.take, outputs) if output is not None]
                self._on_event(StepOutput(new, self._counted(stats)))
                self._give_out()
            case Pong():
                self._pinged = False
            case Ready():
                self._on_ready(event)
            case Fatal() if self._trial is not None:
                self._tried(event)
            case Fatal(_, message) if self._load_seconds is not None:
                self._said = f"the engine stopped: {message}"  # and the child ends
            case Progress() if self._load_seconds is not None and self._trial is None:
                pass
            case _:
                if (heard := self._carried.hear(event)) is not None:
                    self._on_event(heard)

    def _counted(self, stats: Stats) -> Stats:
        if not self._num_restarts and not self.journal.num_resumed:
            return stats
        return msgspec.structs.replace(stats, restarts=self._num_restarts, resumed=self.journal.num_resumed)

    def _on_ready(self, event: Ready) -> None:
        self._ready, self._pinged, self._down = True, False, ""
        seconds = self._clock() - self._began
        first = self._load_seconds is None
        if first or self._trial is not None:
            self._load_seconds = seconds
        if first:
            self._carried.adapters = dict(event.info.lora_paths)
        elif self._trial is None:
            log.warning("the engine is back after %.1f s; %d requests go on", seconds, len(self.journal))
        self._watchdog = Watchdog(self.supervision.watchdog_timeout)
        for command in self._carried.commands(event.info):
            self._pass(command)
        event = Ready(msgspec.structs.replace(event.info, lora_paths=dict(self._carried.adapters)))
        self._on_event(event)
        self._tried(event)
        self._settled.set()
        self._give_out()

    # --- its life ---

    async def _start(self, child: Child) -> None:
        self._child = child
        self._ready, self._killed, self._said = False, False, ""
        self._settled.clear()
        self._began = self._clock()
        bound = self.supervision.watchdog_timeout + RELOAD * (self._load_seconds or 0.0)
        self._watchdog = Watchdog(bound)
        await child.open(partial(self._hear, child), partial(self._died, child))

    async def _look(self) -> None:
        """Kills a child that is silent for too long, so that it can be replaced."""
        while True:
            await asyncio.sleep(min(5.0, self._watchdog.interval))
            child = self._child
            if child is None or self._killed or self._load_seconds is None:
                continue
            child.drain()  # what came while this process was busy counts
            hung = self._watchdog.look(self._clock(), self._ready and self.journal.given)
            if hung is not None and child is self._child:
                self._said, self._killed = hung, True
                child.kill()
            elif self._ready and not self._pinged:
                self._pinged = True
                child.send(Ping())

    def _died(self, child: Child, how: str) -> None:
        if child is not self._child:
            return
        if self._trial is not None:
            self._tried(Fatal("EngineError", self._said or how))
            return
        if self._load_seconds is None or not self.supervision.max_restarts:
            self._settled.set()
            self._on_end(how)
            return
        self._child, self._ready = None, False
        self._spawn(self._bury(child, self._said or how))

    async def _bury(self, child: Child, why: str) -> None:
        """Sorts out what the dead child leaves behind, and starts another."""
        step = child.worked_on()
        await child.close(0.0)
        self._num_restarts += 1
        self._leave(step, why)
        await self._again(why)

    def _leave(self, step: frozenset[str] | None, why: str) -> None:
        """Ends what can't go on elsewhere; all else is to be given out again."""
        for event in self._carried.lost(why):
            self._on_event(event)
        for id, finish in self.journal.left(step, why).items():
            self._tell(self._ends(id, finish))

    async def _again(self, why: str) -> None:
        """Starts another child, as soon as one may be."""
        while True:
            delay = self._restarts.next(self._clock())
            if delay is None:
                await self._rest(why)
                continue
            log.warning("%s; starting another in %g s, for %d requests", why, delay, len(self.journal))
            await asyncio.sleep(delay)
            try:
                await self._start(self._make())
                return
            except Exception as error:  # no process or no files to be had: the next try may find some
                self._child = None
                why = f"the engine can't be started ({error})"

    async def _rest(self, why: str) -> None:
        """Fails all that waits, and lets time pass."""
        limit, window = self.supervision.max_restarts, self.supervision.restart_window
        self._until = self._clock() + self._restarts.wait(self._clock())
        self._down = f"{why}; it was restarted {limit} times within {window:g} s, so the next try has to wait"
        log.error("%s", self._down)
        for id in self.journal.end_all():
            self._tell(self._ends(id, Finish("error", None, self._down, status=503)))
        self._tell_all(self._carried.give_up(self._down))
        self._settled.set()
        await asyncio.sleep(self._until - self._clock())

    # --- another engine in its place ---

    async def replace(self, make: Make) -> Ready | Fatal:
        """Ends the child and starts one that ``make`` makes, which is the one to be started again from then on.

        Requests that have not ended go on in it, as after a death. If it can't be loaded, one like the last is started
        again, and serves when this returns, or ``trouble`` says why not; the Fatal says what went wrong.
        Goes on if whoever awaits it is cancelled. Raises EngineError (503) while there is no engine to be replaced.
        """
        if not self._ready or self._child is None:
            raise EngineError(RESTARTING, 503)
        child, self._child, self._ready = self._child, None, False
        result: asyncio.Future[Ready | Fatal] = asyncio.get_running_loop().create_future()
        self._spawn(self._replace(child, make, result))
        return await asyncio.shield(result)

    async def _replace(self, child: Child, make: Make, result: asyncio.Future[Ready | Fatal]) -> None:
        last, said = self._make, Fatal("EngineError", "the server is shutting down")
        try:
            self._leave(frozenset(), "the engine is replaced")
            await end(child, LEAVE_SECONDS)
            self._make, tried = make, make()
            found = await self._try(tried)
            if isinstance(found, Fatal):
                self._make, said = last, found
                await end(tried, 0.0)
                await self._back()
            else:
                result.set_result(found)
        finally:
            if not result.done():
                result.set_result(said)

    async def _try(self, child: Child) -> Ready | Fatal:
        trial: asyncio.Future[Ready | Fatal] = asyncio.get_running_loop().create_future()
        self._trial = trial
        try:
            await self._start(child)
        except Exception as error:
            self._tried(Fatal("EngineError", f"no process can be started ({error})"))
        return await trial

    def _tried(self, result: Ready | Fatal) -> None:
        """The child that is tried has loaded, and is as any from here on; or it has not, and is no longer heard."""
        trial, self._trial = self._trial, None
        if trial is None:
            return
        if isinstance(result, Fatal):
            self._child = None
        trial.set_result(result)

    async def _back(self) -> None:
        """Starts a child as the last one was, in place of one that could not be loaded."""
        try:
            await self._start(self._make())
        except Exception as error:
            self._child = None
            self._spawn(self._again(f"the engine can't be started ({error})"))
        await self._settled.wait()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def end(child: Child, patience: float) -> None:
    """Ends a child, at once if this is cancelled meanwhile."""
    try:
        await child.close(patience)
    except asyncio.CancelledError:
        await child.close(0.0)
        raise
