"""SGLang's /start_profile and /stop_profile, and the spans of HTTP requests while a profile runs."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pippin.client import EngineClient
from pippin.errors import RequestError
from pippin.profile.control import ProfileOptions
from pippin.profile.timeline import HTTP, Timeline
from pippin.server.http import JsonResponse, read_body
from pippin.server.protocol import Body
from pippin.server.service import Service


class StartProfileRequest(Body, kw_only=True):
    """Fields of SGLang's ProfileReqInput; ``profile.control.ProfileOptions`` says what they do."""

    output_dir: str | None = None
    num_steps: int | None = None
    start_step: int | None = None
    profile_by_stage: bool = False
    profile_id: str | None = None
    profile_prefix: str | None = None
    activities: list[str] | None = None
    merge_profiles: bool = False
    with_stack: bool = False
    record_shapes: bool = False
    profile_stages: list[str] | None = None

    def options(self) -> ProfileOptions:
        """Raises RequestError for what a timeline doesn't hold."""
        for name, asked, instead in (
            ("with_stack", self.with_stack, "the timeline holds no Python stacks; leave it out"),
            ("record_shapes", self.record_shapes, "each step is labelled with its batch instead; leave it out"),
            ("profile_stages", self.profile_stages, "use profile_by_stage, which takes prefill and decode apart"),
        ):
            if asked:
                raise RequestError(f"{name} is not supported: {instead}", name)
        return ProfileOptions(
            output_dir=self.output_dir,
            num_steps=self.num_steps,
            start_step=self.start_step,
            profile_by_stage=self.profile_by_stage,
            profile_id=self.profile_id,
            profile_prefix=self.profile_prefix,
            activities=self.activities,
        )


async def start_profile(service: Service, http: Request) -> Response:
    """/start_profile: begins to record a timeline; the answer names the files that it will be written to."""
    empty = "transfer-encoding" not in http.headers and http.headers.get("content-length", "0") == "0"
    request = StartProfileRequest() if empty else await read_body(http, StartProfileRequest)
    files = await service.client.profiler.start(request.options())
    return answer("profiling has started", files)


async def stop_profile(service: Service, http: Request) -> Response:
    """/stop_profile: ends it; the answer comes when the files are written."""
    return answer("profiling has ended", await service.client.profiler.stop())


def answer(message: str, files: list[Any]) -> Response:
    return JsonResponse({"success": True, "message": message, "files": [str(file) for file in files]})


class RequestSpans:
    """Records each request while a profile runs: all of it, up to its first byte, and streaming."""

    def __init__(self, app: ASGIApp, client: EngineClient) -> None:
        self._app, self._client = app, client

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        timeline = self._client.profiler.timeline
        if timeline is None or scope["type"] != "http":
            await self._app(scope, receive, send)
        else:
            await RequestSpan(timeline, scope).run(self._app, receive, send)


class RequestSpan:
    """One request's."""

    def __init__(self, timeline: Timeline, scope: Scope) -> None:
        self._timeline, self._scope = timeline, scope
        self._began = timeline.now()
        self._group = timeline.begin(HTTP, f"{scope['method']} {scope['path']}", self._began)
        self._first: int | None = None
        self._status, self._bytes = 0, 0

    async def run(self, app: ASGIApp, receive: Receive, send: Send) -> None:
        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._status = message["status"]
            elif message.get("body"):
                self._bytes += len(message["body"])
                if self._first is None:
                    self._first = self._timeline.now()
            await send(message)

        try:
            await app({**self._scope, "extensions": {}}, receive, noted)  # or the body would not come by
        finally:
            self._end()

    def _end(self) -> None:
        timeline, end = self._timeline, self._timeline.now()
        if timeline.end(self._group, {"status": self._status, "bytes": self._bytes}) and self._first is not None:
            timeline.add(HTTP, "to first byte", self._began, self._first, group=self._group)
            timeline.add(HTTP, "streaming", self._first, end, group=self._group)
