"""OpenAI's /v1/responses: to and from a Conversation, and what is kept for ``previous_response_id``.

Source: OpenAI's Responses API. Kept are the last thousand responses, in memory; older ones are forgotten.
"""

from __future__ import annotations

import base64
import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from pippin.errors import RequestError
from pippin.grammar import fields
from pippin.server.blocks import Block, Blocks, Change
from pippin.server.chat import Ask, Step, Usage, begin
from pippin.server.http import EventStream, JsonResponse, encode, error_parts, primed, read_body, unless_gone
from pippin.server.logprobs import chat_logprobs
from pippin.server.protocol import Body, Json, respell
from pippin.server.response_tools import ResponseTool, ResponseTools, ToolChoice, flat
from pippin.server.service import Service
from pippin.server.store import Stored
from pippin.server.stored import missing
from pippin.types import Grammar, SamplingParams

TOP_LOGPROBS = 20
LOGPROBS = "message.output_text.logprobs"
ENCRYPTED = "reasoning.encrypted_content"


class ReasoningConfig(Struct, kw_only=True, forbid_unknown_fields=True):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class TextConfig(Struct, kw_only=True, forbid_unknown_fields=True):
    format: Json | None = None
    verbosity: Literal["medium"] | None = None


class StreamOptions(Struct, kw_only=True, forbid_unknown_fields=True):
    include_obfuscation: bool = False


class PromptRequest(Body, kw_only=True):
    """POST /v1/responses/input_tokens: what a response's prompt is made of."""

    model: str | None = None
    input: str | list[Json]
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: tuple[ResponseTool, ...] = ()
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    reasoning: ReasoningConfig | None = None
    text: TextConfig | None = None

    ignored: ClassVar = {}
    neutral: ClassVar = {"truncation": ("disabled",), "conversation": (), "personality": ()}


class ResponsesRequest(PromptRequest, kw_only=True):
    """POST /v1/responses."""

    store: bool = True
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    max_output_tokens: int | None = None
    include: tuple[Literal["message.output_text.logprobs", "reasoning.encrypted_content"], ...] = ()
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=TOP_LOGPROBS)] = 0
    metadata: dict[str, str] | None = None

    ignored: ClassVar = dict.fromkeys(
        ("user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options",
         "client_metadata"),
        "concerns OpenAI's accounts, storage or routing",
    )  # fmt: skip
    neutral: ClassVar = {
        "background": (False,),
        "background_options": (),
        "truncation": ("disabled",),
        "service_tier": ("auto", "default"),
        "conversation": (),
        "prompt": (),
        "context_management": ([],),
        "max_tool_calls": (),
        "moderation": (),
        "image": (),
        "access_programs": (),
    }


async def responses(service: Service, http: Request) -> Response:
    """POST /v1/responses."""
    request = await read_body(http, ResponsesRequest)
    id = f"resp_{uuid.uuid4().hex}"
    prompt = Prompt(service, request)
    answer = Answer(service, request, prompt, id)
    conversation = await begin(service, asked(service, request, prompt, params_of(service, request), id))
    if not request.stream:
        return JsonResponse(await unless_gone(http, answer.whole(conversation.steps())))
    steps = await primed(http, conversation.steps())
    return EventStream(answer.events(steps), answer.error_event)


async def input_tokens(service: Service, http: Request) -> Response:
    """POST /v1/responses/input_tokens: how long the prompt would be."""
    request = await read_body(http, PromptRequest)
    service.check_model(request.model)
    ask = asked(service, request, Prompt(service, request), SamplingParams(max_new_tokens=1), "count")
    conversation = await begin(service, ask)
    return JsonResponse({"object": "response.input_tokens", "input_tokens": len(conversation.job.tokens)})


def asked(service: Service, request: PromptRequest, prompt: Prompt, params: SamplingParams, id: str) -> Ask:
    functions, choice = prompt.tools.chosen(request.tool_choice)
    system = [{"role": "system", "content": request.instructions}] if request.instructions else []
    return Ask(
        messages=[*system, *prompt.messages],
        params=service.adapted(params, request.model),
        rid=id,
        tools=functions,
        tool_choice=choice,
        parallel=request.parallel_tool_calls,
        effort=request.reasoning.effort if request.reasoning else None,
    )


