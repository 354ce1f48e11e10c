"""What real clients may ask and seldom do, of the shipped model: it is answered, or refused in words that help."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from tests.server.clients import ASK, DESCRIPTION, FUNCTION, SCHEMA, SUM, anthropic_client
from tests.server.conftest import Running
from tests.server.test_end_to_end import close
from tests.server.test_tools import assembled

TOOL: Any = {"type": "function", "function": FUNCTION}
NUMBER = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}}, "required": ["n"]}


@pytest.fixture(scope="module")
def ai(demo: Running) -> Iterator[openai.OpenAI]:
    with demo.openai() as client:
        yield client


def test_four_answers_with_calls_streamed_and_whole(ai: openai.OpenAI) -> None:
    options: Any = {"model": "m", "messages": ASK, "tools": [TOOL], "n": 4, "seed": 3, "max_tokens": 80}
    whole = ai.chat.completions.create(**options)
    chunks = list(ai.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    for choice in whole.choices:
        own = [c.model_copy(update={"choices": [x for x in c.choices if x.index == choice.index]}) for c in chunks]
        message, reason = assembled(own)
        calls = [call.function.model_dump() for call in choice.message.tool_calls or [] if call.type == "function"]
        assert [call["function"] for call in message["tool_calls"]] == calls
        assert (message["content"], reason) == (choice.message.content or "", choice.finish_reason)
    assert any(choice.message.tool_calls for choice in whole.choices)


NO_CALL = {"3": -100}  # the token of <tool_call>: else the shipped model would rather call than write JSON
SHAPE = NUMBER | {"additionalProperties": False}


@pytest.mark.parametrize("stream", [False, True])
def test_a_shape_for_words_leaves_tools_to_be_called(ai: openai.OpenAI, stream: bool) -> None:
    """How agents ask that have tools, and want their last answer as an object."""
    shape = {"type": "json_schema", "json_schema": {"name": "n", "schema": SHAPE}}
    options: Any = {
        "model": "m", "tools": [TOOL], "response_format": shape, "temperature": 0, "max_tokens": 80, "stream": stream,
    }  # fmt: skip

    def asked(messages: Any, **more: Any) -> tuple[Any, Any]:
        answer = ai.chat.completions.create(messages=messages, **options, **more)
        if stream:
            return assembled(answer)
        return answer.choices[0].message.model_dump(), answer.choices[0].finish_reason

    message, reason = asked(ASK)
    assert reason == "tool_calls"
    assert [json.loads(call["function"]["arguments"]) for call in message["tool_calls"]] == [{"city": "Oslo"}]
    back = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": '{"temperature": 7}'}
    for messages in (SUM, [*ASK, message, back]):
        words, reason = asked(messages, logit_bias=NO_CALL)
        assert reason == "stop"
        assert 0 <= json.loads(words["content"])["n"] <= 99


def test_a_shape_for_words_on_the_other_surfaces(ai: openai.OpenAI, demo: Running) -> None:
    text: Any = {"format": {"type": "json_schema", "name": "n", "schema": SHAPE}}
    function: Any = {"type": "function", **FUNCTION, "strict": False}
    options: Any = {"model": "m", "tools": [function], "text": text, "temperature": 0, "max_output_tokens": 80}
    assert [item.type for item in ai.responses.create(input=ASK, **options).output] == ["function_call"]
    tool: Any = {"name": "get_weather", "description": DESCRIPTION, "input_schema": SCHEMA}
    config: Any = {"format": {"type": "json_schema", "schema": SHAPE}}
    more: Any = {"model": "m", "tools": [tool], "output_config": config, "max_tokens": 80}
    with anthropic_client(demo) as claude:
        called = claude.messages.create(messages=ASK, extra_body={"temperature": 0}, **more)
    assert called.stop_reason == "tool_use"


def test_a_structural_tag_says_itself_what_a_call_is(demo: Running) -> None:
    tag = {"structures": [{"begin": "<n>", "schema": SHAPE, "end": "</n>"}], "triggers": ["<n>"]}
    body = {"messages": ASK, "tools": [TOOL], "structural_tag": tag, "temperature": 0, "max_tokens": 60}
    with demo.http() as http:
        answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"]


def test_a_call_that_must_be_made_needs_no_shape(ai: openai.OpenAI) -> None:
    shape: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": SHAPE}}
    options: Any = {"model": "m", "messages": SUM, "tools": [TOOL], "response_format": shape, "max_tokens": 80}
    (choice,) = ai.chat.completions.create(**options, tool_choice="required", parallel_tool_calls=False).choices
    assert choice.finish_reason == "tool_calls"


def test_logprobs_of_an_answer_of_a_schema(ai: openai.OpenAI) -> None:
    shape = {"type": "json_schema", "json_schema": {"name": "n", "schema": SHAPE}}
    options: Any = {
        "model": "m", "messages": SUM, "response_format": shape, "logprobs": True, "top_logprobs": 3, "seed": 1,
        "max_tokens": 60,
    }  # fmt: skip
    (choice,) = ai.chat.completions.create(**options).choices
    assert choice.logprobs is not None
    told = [entry.model_dump() for entry in choice.logprobs.content or []]
    assert "".join(entry["token"] for entry in told) == choice.message.content
    streamed = [
        entry.model_dump()
        for chunk in ai.chat.completions.create(**options, stream=True)
        for entry in (chunk.choices[0].logprobs.content or [] if chunk.choices[0].logprobs else [])
    ]
    assert [e["token"] for e in streamed] == [e["token"] for e in told]
    close([e["logprob"] for e in streamed], [e["logprob"] for e in told])


@pytest.mark.parametrize("stream", [False, True])
def test_no_tokens_at_all_scores_a_prompt(ai: openai.OpenAI, stream: bool) -> None:
    """``max_tokens`` 0 with ``echo`` and ``logprobs``: how evaluations score a text."""
    texts = ["Once upon a time", "12 + 30"]
    options: Any = {"model": "m", "prompt": texts, "max_tokens": 0, "echo": True, "logprobs": 1}
    if stream:
        parts = [c for chunk in ai.completions.create(**options, stream=True) for c in chunk.choices]
        assert ["".join(c.text for c in parts if c.index == i) for i in (0, 1)] == texts
        assert [[c.finish_reason for c in parts if c.index == i and c.finish_reason] for i in (0, 1)] == [
            ["length"]
        ] * 2
        told = [[c.logprobs for c in parts if c.index == i and c.logprobs] for i in (0, 1)]
        scored = [[x for part in one for x in part.token_logprobs or []] for one in told]
    else:
        answer = ai.completions.create(**options)
        assert [(c.text, c.finish_reason) for c in answer.choices] == [(text, "length") for text in texts]
        scored = [list(c.logprobs.token_logprobs or []) if c.logprobs else [] for c in answer.choices]
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 0
        assert answer.usage.prompt_tokens == sum(map(len, scored))
    for logprobs in scored:
        first, *rest = logprobs
        assert first is None
        assert rest
        assert all(x is not None and x <= 0 for x in rest)


def test_no_tokens_and_no_echo_is_an_empty_text(ai: openai.OpenAI) -> None:
    (choice,) = ai.completions.create(model="m", prompt="Once", max_tokens=0).choices
    assert (choice.text, choice.finish_reason) == ("", "length")


def test_a_responses_prompt_is_counted_as_it_will_be(ai: openai.OpenAI) -> None:
    tool: Any = {"type": "function", **FUNCTION, "strict": False}
    first = ai.responses.create(model="m", input=ASK, tools=[tool], instructions="Be brief.", max_output_tokens=60)
    then: Any = {"model": "m", "input": "And in Rome?", "tools": [tool], "previous_response_id": first.id}
    counted = ai.responses.input_tokens.count(**then)
    usage = ai.responses.create(**then, max_output_tokens=1).usage
    assert usage is not None
    assert counted.input_tokens == usage.input_tokens
    with pytest.raises(openai.BadRequestError, match="conversation is not supported"):
        ai.responses.input_tokens.count(input="a", conversation="c")


def test_a_responses_input_page_by_page(ai: openai.OpenAI) -> None:
    items: Any = [{"role": "user", "content": f"number {i}"} for i in range(25)]
    id = ai.responses.create(model="m", input=items, max_output_tokens=1).id

    def words(**query: Any) -> list[str]:
        return [item.content for item in ai.responses.input_items.list(id, **query)]

    said = [f"number {i}" for i in range(25)]
    assert words() == said[::-1]  # the client asks for page after page
    assert words(order="asc", limit=10) == said
    page = ai.responses.input_items.list(id, limit=3, order="asc")
    assert (len(page.data), page.has_more) == (3, True)
    rest = ai.responses.input_items.list(id, order="asc", after=str(page.data[-1].id), limit=100)
    assert (len(rest.data), rest.has_more) == (22, False)


@pytest.mark.parametrize(
    ("path", "query", "part"),
    [
        ("", {"stream": "true"}, "stream is not supported"),
        ("", {"starting_after": "3"}, "starting_after is not supported"),
        ("", {"include[]": "reasoning.encrypted_content"}, "include is not supported"),
        ("", {"odd": "1"}, "unknown field odd"),
        ("/input_items", {"limit": "0"}, "limit"),
        ("/input_items", {"limit": "many"}, "limit"),
        ("/input_items", {"order": "up"}, "order"),
        ("/input_items", {"after": "msg_nobody"}, "there is no item"),
        ("/input_items", {"include": ["a", "b"]}, "include is not supported"),
    ],
)
def test_what_stands_behind_a_path_is_not_ignored(demo: Running, path: str, query: dict[str, str], part: str) -> None:
    with demo.http() as http:
        id = http.post("/v1/responses", json={"input": "a", "max_output_tokens": 1}).json()["id"]
        response = http.get(f"/v1/responses/{id}{path}", params=query)
        assert response.status_code == 400, response.text
        assert part in response.json()["error"]["message"]
        assert http.get(f"/v1/responses/{id}", params={"stream": "false"}).status_code == 200


def test_a_packed_body_is_refused_in_words_that_help(demo: Running) -> None:
    body = gzip.compress(json.dumps({"prompt": "a", "max_tokens": 1}).encode())
    with demo.http() as http:
        headers = {"content-type": "application/json", "content-encoding": "gzip"}
        response = http.post("/v1/completions", content=body, headers=headers)
    assert response.status_code == 415
    assert "without Content-Encoding, not gzip" in response.json()["error"]["message"]


def test_only_what_runs_in_the_background_can_be_cancelled(ai: openai.OpenAI) -> None:
    id = ai.responses.create(model="m", input="a", max_output_tokens=1).id
    with pytest.raises(openai.BadRequestError, match="background"):
        ai.responses.cancel(id)
    with pytest.raises(openai.NotFoundError):
        ai.responses.cancel("resp_nobody")


IMAGE: Any = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
USE: Any = {"role": "assistant", "content": [{"type": "tool_use", "id": "x", "name": "get_weather", "input": {}}]}


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0].type: 'image' is not supported"),
        (
            {"messages": [*ASK, USE, {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "x", "content": [IMAGE]}]}]},
            "messages[2].content[0].content[0].type: 'image' is not supported",
        ),
        (
            {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
            "tools[0].type: 'web_search_20250305' is not supported",
        ),
        ({"tools": [{"type": "custom", "name": "a", "input_schema": SCHEMA, "odd": 1}]}, "odd"),
    ],
)  # fmt: skip
def test_what_is_not_text_is_refused_in_words_that_help(demo: Running, change: dict[str, Any], part: str) -> None:
    options: Any = {"model": "m", "max_tokens": 5, "messages": ASK} | change
    with anthropic_client(demo) as claude, pytest.raises(anthropic.BadRequestError) as caught:
        claude.messages.create(**options)
    assert part in caught.value.message


def test_tools_that_are_no_functions_are_refused_in_words_that_help(ai: openai.OpenAI) -> None:
    custom: Any = {"type": "custom", "custom": {"name": "shell", "description": DESCRIPTION}}
    with pytest.raises(openai.BadRequestError, match=r"tools\[0\].type: 'custom' is not supported"):
        ai.chat.completions.create(model="m", messages=ASK, tools=[custom])
    mcp: Any = {"type": "mcp", "server_label": "x", "server_url": "http://x"}
    with pytest.raises(openai.BadRequestError, match=r"tools\[0\].type: 'mcp' is not supported"):
        ai.responses.create(model="m", input="a", tools=[mcp])
