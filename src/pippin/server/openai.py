"""OpenAI's /v1/completions and /v1/chat/completions: requests to jobs, deltas to JSON, whole and streamed."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from functools import cached_property
from typing import Generic

from starlette.requests import Request
from starlette.responses import Response

from pippin.completion import Delta, unanswered
from pippin.errors import RequestError
from pippin.server.chat import Ask, begin
from pippin.server.choices import C, ChatShape, Shape, TextShape
from pippin.server.http import DONE, EventStream, JsonResponse, encode, event, next_of, read_body, unless_gone
from pippin.server.protocol import ChatRequest, CompletionRequest, Json, OpenAIRequest, respell
from pippin.server.service import Job, Service

TOP_LOGPROBS = 20
COMPLETION_TOKENS = 16


async def chat(service: Service, http: Request) -> Response:
    """POST /v1/chat/completions."""
    request = await read_body(http, ChatRequest)
    shape = ChatShape(service.tokenizer, request.logprobs)
    answer = Answer(service, request, shape)
    conversation = await begin(service, chat_ask(service, request, answer.rid))
    return await answer.respond(http, [shape.of(conversation)])


async def completions(service: Service, http: Request) -> Response:
    """POST /v1/completions."""
    request = await read_body(http, CompletionRequest)
    texts = prompts(request.prompt)
    echoes: list[str] = []
    shape = TextShape(service.tokenizer, request, echoes)
    answer = Answer(service, request, shape)
    jobs = await completion_jobs(service, request, texts, answer.rid)
    if request.echo:  # only now are token ids known to be in the vocabulary
        skip = request.skip_special_tokens
        echoes += [t if isinstance(t, str) else service.tokenizer.decode(t, skip) for t in texts]
    return await answer.respond(http, jobs)


def chat_ask(service: Service, request: ChatRequest, rid: str) -> Ask:
    if request.top_logprobs and not request.logprobs:
        raise RequestError("top_logprobs needs logprobs to be true", "top_logprobs")
    if not 0 <= request.top_logprobs <= TOP_LOGPROBS:
        raise RequestError(f"top_logprobs must be between 0 and {TOP_LOGPROBS}", "top_logprobs")
    limit = request.limit
    params = request.params(
        service.info.context_length if limit is None else limit,
        logprobs=request.logprobs,
        top_logprobs=request.top_logprobs,
    )
    tools, choice = request.chosen()
    return Ask(
        messages=request.messages,
        params=service.adapted(params, request.model, request.lora_path),
        rid=rid,
        tools=tools,
        tool_choice=choice,
        parallel=request.parallel_tool_calls,
        effort=request.reasoning_effort,
        budget=request.thinking_budget,
        template=request.chat_template_kwargs,
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
        separate_reasoning=request.separate_reasoning,
        stream_reasoning=request.stream_reasoning,
        priority=request.priority,
    )


async def completion_jobs(
    service: Service, request: CompletionRequest, texts: Sequence[str | list[int]], rid: str
) -> list[Job]:
    logprobs = request.logprobs is not None
    if request.stream and request.echo and logprobs and request.n > 1:
        raise RequestError("stream, echo and logprobs together need n to be 1", "n")
    try:
        params = request.params(
            COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens or 1,
            logprobs=logprobs,
            top_logprobs=request.logprobs or 0,
            prompt_logprobs=logprobs and request.echo,
        )
    except RequestError as error:
        raise respell(error, {"top_logprobs": "logprobs"}) from error
    params = service.adapted(params, request.model, request.lora_path)
    return [
        service.job(
            await service.encode(text) if isinstance(text, str) else text,
            params,
            rid if len(texts) == 1 else f"{rid}-prompt{i}",
            request.priority,
            "prompt",
        )
        for i, text in enumerate(texts)
    ]


def prompts(prompt: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """One or more prompts, each text or token ids, from the four forms that OpenAI allows."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise RequestError("prompt is an empty list; it needs at least one prompt", "prompt")
    texts = [p for p in prompt if isinstance(p, str)]
    tokens = [p for p in prompt if isinstance(p, int)]
    lists = [p for p in prompt if isinstance(p, list)]
    if len(tokens) == len(prompt):
        return [tokens]
    if len(texts) == len(prompt):
        return [*texts]
    if len(lists) == len(prompt):
        return [*lists]
    raise RequestError("prompt must be text, token ids, or a list of only texts or only lists of token ids", "prompt")


async def silent(deltas: AsyncGenerator[tuple[int, Delta], None]) -> AsyncGenerator[tuple[int, Delta], None]:
    """Answers without the one token that the engine draws: only the prompts were asked about."""
    async with aclosing(deltas):
        async for number, delta in deltas:
            yield number, unanswered(delta)