def params_of(service: Service, request: ResponsesRequest) -> SamplingParams:
    limit = request.max_output_tokens
    if request.top_logprobs and LOGPROBS not in request.include:
        raise RequestError(f"top_logprobs needs {LOGPROBS} in include", "top_logprobs")
    try:
        return SamplingParams(
            max_new_tokens=service.info.context_length if limit is None else limit,
            temperature=request.temperature,
            top_p=request.top_p,
            grammar=grammar_in(request.text),
            logprobs=LOGPROBS in request.include,
            top_logprobs=request.top_logprobs,
        )
    except RequestError as error:
        raise respell(error, {"max_new_tokens": "max_output_tokens"}) from error


def grammar_in(config: TextConfig | None) -> Grammar | None:
    """``text.format``: ``response_format`` with the schema's fields beside its type."""
    given = dict(config.format) if config is not None and config.format is not None else {"type": "text"}
    if given.get("type") == "json_schema":
        given = {"type": "json_schema", "json_schema": {k: v for k, v in given.items() if k != "type"}}
    try:
        return fields.grammar_of({"response_format": given})
    except RequestError as error:
        named = (error.field or "").replace("response_format.json_schema", "response_format")
        raise RequestError(error.message, named.replace("response_format", "text.format")) from error


class Prompt:
    """What a request brings: its items, with ids; the conversation as messages; its tools. Raises RequestError."""

    def __init__(self, service: Service, request: PromptRequest) -> None:
        self.tools = ResponseTools(request.tools)
        self.items = with_ids(request.input)
        before: list[Json] = []
        if request.previous_response_id is not None:
            found = service.responses.get(request.previous_response_id)
            if found is None:
                raise missing(request.previous_response_id, "previous_response_id", 400)
            before = found.messages
        self.messages = [*before, *messages_of(self.items)]


# --- items to messages ---

ITEM_FIELDS = {
    "message": {"type", "id", "role", "content", "status", "phase"},
    "function_call": {"type", "id", "call_id", "name", "namespace", "arguments", "status"},
    "function_call_output": {"type", "id", "call_id", "output", "status"},
    "reasoning": {"type", "id", "summary", "content", "encrypted_content", "status"},
}


def messages_of(items: Sequence[Json]) -> list[Json]:
    """Items as messages: what an assistant thought, said and called becomes one message."""
    found: list[Json] = []
    for i, item in enumerate(items):
        field = f"input[{i}]"
        kind = item.get("type", "message")
        if kind not in ITEM_FIELDS:
            raise RequestError(f"items of type {kind!r} are not supported", f"{field}.type")
        given = {name for name, value in item.items() if value is not None}
        if unknown := sorted(given - ITEM_FIELDS[kind]):
            raise RequestError(f"unknown field {unknown[0]}", f"{field}.{unknown[0]}")
        if kind == "function_call_output":
            message = {
                "role": "tool",
                "tool_call_id": text_in(item, "call_id", field),
                "content": joined(item.get("output"), f"{field}.output"),
            }
            found.append(message)
            continue
        message = assistant_part(kind, item, field)
        last = found[-1] if found else {}
        if message["role"] == "assistant" == last.get("role") and joins(last, message):
            for name, value in message.items():
                if name != "role":
                    last[name] = last[name] + value if name in last else value
        else:
            found.append(message)
    return found


def joins(last: Json, message: Json) -> bool:
    """Reasoning begins a message, text follows reasoning, calls follow anything."""
    return "tool_calls" in message or ("content" in message and "content" not in last and "tool_calls" not in last)


def assistant_part(kind: str, item: Json, field: str) -> Json:
    if kind == "reasoning":
        return {"role": "assistant", "reasoning_content": thought_of(item, field)}
    if kind == "function_call":
        namespace = text_in(item, "namespace", field) if item.get("namespace") is not None else None
        name = flat(namespace, text_in(item, "name", field))
        function = {"name": name, "arguments": text_in(item, "arguments", field)}
        call = {"id": text_in(item, "call_id", field), "type": "function", "function": function}
        return {"role": "assistant", "tool_calls": [call]}
    role, content = item.get("role"), item.get("content")
    if role not in ("user", "assistant", "system", "developer"):
        raise RequestError(f"role must be user, assistant, system or developer, not {role!r}", f"{field}.role")
    return {"role": role, "content": joined(content, f"{field}.content")}


