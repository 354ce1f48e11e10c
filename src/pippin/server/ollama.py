"""Ollama's /api: to and from a Conversation.

Source: Ollama's API documentation. Answers are lines of JSON unless ``stream`` is false. Durations are nanoseconds.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any, ClassVar, Literal

from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

import pippin
from pippin.completion import new_id
from pippin.errors import RequestError
from pippin.server.chat import Ask, Conversation, Step, Usage, begin, plain
from pippin.server.chat import Message as Answered
from pippin.server.http import EventStream, JsonResponse, encode, error_parts, primed, read_body, unless_gone
from pippin.server.logprobs import chat_logprobs
from pippin.server.protocol import Body, Json, Tool, build, respell
from pippin.server.service import Service
from pippin.text.parts import CallBroken, Reasoning, Text
from pippin.types import Grammar, SamplingParams

API_VERSION = "0.12.6"
"""The version of Ollama whose API this is; clients ask whether it is new enough."""

LOADING = "set when the server starts"

Level = Literal["low", "medium", "high"]


class Options(Body, kw_only=True):
    """Ollama's ``options``, with its defaults."""

    num_predict: int = -1
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.9
    min_p: float = 0.0
    seed: int | None = None
    stop: str | tuple[str, ...] = ()
    repeat_penalty: float = 1.0
    repeat_last_n: int = -1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    ignored: ClassVar = dict.fromkeys(
        ("num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "numa", "low_vram", "f16_kv", "use_mmap",
         "use_mlock", "vocab_only", "embedding_only", "logits_all"), LOADING
    ) | {"num_keep": "prompts that are too long are refused, not cut"}  # fmt: skip
    neutral: ClassVar = {
        "mirostat": (0,),
        "mirostat_tau": (5.0,),
        "mirostat_eta": (0.1,),
        "tfs_z": (1.0, 1),
        "typical_p": (1.0, 1),
        "penalize_newline": (True, False),
    }


class Function(Struct, kw_only=True, forbid_unknown_fields=True):
    name: str
    arguments: Json = {}
    index: int | None = None


class ToolCall(Struct, kw_only=True, forbid_unknown_fields=True):
    function: Function
    id: str | None = None
    type: Literal["function"] = "function"


class Message(Struct, kw_only=True, forbid_unknown_fields=True):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = ""
    thinking: str | None = None
    images: list[Any] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class OllamaRequest(Body, kw_only=True):
    """What /api/chat and /api/generate share."""

    model: str
    stream: bool = True
    options: Json | None = None
    think: bool | Level | None = None
    format: Literal["", "json"] | Json = ""
    logprobs: bool = False
    top_logprobs: int = 0

    ignored: ClassVar = {"keep_alive": "the model stays loaded for as long as the server runs"}
    neutral: ClassVar = {"truncate": (True, False), "shift": (True, False)}

    @property
    def grammar(self) -> Grammar | None:
        """``format``: json, or a JSON schema."""
        if not self.format:
            return None
        if self.format == "json":
            return Grammar("json_object", "", "format")
        return Grammar("json_schema", json.dumps(self.format), "format")

    def params(self, context_length: int) -> SamplingParams:
        """Raises RequestError with Ollama's names."""
        options = read_options(self.options or {})
        if options.repeat_penalty != 1.0 and options.repeat_last_n not in (-1, 0):
            raise RequestError("repeat_last_n must be -1 (all tokens) or 0 (off)", "options.repeat_last_n")
        try:
            return SamplingParams(
                max_new_tokens=context_length if options.num_predict < 0 else options.num_predict,
                temperature=options.temperature,
                top_k=options.top_k if options.top_k > 0 else -1,
                top_p=options.top_p,
                min_p=options.min_p,
                seed=options.seed,
                stop=(options.stop,) if isinstance(options.stop, str) else tuple(options.stop),
                repetition_penalty=1.0 if options.repeat_last_n == 0 else options.repeat_penalty,
                presence_penalty=options.presence_penalty,
                frequency_penalty=options.frequency_penalty,
                grammar=self.grammar,
                logprobs=self.logprobs,
                top_logprobs=self.top_logprobs if self.logprobs else 0,
            )
        except RequestError as error:
            raise respell(error, {n: f"options.{o}" for n, o in NAMES.items()}) from error


NAMES = {
    "max_new_tokens": "num_predict", "repetition_penalty": "repeat_penalty",
    **{name: name for name in ("temperature", "top_k", "top_p", "min_p", "seed", "stop")},
    **{name: name for name in ("presence_penalty", "frequency_penalty")},
}  # fmt: skip


class OllamaChatRequest(OllamaRequest, kw_only=True):
    """POST /api/chat."""

    messages: tuple[Message, ...] = ()
    tools: tuple[Tool, ...] = ()


class OllamaGenerateRequest(OllamaRequest, kw_only=True):
    """POST /api/generate."""

    prompt: str = ""
    system: str = ""
    raw: bool = False
    context: tuple[int, ...] = ()

    neutral: ClassVar = OllamaRequest.neutral | {
        "suffix": ("",),
        "images": ([],),
        "template": ("",),
        "width": (0,),
        "height": (0,),
        "steps": (0,),
    }


