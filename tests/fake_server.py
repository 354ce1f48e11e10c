"""A server that speaks OpenAI's and SGLang's streams without a model, and fails in the ways that servers fail.

Answers are as many words as were asked for; a token is a word. What it was asked is kept for tests to look at.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

Json = dict[str, Any]


@dataclass(slots=True)
class Script:
    """How it behaves. ``mode`` is how requests fail, from number ``healthy`` (counted from 0) on."""

    mode: str = "ok"
    healthy: int = 0
    usage: bool = True
    cached: int | None = 0
    first: float = 0.0
    between: float = 0.0
    tokens_per_event: int = 1
    incremental: bool = False
    models: bool = True
    key: str = ""


@dataclass(slots=True)
class FakeServer:
    """A running one."""

    script: Script
    url: str = ""
    asked: list[tuple[str, Json]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    running: int = 0
    most_running: int = 0

    def bodies(self, path: str) -> list[Json]:
        return [body for where, body in self.asked if where == path]

    async def models(self, request: web.Request) -> web.Response:
        if self.script.key and request.headers.get("Authorization") != f"Bearer {self.script.key}":
            return web.json_response({"error": {"message": "no key"}}, status=401)
        if not self.script.models:
            return web.json_response({"error": "no such path"}, status=404)
        return web.json_response({"object": "list", "data": [{"id": "fake-model", "owned_by": "fake"}]})

    async def other(self, request: web.Request) -> web.Response:
        self.asked.append((request.path, {}))
        return web.Response()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        number = len(self.asked)
        self.asked.append((request.path, body))
        self.keys.append(request.headers.get("Authorization"))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            mode = self.script.mode if number >= self.script.healthy else "ok"
            return await self._respond(request, body, mode)
        finally:
            self.running -= 1

    async def _respond(self, request: web.Request, body: Json, mode: str) -> web.StreamResponse:
        if mode.isdigit():
            return web.json_response({"error": {"message": "not now"}}, status=int(mode))
        if mode == "drop":
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if not body.get("stream"):
            return web.json_response(self._whole(request.path, body))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        async for data in self._events(request.path, body, mode):
            await response.write(f"data: {data}\n\n".encode())
        if mode == "abort":
            assert request.transport is not None
            request.transport.abort()
        return response

    async def _events(self, path: str, body: Json, mode: str) -> AsyncIterator[str]:
        said, sofar = words_of(body), ""
        number = output_len(body)
        await asyncio.sleep(self.script.first)
        for begin in range(0, number, self.script.tokens_per_event):
            if begin:
                await asyncio.sleep(self.script.between)
            if mode in ("cut", "abort", "error", "garbage") and begin >= 2:
                break
            new = "".join(f"w{i} " for i in range(begin, min(number, begin + self.script.tokens_per_event)))
            sofar += new if mode != "empty" else ""
            done = min(number, begin + self.script.tokens_per_event)
            shown = new if self.script.incremental or path != "/generate" else sofar
            yield json.dumps(self._event(path, "" if mode == "empty" else shown, said, done, done == number))
        match mode:
            case "garbage":
                yield '{"choices": [{'
            case "strange":
                yield '{"hello": 1}'
            case "error":
                yield '{"error": {"message": "out of memory"}}'
            case "cut" | "abort" | "slow":
                await asyncio.sleep(1000 if mode == "slow" else 0)
                return
            case _:
                if path != "/generate" and self.script.usage:
                    yield json.dumps({"choices": [], "usage": self._usage(said, number)})
        if mode != "error":
            yield "[DONE]"

    def _event(self, path: str, text: str, said: int, done: int, last: bool) -> Json:
        if path == "/generate":
            finish = {"type": "length", "length": done} if last else None
            meta: Json = {"id": "x", "finish_reason": finish}
            if self.script.usage:
                meta |= {"prompt_tokens": said, "completion_tokens": done, "cached_tokens": self.script.cached}
            return {"text": text, "meta_info": meta}
        finish_reason = "length" if last else None
        if path == "/v1/completions":
            return {"choices": [{"index": 0, "text": text, "finish_reason": finish_reason}], "usage": None}
        return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish_reason}]}

    def _whole(self, path: str, body: Json) -> Json:
        said, number = words_of(body), output_len(body)
        text = "".join(f"w{i} " for i in range(number))
        if path == "/generate":
            return self._event(path, text, said, number, True)
        choice = {"text": text} if path == "/v1/completions" else {"message": {"role": "assistant", "content": text}}
        return {"choices": [choice | {"finish_reason": "length"}], "usage": self._usage(said, number)}

    def _usage(self, said: int, number: int) -> Json:
        usage: Json = {"prompt_tokens": said, "completion_tokens": number}
        return usage | (
            {} if self.script.cached is None else {"prompt_tokens_details": {"cached_tokens": self.script.cached}}
        )


def words_of(body: Json) -> int:
    """How long a prompt is; a chat has 5 tokens of template."""
    if "messages" in body:
        return 5 + sum(len(m["content"].split()) for m in body["messages"])
    prompt = next(body[name] for name in ("text", "prompt", "input_ids") if name in body)
    return len(prompt.split()) if isinstance(prompt, str) else len(prompt)


def output_len(body: Json) -> int:
    found: int = body["sampling_params"]["max_new_tokens"] if "sampling_params" in body else body["max_tokens"]
    return found


@contextmanager
def fake_server(script: Script | None = None) -> Iterator[FakeServer]:
    """One that listens on loopback, in a thread of its own."""
    server = FakeServer(script or Script())
    loop = asyncio.new_event_loop()
    ready = threading.Event()
    stop = asyncio.Event()

    async def serve() -> None:
        app = web.Application()
        app.router.add_get("/v1/models", server.models)
        for path in ("/generate", "/v1/completions", "/v1/chat/completions"):
            app.router.add_post(path, server.answer)
        for path in ("/flush_cache", "/start_profile", "/stop_profile"):
            app.router.add_post(path, server.other)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()
        await stop.wait()
        await runner.cleanup()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert ready.wait(20)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(20)
        loop.close()
