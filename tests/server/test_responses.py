"""/v1/responses as OpenAI's client sees it, with the shipped model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from pippin.server.store import Store, Stored
from tests.server.clients import ASK, FUNCTION, SUM
from tests.server.conftest import Running

TOOL: dict[str, Any] = {"type": "function", **FUNCTION, "strict": False}


@pytest.fixture(scope="module")
def ai(demo: Running) -> Iterator[openai.OpenAI]:
    with demo.openai() as client:
        yield client


VARY = {"id", "created_at", "completed_at", "call_id", "usage", "store"}


def essence(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: essence(v) for k, v in value.items() if k not in VARY and not k.startswith("parsed")}
    if isinstance(value, list):
        return [essence(v) for v in value]
    return round(value, 3) if isinstance(value, float) else value


@pytest.mark.parametrize(
    "more",
    [
        {"input": "What is 12 + 30?"},
        {"input": ASK, "tools": [TOOL]},
        {"input": SUM, "max_output_tokens": 3},
        {"input": SUM, "instructions": "Be brief.", "metadata": {"a": "b"}},
        {"input": SUM, "include": ["message.output_text.logprobs"], "top_logprobs": 2},
    ],
)
def test_streamed_and_whole_are_the_same(ai: openai.OpenAI, more: dict[str, Any]) -> None:
    options: Any = {"model": "demo", "temperature": 0, "max_output_tokens": 60} | more
    whole = ai.responses.create(**options)
    with ai.responses.stream(**options) as stream:
        events = list(stream)
        streamed = stream.get_final_response() if whole.status == "completed" else events[-1].response
    assert essence(streamed.model_dump()) == essence(whole.model_dump())
    assert streamed.usage is not None
    assert whole.usage is not None
    assert streamed.usage.output_tokens == whole.usage.output_tokens
    assert [e.sequence_number for e in events if hasattr(e, "sequence_number")] == sorted(
        e.sequence_number for e in events if hasattr(e, "sequence_number")
    )


def test_events_come_in_order(ai: openai.OpenAI) -> None:
    events = list(ai.responses.create(model="demo", input=SUM, temperature=0, stream=True))
    kinds = [event.type for event in events]
    assert [kind for i, kind in enumerate(kinds) if kind not in kinds[:i]] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text == "12 + 30 = 42"
    assert [e.sequence_number for e in events] == list(range(len(events)))


def test_a_call_and_its_result(ai: openai.OpenAI) -> None:
    answer = ai.responses.create(model="demo", input=ASK, tools=[TOOL], temperature=0)
    (call,) = answer.output
    assert call.type == "function_call"
    assert (call.name, call.arguments) == ("get_weather", '{"city": "Oslo"}')
    output: Any = {
        "type": "function_call_output",
        "call_id": call.call_id,
        "output": '{"temperature": 7, "sky": "rain"}',
    }
    by_id = ai.responses.create(
        model="demo", input=[output], previous_response_id=answer.id, tools=[TOOL], temperature=0
    )
    by_items = ai.responses.create(
        model="demo", input=[*ASK, call.model_dump(exclude_none=True), output], tools=[TOOL], temperature=0
    )
    assert "7" in by_id.output_text
    assert by_id.output_text == by_items.output_text


def test_what_was_stored(ai: openai.OpenAI) -> None:
    first = ai.responses.create(model="demo", input="What is 12 + 30?", temperature=0)
    assert ai.responses.retrieve(first.id) == first
    second = ai.responses.create(model="demo", input="And 2 + 2?", previous_response_id=first.id, temperature=0)
    assert second.previous_response_id == first.id
    assert second.usage is not None
    assert first.usage is not None
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.total_tokens - 1
    (item,) = ai.responses.input_items.list(first.id).data
    assert item.model_dump()["content"][0]["text"] == "What is 12 + 30?"
    ai.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        ai.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError) as caught:
        ai.responses.create(model="demo", input="a", previous_response_id=first.id)
    assert caught.value.param == "previous_response_id"
    unstored = ai.responses.create(model="demo", input="What is 1 + 1?", store=False, max_output_tokens=2)
    with pytest.raises(openai.NotFoundError):
        ai.responses.retrieve(unstored.id)


def test_the_store_is_bounded() -> None:
    store = Store(most=3, most_bytes=2000)
    for i in range(10):
        store.put(Stored({"id": str(i)}, [], [{"content": "x" * 100}]))
        assert store.get("0") is not None or i > 2
    assert len(store) == 3
    store.put(Stored({"id": "large"}, [], [{"content": "x" * 1900}]))
    assert len(store) == 1
    store.put(Stored({"id": "larger"}, [], [{"content": "x" * 3000}]))
    assert len(store) == 0


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"input": [{"type": "image_generation_call", "id": "a"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"role": "user", "content": "a", "mood": 1}]}, "input[0].mood"),
        ({"input": [{"role": "king", "content": "a"}]}, "input[0].role"),
        ({"input": []}, "messages"),
        ({"tools": [{"type": "file_search"}]}, "tools[0].type"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"conversation": "c"}, "conversation"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"include": ["file_search_call.results"]}, "include[0]"),
        ({"foo": 1}, "foo"),
    ],
)  # fmt: skip
def test_what_can_not_be_done_is_refused_by_name(demo: Running, change: dict[str, Any], field: str) -> None:
    with demo.http() as http:
        response = http.post("/v1/responses", json={"model": "m", "input": "a"} | change)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == field, response.text
