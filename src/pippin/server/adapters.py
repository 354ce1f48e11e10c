"""SGLang's /load_lora_adapter and /unload_lora_adapter, vLLM's under /v1: adapters come and go while serving."""

from __future__ import annotations

import uuid

from starlette.requests import Request
from starlette.responses import Response

from pippin.errors import RequestError
from pippin.messages import LoadAdapter, UnloadAdapter
from pippin.server.http import JsonResponse, read_body, unless_gone
from pippin.server.protocol import Body
from pippin.server.service import Service


class LoadAdapterRequest(Body, kw_only=True):
    """POST /load_lora_adapter. ``lora_path`` is a directory of the server's."""

    lora_name: str
    lora_path: str


class UnloadAdapterRequest(Body, kw_only=True):
    """POST /unload_lora_adapter."""

    lora_name: str


async def load(service: Service, http: Request) -> Response:
    """POST /load_lora_adapter: requests may name it from now on."""
    request = await read_body(http, LoadAdapterRequest)
    if not request.lora_name or ":" in request.lora_name or request.lora_name == service.model_name:
        raise RequestError("lora_name must not be empty, the model's own, or have a colon in it", "lora_name")
    return await change(service, http, LoadAdapter(uuid.uuid4().hex, request.lora_name, request.lora_path))


async def unload(service: Service, http: Request) -> Response:
    """POST /unload_lora_adapter: requests that have it end with it, others can't name it any more."""
    request = await read_body(http, UnloadAdapterRequest)
    return await change(service, http, UnloadAdapter(uuid.uuid4().hex, request.lora_name))


async def change(service: Service, http: Request, command: LoadAdapter | UnloadAdapter) -> Response:
    changed = await unless_gone(http, service.client.change_adapters(command))
    if changed.error:
        raise RequestError(changed.error, changed.field, changed.status)
    return JsonResponse({"success": True, "loaded_adapters": changed.adapters})
