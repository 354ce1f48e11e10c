"""One model in place of another: which options it is served with, and how callers wait meanwhile."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from pippin.config import EngineConfig
from pippin.errors import EngineError
from pippin.gguf_files import gguf_of
from pippin.messages import ModelInfo

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def config_for(config: EngineConfig, info: ModelInfo, adapters: Mapping[str, str], path: str) -> EngineConfig:
    """The start's ``config`` for the model at ``path``, where ``info`` is served with ``adapters``.

    It keeps the tokenizer, if it brings none, and the LoRA adapters. A revision is the start's model's alone.
    """
    tokenizer, directory = config.tokenizer_path, Path(path).expanduser()
    own = any((directory / f).exists() for f in TOKENIZER_FILES) or gguf_of(directory) is not None
    if tokenizer is None and directory.is_dir() and not own:
        tokenizer = info.tokenizer_path
    return replace(
        config,
        model_path=path,
        tokenizer_path=tokenizer,
        revision=config.revision if path == config.model_path else None,
        lora_paths=[f"{name}={where}" for name, where in adapters.items()] or None,
    )


class Door:
    """Requests of one event loop go through it; whoever replaces the model shuts it and waits until they are done.

    ``model`` counts the models so far: what was prepared for an earlier one is not let in.
    """

    def __init__(self) -> None:
        self.model = 0
        self.waited = 0
        """Callers that found it shut, the last time."""
        self._opened, self._counting = threading.Event(), threading.Lock()
        self._opened.set()
        self._inside = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def is_open(self) -> bool:
        return self._opened.is_set()

    def wait(self) -> None:
        """Returns when it is open; for callers in threads of their own, before they prepare a request."""
        if self.is_open:
            return
        with self._counting:
            self.waited += 1
        self._opened.wait()

    @asynccontextmanager
    async def inside(self, model: int) -> AsyncGenerator[None, None]:
        """One request, prepared for ``model``. Raises EngineError (503) if that is, or will be, replaced."""
        if model != self.model or not self.is_open:
            raise EngineError("the model was replaced while the request was prepared; ask again", 503)
        self._inside += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._idle.set()

    @asynccontextmanager
    async def alone(self) -> AsyncGenerator[None, None]:
        """Begins when nobody is inside; nobody comes in until it ends."""
        self.waited = 0
        self._opened.clear()
        try:
            await self._idle.wait()
            yield
        finally:
            self._opened.set()
