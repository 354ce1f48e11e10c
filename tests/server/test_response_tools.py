"""Tools of /v1/responses: namespaces, what OpenAI's own service would run, and who may be called."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pippin.errors import RequestError
from pippin.server.response_tools import AllowedTools, NamedFunction, ResponseTool, ResponseTools, flat
from pippin.server.responses import messages_of
from tests.server.clients import FUNCTION, SCHEMA
from tests.server.conftest import Running
from tests.server.speaker import speaking

SEARCH = {"type": "web_search", "external_web_access": True}
SPAWN = {"type": "function", "name": "spawn", "description": "Begins one.", "parameters": SCHEMA, "strict": False}
CLOSE = {"type": "function", "name": "close", "parameters": SCHEMA}
AGENTS = {"type": "namespace", "name": "agents", "description": "Helpers.", "tools": [SPAWN, CLOSE]}
WEATHER = {"type": "function", **FUNCTION}
CALL = '<tool_call>\n{"name": "agents__spawn", "arguments": {"city": "Oslo"}}\n</tool_call>'

NAMES = st.text("abc_", min_size=1, max_size=4)


def tools_of(*tools: Any) -> ResponseTools:
    return ResponseTools(msgspec.convert(tools, tuple[ResponseTool, ...]))


@pytest.fixture(scope="module")
def speaker() -> Iterator[Running]:
    with speaking({"spawn": CALL, '{"ok": true}': "It runs."}) as running:
        yield running


@pytest.fixture(scope="module")
def ai(speaker: Running) -> Iterator[openai.OpenAI]:
    with speaker.openai() as client:
        yield client


@given(st.lists(st.tuples(NAMES, st.lists(NAMES, unique=True, max_size=3)), max_size=4), st.lists(NAMES, unique=True))
def test_every_function_has_one_name_and_keeps_both(spaces: list[tuple[str, list[str]]], plain: list[str]) -> None:
    given: list[Any] = [{"type": "function", "name": name} for name in plain]
    given += [
        {"type": "namespace", "name": space, "tools": [{"type": "function", "name": n} for n in names]}
        for space, names in spaces
    ]
    pairs: list[tuple[str | None, str]] = [(None, n) for n in plain]
    pairs += [(space, n) for space, names in spaces for n in names]
    known = [flat(space, name) for space, name in pairs]
    if len(set(known)) < len(known):
        with pytest.raises(RequestError, match="already"):
            tools_of(*given)
        return
    tools = tools_of(*given)
    assert [f["function"]["name"] for f in tools.functions] == known
    called = [tools.called(name) for name in known]
    assert [(c.namespace, c.name) for c in called] == pairs
    assert not tools.warnings


def test_what_templates_are_told() -> None:
    spawn, close = tools_of(AGENTS).functions
    assert spawn["function"] == {
        "name": "agents__spawn", "description": "Helpers.\n\nBegins one.", "parameters": SCHEMA
    }  # fmt: skip
    assert close["function"] == {"name": "agents__close", "parameters": SCHEMA}
    assert flat("mcp__files__", "read") == "mcp__files__read"


def test_who_may_be_called() -> None:
    tools = tools_of(AGENTS, WEATHER)
    assert tools.chosen(NamedFunction(name="spawn")) == (tools.functions, ("agents__spawn",))
    assert tools.chosen(NamedFunction(name="get_weather"))[1] == ("get_weather",)
    allowed = AllowedTools(mode="required", tools=(NamedFunction(name="agents__close"),))
    functions, choice = tools.chosen(allowed)
    assert ([f["function"]["name"] for f in functions], choice) == (["agents__close"], "required")
    with pytest.raises(RequestError, match="there is no tool 'fly'") as caught:
        tools.chosen(AllowedTools(mode="auto", tools=(NamedFunction(name="fly"),)))
    assert caught.value.field == "tool_choice.tools[0]"
    with pytest.raises(RequestError, match="any of agents__spawn, more__spawn"):
        tools_of(AGENTS, AGENTS | {"name": "more"}).chosen(NamedFunction(name="spawn"))


def test_a_call_in_a_namespace_comes_and_goes_with_both_names(ai: openai.OpenAI) -> None:
    options: Any = {"model": "m", "tools": [AGENTS, WEATHER, SEARCH]}
    whole = ai.responses.create(input="spawn", **options)
    events = list(ai.responses.create(input="spawn", stream=True, **options))
    (call,) = whole.output
    assert call.type == "function_call"
    assert (call.namespace, call.name, call.arguments) == ("agents", "spawn", '{"city": "Oslo"}')
    (done,) = [e for e in events if e.type == "response.function_call_arguments.done"]
    assert (done.name, done.arguments) == ("spawn", call.arguments)
    for kind in ("response.output_item.added", "response.output_item.done"):
        (item,) = [e.item for e in events if e.type == kind]
        assert item.type == "function_call"
        assert (item.namespace, item.name) == ("agents", "spawn")
    output = {"type": "function_call_output", "call_id": call.call_id, "output": '{"ok": true}'}
    mine: Any = [{"role": "user", "content": "spawn"}, call.model_dump(exclude_none=True), output]
    assert ai.responses.create(input=mine, **options).output_text == "It runs."
    kept: Any = [output]
    assert ai.responses.create(input=kept, previous_response_id=whole.id, **options).output_text == "It runs."


def test_the_model_reads_its_call_as_it_wrote_it() -> None:
    call = {"type": "function_call", "call_id": "c", "namespace": "agents", "name": "spawn", "arguments": "{}"}
    (message,) = messages_of([call])
    assert message["tool_calls"][0]["function"]["name"] == "agents__spawn"


def test_what_is_left_out_is_said(ai: openai.OpenAI) -> None:
    tools: Any = [WEATHER, SEARCH, {"type": "image_generation", "size": "auto"}, {"type": "web_search_preview"}]
    response = ai.responses.create(model="m", input="x", tools=tools)
    assert response.output_text == "Hello."
    assert [tool.type for tool in response.tools] == ["function"]
    warnings = response.model_dump()["warnings"]
    assert [w["param"] for w in warnings] == ["tools[1]", "tools[2]", "tools[3]"]
    assert "web_search is not offered to the model" in warnings[0]["message"]
    created, *_ = ai.responses.create(model="m", input="x", tools=tools, stream=True)
    assert created.model_dump()["response"]["warnings"] == warnings
    assert "warnings" not in ai.responses.create(model="m", input="x", tools=tools[:1]).model_dump()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"tools": [SEARCH], "tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"tools": [SEARCH], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "file_search", "vector_store_ids": ["a"]}]}, "tools[0]"),
        ({"tools": [{"type": "mcp", "server_label": "a", "server_url": "http://a"}]}, "tools[0]"),
        ({"tools": [{"type": "custom", "name": "a"}]}, "tools[0]"),
        ({"tools": [{"type": "code_interpreter", "container": {"type": "auto"}}]}, "tools[0]"),
        ({"tools": [{"type": "web_search", "odd": 1}]}, "tools[0]"),
        ({"tools": [AGENTS | {"odd": 1}]}, "tools[0]"),
        ({"tools": [AGENTS | {"tools": [{"type": "custom", "name": "a"}]}]}, "tools[0].tools[0]"),
        ({"tools": [AGENTS, {"type": "function", "name": "agents__spawn"}]}, "tools[1].name"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "fly"}}, "tool_choice"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "a", "arguments": "", "namespace": 1}]},
         "input[0].namespace"),
    ],
)  # fmt: skip
def test_what_somebody_set_up_is_refused(speaker: Running, change: dict[str, Any], field: str) -> None:
    with speaker.http() as http:
        response = http.post("/v1/responses", json={"model": "m", "input": "x"} | change)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].startswith(field), response.text


def test_allowed_tools_in_a_chat(demo: Running) -> None:
    """Whatever the question, only what is allowed is called, if something must be."""
    other: Any = {"type": "function", "function": {"name": "roll_dice", "parameters": {"type": "object"}}}
    tools: Any = [{"type": "function", "function": FUNCTION}, other]
    dice = {"type": "function", "function": {"name": "roll_dice"}}
    choice: Any = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [dice]}}
    messages: Any = [{"role": "user", "content": "What is the weather in Oslo?"}]
    options: Any = {"model": "m", "messages": messages, "tools": tools, "temperature": 0, "max_tokens": 60}
    with demo.openai() as ai:
        free = ai.chat.completions.create(**options).choices[0].message.tool_calls
        bound = ai.chat.completions.create(**options, tool_choice=choice).choices[0].message.tool_calls
    assert free
    assert free[0].function.name == "get_weather"
    assert bound
    assert {call.function.name for call in bound} == {"roll_dice"}
    choice["allowed_tools"]["tools"] = [{"type": "function", "function": {"name": "fly"}}]
    with demo.http() as http:
        refused = http.post("/v1/chat/completions", json=options | {"tool_choice": choice})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "tool_choice.allowed_tools.tools[0]"


# What Codex 0.169 asks with a provider of its own and no other setting: the same fields, other words.
CODEX: dict[str, Any] = {
    "model": "any",
    "stream": True,
    "input": [
        {"type": "message", "id": "msg_1", "role": "developer", "content": [{"type": "input_text", "text": "Code."}]},
        {"type": "message", "id": "msg_2", "role": "user", "content": [{"type": "input_text", "text": "spawn"}]},
    ],
    "tools": [WEATHER | {"strict": False}, AGENTS, SEARCH],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "reasoning": {"summary": "auto"},
    "store": False,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "01a1",
    "client_metadata": {"session_id": "01a1"},
}


def test_codex_as_it_comes(speaker: Running) -> None:
    with speaker.http() as http:
        lines = http.post("/v1/responses", json=CODEX).text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    assert events[-1]["type"] == "response.completed"
    (call,) = events[-1]["response"]["output"]
    assert (call["namespace"], call["name"]) == ("agents", "spawn")
