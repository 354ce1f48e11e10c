"""Anthropic's /v1/messages and /v1/messages/count_tokens: to and from a Conversation.

Source: Anthropic's Messages API. Prompts are cached without being asked, so ``cache_control`` has no effect; what was
found in the cache is ``cache_read_input_tokens``.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from pippin.errors import RequestError
from pippin.server.blocks import Block, Blocks, Change
from pippin.server.chat import Ask, Conversation, Step, Usage, begin
from pippin.server.http import EventStream, JsonResponse, encode, error_parts, primed, read_body, unless_gone
from pippin.server.protocol import Body, Json, respell
from pippin.server.service import Service
from pippin.types import Grammar, SamplingParams

# Claude Code begins its system prompt with a line that differs from request to request. It is for Anthropic's accounts;
# left in, no two requests would have a prefix in common.
BILLING = "x-anthropic-billing-header:"

CacheControl = Json


class TextBlock(Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="text"):
    text: str
    cache_control: CacheControl | None = None
    citations: None = None


class ThinkingBlock(Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="thinking"):
    thinking: str
    signature: str = ""


class ToolUseBlock(Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: Json
    cache_control: CacheControl | None = None
    caller: Json | None = None


class ToolResultBlock(Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="tool_result"):
    tool_use_id: str
    content: str | list[TextBlock] = ""
    is_error: bool = False
    cache_control: CacheControl | None = None


class Message(Struct, kw_only=True, forbid_unknown_fields=True):
    role: Literal["user", "assistant", "system"]
    content: str | list[TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock]


class Tool(Struct, kw_only=True, forbid_unknown_fields=True):
    name: str
    input_schema: Json
    description: str | None = None
    type: Literal["custom"] | None = None
    strict: bool | None = None
    cache_control: CacheControl | None = None
    eager_input_streaming: bool | None = None


class ToolChoice(Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Thinking(Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["json_schema"]
    schema: Json


class OutputConfig(Struct, kw_only=True, forbid_unknown_fields=True):
    format: OutputFormat | None = None
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None


class CountRequest(Body, kw_only=True):
    """POST /v1/messages/count_tokens."""

    model: str | None = None
    messages: list[Message]
    system: str | list[TextBlock] = ""
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None

    ignored: ClassVar = {"metadata": "names Anthropic's user", "betas": "what they stand for is checked by field"}
    neutral: ClassVar = {
        "service_tier": ("auto", "standard_only"),
        "speed": ("standard",),
        "container": (),
        "mcp_servers": ([],),
        "inference_geo": (),
        "diagnostics": (),
        "user_profile_id": (),
        "workspace_id": (),
        "thread": (),
        "compaction": (),
        "fallbacks": (),
        "fallback_credit_token": (),
        "billing_policy": (),
        "context_management": (
            {"edits": []},
            {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        ),
    }


class MessagesRequest(CountRequest, kw_only=True):
    """POST /v1/messages."""

    max_tokens: int
    stop_sequences: tuple[str, ...] = ()
    stream: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1


async def messages(service: Service, http: Request) -> Response:
    """POST /v1/messages."""
    request = await read_body(http, MessagesRequest)
    model = service.check_model(request.model)
    rid = f"msg_{uuid.uuid4().hex}"
    conversation = await asked(service, request, params_of(request), rid)
    omits = request.thinking is not None and request.thinking.display == "omitted"
    answer = Answer(rid, model, omits)
    if request.stream:
        return EventStream(answer.events(await primed(http, conversation.steps())), error_event)
    return JsonResponse(await unless_gone(http, answer.whole(conversation.steps())))


async def count_tokens(service: Service, http: Request) -> Response:
    """POST /v1/messages/count_tokens: how long the prompt would be."""
    request = await read_body(http, CountRequest)
    service.check_model(request.model)
    conversation = await asked(service, request, SamplingParams(max_new_tokens=1), "count")
    return JsonResponse({"input_tokens": len(conversation.job.tokens)})


def params_of(request: MessagesRequest) -> SamplingParams:
    try:
        return SamplingParams(
            max_new_tokens=request.max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            stop=tuple(request.stop_sequences),
            grammar=grammar_of(request.output_config),
        )
    except RequestError as error:
        raise respell(error, {"max_new_tokens": "max_tokens", "stop": "stop_sequences"}) from error


def grammar_of(config: OutputConfig | None) -> Grammar | None:
    if config is None or config.format is None:
        return None
    return Grammar("json_schema", json.dumps(config.format.schema), "output_config.format.schema")


async def asked(service: Service, request: CountRequest, params: SamplingParams, rid: str) -> Conversation:
    """The request as a Conversation."""
    choice = request.tool_choice
    kinds: dict[str, str | tuple[str]] = {"auto": "auto", "any": "required", "none": "none"}
    if choice is not None and (choice.type == "tool") != (choice.name is not None):
        raise RequestError("tool_choice needs a name if its type is tool, and only then", "tool_choice.name")
    thinking = request.thinking
    if thinking is not None and thinking.type == "enabled" and thinking.budget_tokens is None:
        raise RequestError("thinking needs budget_tokens if it is enabled", "thinking.budget_tokens")
    found = list(translated(request))
    ask = Ask(
        messages=found,
        params=service.adapted(params, request.model),
        rid=rid,
        tools=[tool_dict(tool) for tool in request.tools],
        tool_choice="auto" if choice is None else kinds.get(choice.type) or (choice.name or "",),
        parallel=choice is None or not choice.disable_parallel_tool_use,
        thinking=thinking is not None and thinking.type != "disabled",
        effort=request.output_config.effort if request.output_config else None,
        budget=thinking.budget_tokens if thinking is not None and thinking.type == "enabled" else None,
        continue_final_message=bool(found) and found[-1]["role"] == "assistant",
    )
    return await begin(service, ask)


def tool_dict(tool: Tool) -> Json:
    """A tool in OpenAI's shape, as templates want it."""
    function: Json = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.strict:
        function["strict"] = True
    return {"type": "function", "function": function}