class ShowRequest(Body, kw_only=True):
    """POST /api/show."""

    model: str = ""
    name: str = ""
    verbose: bool = False

    ignored: ClassVar = {}
    neutral: ClassVar = {"system": ("",), "template": ("",), "options": ({},)}


def read_options(given: Mapping[str, Any]) -> Options:
    try:
        return build(given, Options)
    except RequestError as error:
        raise RequestError(error.message, f"options.{error.field}" if error.field else "options") from error


async def chat(service: Service, http: Request) -> Response:
    """POST /api/chat."""
    request = await read_body(http, OllamaChatRequest)
    model = service.check_model(request.model)
    if not request.messages:
        return loaded(model, {"message": {"role": "assistant", "content": ""}})
    messages = [m for i, message in enumerate(request.messages) for m in translated(message, i)]
    ask = Ask(
        messages=messages,
        params=service.adapted(request.params(service.info.context_length), request.model),
        rid=new_id(),
        tools=[tool.as_dict() for tool in request.tools],
        continue_final_message=messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1],
        **thinking(request.think),
    )
    return await respond(service, http, request, await begin(service, ask), ChatLines(service, request, model))


async def generate(service: Service, http: Request) -> Response:
    """POST /api/generate."""
    request = await read_body(http, OllamaGenerateRequest)
    model = service.check_model(request.model)
    if not request.prompt:
        return loaded(model, {"response": ""})
    if request.raw and (request.system or request.context):
        raise RequestError("raw takes the prompt as it is: send no system and no context", "raw")
    messages = [{"role": "system", "content": request.system}] if request.system else []
    ask = Ask(
        messages=[*messages, {"role": "user", "content": request.prompt}],
        params=service.adapted(request.params(service.info.context_length), request.model),
        rid=new_id(),
        **thinking(request.think),
    )
    conversation = (
        await plain(service, ask, request.prompt) if request.raw else await begin(service, ask, request.context)
    )
    lines = GenerateLines(service, request, model, None if request.raw else conversation.job.tokens)
    return await respond(service, http, request, conversation, lines)


def thinking(think: bool | Level | None) -> dict[str, Any]:
    return {"thinking": True, "effort": think} if isinstance(think, str) else {"thinking": think}


def translated(message: Message, index: int) -> Iterator[Json]:
    """A message in OpenAI's shape."""
    if message.images:
        raise RequestError("images are not supported", f"messages[{index}].images")
    found: Json = {"role": message.role, "content": message.content or ""}
    for name, value in (
        ("reasoning_content", message.thinking),
        ("name", message.tool_name),
        ("tool_call_id", message.tool_call_id),
    ):
        if value is not None:
            found[name] = value
    if message.tool_calls:
        found["tool_calls"] = [
            {"id": call.id or f"call_{i}", "type": "function", "function": {
                "name": call.function.name, "arguments": json.dumps(call.function.arguments)}}
            for i, call in enumerate(message.tool_calls)
        ]  # fmt: skip
    yield found


def loaded(model: str, empty: Json) -> JsonResponse:
    """The answer to a request without a prompt: Ollama loads a model so. Ours is there."""
    return JsonResponse({"model": model, "created_at": now(), **empty, "done": True, "done_reason": "load"})


def now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


async def respond(
    service: Service, http: Request, request: OllamaRequest, conversation: Conversation, lines: Lines
) -> Response:
    if not request.stream:
        return JsonResponse(await unless_gone(http, lines.whole(conversation.steps())))
    steps = await primed(http, conversation.steps())
    return EventStream(lines.stream(steps), error_line, "application/x-ndjson")


