"""``pippin serve``: the engine in a child process, the server in this one, until a signal ends both."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import uvicorn
from starlette.types import ASGIApp

from pippin.client import EngineClient
from pippin.config import EngineConfig, ServerConfig
from pippin.errors import ConfigError, PippinError
from pippin.garbage import leave_loaded_alone
from pippin.logs import configure
from pippin.messages import ModelInfo, Progress
from pippin.preflight import check
from pippin.restarts import Supervision
from pippin.server.app import create_app
from pippin.server.connection import Connections
from pippin.server.gate import Gate
from pippin.server.guard import HEADER_BYTES, warning_of
from pippin.server.traces import otlp_provider
from pippin.server.weights import Weights
from pippin.text.chat import ChatTemplate, read_template
from pippin.text.reply import named_formats
from pippin.text.tokenizer import Tokenizer, load_tokenizer
from pippin.worker import CORE

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

log = logging.getLogger("pippin")

LAST_SECONDS = 2
"""How long clients have to read their last words, once the engine is gone."""

BACKLOG = 2048
"""Connections that the system holds before they are looked at."""


def run(
    engine: EngineConfig,
    server: ServerConfig,
    on_ready: Callable[[ModelInfo, str], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    core: str = CORE,
) -> None:
    """Serve until SIGINT or SIGTERM. ``on_ready`` hears what is served and at which URL, ``on_progress`` of loading.

    The port answers at once, with 503 until the model is loaded. Raises ConfigError for an option that can't be met
    (an address in use, say), ModelError if the model can't be served, EngineError if the engine died while loading.
    """
    configure(server.log_level, server.log_format)
    asyncio.run(Serving(engine, server, on_progress or LoggedProgress(), core).run(on_ready or announce))


def plan(engine: EngineConfig, on_progress: Callable[[Progress], None], core: str = CORE) -> ModelInfo:
    """What serving would take, found out by loading the model; raises as ``run`` does."""

    async def load() -> ModelInfo:
        client = EngineClient.spawn(replace(engine, skip_server_warmup=True), core)
        client.on_progress = on_progress
        try:
            return await client.start()
        finally:
            await client.close()

    return asyncio.run(load())


def announce(info: ModelInfo, url: str) -> None:
    log.info("%s (%s, %s) is ready at %s", info.model_path, info.dtype, info.device, url)


class LoggedProgress:
    """A line in the log for each stage of loading."""

    def __init__(self) -> None:
        self._stage = ""

    def __call__(self, progress: Progress) -> None:
        if progress.stage != self._stage:
            self._stage = progress.stage
            log.info("%s…", progress.stage)


class Serving:
    """One server's life: listen, load, serve, close."""

    def __init__(
        self, engine: EngineConfig, server: ServerConfig, on_progress: Callable[[Progress], None], core: str
    ) -> None:
        self._engine, self._config, self._core = engine, server, core
        self._provider: TracerProvider | None = None
        if server.enable_trace:
            self._provider = otlp_provider(server.otlp_traces_endpoint)  # raises now, as the next
        named_formats(server.tool_call_parser, server.reasoning_parser)  # raises now rather than after loading
        self._template = read_template(server.chat_template) if server.chat_template else None
        watched = Supervision(server.watchdog_timeout, server.max_restarts, server.restart_window)
        self._client = EngineClient.spawn(engine, core, server.log_level, watched, server.log_format)
        self._client.on_progress = on_progress
        self._gate = Gate(self._client, ui=not server.no_ui)

    async def run(self, on_ready: Callable[[ModelInfo, str], None]) -> None:
        listener = listen(self._config)
        host, port = listener.getsockname()[:2]
        http = HttpServer(http_config(self._gate, self._config))
        if (warning := warning_of(self._config)) is not None:
            log.warning(warning)
        stop, stop_now = asyncio.Event(), asyncio.Event()

        def on_signal() -> None:
            if stop.is_set():  # asked a second time
                http.force_exit = True
                stop_now.set()
            stop.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, on_signal)
        serving, loading = asyncio.create_task(http.serve([listener])), asyncio.create_task(self._load())
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait((serving, loading, stopping), return_when=asyncio.FIRST_COMPLETED)
            if loading.done():
                on_ready(loading.result(), f"http://{f'[{host}]' if ':' in host else host}:{port}")
                await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
        finally:
            loading.cancel()
            stopping.cancel()
            await self._drain(serving, stop_now)
            await self._client.close()  # streams that still run end with an error that says so
            http.should_exit = True
            await serving
            if self._provider is not None:
                await asyncio.to_thread(self._provider.shutdown)  # which sends the last spans

    async def _drain(self, serving: asyncio.Task[None], stop_now: asyncio.Event) -> None:
        """Takes nothing new, and waits for what is being answered, for so long as that may be."""
        self._gate.drain()
        idle, hurried = asyncio.create_task(self._gate.idle.wait()), asyncio.create_task(stop_now.wait())
        if not self._gate.idle.is_set():
            log.info("stopping when all requests are answered, at the latest in %g s", self._config.drain_timeout)
        waits = (idle, hurried, serving)
        await asyncio.wait(waits, timeout=self._config.drain_timeout, return_when=asyncio.FIRST_COMPLETED)
        idle.cancel()
        hurried.cancel()

    async def _load(self) -> ModelInfo:
        path = self._engine.tokenizer_path or self._engine.model_path
        early = path is None or Path(path).is_dir()  # else the engine downloads it first
        reading = asyncio.create_task(self._tokenizer(path)) if early else None
        try:
            info = await self._client.start()
        except PippinError:
            if reading is not None:
                reading.cancel()
            raise
        tokenizer = await (reading or self._tokenizer(info.tokenizer_path))
        chat = ChatTemplate(tokenizer, self._template)
        if (fault := chat.fault()) is not None:
            log.warning(
                "chats will be refused, since the model's chat template is broken (%s); --chat-template replaces it",
                fault,
            )
        weights = Weights(self._engine, self._gate, self._check, self._text)
        self._gate.app = create_app(self._client, tokenizer, chat, self._config, self._provider, weights)
        leave_loaded_alone()
        return info

    async def _check(self, config: EngineConfig) -> None:
        if self._core == CORE:  # any other says so when it loads
            await check(config)

    async def _text(self, config: EngineConfig) -> tuple[Tokenizer, ChatTemplate]:
        """The text layer of another model."""
        path, trust = config.tokenizer_path or config.model_path, config.trust_remote_code
        tokenizer = await asyncio.to_thread(load_tokenizer, path, revision=config.revision, trust_remote_code=trust)
        return tokenizer, ChatTemplate(tokenizer, self._template)

    async def _tokenizer(self, path: str | None) -> Tokenizer:
        tokenizer, _ = await self._text(replace(self._engine, tokenizer_path=path))
        return tokenizer