def joined(content: object, field: str) -> str:
    return content if isinstance(content, str) else "".join(texts(content, field))


WORDS = ("input_text", "output_text", "text")
THOUGHTS = ("reasoning_text", "summary_text")


def texts(content: object, field: str, kinds: Sequence[str] = WORDS) -> Iterator[str]:
    if not isinstance(content, list):
        raise RequestError("this must be a string or a list of text parts", field)
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind not in kinds:
            raise RequestError(f"only {', '.join(kinds)} are supported, not {kind!r}", f"{field}[{i}].type")
        if unknown := sorted(set(part) - {"type", "text", "annotations", "logprobs"}):
            raise RequestError(f"unknown field {unknown[0]}", f"{field}[{i}].{unknown[0]}")
        yield text_in(part, "text", f"{field}[{i}]")


def text_in(item: Json, name: str, field: str) -> str:
    if not isinstance(item.get(name), str):
        raise RequestError(f"{name} must be a string", f"{field}.{name}")
    return str(item[name])


def thought_of(item: Json, field: str) -> str:
    """The reasoning of an item of ours, whichever way the client kept it."""
    for name in ("content", "summary"):
        if parts := item.get(name):
            return "\n".join(texts(parts, f"{field}.{name}", THOUGHTS))
    try:
        return base64.b64decode(str(item.get("encrypted_content") or ""), validate=True).decode()
    except ValueError as error:
        raise RequestError("this reasoning was not encrypted here", f"{field}.encrypted_content") from error


def with_ids(items: str | Sequence[Json]) -> list[Json]:
    """Items as they are kept: a text is a user's message, and each has an id."""
    if isinstance(items, str):
        items = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": items}]}]
    return [{"type": "message", **item, "id": item.get("id") or f"msg_{uuid.uuid4().hex}"} for item in items]


# --- the answer ---


