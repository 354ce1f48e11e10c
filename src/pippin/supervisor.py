"""A transport to an engine that comes back: watches the child, restarts it, and gives it again what had not ended.

Whoever asks sees one engine that is slow for a while. The journal of what was asked and answered is here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import msgspec

from pippin.errors import EngineError
from pippin.restarts import Docket, Restarts, Supervision, Watchdog
from pippin.transport import OnEnd, OnEvent, Transport
from pippin.types import (
    Abort,
    AdaptersChanged,
    CacheMiss,
    Command,
    Event,
    Fatal,
    Finish,
    Flush,
    Flushed,
    LoadAdapter,
    Marks,
    Output,
    Ping,
    Pong,
    ProfileStarted,
    Progress,
    Ready,
    StartProfile,
    Stats,
    StepOutput,
    Submit,
    UnloadAdapter,
)

log = logging.getLogger(__name__)

RELOAD = 3.0
"""How many times as long as the first one a load may go on without a word, beside the watchdog's own bound."""


class Child(Transport, Protocol):
    """A transport to a process that can be ended; ``transport.ProcessTransport`` is the real one."""

    @property
    def pid(self) -> int | None: ...

    def drain(self) -> None:
        """Hand on what has come, now."""

    def worked_on(self) -> frozenset[str] | None:
        """The requests of the steps that it worked on when it died; None if that is not known."""

    def kill(self) -> None: ...


@dataclass(slots=True, eq=False)
class Job:
    """A request that has not ended: what was asked, and what has been told since.

    ``given``: the engine that lives now has it. ``told`` prompt logprobs; ``skip`` of those that come are known.
    """

    submit: Submit
    tokens: list[int] = field(default_factory=list)
    given: bool = False
    aborted: bool = False
    resumed: bool = False
    told: int = 0
    skip: int = 0
    num_cached: int = 0
    miss: CacheMiss | None = None
    waited: float = 0.0

    def again(self) -> Submit:
        """What another engine is asked, so that it goes on where the last one stopped."""
        self.skip = 0 if self.tokens else self.told  # with tokens, the engine knows that the prompt's were told
        return msgspec.structs.replace(self.submit, tokens=self.submit.tokens + self.tokens)

    def take(self, output: Output) -> Output:
        """Notes what has come; returns what of it is new to whoever asked."""
        if self.resumed:
            output = self._continued(output)
        elif output.tokens or output.num_cached:
            self.num_cached, self.miss, self.waited = output.num_cached, output.miss, output.waited
        self.tokens += output.tokens
        self.told += len(output.prompt_logprobs)
        return output

    def _continued(self, output: Output) -> Output:
        """A prompt's logprobs are told once; what the cache gave, and the time in the queue, are the first engine's."""
        known, self.skip = min(self.skip, len(output.prompt_logprobs)), max(0, self.skip - len(output.prompt_logprobs))
        if not self.tokens:
            self.num_cached, self.miss, self.waited = output.num_cached, output.miss, output.waited
        return msgspec.structs.replace(
            output,
            prompt_logprobs=output.prompt_logprobs[known:],
            num_cached=self.num_cached,
            miss=self.miss,
            waited=self.waited,
        )