def http_config(app: ASGIApp, config: ServerConfig) -> uvicorn.Config:
    """uvicorn, with our limits and without its log, environment and websockets."""
    return uvicorn.Config(
        app,
        http=cast(type[asyncio.Protocol], Connections(config.max_connections).protocol()),
        lifespan="off",
        ws="none",
        log_level="debug" if config.log_level == "debug" else "critical",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=HEADER_BYTES,
        timeout_graceful_shutdown=LAST_SECONDS,
        backlog=BACKLOG,
    )


class HttpServer(uvicorn.Server):
    """uvicorn, without its signal handlers: they would end this process before the child is closed."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def _why_not(config: ServerConfig, error: OSError | OverflowError) -> tuple[str, str]:
    """Why nobody can listen there and what would help, and the option that it is about."""
    why = error.strerror if isinstance(error, OSError) else str(error)
    reason = f"{config.host}:{config.port} can't be listened on ({why})"
    match error:
        case OSError(errno=errno.EADDRINUSE):
            return f"{reason}; another program has it: take another port, or 0 for any that is free", "--port"
        case OSError(errno=errno.EACCES):
            return f"{reason}; ports below 1024 are the system's", "--port"
    return f"{reason}; give an address of this machine: 127.0.0.1 for itself alone, 0.0.0.0 for all", "--host"


def listen(config: ServerConfig) -> socket.socket:
    """A listening socket, so that a port in use is an error now and not after minutes of loading."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # asyncio sends small pieces at once (TCP_NODELAY) only through sockets that name their protocol.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
        listener.listen()
    except (OSError, OverflowError) as error:
        listener.close()
        raise ConfigError(*_why_not(config, error)) from error
    return listener
