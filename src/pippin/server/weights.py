"""SGLang's /update_weights_from_disk: other weights, or another model, behind the same socket.

A new engine process loads them, so all that hangs on a model begins anew with it: prefix cache, keys of the disk tier,
grammars, graphs, the memory plan. Before, the files are looked at in a process aside; the engine that serves ends when
what it has taken in is answered, since there may be no memory for two. If the new one can't be loaded, the old one is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from starlette.requests import Request
from starlette.responses import Response

from pippin.config import EngineConfig
from pippin.errors import ConfigError, EngineError, ModelError, RequestError
from pippin.exchange import config_for
from pippin.server.http import JsonResponse, error_body, read_body, unless_gone
from pippin.server.protocol import Body
from pippin.server.service import Service
from pippin.text.chat import ChatTemplate
from pippin.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class UpdateWeightsRequest(Body, kw_only=True):
    """POST /update_weights_from_disk. ``model_path`` is a directory of the server's, or a hub id.

    ``abort_all_requests`` ends what runs instead of waiting for it. ``weight_version`` is shown from then on.
    """

    ignored: ClassVar[Mapping[str, str]] = {
        "torch_empty_cache": "an engine that ends gives all memory back",
        "recapture_cuda_graph": "a new engine always captures its own",
        "token_step": "nothing is made of it",
    }
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "load_format": ("auto", "safetensors"),
        "is_async": (False,),
        "keep_pause": (False,),
        "flush_cache": (True,),
        "manifest": (),
    }

    model_path: str
    abort_all_requests: bool = False
    weight_version: str | None = None


class Door(Protocol):
    """What lets requests in; ``gate.Gate`` is the real one."""

    @property
    def waiting(self) -> int:
        """Requests that wait to be let in."""

    def alone(self, hurry: Callable[[], None] | None = None) -> AbstractAsyncContextManager[None]:
        """Begins when all requests that were let in have been answered; those that come wait until it ends."""


@dataclass
class Weights:
    """How a server's model is replaced. ``config`` is what the server was started with.

    ``check`` raises PippinError where a model could not be served, ``read_text`` reads a tokenizer and its template.
    """

    config: EngineConfig
    door: Door
    check: Callable[[EngineConfig], Awaitable[None]]
    read_text: Callable[[EngineConfig], Awaitable[tuple[Tokenizer, ChatTemplate]]]
    busy: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def change(self, service: Service, asked: UpdateWeightsRequest) -> int:
        """Serves what is asked for; how many requests waited for it. Raises PippinError: then all is as before.

        Until the old engine ends this can be cancelled, and no longer.
        """
        if self.busy.locked():
            raise RequestError("the model is being replaced already; try again when that is done", status=409)
        async with self.busy:
            config = config_for(self.config, service.info, service.client.adapters, asked.model_path)
            await self.check(config)
            text = await self.read_text(config)
            service.speech_of(*text)  # raises now, if the parsers that were asked for don't go with it
            async with self.door.alone(service.abort_all if asked.abort_all_requests else None):
                swap = asyncio.create_task(self._swap(service, config, text, asked.weight_version))
                try:
                    return await asyncio.shield(swap)
                finally:
                    await asyncio.wait([swap])

    async def _swap(
        self, service: Service, config: EngineConfig, text: tuple[Tokenizer, ChatTemplate], version: str | None
    ) -> int:
        before = service.info.model_path
        try:
            info = await service.client.replace(config)
        except (ModelError, ConfigError, EngineError) as error:
            log.error("%s could not be loaded, %s is served on: %s", config.model_path, before, error)
            raise
        service.change_text(*text, version)
        log.info("%s is served in place of %s", info.model_path, before)
        return self.door.waiting


async def update(service: Service, http: Request) -> Response:
    """/update_weights_from_disk: 200 once it serves; else the reason, and what was served before is."""
    asked = await read_body(http, UpdateWeightsRequest)
    if not asked.model_path:
        raise RequestError("model_path must name a directory or a hub id", "model_path")
    if service.weights is None:
        raise RequestError("only a server whose engine is a process of its own can load another model")
    try:
        waited = await unless_gone(http, service.weights.change(service, asked))
    except (ModelError, ConfigError) as error:
        raise RequestError(said(service, error), "model_path") from error
    except EngineError as error:
        if error.status == 503 or service.client.trouble is not None:
            raise
        raise EngineError(said(service, error), error.status) from error
    return JsonResponse(told(True, f"{service.info.model_path} is served now", waited))


def said(service: Service, error: Exception) -> str:
    return f"{str(error).rstrip('.')}; {service.info.model_path} is served on"


def told(success: bool, message: str, waited: int = 0) -> dict[str, Any]:
    """SGLang's answer; ``num_paused_requests`` waited meanwhile."""
    return {"success": success, "message": message, "num_paused_requests": waited}


def error_json(error: Exception) -> tuple[int, dict[str, Any]]:
    """The HTTP status and JSON of an error: SGLang's fields, and OpenAI's beside them."""
    status, body = error_body(error)
    return status, told(False, body["error"]["message"]) | body
