"""Calls that a request insists on, streamed and whole, by real clients: equal field by field, on every surface."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.server.clients import DESCRIPTION, FUNCTION, anthropic_client
from tests.server.conftest import Running

HELLO: list[Any] = [{"role": "user", "content": "Hello!"}]
CITIES = {"type": "object", "properties": {"city": {"enum": ["Rome", "Lima"]}}, "required": ["city"]}
STRICT = {"name": "get_weather", "description": DESCRIPTION, "parameters": CITIES | {"additionalProperties": False}}
OTHER = {"name": "now", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}
FUNCTIONS = [FUNCTION, OTHER]
KINDS = ["required", "named", "strict"]


@pytest.fixture(scope="module")
def ai(demo: Running) -> Iterator[openai.OpenAI]:
    with demo.openai() as client:
        yield client


def functions(kind: str) -> list[dict[str, Any]]:
    return [STRICT | {"strict": True}] if kind == "strict" else FUNCTIONS


def check_call(kind: str, name: str, arguments: dict[str, Any]) -> None:
    if kind == "named":
        assert name == "get_weather"
    if kind == "strict":
        assert (name, arguments["city"] in ("Rome", "Lima")) == ("get_weather", True)
    assert isinstance(arguments.get("city", ""), str)


@pytest.mark.parametrize("kind", KINDS)
def test_chat(ai: openai.OpenAI, kind: str) -> None:
    choice: Any = {"type": "function", "function": {"name": "get_weather"}} if kind == "named" else "required"
    options: Any = {
        "model": "demo", "messages": HELLO, "tools": [{"type": "function", "function": f} for f in functions(kind)],
        "tool_choice": choice, "temperature": 0, "max_tokens": 200, "parallel_tool_calls": False,
    }  # fmt: skip
    whole = ai.chat.completions.create(**options).choices[0]
    with ai.chat.completions.stream(**options) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert whole.finish_reason == streamed.finish_reason == "tool_calls"
    assert not whole.message.content
    assert not streamed.message.content
    (one,), (same,) = whole.message.tool_calls or [], streamed.message.tool_calls or []
    assert one.type == "function"
    assert (same.function.name, same.function.arguments) == (one.function.name, one.function.arguments)
    check_call(kind, one.function.name, json.loads(one.function.arguments))


@pytest.mark.parametrize("kind", KINDS)
def test_responses(ai: openai.OpenAI, kind: str) -> None:
    choice: Any = {"type": "function", "name": "get_weather"} if kind == "named" else "required"
    tools: Any = [{"type": "function", "strict": None, **f} for f in functions(kind)]
    options: Any = {
        "model": "demo", "input": HELLO, "tools": tools, "tool_choice": choice, "temperature": 0,
        "max_output_tokens": 200, "parallel_tool_calls": False,
    }  # fmt: skip
    whole = ai.responses.create(**options)
    with ai.responses.stream(**options) as stream:
        deltas = "".join(e.delta for e in stream if e.type == "response.function_call_arguments.delta")
        streamed = stream.get_final_response()
    assert whole.status == streamed.status == "completed"
    (one,), (same,) = whole.output, streamed.output
    assert one.type == same.type == "function_call"
    assert (one.name, one.arguments, one.status) == (same.name, same.arguments, same.status)
    assert deltas == one.arguments
    assert whole.usage is not None
    assert streamed.usage is not None
    assert whole.usage.output_tokens == streamed.usage.output_tokens
    check_call(kind, one.name, json.loads(one.arguments))
    # What was called is there for the response that refers to it.
    result = {"type": "function_call_output", "call_id": one.call_id, "output": '{"temperature": 7, "sky": "rain"}'}
    more = ai.responses.create(
        model="demo", input=[result], previous_response_id=whole.id, tools=tools, temperature=0, max_output_tokens=40
    )
    assert more.previous_response_id == whole.id
    assert more.usage is not None
    assert more.usage.input_tokens > whole.usage.input_tokens


@pytest.mark.parametrize("kind", KINDS)
def test_messages(demo: Running, kind: str) -> None:
    choice: Any = {"type": "tool", "name": "get_weather"} if kind == "named" else {"type": "any"}
    tools: Any = [
        {"name": f["name"], "input_schema": f["parameters"], "strict": f.get("strict", False)} for f in functions(kind)
    ]
    options: Any = {
        "model": "demo", "messages": HELLO, "tools": tools, "extra_body": {"temperature": 0}, "max_tokens": 200,
        "tool_choice": choice | {"disable_parallel_tool_use": True},
    }  # fmt: skip
    with anthropic_client(demo) as claude:
        whole = claude.messages.create(**options)
        with claude.messages.stream(**options) as stream:
            kinds = [event.type for event in stream]
            streamed = stream.get_final_message()
    assert whole.stop_reason == streamed.stop_reason == "tool_use"
    (one,), (same,) = whole.content, streamed.content
    assert one.type == same.type == "tool_use"
    assert (one.name, one.input) == (same.name, same.input)
    assert whole.usage.output_tokens == streamed.usage.output_tokens
    assert (kinds[0], kinds[1], kinds[-1]) == ("message_start", "content_block_start", "message_stop")
    check_call(kind, one.name, dict(one.input))


def test_a_grammar_with_n_and_logprobs_spells_out_what_it_forces(ai: openai.OpenAI) -> None:
    """With logprobs forced tokens are drawn one by one: each has an entry, and their texts are the answer's."""
    options: Any = {
        "model": "demo", "messages": HELLO, "n": 3, "logprobs": True, "top_logprobs": 2, "seed": 1, "max_tokens": 120,
        "extra_body": {"guided_json": STRICT["parameters"]},
    }  # fmt: skip
    for choice in ai.chat.completions.create(**options).choices:
        assert choice.logprobs is not None
        entries = choice.logprobs.content or []
        assert json.loads(choice.message.content or "")["city"] in ("Rome", "Lima")
        assert (choice.message.content or "") in "".join(entry.token for entry in entries)
        assert all(entry.logprob <= 0 and len(entry.top_logprobs) == 2 for entry in entries)


def test_forced_tokens_change_no_answer(demo: Running) -> None:
    """Without logprobs the same tokens are appended, not drawn."""
    ask: dict[str, Any] = {"messages": HELLO, "seed": 1, "max_tokens": 120, "guided_json": STRICT["parameters"], "n": 3}
    with demo.http() as http:
        drawn = http.post("/v1/chat/completions", json=ask | {"logprobs": True}).json()
        forced = http.post("/v1/chat/completions", json=ask).json()
    texts = [[choice["message"]["content"] for choice in answer["choices"]] for answer in (drawn, forced)]
    assert texts[0] == texts[1]
