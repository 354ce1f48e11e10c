"""OpenTelemetry traces of requests, where somebody asks for them (``--enable-trace``).

A request's span begins when its tokens are known; inside of it are ``queue``, ``prefill`` (to the first token) and
``decode``. They are made when the request has ended, from what ``History`` knows. Names of attributes are those of
OpenTelemetry's conventions for generative AI. A client's ``traceparent`` header becomes the parent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

import pippin
from pippin.errors import ConfigError
from pippin.server.history import Entry

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

EXPORT_SECONDS = 2
"""How long a collector may take for a batch of spans: it must not hold up the server's end."""


def otlp_provider(endpoint: str) -> TracerProvider:
    """What sends spans to a collector by OTLP over HTTP. Raises ConfigError, also if the extra is missing."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError("needs OpenTelemetry: pip install 'pippin[otel]'", "--enable-trace") from error
    exporter = OTLPSpanExporter(url_of(endpoint), timeout=EXPORT_SECONDS)
    served = Resource.create({"service.name": "pippin", "service.version": pippin.__version__})
    provider = TracerProvider(resource=served)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def url_of(endpoint: str) -> str:
    """``host:port`` or a URL, whose path may be left out. Raises ConfigError."""
    url = endpoint if "://" in endpoint else f"http://{endpoint}"
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(f"must be host:port or an http URL, not {endpoint!r}", "--otlp-traces-endpoint")
    return url if parts.path.strip("/") else f"{url.rstrip('/')}/v1/traces"


class Traces:
    """Tells a provider of each request that has ended."""

    def __init__(self, provider: TracerProvider, model_name: Callable[[], str]) -> None:
        self._tracer = provider.get_tracer("pippin", pippin.__version__)
        self._model_name = model_name

    def tell(self, entry: Entry) -> None:
        """Makes the entry's spans. ``gen_ai.response.id`` is the id that the log knows it by."""
        from opentelemetry.trace import Status, StatusCode, set_span_in_context

        end = entry.end or 0.0
        span = self._tracer.start_span("request", start_time=nanoseconds(entry.at), attributes=self._attributes(entry))
        inside = set_span_in_context(span)
        for name, start, stop in phases(entry):
            part = self._tracer.start_span(name, inside, start_time=nanoseconds(entry.at + start))
            part.end(nanoseconds(entry.at + stop))
        if entry.outcome == "error":
            span.set_status(Status(StatusCode.ERROR))
        span.end(nanoseconds(entry.at + end))

    def _attributes(self, entry: Entry) -> dict[str, str | int | list[str]]:
        return {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.request.model": self._model_name(),
            "gen_ai.request.choice.count": entry.answers,
            "gen_ai.response.id": entry.id,
            "gen_ai.response.finish_reasons": [entry.outcome or "disconnect"],
            "gen_ai.usage.input_tokens": entry.prompt,
            "gen_ai.usage.cache_read.input_tokens": entry.cached,
            "gen_ai.usage.output_tokens": entry.generated,
        }


def phases(entry: Entry) -> list[tuple[str, float, float]]:
    """Name, beginning and end of each phase that a request came to, in seconds since its beginning."""
    end = entry.end or 0.0
    if entry.first is None or entry.queue is None:  # it ended before its first token: nobody knows where it was
        return []
    return [("queue", 0.0, entry.queue), ("prefill", entry.queue, entry.first), ("decode", entry.first, end)]


def nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)


class TraceParent:
    """Makes a client's ``traceparent`` the parent of what is traced while its request is answered."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        from opentelemetry.context import attach, detach
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        token = attach(TraceContextTextMapPropagator().extract(headers))
        try:
            return await self._app(scope, receive, send)
        finally:
            detach(token)