class Answer:
    """One response in the making, whole or as events."""

    def __init__(self, service: Service, request: ResponsesRequest, prompt: Prompt, id: str) -> None:
        self._service, self._request, self._prompt = service, request, prompt
        self._id = id
        self._model = service.check_model(request.model)
        self._created = int(time.time())
        self._usage = Usage()
        self._blocks = Blocks()
        self._ids: dict[Block, str] = {}
        self._number = 0
        self._logprobs: list[Any] = []
        self._length = False

    async def whole(self, steps: AsyncGenerator[Step, None]) -> Json:
        async with aclosing(steps):
            async for step in steps:
                self._add(step)
        for _ in self._blocks.finish():
            pass
        return self._finished()

    async def events(self, steps: AsyncGenerator[Step, None]) -> AsyncGenerator[bytes, None]:
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._response("in_progress"))
        async with aclosing(steps):
            async for step in steps:
                for change in self._add(step):
                    for told in self._changed(change, step):
                        yield told
        for change in self._blocks.finish():
            for told in self._changed(change, None):
                yield told
        finished = self._finished()
        yield self._event(f"response.{finished['status']}", response=finished)

    def error_event(self, error: Exception) -> bytes:
        _, message, _ = error_parts(error)
        failed = self._response("failed") | {"error": {"code": "server_error", "message": message}}
        return self._event("response.failed", response=failed)

    def _add(self, step: Step) -> list[Change]:
        self._usage.add(step)
        self._logprobs += step.delta.logprobs
        if step.finish is not None:
            self._length = step.finish.reason == "length"
        return list(self._blocks.push(step.parts))

    def _finished(self) -> Json:
        response = self._response("incomplete" if self._length else "completed")
        if self._request.store:
            messages = [*self._prompt.messages, *messages_of(response["output"])]
            self._service.responses.put(Stored(response, self._prompt.items, messages))
        return response

    def _response(self, status: str) -> Json:
        request = self._request
        ended = status in ("completed", "incomplete")
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if ended else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": self._model,
            "output": [self._item(block, "completed") for block in self._blocks.done] if ended else [],
            "parallel_tool_calls": request.parallel_tool_calls,
            "previous_response_id": request.previous_response_id,
            "reasoning": msgspec.to_builtins(request.reasoning or ReasoningConfig()),
            "store": request.store,
            "temperature": request.temperature,
            "text": msgspec.to_builtins(request.text) if request.text else {"format": {"type": "text"}},
            "tool_choice": msgspec.to_builtins(request.tool_choice),
            "tools": self._prompt.tools.told,
            "top_logprobs": request.top_logprobs,
            "top_p": request.top_p,
            "truncation": "disabled",
            "usage": self._usage_dict() if ended else None,
            **({"warnings": self._prompt.tools.warnings} if self._prompt.tools.warnings else {}),
        }

    def _usage_dict(self) -> Json:
        usage = self._usage
        return {
            "input_tokens": usage.prompt,
            "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
            "output_tokens": usage.generated,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning},
            "total_tokens": usage.prompt + usage.generated,
        }

    def _item(self, block: Block, status: str) -> Json:
        id = self._ids.setdefault(block, f"{PREFIXES[block.kind]}_{uuid.uuid4().hex}")
        if block.kind == "call":
            return {
                "type": "function_call", "id": id, "call_id": block.id,
                **self._prompt.tools.called(block.name).as_json(), "arguments": block.text, "status": status,
            }  # fmt: skip
        if block.kind == "text":
            content = [self._part(block)] if status == "completed" else []
            return {"type": "message", "id": id, "role": "assistant", "status": status, "content": content}
        item: Json = {"type": "reasoning", "id": id, "summary": [], "status": status, "content": []}
        if status == "completed":
            item["content"] = [self._part(block)]
            if ENCRYPTED in self._request.include:
                item["encrypted_content"] = base64.b64encode(block.text.encode()).decode()
        return item

    def _part(self, block: Block) -> Json:
        if block.kind == "reasoning":
            return {"type": "reasoning_text", "text": block.text}
        last = [b for b in self._blocks.done if b.kind == "text"][-1:] == [block]
        logprobs = self._logprob_list(self._logprobs) if last else []
        return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": logprobs}

    def _logprob_list(self, entries: Sequence[Any]) -> Any:
        return chat_logprobs(self._service.tokenizer, entries)["content"]

    def _changed(self, change: Change, step: Step | None) -> Iterator[bytes]:
        block = change.block
        at = {"output_index": block.number}
        if change.what == "opened":
            item = self._item(block, "in_progress")
            yield self._event("response.output_item.added", **at, item=item)
            if block.kind != "call":
                part = self._part(Block(block.kind))
                yield self._event("response.content_part.added", **at, **self._place(block), part=part)
        elif change.what == "grew":
            more = {"logprobs": self._logprob_list(step.delta.logprobs if step else [])} if block.kind == "text" else {}
            yield self._event(f"{EVENTS[block.kind]}.delta", **at, **self._place(block), delta=change.text, **more)
        elif change.what == "closed":
            yield from self._closed(block, at)

    def _closed(self, block: Block, at: Json) -> Iterator[bytes]:
        item = self._item(block, "completed")
        if block.kind == "call":
            named = {"item_id": item["id"], "name": item["name"], "arguments": block.text}
            yield self._event(f"{EVENTS['call']}.done", **at, **named)
        else:
            part = self._part(block)
            more = {"logprobs": part["logprobs"]} if block.kind == "text" else {}
            yield self._event(f"{EVENTS[block.kind]}.done", **at, **self._place(block), text=block.text, **more)
            yield self._event("response.content_part.done", **at, **self._place(block), part=part)
        yield self._event("response.output_item.done", **at, item=item)

    def _place(self, block: Block) -> Json:
        place = {"item_id": self._item(block, "in_progress")["id"]}
        return place if block.kind == "call" else {**place, "content_index": 0}

    def _event(self, kind: str, **fields: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        content = {"type": kind, "sequence_number": number, **fields}
        return f"event: {kind}\ndata: ".encode() + encode(content) + b"\n\n"


PREFIXES = {"call": "fc", "text": "msg", "reasoning": "rs"}
EVENTS = {
    "call": "response.function_call_arguments",
    "text": "response.output_text",
    "reasoning": "response.reasoning_text",
}