class Supervisor:
    """A Transport over one child after another; ``make`` makes the transport to a new one.

    Requests that come while there is none wait for the next. After too many restarts everything that waits fails, with
    503, and so does what comes, until the window lets another try begin (``trouble``). A child that fails in its first
    load is not replaced, and none is if ``max_restarts`` is 0.
    """

    def __init__(
        self,
        make: Callable[[], Child],
        supervision: Supervision | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.supervision = supervision or Supervision()
        self._make, self._clock = make, clock
        asked = self.supervision
        self._restarts = Restarts(asked.max_restarts, asked.restart_window, asked.back_off)
        self._watchdog = Watchdog(asked.watchdog_timeout)
        self._docket = Docket()
        self._jobs: dict[str, Job] = {}
        self._flushes: list[Flush] = []
        self._adapters: dict[str, str] = {}  # LoRA adapters that a new child is to have
        self._changing: set[str] = set()
        self._profile: str | None = None
        self._profiling = False
        self._child: Child | None = None
        self._ready = self._pinged = self._killed = False
        self._began = 0.0
        self._load_seconds: float | None = None  # of the first load; None until it is done
        self._said = ""
        self._down = ""
        self._until = 0.0
        self._stats = Stats()
        self._num_restarts = self._num_resumed = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._on_event: OnEvent = lambda event: None
        self._on_end: OnEnd = lambda how: None

    @property
    def pid(self) -> int | None:
        """The child's process id; None while there is none."""
        return self._child.pid if self._child is not None else None

    async def open(self, on_event: OnEvent, on_end: OnEnd) -> None:
        self._on_event, self._on_end = on_event, on_end
        await self._start()
        self._spawn(self._look())

    def trouble(self) -> EngineError | None:
        """Why requests are refused now; None while they are taken, though they may have to wait for a restart."""
        if not self._down:
            return None
        return EngineError(self._down, 503, max(1.0, self._until - self._clock()))

    def send(self, command: Command) -> None:
        match command:
            case Submit():
                self._submit(command)
            case Abort(id):
                self._abort(id)
            case Flush(id):
                if self._down:
                    self._tell(Flushed(id, False, self._down))
                    return
                self._flushes.append(command)
                self._pass(command)
            case LoadAdapter(id=id) | UnloadAdapter(id=id) if not self._ready:
                self._tell(self._unchanged(id))
            case LoadAdapter(id=id) | UnloadAdapter(id=id):
                self._changing.add(id)
                self._pass(command)
            case StartProfile(id=id) if not self._ready:
                self._tell(ProfileStarted(id, 0, 0, "the engine is restarting; try again in a while"))
            case StartProfile(id=id):
                self._profile, self._profiling = id, False
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

    def _unchanged(self, id: str) -> AdaptersChanged:
        said = "the engine is restarting; try again in a while"
        return AdaptersChanged(id, dict(self._adapters), said, status=503)

    def _restored(self, event: Ready) -> Ready:
        """Gives a new child the LoRA adapters that were loaded and forgotten since the first one began."""
        assert self._child is not None
        given = event.info.lora_paths
        for name in [n for n in given if given[n] != self._adapters.get(n)]:
            self._child.send(UnloadAdapter("", name))
        for name in [n for n in self._adapters if given.get(n) != self._adapters[n]]:
            self._child.send(LoadAdapter("", name, self._adapters[name]))
        return Ready(msgspec.structs.replace(event.info, lora_paths=dict(self._adapters)))

    def _submit(self, submit: Submit) -> None:
        if self._down:
            self._tell(self._ends(submit.id, Finish("error", None, self._down, status=503)))
            return
        self._jobs[submit.id] = Job(submit)
        self._docket.add(submit.id)
        self._give_out()

    def _abort(self, id: str) -> None:
        job = self._jobs.get(id)
        if job is None:
            return
        if job.given:
            job.aborted = True
            self._pass(Abort(id))
        else:
            self._end(id, Finish("abort"))

    def _give_out(self) -> None:
        """Gives the engine what may go to it now."""
        if not self._ready or self._child is None:
            return
        for id in self._docket.next():
            job = self._jobs[id]
            job.given = True
            self._child.send(job.again() if job.resumed else job.submit)

    def _ends(self, id: str, finish: Finish) -> StepOutput:
        return StepOutput([Output(id, finish=finish)], self._counted(self._stats))

    def _end(self, id: str, finish: Finish) -> None:
        """Ends a request that no engine has."""
        self._forget(id)
        self._tell(self._ends(id, finish))

    def _forget(self, id: str) -> None:
        del self._jobs[id]
        self._docket.ended(id)

    # --- what the child says ---

    def _hear(self, child: Child, event: Event) -> None:
        if child is not self._child:
            return
        self._watchdog.heard(isinstance(event, StepOutput))
        match event:
            case StepOutput(outputs, stats):
                self._stats = stats
                new = [output for output in map(self._taken, outputs) if output is not None]
                self._on_event(StepOutput(new, self._counted(stats)))
                self._give_out()
            case Pong():
                self._pinged = False
            case Ready():
                self._on_ready(event)
            case AdaptersChanged(id="", error=error):
                if error:
                    log.warning("a LoRA adapter could not be loaded again: %s", error)
            case Fatal(_, message) if self._load_seconds is not None:
                self._said = f"the engine stopped: {message}"  # and the child ends
            case Progress() if self._load_seconds is not None:
                pass
            case _:
                self._note(event)
                self._on_event(event)

    def _note(self, event: Event) -> None:
        match event:
            case Flushed(id):
                self._flushes = [flush for flush in self._flushes if flush.id != id]
            case AdaptersChanged(id, adapters):
                self._adapters = dict(adapters)
                self._changing.discard(id)
            case ProfileStarted():
                self._profiling = not event.error
            case Marks() if event.ended:
                self._profiling = False

    def _taken(self, output: Output) -> Output | None:
        job = self._jobs.get(output.id)
        if job is None:
            return None
        self._docket.heard(output.id, len(output.tokens))
        if output.finish is not None:
            self._forget(output.id)
        return job.take(output)

    def _counted(self, stats: Stats) -> Stats:
        if not self._num_restarts:
            return stats
        return msgspec.structs.replace(stats, restarts=self._num_restarts, resumed=self._num_resumed)

    def _on_ready(self, event: Ready) -> None:
        self._ready, self._pinged, self._down = True, False, ""
        seconds = self._clock() - self._began
        if self._load_seconds is None:
            self._load_seconds = seconds
            self._adapters = dict(event.info.lora_paths)
        else:
            event = self._restored(event)
            log.warning("the engine is back after %.1f s; %d requests go on", seconds, len(self._jobs))
        self._watchdog = Watchdog(self.supervision.watchdog_timeout)
        for flush in self._flushes:
            self._pass(flush)
        self._on_event(event)
        self._give_out()

    # --- its life ---

    async def _start(self) -> None:
        child = self._child = self._make()
        self._ready, self._killed, self._said = False, False, ""
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
            hung = self._watchdog.look(self._clock(), self._ready and any(job.given for job in self._jobs.values()))
            if hung is not None and child is self._child:
                self._said, self._killed = hung, True
                child.kill()
            elif self._ready and not self._pinged:
                self._pinged = True
                child.send(Ping())

    def _died(self, child: Child, how: str) -> None:
        if child is not self._child:
            return
        if self._load_seconds is None or not self.supervision.max_restarts:
            self._on_end(how)
            return
        self._child, self._ready = None, False
        self._spawn(self._bury(child, self._said or how))

    async def _bury(self, child: Child, why: str) -> None:
        """Sorts out what the dead child leaves behind, and starts another."""
        guilty = self._docket.crashed(child.worked_on())
        await child.close(0.0)
        self._num_restarts += 1
        self._leave(guilty, why)
        await self._again(why)

    def _leave(self, guilty: str | None, why: str) -> None:
        """Ends what can't go on elsewhere; all else is to be given out again."""
        if self._profile is not None and self._profiling:
            self._on_event(Marks(self._profile, [], ended=True, error=why))
        elif self._profile is not None:
            self._on_event(ProfileStarted(self._profile, 0, 0, why))
        self._profile = None
        for id in self._changing:
            self._on_event(self._unchanged(id))
        self._changing.clear()
        for id, job in [*self._jobs.items()]:
            if id == guilty:
                log.error("request %s is failed: the engine died on it twice", id)
                self._end(id, Finish("error", None, f"the engine's process died on this request twice ({why})"))
            elif job.given and job.aborted:
                self._end(id, Finish("abort"))
            elif job.given:
                job.given, job.resumed = False, True
                self._num_resumed += 1

    async def _again(self, why: str) -> None:
        """Starts another child, as soon as one may be."""
        delay = self._restarts.next(self._clock())
        while delay is None:
            await self._rest(why)
            delay = self._restarts.next(self._clock())
        log.warning("%s; starting another in %g s, for %d requests", why, delay, len(self._jobs))
        await asyncio.sleep(delay)
        try:
            await self._start()
        except OSError as error:  # no process to be had
            self._child = None
            await self._again(f"the engine can't be started ({error})")

    async def _rest(self, why: str) -> None:
        """Fails all that waits, and lets time pass."""
        limit, window = self.supervision.max_restarts, self.supervision.restart_window
        self._until = self._clock() + self._restarts.wait(self._clock())
        self._down = f"{why}; it was restarted {limit} times within {window:g} s, so the next try has to wait"
        log.error("%s", self._down)
        for id in [*self._jobs]:
            self._end(id, Finish("error", None, self._down, status=503))
        for flush in self._flushes:
            self._tell(Flushed(flush.id, False, self._down))
        self._flushes.clear()
        await asyncio.sleep(self._until - self._clock())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
