"""/v1/messages as Anthropic's own client sees it, with the shipped model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest

from pippin.config import ServerConfig
from tests.server.clients import ASK, DESCRIPTION, SCHEMA, SUM, anthropic_client
from tests.server.conftest import Running, Serve

TOOL: dict[str, Any] = {"name": "get_weather", "description": DESCRIPTION, "input_schema": SCHEMA}
GREEDY = {"temperature": 0}
PATH = "/v1/messages"


@pytest.fixture(scope="module")
def claude(demo: Running) -> Iterator[anthropic.Anthropic]:
    with anthropic_client(demo) as client:
        yield client


def same(one: Any, other: Any) -> None:
    """Two messages but for ids and cache use."""
    left, right = (m.model_dump(exclude={"id": True, "usage": True}) for m in (one, other))
    for message in (left, right):
        for block in message["content"]:
            block.pop("id", None)
            block.pop("parsed_output", None)
    assert left == right
    total = [m.usage.input_tokens + m.usage.cache_read_input_tokens for m in (one, other)]
    assert total[0] == total[1]
    assert one.usage.output_tokens == other.usage.output_tokens


@pytest.mark.parametrize(
    "more",
    [
        {"messages": SUM},
        {"messages": ASK, "tools": [TOOL]},
        {"messages": SUM, "max_tokens": 3},
        {"messages": SUM, "stop_sequences": ["= "]},
        {"messages": [*SUM, {"role": "assistant", "content": "12 + 30 ="}]},
        {"messages": SUM, "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]},
    ],
)
def test_streamed_and_whole_are_the_same(claude: anthropic.Anthropic, more: dict[str, Any]) -> None:
    options: Any = {"model": "demo", "max_tokens": 60, "extra_body": GREEDY} | more
    whole = claude.messages.create(**options)
    with claude.messages.stream(**options) as stream:
        streamed = stream.get_final_message()
    same(whole, streamed)


def test_a_sum_and_why_it_ended(claude: anthropic.Anthropic) -> None:
    options: Any = {"model": "demo", "max_tokens": 60, "messages": SUM, "extra_body": GREEDY}
    answer = claude.messages.create(**options)
    assert [block.model_dump()["text"] for block in answer.content] == ["12 + 30 = 42"]
    assert (answer.role, answer.model, answer.stop_reason) == ("assistant", "demo", "end_turn")
    assert claude.messages.create(**options | {"max_tokens": 2}).stop_reason == "max_tokens"
    stopped = claude.messages.create(**options, stop_sequences=["= ", "never"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "= ")


def test_a_call_and_its_result(claude: anthropic.Anthropic) -> None:
    options: Any = {"model": "demo", "max_tokens": 100, "tools": [TOOL], "extra_body": GREEDY}
    answer = claude.messages.create(**options, messages=ASK)
    assert answer.stop_reason == "tool_use"
    (block,) = answer.content
    assert block.type == "tool_use"
    assert (block.name, block.input) == ("get_weather", {"city": "Oslo"})
    result = {"type": "tool_result", "tool_use_id": block.id, "content": '{"temperature": 7, "sky": "rain"}'}
    history: list[Any] = [
        *ASK,
        {"role": "assistant", "content": [block.model_dump(include={"type", "id", "name", "input"})]},
        {"role": "user", "content": [result]},
    ]
    final = claude.messages.create(**options, messages=history)
    assert final.content[0].type == "text"
    assert "7" in final.content[0].text
    assert final.usage.cache_read_input_tokens


def test_a_loop_of_tools(claude: anthropic.Anthropic) -> None:
    """The client asks for a conversation that the server holds, is told that there are none, and goes on without."""

    @anthropic.beta_tool
    def get_weather(city: str) -> str:
        """Get the current weather in a city.

        Args:
            city: The city.
        """
        return '{"temperature": 7, "sky": "rain"}'

    runner = claude.beta.messages.tool_runner(model="m", max_tokens=100, tools=[get_weather], messages=ASK)
    kinds = [[block.type for block in message.content] for message in runner]
    assert kinds == [["tool_use"], ["text"]]


def test_events_come_in_order(demo: Running) -> None:
    body = {"model": "demo", "max_tokens": 60, "messages": ASK, "tools": [TOOL], "stream": True} | GREEDY
    with demo.http() as http:
        text = http.post(PATH, json=body).text
    found = [chunk.split("\n") for chunk in text.strip().split("\n\n")]
    kinds = [lines[0].removeprefix("event: ") for lines in found]
    assert [json.loads(lines[1].removeprefix("data: "))["type"] for lines in found] == kinds
    middle = [kind for kind in kinds if kind != "content_block_delta"]
    assert middle == ["message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop"]
    assert kinds.index("content_block_delta") == 2


def test_tokens_are_counted_as_they_will_be(claude: anthropic.Anthropic) -> None:
    options: Any = {"model": "demo", "messages": ASK, "tools": [TOOL], "system": "Be brief."}
    counted = claude.messages.count_tokens(**options)
    usage = claude.messages.create(**options, max_tokens=1).usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_models_are_listed(claude: anthropic.Anthropic) -> None:
    (model,) = claude.models.list().data
    assert (model.id, model.type) == ("pippin-demo", "model")


def test_a_line_for_billing_does_not_cost_the_cache(demo: Running) -> None:
    """Claude Code's first system block differs each time; what comes after it must be found again."""
    with demo.http() as http:
        for turn in range(2):
            system = [
                {"type": "text", "text": f"x-anthropic-billing-header: cch={turn};"},
                {"type": "text", "text": "You are a very careful assistant, and you always answer briefly."},
            ]
            body = {"model": "demo", "max_tokens": 2, "messages": SUM, "system": system}
            usage = http.post(PATH, json=body).json()["usage"]
    assert usage["cache_read_input_tokens"] > 20


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"max_tokens": None}, "max_tokens is required"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temprature": 1}, "did you mean temperature"),
        ({"top_p": 3}, "top_p"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"service_tier": "fast"}, "service_tier is not supported"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
        ({"thinking": {"type": "enabled"}}, "budget_tokens"),
        ({"tool_choice": {"type": "tool"}}, "name"),
        ({"tool_choice": {"type": "any"}}, "tool_choice needs tools"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "image"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "mood": 1}]}]}, "mood"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "b", "input": {}}]}]},
         "tool_use belongs"),
        ({"messages": []}, "at least one message"),
    ],
)  # fmt: skip
def test_what_can_not_be_done_is_refused_by_name(demo: Running, change: dict[str, Any], part: str) -> None:
    with demo.http() as http:
        response: httpx.Response = http.post(PATH, json={"model": "m", "max_tokens": 5, "messages": SUM} | change)
    assert response.status_code == 400, response.text
    body = response.json()
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    assert part in body["error"]["message"]


def test_the_key_may_come_as_x_api_key(serve: Serve) -> None:
    with serve(ServerConfig(api_key="right")) as running:
        with anthropic_client(running, "right") as client:
            assert client.models.list().data
        with anthropic_client(running, "wrong") as client, pytest.raises(anthropic.AuthenticationError):
            client.messages.create(model="m", max_tokens=1, messages=SUM)
