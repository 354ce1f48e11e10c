"""The web page at /: its files, the headers that keep it safe, and the numbers of its dashboard.

What a model says is not to be trusted. The page sanitises it, and the policy below lets nothing run or load that this
server does not send by itself, even if something got past.
"""

from __future__ import annotations

import hashlib
import time
from functools import cache
from importlib.resources import files

import msgspec
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

import pippin
from pippin.server.history import Entry, quantiles
from pippin.server.http import JsonResponse
from pippin.server.service import Service

TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "txt": "text/plain; charset=utf-8",
}

HEADERS = {
    "content-security-policy": "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "img-src 'self'",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types dompurify",
        )
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-cache",  # asked for again each time, answered 304 unless the server is another version
}


def _pages() -> tuple[str, ...]:
    folder = files("pippin") / "ui"
    names = [f"/ui/{file.name}" for file in folder.iterdir() if file.is_file()]
    vendored = [f"/ui/vendor/{file.name}" for file in (folder / "vendor").iterdir()]
    return ("/", *sorted(n for n in [*names, *vendored] if n.rpartition(".")[2] in TYPES))


PAGES = _pages()
"""The paths of the page's files."""


@cache
def _content(path: str) -> tuple[bytes, str]:
    """A file's bytes and its entity tag."""
    file = files("pippin").joinpath(path.lstrip("/") or "ui/index.html")
    content = file.read_bytes()
    return content, f'"{hashlib.sha256(content).hexdigest()[:20]}"'


def response(path: str, known: str | None = None) -> Response:
    """A file of the page, one of PAGES; 304 if ``known`` is its entity tag."""
    content, tag = _content(path)
    headers = HEADERS | {"etag": tag}
    if known == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=TYPES[path.rpartition(".")[2] if path != "/" else "html"])


async def page(request: Request) -> Response:
    return response(request.url.path, request.headers.get("if-none-match"))


def add_pages(app: FastAPI) -> None:
    for path in PAGES:
        app.add_route(path, page, include_in_schema=False)


async def stats(service: Service, http: Request) -> Response:
    """/pippin/stats: what is served, the engine's counts now, latencies and the latest requests; no text of anybody."""
    if (trouble := service.client.trouble) is not None:
        raise trouble
    info, history = service.info, service.history
    latest = history.latest()
    return JsonResponse(
        {
            "version": pippin.__version__,
            "model": service.model_name,
            "info": msgspec.structs.asdict(info),
            "uptime": time.time() - service.client.started_at,
            "time": history.wall(),
            "generated_tokens": history.generated,
            "stats": msgspec.structs.asdict(service.client.stats),
            "latency": {
                "queue": quantiles(entry.queue for entry in latest),
                "first_token": quantiles(entry.first for entry in latest),
                "next_token": quantiles(map(between, latest)),
                "request": quantiles(entry.end for entry in latest),
            },
            "reasons": service.speech.reasoning is not None,
            "calls_tools": service.speech.tools is not None,
            "requests": [msgspec.structs.asdict(entry) for entry in latest],
        }
    )


def between(entry: Entry) -> float | None:
    """Seconds from token to token of an answer, on average."""
    tokens = entry.generated // entry.answers
    if entry.first is None or entry.end is None or tokens < 2:
        return None
    return (entry.end - entry.first) / (tokens - 1)