def translated(request: CountRequest) -> Iterator[Json]:
    """The messages in OpenAI's shape."""
    if system := text_of(request.system):
        yield {"role": "system", "content": system}
    for i, message in enumerate(request.messages):
        if isinstance(message.content, str):
            yield {"role": message.role, "content": message.content}
        elif message.role == "assistant":
            yield assistant(message.content, f"messages[{i}].content")
        else:
            yield from user(message.role, message.content, f"messages[{i}].content")


def text_of(content: str | Sequence[TextBlock]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(block.text for block in content if not block.text.startswith(BILLING))


def assistant(content: Sequence[Any], field: str) -> Json:
    texts = [block.text for block in content if isinstance(block, TextBlock)]
    thoughts = [block.thinking for block in content if isinstance(block, ThinkingBlock)]
    calls = [
        {"id": b.id, "type": "function", "function": {"name": b.name, "arguments": json.dumps(b.input)}}
        for b in content
        if isinstance(b, ToolUseBlock)
    ]
    if any(isinstance(block, ToolResultBlock) for block in content):
        raise RequestError("a tool_result belongs into a message of the user", field)
    message: Json = {"role": "assistant", "content": "".join(texts)}
    if any(thoughts):
        message["reasoning_content"] = "\n".join(filter(None, thoughts))
    return message | ({"tool_calls": calls} if calls else {})


def user(role: str, content: Sequence[Any], field: str) -> Iterator[Json]:
    """Results of tools come before the words, each as a message of its own."""
    for block in content:
        if isinstance(block, ToolResultBlock):
            text = text_of(block.content)
            text = f"Error: {text}" if block.is_error else text
            yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": text}
        elif not isinstance(block, TextBlock):
            raise RequestError(f"{block.__struct_config__.tag} belongs into a message of the assistant", field)
    if texts := [block for block in content if isinstance(block, TextBlock)]:
        yield {"role": role, "content": text_of(texts)}


class Answer:
    """One message in the making, whole or as events."""

    def __init__(self, id: str, model: str, omits_thinking: bool) -> None:
        self._id, self._model = id, model
        self._omits = omits_thinking
        self._usage = Usage()
        self._blocks = Blocks()
        self._ending: Json = {"stop_reason": None, "stop_sequence": None}

    async def whole(self, steps: AsyncGenerator[Step, None]) -> Json:
        async with aclosing(steps):
            async for step in steps:
                self._add(step)
        for _ in self._blocks.finish():
            pass
        content = [self._content(block) for block in self._blocks.done]
        return {**self._message(), "content": content, **self._ending, "usage": self._usage_dict()}

    async def events(self, steps: AsyncGenerator[Step, None]) -> AsyncGenerator[bytes, None]:
        started = False
        async with aclosing(steps):
            async for step in steps:
                changes = self._add(step)
                if not started:
                    started = True
                    yield event("message_start", message={**self._message(), "content": [], **self._empty()})
                for change in changes:
                    yield self._event(change)
        for change in self._blocks.finish():
            yield self._event(change)
        yield event("message_delta", delta=self._ending, usage=self._usage_dict())
        yield event("message_stop")

    def _add(self, step: Step) -> list[Change]:
        self._usage.add(step)
        changes = [c for c in self._blocks.push(step.parts) if not (self._omits and hides(c))]
        if step.finish is not None:
            matched = step.finish.matched
            reason = {"length": "max_tokens", "stop": "end_turn"}.get(step.finish.reason, "end_turn")
            if step.called:
                reason = "tool_use"
            elif isinstance(matched, str):
                reason = "stop_sequence"
            self._ending = {
                "stop_reason": reason,
                "stop_sequence": matched if reason == "stop_sequence" else None,
            }
        return changes

    def _event(self, change: Change) -> bytes:
        kind, index = change.block.kind, change.block.number
        if change.what == "opened":
            empty = self._content(Block(kind, "", change.block.name, change.block.id))
            return event("content_block_start", index=index, content_block=empty)
        if change.what == "grew":
            name, field = DELTAS[kind]
            return event("content_block_delta", index=index, delta={"type": name, field: change.text})
        stop = event("content_block_stop", index=index)
        if kind != "reasoning":
            return stop
        signature = {"type": "signature_delta", "signature": SIGNATURE}
        return event("content_block_delta", index=index, delta=signature) + stop

    def _content(self, block: Block) -> Json:
        if block.kind == "text":
            return {"type": "text", "text": block.text}
        if block.kind == "reasoning":
            signature = SIGNATURE if block.text else ""
            return {"type": "thinking", "thinking": "" if self._omits else block.text, "signature": signature}
        return {"type": "tool_use", "id": block.id, "name": block.name, "input": json.loads(block.text or "{}")}

    def _message(self) -> Json:
        return {"id": self._id, "type": "message", "role": "assistant", "model": self._model}

    def _empty(self) -> Json:
        return {"stop_reason": None, "stop_sequence": None, "usage": self._usage_dict() | {"output_tokens": 0}}

    def _usage_dict(self) -> Json:
        usage = self._usage
        return {
            "input_tokens": usage.prompt - usage.cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": usage.cached,
            "output_tokens": usage.generated,
            "output_tokens_details": {"thinking_tokens": usage.reasoning},
        }


SIGNATURE = "pippin"
"""Anthropic signs its thinking so that it can't be forged. Ours is not signed, and not checked."""

DELTAS = {
    "text": ("text_delta", "text"),
    "reasoning": ("thinking_delta", "thinking"),
    "call": ("input_json_delta", "partial_json"),
}


def hides(change: Change) -> bool:
    return change.block.kind == "reasoning" and change.what == "grew"


def event(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: ".encode() + encode({"type": kind, **fields}) + b"\n\n"


NO_THREADS = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
"""By which Anthropic's client knows that it must send whole conversations."""

KINDS = {401: "authentication_error", 404: "not_found_error", 413: "request_too_large", 503: "overloaded_error"}


def error_json(error: Exception) -> tuple[int, Json]:
    """The HTTP status and Anthropic's JSON of an error."""
    status, message, field = error_parts(error)
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "api_error")
    details = {"details": NO_THREADS} if field == "thread" else {}
    return status, {"type": "error", "error": {"type": kind, "message": message, **details}}


def error_event(error: Exception) -> bytes:
    return event("error", error=error_json(error)[1]["error"])
