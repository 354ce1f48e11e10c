"""The asking side of the queue: submit token ids, get token ids back, in one event loop.

A child that dies is the supervisor's affair: what is asked here goes on in the next one.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import msgspec

from pippin import __version__
from pippin.config import EngineConfig
from pippin.errors import ConfigError, EngineError, ModelError, PippinError, RequestError
from pippin.messages import (
    Abort,
    AdaptersChanged,
    Event,
    Fatal,
    Flush,
    Flushed,
    LoadAdapter,
    Marks,
    ModelInfo,
    Output,
    ProfileStarted,
    Progress,
    Ready,
    Stats,
    StepOutput,
    Submit,
    UnloadAdapter,
)
from pippin.profile.control import Profiler
from pippin.profile.timeline import Timeline
from pippin.restarts import Supervision
from pippin.supervisor import Supervisor
from pippin.transport import ProcessTransport, ThreadTransport, Transport
from pippin.types import Pooling, SamplingParams
from pippin.worker import CORE, Load

Replace = Callable[[EngineConfig], Awaitable[Ready | Fatal]]

CLOSE_SECONDS = 5.0
"""How long an engine may take for its last words, and to end."""


@dataclass(slots=True, eq=False)
class Live:
    """A request in flight: what was asked, and what has come and nobody has read yet."""

    submit: Submit
    unread: list[Output] = field(default_factory=list)
    failure: PippinError | None = None
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    _waiting: asyncio.Future[None] | None = None  # the reader, while there is nothing

    async def read(self) -> Output:
        """All that came since the last read, as one Output: a reader that is slow gets more at a time.

        Raises the failure, if there is one and nothing before it.
        """
        if not self.unread and self.failure is None:
            self._waiting = self._loop.create_future()
            await self._waiting
        outputs, self.unread = self.unread, []
        if not outputs and self.failure is not None:
            raise self.failure
        return outputs[0] if len(outputs) == 1 else joined(outputs)

    def put(self, output: Output) -> None:
        if output.finish is not None and (failure := error_of(output)) is not None:
            self.fail(failure)
            return
        self.unread.append(output)
        self._wake()

    def fail(self, failure: PippinError) -> None:
        self.failure = failure
        self._wake()

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None and not waiting.done():
            waiting.set_result(None)


class EngineClient:
    """Speaks to one worker. Use it from the event loop that called ``start``.

    ``seed`` makes the seeds of requests that bring none reproducible.
    """

    def __init__(self, transport: Transport, seed: int | None = None, replace: Replace | None = None) -> None:
        self.transport = transport
        self._replace = replace
        self.stats = Stats()
        self.progress: Progress | None = None
        self.on_progress: Callable[[Progress], None] = lambda progress: None
        self.failure: PippinError | None = None
        self.started_at = time.time()
        self._info: ModelInfo | None = None
        self._journal: dict[str, Live] = {}
        self._flushes: dict[str, asyncio.Future[Flushed]] = {}
        self.adapters: dict[str, str] = {}
        """LoRA adapters that requests can name, with their paths."""
        self._changes: dict[str, asyncio.Future[AdaptersChanged]] = {}
        self._ready: asyncio.Future[ModelInfo] | None = None
        self._random = random.Random(seed)
        self._count = itertools.count()
        self.profiler = Profiler(transport.send, self._about)

    @classmethod
    def spawn(
        cls,
        config: EngineConfig,
        core: str = CORE,
        log_level: str = "warning",
        supervision: Supervision | None = None,
        log_format: str = "text",
    ) -> EngineClient:
        """A client of a child process, not started yet, which is watched and replaced as ``supervision`` says."""

        def maker(config: EngineConfig) -> Callable[[], ProcessTransport]:
            return partial(ProcessTransport, config, core, log_level, log_format)

        supervisor = Supervisor(maker(config), supervision)
        return cls(supervisor, config.random_seed, lambda other: supervisor.replace(maker(other)))

    @classmethod
    def in_thread(
        cls, load: Load, seed: int | None = None, load_other: Callable[[EngineConfig], Load] | None = None
    ) -> EngineClient:
        """A client of a worker in a thread of this process, not started yet; with ``load_other`` it can be replaced."""
        transport = ThreadTransport(load)
        if load_other is None:
            return cls(transport, seed)
        return cls(transport, seed, lambda other: transport.replace(load_other(other)))

    @property
    def info(self) -> ModelInfo:
        """What is served. Raises EngineError (503) before the engine is ready."""
        if self._info is None:
            raise self.failure or EngineError("the model is still loading", 503)
        return self._info

    @property
    def timeline(self) -> Timeline | None:
        """Where to record what takes time in this process; None unless a profile runs."""
        return self.profiler.timeline

    async def start(self) -> ModelInfo:
        """Start the worker and wait until it is ready.

        Raises ModelError or ConfigError if the worker says so, EngineError if it died.
        """
        self._ready = asyncio.get_running_loop().create_future()
        await self.transport.open(self._on_event, self._on_end)
        return await self._ready

    async def replace(self, config: EngineConfig) -> ModelInfo:
        """Serve what ``config`` says from here on. Requests that have not ended go on there, with the tokens they have;
        an engine in a thread is to have none.

        Raises ModelError, ConfigError or EngineError if it can't be served: the engine is as before then, but empty.
        """
        if self._replace is None:
            raise EngineError("this engine can't be replaced: nobody said how another is loaded")
        result = await self._replace(config)
        if isinstance(result, Fatal):
            error = failure_of(result.kind, result.message)
            raise EngineError(result.message) if isinstance(error, EngineError) else error
        return result.info

    async def submit(
        self,
        tokens: Sequence[int],
        params: SamplingParams,
        priority: int = 0,
        id: str | None = None,
        num_prompt: int | None = None,
        pooling: Pooling | None = None,
    ) -> AsyncGenerator[Output, None]:
        """Yield a request's Outputs as steps produce them, or several steps' as one; the last has ``finish``.

        ``tokens`` is the prompt, of which all after ``num_prompt`` were generated before. With ``pooling``, the one
        Output has a vector, and ``params`` mean nothing. Closing the iterator
        aborts the request. Raises RequestError if it can't be served as asked, EngineError if the engine failed.
        """
        id = id or uuid.uuid4().hex
        live = self._begin(id, Submit("", list(tokens), num_prompt or len(tokens), params, priority, pooling))
        try:
            while True:
                output = await live.read()
                yield output
                if output.finish is not None:
                    return
        finally:
            if self._journal.get(id) is live:
                del self._journal[id]
                self.transport.send(Abort(live.submit.id))

    def draw_seed(self) -> int:
        """A seed for a request that brings none, so that its stream can be resumed; 63 bits."""
        return self._random.getrandbits(63)

    @property
    def trouble(self) -> PippinError | None:
        """Why requests are refused now; None if they are not."""
        return self.failure or self.transport.trouble()

    def _begin(self, id: str, submit: Submit) -> Live:
        if (trouble := self.trouble) is not None:
            raise trouble
        if id in self._journal:
            raise RequestError(f"request id {id!r} is in use by a request that has not ended", "rid")
        params = submit.params
        if params.seed is None and params.temperature > 0:
            params = msgspec.structs.replace(params, seed=self.draw_seed())
        # The engine's id is used once only: an abandoned request's last outputs may still be on their way.
        submit = msgspec.structs.replace(submit, id=f"{id}:{next(self._count)}", params=params)
        self.transport.send(submit)
        live = self._journal[id] = Live(submit)
        return live

    def abort(self, id: str) -> None:
        """End a request: its iterator gets a last Output with finish reason ``abort``. Unknown ids are ignored."""
        if (live := self._journal.get(id)) is not None:
            self.transport.send(Abort(live.submit.id))

    @property
    def live(self) -> tuple[str, ...]:
        """Ids of the requests that have not ended."""
        return tuple(self._journal)

    async def flush(self) -> Flushed:
        """Empty the prefix cache; the answer is not ``ok`` while requests run."""
        if (trouble := self.trouble) is not None:
            raise trouble
        id = uuid.uuid4().hex
        self._flushes[id] = asyncio.get_running_loop().create_future()
        self.transport.send(Flush(id))
        return await self._flushes[id]

    async def change_adapters(self, command: LoadAdapter | UnloadAdapter) -> AdaptersChanged:
        """Load or forget a LoRA adapter; the answer has an ``error`` if that can't be done."""
        if self.failure is not None:
            raise self.failure
        self._changes[command.id] = asyncio.get_running_loop().create_future()
        self.transport.send(command)
        return await self._changes[command.id]

    async def close(self) -> None:
        """End the worker, at once if it is still loading; requests still live fail with EngineError."""
        await self.profiler.close(CLOSE_SECONDS)
        self._fail(EngineError("the server is shutting down", 503))
        await self.transport.close(0.0 if self._info is None else CLOSE_SECONDS)

    def _about(self) -> dict[str, str | None]:
        """For a profile's files: what was served, on what."""
        info = self._info
        return {
            "pippin": __version__,
            "model": info.model_path if info else None,
            "device": info.device if info else None,
            "attention_backend": info.attention_backend if info else None,
        }

    def _on_event(self, event: Event) -> None:
        match event:
            case StepOutput(outputs, stats):
                self.stats = stats
                for output in outputs:
                    self._deliver(output)
            case Flushed(id):
                if (waiter := self._flushes.pop(id, None)) is not None and not waiter.done():
                    waiter.set_result(event)
            case AdaptersChanged(id, adapters):
                self.adapters = adapters
                if (change := self._changes.pop(id, None)) is not None and not change.done():
                    change.set_result(event)
            case ProfileStarted() | Marks():
                self.profiler.hear(event)
            case Progress():
                self.progress = event
                self.on_progress(event)
            case Ready(info):
                self._info, self.adapters = info, info.lora_paths
                if self._ready is not None and not self._ready.done():
                    self._ready.set_result(info)
            case Fatal(kind, message):
                self._fail(failure_of(kind, message))

    def _deliver(self, output: Output) -> None:
        id = output.id.rpartition(":")[0]
        live = self._journal.get(id)
        if live is None or live.submit.id != output.id:  # the asker went away
            return
        live.put(output)
        if output.finish is not None:
            del self._journal[id]

    def _on_end(self, how: str) -> None:
        self._fail(EngineError(f"{how}; requests in flight are lost", 503))

    def _fail(self, failure: PippinError) -> None:
        """The worker is gone, or as good as: nothing that waits will get an answer. The first reason stays."""
        if self.failure is None:
            self.failure = failure
        self.profiler.lost(self.failure)
        journal, self._journal = self._journal, {}
        for live in journal.values():
            live.fail(self.failure)
        flushes, self._flushes = self._flushes, {}
        changes, self._changes = self._changes, {}
        for waiter in [*flushes.values(), *changes.values(), self._ready]:
            if waiter is not None and not waiter.done():
                waiter.set_exception(self.failure)


def joined(outputs: Sequence[Output]) -> Output:
    """Successive Outputs of one request as one."""
    return Output(
        outputs[-1].id,
        [token for output in outputs for token in output.tokens],
        [logprob for output in outputs for logprob in output.logprobs],
        [logprob for output in outputs for logprob in output.prompt_logprobs],
        max(output.num_cached for output in outputs),
        outputs[-1].finish,
        outputs[-1].miss,
        max(output.waited for output in outputs),
        outputs[-1].pooled,
    )


def error_of(output: Output) -> PippinError | None:
    """The exception that an Output with finish reason ``error`` stands for."""
    finish = output.finish
    if finish is None or finish.reason != "error":
        return None
    if finish.status < 500:
        return RequestError(finish.message, finish.field, finish.status)
    return EngineError(finish.message, finish.status)


def failure_of(kind: str, message: str) -> PippinError:
    """The exception that a Fatal stands for."""
    if kind == "ModelError":
        return ModelError(message)
    if kind == "ConfigError":
        return ConfigError(message)
    return EngineError(f"the engine stopped: {message}", 503)