class Answer(Generic[C]):
    """One request's answer in the making: ids, usage, and the JSON round the choices, which ``shape`` writes."""

    def __init__(self, service: Service, request: OpenAIRequest, shape: Shape[C]) -> None:
        self.rid = request.rid or f"{shape.prefix}-{uuid.uuid4().hex}"
        self._service = service
        self._request = request
        self._shape = shape
        self._model = service.check_model(request.model)
        self._created = int(time.time())
        self._generated = 0
        self._prompts: dict[int, tuple[int, int]] = {}

    async def respond(self, http: Request, jobs: Sequence[Job]) -> Response:
        """Run the jobs and answer as asked. What fails before the first token has an HTTP status of its own."""
        deltas = self._service.run(jobs, self.rid if len(jobs) > 1 else None)
        if self._request.max_tokens == 0:
            deltas = silent(deltas)
        if not self._request.stream:
            return JsonResponse(await unless_gone(http, self._whole(deltas)))
        first = await unless_gone(http, next_of(deltas))
        return EventStream(self._events(first, deltas))

    async def _whole(self, deltas: AsyncGenerator[tuple[int, Delta], None]) -> Json:
        choices: dict[int, C] = {}
        async with aclosing(deltas):
            async for number, delta in deltas:
                self._count(number, delta)
                choices.setdefault(number * self._request.n + delta.index, self._shape.collect(number)).add(delta)
        shown = [self._shape.choice(i, choices[i], choices[i - i % self._request.n]) for i in sorted(choices)]
        return {**self._head(self._shape.whole), "choices": shown, "usage": self._usage()}

    async def _events(
        self, first: tuple[int, Delta], deltas: AsyncGenerator[tuple[int, Delta], None]
    ) -> AsyncGenerator[bytes, None]:
        options = self._request.stream_options
        async with aclosing(deltas):
            if chunks := self._chunks(*first):
                yield chunks
            async for number, delta in deltas:
                if chunks := self._chunks(number, delta):
                    yield chunks
        if options is not None and options.include_usage:
            yield event({**self._head(self._shape.chunk), "choices": [], "usage": self._usage()})
        yield DONE

    def _chunks(self, number: int, delta: Delta) -> bytes:
        """A delta's events, in one piece."""
        self._count(number, delta)
        parts = self._shape.parts(number * self._request.n + delta.index, number, delta)
        return self._chunk(parts[0]) if len(parts) == 1 else b"".join(map(self._chunk, parts))

    def _chunk(self, choice: Json) -> bytes:
        options = self._request.stream_options
        usage = b""
        if options is not None and (options.include_usage or options.continuous_usage_stats):
            usage = b',"usage":' + encode(self._usage() if options.continuous_usage_stats else None)
        return b"".join((self._opening, encode(choice), b"]", usage, b"}\n\n"))

    @cached_property
    def _opening(self) -> bytes:
        """What all chunks begin with, up to the choice."""
        return b"data: " + encode(self._head(self._shape.chunk)).removesuffix(b"}") + b',"choices":['

    def _count(self, number: int, delta: Delta) -> None:
        self._generated += len(delta.tokens)
        if delta.index == 0:  # n answers share a prompt: it is counted, and cached, once
            self._prompts[number] = (delta.num_prompt, delta.num_cached)

    def _head(self, kind: str) -> Json:
        return {"id": self.rid, "object": kind, "created": self._created, "model": self._model}

    def _usage(self) -> Json:
        prompt = sum(length for length, _ in self._prompts.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._generated,
            "total_tokens": prompt + self._generated,
            "prompt_tokens_details": {"cached_tokens": sum(cached for _, cached in self._prompts.values())},
            **self._shape.usage(),
        }


async def models(service: Service, http: Request) -> Response:
    """GET /v1/models: the model that is served, and its LoRA adapters."""
    adapters = [adapter_card(service, name) for name in service.client.adapters]
    data = [card(service), *adapters]
    return JsonResponse(
        {"object": "list", "data": data, "has_more": False, "first_id": data[0]["id"], "last_id": data[-1]["id"]}
    )


def adapter_card(service: Service, name: str) -> Json:
    root = service.client.adapters[name]
    return card(service) | {"id": name, "display_name": name, "root": root, "parent": service.model_name}


async def model(service: Service, http: Request) -> Response:
    """GET /v1/models/{model}. Raises RequestError (404) for another name."""
    name = http.path_params["model"]
    if name in service.client.adapters:
        return JsonResponse(adapter_card(service, name))
    if name != service.model_name:
        raise RequestError(f"there is no model {name!r} here; this is {service.model_name!r}", "model", 404)
    return JsonResponse(card(service))


def card(service: Service) -> Json:
    return {
        "id": service.model_name,
        "object": "model",
        "type": "model",  # this and the next two are Anthropic's, whose client asks here too
        "display_name": service.model_name,
        "created_at": datetime.fromtimestamp(service.created, UTC).isoformat(),
        "created": service.created,
        "owned_by": "pippin",
        "root": service.info.model_path,
        "parent": None,
        "max_model_len": service.info.context_length,
    }
