"""OpenTelemetry spans of requests: in memory, and as a collector gets them; and lines of the log."""

from __future__ import annotations

import gzip
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanContext

from pippin.config import EngineConfig, ServerConfig
from pippin.errors import ConfigError
from pippin.server.history import Entry
from pippin.server.launch import Serving
from pippin.server.traces import Traces, otlp_provider, url_of
from tests.fake_core import RAISE
from tests.server.conftest import Serve

PARENT = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
ASK: dict[str, Any] = {"prompt": "abc", "max_tokens": 5, "rid": "mine"}


def in_memory() -> tuple[TracerProvider, InMemorySpanExporter]:
    provider, exporter = TracerProvider(shutdown_on_exit=False), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider, exporter


def context_of(span: ReadableSpan) -> SpanContext:
    context = span.get_span_context()
    assert context is not None
    return context


def parent_of(span: ReadableSpan) -> int | None:
    return span.parent.span_id if span.parent else None


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_has_its_phases_one_after_the_other(serve: Serve, stream: bool) -> None:
    provider, exporter = in_memory()
    with serve(provider=provider) as running, running.http() as http:
        assert http.post("/v1/completions", json=ASK | {"stream": stream}, headers=PARENT).status_code == 200
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert set(spans) == {"request", "queue", "prefill", "decode"}
    request, context = spans.pop("request"), context_of(spans["queue"])
    assert f"{context.trace_id:032x}" in PARENT["traceparent"]
    assert f"{parent_of(request):016x}" in PARENT["traceparent"]
    for span in spans.values():
        assert parent_of(span) == context_of(request).span_id
    times = [(spans[name].start_time or 0, spans[name].end_time or 0) for name in ("queue", "prefill", "decode")]
    assert all(start <= end for start, end in times)
    assert all(before[1] == after[0] for before, after in pairwise(times))
    assert (times[0][0], times[-1][1]) == (request.start_time, request.end_time)
    found = dict(request.attributes or {})
    assert found["gen_ai.response.id"] == "mine"
    assert (found["gen_ai.usage.input_tokens"], found["gen_ai.usage.output_tokens"]) == (3, 5)
    assert found["gen_ai.response.finish_reasons"] == ("length",)


def test_without_a_parent_each_request_is_a_trace(serve: Serve) -> None:
    provider, exporter = in_memory()
    with serve(provider=provider) as running, running.http() as http:
        for n in (1, 2):
            http.post("/v1/completions", json=ASK | {"n": n})
        http.post("/v1/completions", json=ASK | {"prompt": [RAISE]})
    requests = [span for span in exporter.get_finished_spans() if span.name == "request"]
    assert len({context_of(span).trace_id for span in requests}) == 3
    assert [dict(span.attributes or {})["gen_ai.request.choice.count"] for span in requests] == [1, 2, 1]
    assert [span.status.is_ok for span in requests] == [True, True, False]


def test_each_phase_begins_where_the_one_before_ends() -> None:
    provider, exporter = in_memory()
    Traces(provider, lambda: "m").tell(Entry(id="a", at=1.0, prompt=3, queue=0.5, first=2.0, end=4.0, outcome="stop"))
    found = [(s.name, (s.start_time or 0) / 1e9, (s.end_time or 0) / 1e9) for s in exporter.get_finished_spans()]
    assert found == [("queue", 1.0, 1.5), ("prefill", 1.5, 3.0), ("decode", 3.0, 5.0), ("request", 1.0, 5.0)]


def test_a_request_that_ends_in_the_queue_has_no_phases() -> None:
    provider, exporter = in_memory()
    Traces(provider, lambda: "m").tell(Entry(id="a", at=1.0, prompt=3, end=0.5, outcome="disconnect"))
    (span,) = exporter.get_finished_spans()
    assert (span.name, span.start_time, span.end_time) == ("request", 10**9, 15 * 10**8)


def test_a_collector_gets_them(serve: Serve) -> None:
    taken: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            taken.append(gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body)
            self.send_response(200 if self.path == "/v1/traces" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        provider = otlp_provider(f"127.0.0.1:{collector.server_port}")
        with serve(provider=provider) as running, running.http() as http:
            http.post("/v1/completions", json=ASK)
        provider.shutdown()
        collector.shutdown()
        thread.join()
    found = [
        span.name
        for body in taken
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    assert sorted(found) == ["decode", "prefill", "queue", "request"]


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("localhost:4318", "http://localhost:4318/v1/traces"),
        ("https://x/", "https://x/v1/traces"),
        ("http://x:1/in", "http://x:1/in"),
    ],
)
def test_addresses(given: str, url: str) -> None:
    assert url_of(given) == url


def test_what_is_no_address_is_refused_before_anything_loads() -> None:
    for given in ("ftp://x", "http://"):
        with pytest.raises(ConfigError, match="--otlp-traces-endpoint"):
            Serving(EngineConfig(), ServerConfig(enable_trace=True, otlp_traces_endpoint=given), print, "none:none")


def test_without_the_extra_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"pip install 'pippin\[otel\]'"):
        otlp_provider("localhost:4318")


def test_nothing_of_it_is_loaded_unless_asked_for() -> None:
    code = "import sys, pippin.server.launch; print('opentelemetry.sdk' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"


def test_no_span_for_what_is_not_a_request(serve: Serve) -> None:
    provider, exporter = in_memory()
    with serve(provider=provider) as running, running.http() as http:
        answers: list[httpx.Response] = [http.get("/health"), http.post("/v1/completions", json={})]
    assert [answer.status_code for answer in answers] == [200, 400]
    assert exporter.get_finished_spans() == ()
