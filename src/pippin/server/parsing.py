"""SGLang's /parse_function_call and /separate_reasoning: the parsers, on a text that the client has."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from pippin.errors import ConfigError, RequestError
from pippin.server.chat import Message
from pippin.server.http import JsonResponse, off_loop, read_body
from pippin.server.protocol import Body, Tool
from pippin.server.service import Service
from pippin.text.reply import OFF, Reply, Speech
from pippin.text.tools.offered import Offered


class ParseRequest(Body, kw_only=True):
    """POST /parse_function_call."""

    text: str
    tools: list[Tool]
    tool_call_parser: str = "auto"


class SeparateRequest(Body, kw_only=True):
    """POST /separate_reasoning."""

    text: str
    reasoning_parser: str = "auto"


async def parse_function_call(service: Service, http: Request) -> Response:
    """POST /parse_function_call: the calls in a text, and what is left of it."""
    request = await read_body(http, ParseRequest)
    speech = speech_of(service, request.tool_call_parser, OFF)
    offered = Offered([tool.as_dict() for tool in request.tools])
    found = await off_loop(len(request.text), parsed, speech, request.text, offered)
    names = offered.names
    calls = [{"tool_index": names.index(c.name), "name": c.name, "parameters": c.arguments} for c in found.calls]
    return JsonResponse({"normal_text": found.content, "calls": calls})


async def separate_reasoning(service: Service, http: Request) -> Response:
    """POST /separate_reasoning: the reasoning in a text, and what is left of it."""
    request = await read_body(http, SeparateRequest)
    speech = speech_of(service, OFF, request.reasoning_parser)
    found = await off_loop(len(request.text), parsed, speech, request.text, None)
    return JsonResponse({"reasoning_text": found.reasoning, "text": found.content})


def speech_of(service: Service, tool_parser: str, reasoning_parser: str) -> Speech:
    """Raises RequestError for a parser that isn't there."""
    try:
        return Speech.of(service.tokenizer, service.chat.known(), tool_parser, reasoning_parser)
    except ConfigError as error:
        field = (error.option or "").removeprefix("--").replace("-", "_")
        raise RequestError(f"{field} {error.message}", field) from error


def parsed(speech: Speech, text: str, offered: Offered | None) -> Message:
    """What a whole text comes to."""
    reply, message = Reply(speech, "", offered), Message()
    message.take([*reply.push(text), *reply.finish()])
    return message
