"""Tools and reasoning through OpenAI's client, with the shipped model: streamed and not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.server.conftest import Running

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ASK: list[Any] = [{"role": "user", "content": "What is the weather in Oslo?"}]


def assembled(chunks: Any) -> tuple[dict[str, Any], str | None]:
    """The message that a stream's deltas add up to, and how it ended."""
    message: dict[str, Any] = {"role": None, "content": "", "tool_calls": []}
    reason = None
    for chunk in chunks:
        for choice in chunk.choices:
            delta = choice.delta
            message["role"] = delta.role or message["role"]
            message["content"] += delta.content or ""
            for call in delta.tool_calls or []:
                if call.index == len(message["tool_calls"]):
                    function = {"name": call.function.name, "arguments": ""}
                    message["tool_calls"].append({"id": call.id, "type": "function", "function": function})
                message["tool_calls"][call.index]["function"]["arguments"] += call.function.arguments
            reason = choice.finish_reason or reason
    return message, reason


@pytest.fixture(scope="module")
def demo_ai(demo: Running) -> Iterator[openai.OpenAI]:
    with demo.openai() as client:
        yield client


def test_a_call_streamed_and_whole_and_its_result(demo_ai: openai.OpenAI) -> None:
    options: Any = {"model": "demo", "messages": ASK, "tools": [WEATHER], "temperature": 0, "max_tokens": 100}
    whole = demo_ai.chat.completions.create(**options)
    message, reason = whole.choices[0].message, whole.choices[0].finish_reason
    streamed, streamed_reason = assembled(demo_ai.chat.completions.create(stream=True, **options))
    assert reason == streamed_reason == "tool_calls"
    assert message.tool_calls is not None
    (call,) = message.tool_calls
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Oslo"})
    assert not message.content
    (same,) = streamed["tool_calls"]
    assert same["function"] == call.function.model_dump()
    assert streamed["content"] == ""

    history = [*ASK, message, {"role": "tool", "tool_call_id": call.id, "content": '{"temperature": 7, "sky": "rain"}'}]
    answer = demo_ai.chat.completions.create(**options | {"messages": history})
    assert answer.choices[0].finish_reason == "stop"
    assert "7" in (answer.choices[0].message.content or "")


def test_arguments_come_in_deltas(demo_ai: openai.OpenAI) -> None:
    def pieces() -> list[str]:
        stream = demo_ai.chat.completions.create(
            model="demo", messages=ASK, tools=[WEATHER], temperature=0, max_tokens=100, stream=True
        )
        calls = [c.function for x in stream for c in x.choices[0].delta.tool_calls or [] if c.function]
        return [function.arguments for function in calls if function.arguments]

    found = [pieces() for _ in range(5)]  # a client that is slow to read gets several at once
    assert {"".join(p) for p in found} == {'{"city": "Oslo"}'}
    assert max(map(len, found)) > 1


def test_tool_choice_none_gives_words(demo_ai: openai.OpenAI) -> None:
    answer = demo_ai.chat.completions.create(
        model="demo", messages=ASK, tools=[WEATHER], tool_choice="none", temperature=0, max_tokens=60
    )
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].message.content


def test_a_call_that_is_cut_off_is_text(demo: Running) -> None:
    body = {"messages": ASK, "tools": [WEATHER], "temperature": 0, "max_tokens": 12}
    with demo.http() as http:
        choice = http.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert "tool_calls" not in choice["message"]
    assert choice["message"]["content"].startswith("<tool_call>")


def test_a_tool_that_was_not_offered_can_not_be_chosen(demo: Running) -> None:
    body = {"messages": ASK, "tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}
    with demo.http() as http:
        response: httpx.Response = http.post("/v1/chat/completions", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tool_choice")


CALCULATOR: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "set_alarm",
        "parameters": {
            "type": "object",
            "properties": {"hour": {"type": "integer", "minimum": 0, "maximum": 23}, "loud": {"type": "boolean"}},
            "required": ["hour", "loud"],
            "additionalProperties": False,
        },
    },
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "set_alarm"}}])
@pytest.mark.parametrize("seed", range(3))
def test_a_call_that_is_asked_for_is_made_and_is_valid(
    demo_ai: openai.OpenAI, choice: Any, stream: bool, seed: int
) -> None:
    """At a temperature at which the model would write anything, and to a question that needs no tool."""
    options: Any = {
        "model": "demo", "messages": [{"role": "user", "content": "Hello!"}], "tools": [WEATHER, CALCULATOR],
        "tool_choice": choice, "temperature": 1.5, "seed": seed, "max_tokens": 300, "parallel_tool_calls": False,
    }  # fmt: skip
    if stream:
        message, reason = assembled(demo_ai.chat.completions.create(stream=True, **options))
    else:
        answer = demo_ai.chat.completions.create(**options).choices[0]
        message, reason = answer.message.model_dump(), answer.finish_reason
    assert reason == "tool_calls"
    assert not message["content"]
    (call,) = message["tool_calls"]
    arguments = json.loads(call["function"]["arguments"])
    if choice != "required":
        assert call["function"]["name"] == "set_alarm"
    if call["function"]["name"] == "set_alarm":
        assert set(arguments) == {"hour", "loud"}
        assert isinstance(arguments["hour"], int)
    else:
        assert isinstance(arguments["city"], str)


def test_strict_tools_are_called_by_their_schema(demo_ai: openai.OpenAI) -> None:
    """The model would say Oslo; the schema knows two other cities."""
    schema = {"type": "object", "properties": {"city": {"enum": ["Rome", "Lima"]}}, "required": ["city"]}
    function = WEATHER["function"] | {"parameters": schema, "strict": True}
    for seed in range(3):
        answer = demo_ai.chat.completions.create(
            model="demo", messages=ASK, tools=[{"type": "function", "function": function}], seed=seed, max_tokens=60
        )
        assert answer.choices[0].finish_reason == "tool_calls"
        for call in answer.choices[0].message.tool_calls or []:
            assert call.type == "function"
            assert json.loads(call.function.arguments)["city"] in ("Rome", "Lima")


def test_only_one_call_without_parallel_ones(demo_ai: openai.OpenAI) -> None:
    options: Any = {
        "model": "demo", "messages": [{"role": "user", "content": "What is the weather in Oslo and in Rome?"}],
        "tools": [WEATHER], "temperature": 0, "max_tokens": 200, "tool_choice": "required",
    }  # fmt: skip
    one = demo_ai.chat.completions.create(**options, parallel_tool_calls=False).choices[0]
    assert (len(one.message.tool_calls or []), one.finish_reason) == (1, "tool_calls")
    whole = demo_ai.chat.completions.create(**options | {"tool_choice": "auto"}, parallel_tool_calls=False).choices[0]
    assert (len(whole.message.tool_calls or []), whole.finish_reason) == (1, "tool_calls")
