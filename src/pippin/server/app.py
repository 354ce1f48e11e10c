"""The routes, who may call them, and how errors look."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Awaitable, Callable, Collection
from typing import TYPE_CHECKING, Any

import msgspec
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

import pippin
from pippin.client import EngineClient
from pippin.config import ServerConfig
from pippin.errors import PippinError, RequestError
from pippin.server import (
    adapters,
    anthropic,
    embeddings,
    native,
    ollama,
    openai,
    parsing,
    profile,
    rerank,
    responses,
    stored,
    ui,
    weights,
)
from pippin.server.adapters import LoadAdapterRequest, UnloadAdapterRequest
from pippin.server.anthropic import CountRequest, MessagesRequest
from pippin.server.embeddings import EmbeddingRequest, EncodeRequest, OllamaEmbeddingsRequest, OllamaEmbedRequest
from pippin.server.guard import Guard
from pippin.server.http import CLIENT_CLOSED, error_response
from pippin.server.ollama import OllamaChatRequest, OllamaGenerateRequest, ShowRequest
from pippin.server.parsing import ParseRequest, SeparateRequest
from pippin.server.protocol import (
    AbortRequest,
    Body,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerateRequest,
    TokenizeRequest,
)
from pippin.server.rerank import RerankRequest, ScoreRequest
from pippin.server.responses import PromptRequest, ResponsesRequest
from pippin.server.service import Service
from pippin.server.shapes import shape_of
from pippin.server.traces import TraceParent, Traces
from pippin.server.weights import UpdateWeightsRequest, Weights
from pippin.text.chat import ChatTemplate
from pippin.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

log = logging.getLogger(__name__)

Route = Callable[[Service, Request], Awaitable[Response]]

ROUTES: tuple[tuple[str, str, Route, type[Body] | None], ...] = (
    ("POST", "/v1/chat/completions", openai.chat, ChatRequest),
    ("POST", "/v1/completions", openai.completions, CompletionRequest),
    ("POST", "/v1/embeddings", embeddings.embeddings, EmbeddingRequest),
    ("POST", "/v1/rerank", rerank.rerank, RerankRequest),
    ("POST", "/v2/rerank", rerank.rerank, RerankRequest),
    ("POST", "/rerank", rerank.rerank, RerankRequest),
    ("POST", "/v1/score", rerank.score, ScoreRequest),
    ("POST", "/score", rerank.score, ScoreRequest),
    ("POST", "/v1/responses", responses.responses, ResponsesRequest),
    ("POST", "/v1/responses/input_tokens", responses.input_tokens, PromptRequest),
    ("GET", "/v1/responses/{id}", stored.retrieve, None),
    ("DELETE", "/v1/responses/{id}", stored.delete, None),
    ("POST", "/v1/responses/{id}/cancel", stored.cancel, None),
    ("GET", "/v1/responses/{id}/input_items", stored.input_items, None),
    ("POST", "/v1/messages", anthropic.messages, MessagesRequest),
    ("POST", "/v1/messages/count_tokens", anthropic.count_tokens, CountRequest),
    ("POST", "/api/chat", ollama.chat, OllamaChatRequest),
    ("POST", "/api/generate", ollama.generate, OllamaGenerateRequest),
    ("POST", "/api/embed", embeddings.ollama_embed, OllamaEmbedRequest),
    ("POST", "/api/embeddings", embeddings.ollama_embeddings, OllamaEmbeddingsRequest),
    ("POST", "/api/show", ollama.show, ShowRequest),
    ("GET", "/api/tags", ollama.tags, None),
    ("GET", "/api/ps", ollama.ps, None),
    ("GET", "/api/version", ollama.version, None),
    ("GET", "/v1/models", openai.models, None),
    ("GET", "/v1/models/{model:path}", openai.model, None),
    ("POST", "/generate", native.generate, GenerateRequest),
    ("PUT", "/generate", native.generate, GenerateRequest),
    ("GET", "/generate", native.generate, GenerateRequest),
    ("POST", "/load_lora_adapter", adapters.load, LoadAdapterRequest),
    ("POST", "/v1/load_lora_adapter", adapters.load, LoadAdapterRequest),
    ("POST", "/unload_lora_adapter", adapters.unload, UnloadAdapterRequest),
    ("POST", "/v1/unload_lora_adapter", adapters.unload, UnloadAdapterRequest),
    ("POST", "/update_weights_from_disk", weights.update, UpdateWeightsRequest),
    ("POST", "/encode", embeddings.encode, EncodeRequest),
    ("POST", "/tokenize", native.tokenize, TokenizeRequest),
    ("POST", "/v1/tokenize", native.tokenize, TokenizeRequest),
    ("POST", "/detokenize", native.detokenize, DetokenizeRequest),
    ("POST", "/v1/detokenize", native.detokenize, DetokenizeRequest),
    ("POST", "/parse_function_call", parsing.parse_function_call, ParseRequest),
    ("POST", "/separate_reasoning", parsing.separate_reasoning, SeparateRequest),
    ("GET", "/health", native.health, None),
    ("GET", "/ready", native.ready, None),
    ("GET", "/health_generate", native.health_generate, None),
    ("GET", "/get_model_info", native.model_info, None),
    ("GET", "/model_info", native.model_info, None),
    ("GET", "/get_server_info", native.server_info, None),
    ("GET", "/server_info", native.server_info, None),
    ("POST", "/flush_cache", native.flush_cache, None),
    ("GET", "/flush_cache", native.flush_cache, None),
    ("POST", "/abort_request", native.abort_request, AbortRequest),
    ("POST", "/start_profile", profile.start_profile, profile.StartProfileRequest),
    ("GET", "/start_profile", profile.start_profile, None),
    ("POST", "/stop_profile", profile.stop_profile, None),
    ("GET", "/stop_profile", profile.stop_profile, None),
    ("GET", "/metrics", native.metrics, None),
    ("GET", "/pippin/stats", ui.stats, None),
)

OPEN = ("/health", "/ready", "/health_generate", "/metrics")
"""Answered without the API key: they tell no text, and probes have no key."""


def create_app(
    client: EngineClient,
    tokenizer: Tokenizer,
    chat: ChatTemplate,
    config: ServerConfig,
    provider: TracerProvider | None = None,
    weights: Weights | None = None,
) -> FastAPI:
    """The server's app, of ready parts: ``client`` has started. It holds no state but theirs.

    ``provider`` hears of requests that have ended. Without ``weights`` the model is the same for good.
    """
    service = Service(client, tokenizer, chat, config, weights)
    if provider is not None:
        service.history.on_end = Traces(provider, lambda: service.model_name).tell
    log.info("tool calls: %s; reasoning: %s", *(f.name if f else "none" for f in service.speech.formats))
    app = Described(title="Pippin", version=pippin.__version__, docs_url=None, redoc_url=None)
    for path in (path for paths in native.NOT_HERE.values() for path in paths):
        app.add_api_route(
            path, bound(service, native.not_here), methods=["GET", "POST", "PUT", "DELETE"], include_in_schema=False
        )
    for method, path, route, body in ROUTES:
        extra = {"requestBody": body_schema(body)} if body else None
        app.add_api_route(
            path, bound(service, route), methods=[method], response_model=None, name=route.__name__, openapi_extra=extra
        )
    if not config.no_ui:
        ui.add_pages(app)
    for kind in (PippinError, HTTPException, ClientDisconnect, Exception):
        app.add_exception_handler(kind, on_error)
    app.add_middleware(profile.RequestSpans, client=client)
    if provider is not None:
        app.add_middleware(TraceParent)
    if config.api_key:
        app.add_middleware(ApiKey, key=config.api_key, open=OPEN if config.no_ui else (*OPEN, *ui.PAGES))
    if config.allowed_origins:
        app.add_middleware(CORSMiddleware, allow_origins=config.allowed_origins, allow_methods="*", allow_headers="*")
    app.add_middleware(Guard, config=config)
    return app


class Described(FastAPI):
    """FastAPI, with the structs of the requests in /openapi.json."""

    def openapi(self) -> dict[str, Any]:
        bodies = [body for *_, body in ROUTES if body is not None]
        _, components = msgspec.json.schema_components(bodies, ref_template=SCHEMA)
        return super().openapi() | {"components": {"schemas": components}}


SCHEMA = "#/components/schemas/{name}"


def body_schema(body: type[Body]) -> dict[str, Any]:
    reference = {"$ref": SCHEMA.format(name=body.__name__)}
    return {"required": True, "content": {"application/json": {"schema": reference}}}


def bound(service: Service, route: Route) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        return await route(service, request)

    endpoint.__doc__ = route.__doc__
    return endpoint


async def on_error(request: Request, error: Exception) -> Response:
    """Any error in OpenAI's shape; nobody reads the answer to a client that went away."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=CLIENT_CLOSED)
    if isinstance(error, HTTPException):
        text = {
            404: f"there is no {request.url.path} here; see /openapi.json for what there is",
            405: f"{request.url.path} takes {(error.headers or {}).get('Allow', 'other methods')}",
        }.get(error.status_code, str(error.detail))
        error = RequestError(text, status=error.status_code)
    return error_response(error, shape_of(request.url.path))


class ApiKey:
    """Lets requests through that bring the key as ``Authorization: Bearer KEY``, or Anthropic's ``x-api-key: KEY``."""

    def __init__(self, app: ASGIApp, key: str, open: Collection[str]) -> None:
        self._app = app
        self._open = frozenset(open)
        self._expected = b"bearer " + key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._open or self._fits(scope):
            return await self._app(scope, receive, send)
        error = RequestError("a valid API key is required, as `Authorization: Bearer KEY`", status=401)
        return await error_response(error, shape_of(scope["path"]))(scope, receive, send)

    def _fits(self, scope: Scope) -> bool:
        headers = dict(scope["headers"][::-1])  # of several, the first counts
        given = headers.get(b"authorization") or b"Bearer " + headers.get(b"x-api-key", b"")
        scheme, _, key = given.partition(b" ")
        return hmac.compare_digest(scheme.lower() + b" " + key.strip(), self._expected)