class Lines:
    """One answer in the making, as lines or as one object. Subclasses have the place of its text."""

    def __init__(self, service: Service, request: OllamaRequest, model: str) -> None:
        self._tokenizer = service.tokenizer
        self._logprobs = request.logprobs
        self._model = model
        self._usage = Usage()
        self._answer = Answered()
        self._began = time.perf_counter_ns()
        self._first = 0
        self._tokens: list[int] = []

    def shown(self, text: str, thought: str, calls: list[Json]) -> Json:
        raise NotImplementedError

    def last(self) -> Json:
        return {}

    async def whole(self, steps: AsyncGenerator[Step, None]) -> Json:
        async with aclosing(steps):
            async for step in steps:
                self._add(step)
        calls = [called(i, call.id, call.name, call.arguments) for i, call in enumerate(self._answer.calls)]
        shown = self.shown(self._answer.content, self._answer.reasoning, calls)
        return {**self._head(), **shown, **self._logprob_list(self._answer.logprobs), **self._end()}

    async def stream(self, steps: AsyncGenerator[Step, None]) -> AsyncGenerator[bytes, None]:
        async with aclosing(steps):
            async for step in steps:
                before = len(self._answer.calls)
                self._add(step)
                text = "".join(p.text for p in step.parts if isinstance(p, Text | CallBroken))
                thought = "".join(p.text for p in step.parts if isinstance(p, Reasoning))
                new = self._answer.calls[before:]
                calls = [called(before + i, c.id, c.name, c.arguments) for i, c in enumerate(new)]
                logprobs = self._logprob_list(step.delta.logprobs)
                if text or thought or calls or logprobs:
                    yield line({**self._head(), **self.shown(text, thought, calls), **logprobs, "done": False})
        yield line({**self._head(), **self.shown("", "", []), **self._end()})

    def _add(self, step: Step) -> None:
        self._first = self._first or time.perf_counter_ns()
        self._usage.add(step)
        self._answer.add(step)
        self._tokens += step.delta.tokens

    def _head(self) -> Json:
        return {"model": self._model, "created_at": now()}

    def _logprob_list(self, entries: Any) -> Json:
        if not self._logprobs or not entries:
            return {}
        return {"logprobs": chat_logprobs(self._tokenizer, entries)["content"]}

    def _end(self) -> Json:
        finish, end = self._answer.finish, time.perf_counter_ns()
        first = self._first or end
        return {
            **self.last(),
            "done": True,
            "done_reason": "length" if finish is not None and finish.reason == "length" else "stop",
            "total_duration": end - self._began,
            "load_duration": 0,
            "prompt_eval_count": self._usage.prompt,
            "prompt_eval_duration": first - self._began,
            "eval_count": self._usage.generated,
            "eval_duration": end - first,
        }


class ChatLines(Lines):
    def shown(self, text: str, thought: str, calls: list[Json]) -> Json:
        message: Json = {"role": "assistant", "content": text}
        if thought:
            message["thinking"] = thought
        return {"message": message | ({"tool_calls": calls} if calls else {})}


class GenerateLines(Lines):
    """``prompt`` is the prompt's tokens, which the last line repeats as ``context`` with the answer's."""

    def __init__(self, service: Service, request: OllamaRequest, model: str, prompt: list[int] | None) -> None:
        super().__init__(service, request, model)
        self._prompt = prompt

    def shown(self, text: str, thought: str, calls: list[Json]) -> Json:
        return {"response": text} | ({"thinking": thought} if thought else {})

    def last(self) -> Json:
        return {} if self._prompt is None else {"context": [*self._prompt, *self._tokens]}


def called(index: int, id: str, name: str, arguments: str) -> Json:
    return {"id": id, "function": {"index": index, "name": name, "arguments": json.loads(arguments)}}


def line(content: Json) -> bytes:
    return encode(content) + b"\n"


def error_json(error: Exception) -> tuple[int, Json]:
    """The HTTP status and Ollama's JSON of an error."""
    status, message, _ = error_parts(error)
    return status, {"error": message}


def error_line(error: Exception) -> bytes:
    return line(error_json(error)[1])


# --- what is served ---


async def tags(service: Service, http: Request) -> Response:
    """GET /api/tags: the one model that is served."""
    return JsonResponse({"models": [card(service) | {"modified_at": started(service)}]})


async def ps(service: Service, http: Request) -> Response:
    """GET /api/ps: it is loaded, and stays so."""
    info = service.info
    running = {
        "expires_at": "2318-09-24T00:00:00Z",  # Ollama's "for ever"
        "size_vram": 0 if info.device.startswith("cpu") else info.weight_bytes + info.pool_bytes,
        "context_length": info.context_length,
    }
    return JsonResponse({"models": [card(service) | running]})


async def show(service: Service, http: Request) -> Response:
    """POST /api/show."""
    request = await read_body(http, ShowRequest)
    service.check_model(request.model or request.name or None)
    info, speech = service.info, service.speech
    capabilities = ["completion", *(["tools"] if speech.tools else []), *(["thinking"] if speech.reasoning else [])]
    return JsonResponse(
        {
            "modelfile": f"FROM {service.model_name}\n",
            "parameters": "",
            "template": service.chat.known() or "",
            "license": "",
            "details": details(service),
            "model_info": {
                "general.architecture": info.model_type,
                "general.basename": service.model_name,
                f"{info.model_type}.context_length": info.context_length,
                f"{info.model_type}.vocab_size": info.vocab_size,
            },
            "capabilities": capabilities,
            "modified_at": started(service),
        }
    )


async def version(service: Service, http: Request) -> Response:
    """GET /api/version."""
    return JsonResponse({"version": API_VERSION, "server": f"pippin {pippin.__version__}"})


def card(service: Service) -> Json:
    name = service.model_name
    digest = hashlib.sha256(f"{name} {service.info.weight_bytes}".encode()).hexdigest()
    return {
        "name": name, "model": name, "size": service.info.weight_bytes, "digest": digest, "details": details(service),
    }  # fmt: skip


def details(service: Service) -> Json:
    info = service.info
    return {
        "parent_model": "",
        "format": "safetensors",
        "family": info.model_type,
        "families": [info.model_type],
        "parameter_size": "",
        "quantization_level": info.quantization or info.dtype,
    }


def started(service: Service) -> str:
    return datetime.fromtimestamp(service.created, UTC).isoformat().replace("+00:00", "Z")
