"""Nothing is ignored in silence, however deep: every object that a body may hold refuses a key that it doesn't know."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest
from msgspec import inspect

from pippin.errors import RequestError
from pippin.grammar.source import JsonStyle, llguidance_grammar
from pippin.grammar.vocabulary import vocabulary_of
from pippin.server.app import ROUTES
from pippin.server.ollama import Options
from pippin.server.protocol import Body
from pippin.types import Grammar
from tests.server.conftest import byte_tokenizer

BODIES: list[type[Body]] = list(dict.fromkeys([body for *_, body in ROUTES if body is not None] + [Options]))

FREE = {
    "parameters": "a JSON schema",
    "input_schema": "a JSON schema",
    "schema": "a JSON schema",
    "json_schema": "a JSON schema",
    "guided_json": "a JSON schema",
    "format": "a JSON schema, or checked like response_format",
    "arguments": "what the model gave a tool",
    "input": "what the model gave a tool",
    "chat_template_kwargs": "variables of the template",
    "cache_control": "no effect: every prompt is cached",
    "caller": "no effect: told by us, sent back",
    "filters": "of a tool that is left out",
    "user_location": "of a tool that is left out",
    "input_image_mask": "of a tool that is left out",
}
"""Objects that may hold anything, by the last name of their place."""

HI: Any = [{"role": "user", "content": "hi"}]
CALL: dict[str, Any] = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CHAT, RESPONSES, OLLAMA, TEXT = "/v1/chat/completions", "/v1/responses", "/api/chat", "/v1/completions"


def called(call: Any) -> dict[str, Any]:
    return {"messages": [*HI, {"role": "assistant", "content": "", "tool_calls": [call]}], "model": "m"}


def item(**fields: Any) -> dict[str, Any]:
    return {"input": [fields]}


# What is JSON without a type of its own is checked by hand: its place, and requests with a key `odd` in it.
BY_HAND: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "messages[]": [
        (CHAT, {"messages": [{"role": "user", "content": "a", "odd": 1}]}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "odd": 1}]}]}),
        (CHAT, called(CALL | {"odd": 1})),
        (CHAT, called(CALL | {"function": {"name": "f", "arguments": "{}", "odd": 1}})),
    ],
    "messages[].images[]": [(OLLAMA, {"model": "m", "messages": [{"role": "user", "images": [{"odd": 1}]}]})],
    "input[]": [
        (RESPONSES, item(role="user", content="a", odd=1)),
        (RESPONSES, item(role="user", content=[{"type": "input_text", "text": "a", "odd": 1}])),
        (RESPONSES, item(type="function_call", call_id="c", name="f", arguments="{}", odd=1)),
        (RESPONSES, item(type="function_call_output", call_id="c", output="x", odd=1)),
        (RESPONSES, item(type="reasoning", summary=[], odd=1)),
        (RESPONSES, item(type="reasoning", content=[{"type": "reasoning_text", "text": "a", "odd": 1}])),
        (RESPONSES, item(type="reasoning", summary=[{"type": "summary_text", "text": "a", "odd": 1}])),
        (RESPONSES, item(type="reasoning", summary=["odd"])),
    ],
    "response_format": [
        (CHAT, {"messages": HI, "response_format": {"type": "text", "odd": 1}}),
        (CHAT, {"messages": HI, "response_format": {"type": "json_object", "odd": 1}}),
        (TEXT, {"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"schema": {}, "odd": 1}}}),
        (RESPONSES, {"input": "a", "text": {"format": {"type": "json_schema", "name": "n", "schema": {}, "odd": 1}}}),
    ],
    "structured_outputs": [(CHAT, {"messages": HI, "structured_outputs": {"odd": 1}})],
    "options": [(OLLAMA, {"model": "m", "messages": HI, "options": {"odd": 1}})],
    "sampling_params": [("/generate", {"text": "a", "sampling_params": {"odd": 1}})],
    "structural_tag": [],  # the engine reads it: see below
    **{name: [] for name in ("text", "input_ids", "rid")},  # texts and numbers, one or a list: tests/server/test_errors
    **{name: [] for name in ("return_logprob", "logprob_start_len", "top_logprobs_num")},
}
CASES = [case for cases in BY_HAND.values() for case in cases]

# Objects with types, which no request above reaches.
TYPED = [
    (OLLAMA, called({"function": {"name": "f"}, "odd": 1})),
    (OLLAMA, called({"function": {"name": "f", "odd": 1}})),
    (OLLAMA, {"model": "m", "messages": [{"role": "user", "content": "a", "odd": 1}]}),
    (CHAT, {"messages": HI, "stream_options": {"odd": 1}}),
    (CHAT, {"messages": HI, "tools": [{"function": {"name": "f", "odd": 1}}]}),
    ("/v1/messages", {"max_tokens": 1, "messages": [{"role": "user", "content": [{"type": "text", "odd": 1}]}]}),
]


def places(found: inspect.Type, path: str = "", above: frozenset[type] = frozenset()) -> Iterator[tuple[str, Any]]:
    """Every object's place in a body, with its type; None where it has none."""
    if isinstance(found, inspect.StructType) and found.cls not in above:
        yield path, found.cls
        for field in found.fields:
            yield from places(field.type, f"{path}.{field.encode_name}".lstrip("."), above | {found.cls})
    elif isinstance(found, inspect.UnionType):
        for part in found.types:
            yield from places(part, path, above)
    elif isinstance(found, inspect.ListType | inspect.VarTupleType):
        yield from places(found.item_type, f"{path}[]", above)
    elif isinstance(found, inspect.DictType):
        yield from places(found.value_type, path, above)
    elif isinstance(found, inspect.AnyType):
        yield path, None


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_every_object_is_strict_or_checked_by_hand_or_free(body: type[Body]) -> None:
    seen = list(places(inspect.type_info(body)))
    assert seen
    for path, kind in seen:
        if kind is not None:
            assert kind.__struct_config__.forbid_unknown_fields, f"{path}: {kind}"
        else:
            assert path.rpartition(".")[2] in FREE or path in BY_HAND, path


@pytest.mark.parametrize(("path", "body"), [*CASES, *TYPED], ids=lambda value: value if isinstance(value, str) else "")
def test_an_unknown_key_is_refused_by_name(http: httpx.Client, path: str, body: dict[str, Any]) -> None:
    response = http.post(path, json=body)
    assert response.status_code == 400, response.text
    assert "odd" in response.text or "images" in response.text or "summary[0]" in response.text, response.text


@pytest.mark.parametrize(
    "tag",
    [
        {"format": {"type": "tag", "begin": "a", "content": {"type": "any_text", "odd": 1}, "end": "b"}},
        {"format": {"type": "tag", "begin": "a", "content": {"type": "any_text"}, "end": "b", "odd": 1}},
        {"format": {"type": "any_text"}, "odd": 1},
        {"format": {"type": "triggered_tags", "triggers": ["a"], "tags": [{"begin": "a", "odd": 1}]}},
        {"structures": [{"begin": "a", "schema": {}, "end": "b", "odd": 1}], "triggers": ["a"]},
    ],
)
def test_structural_tags_refuse_unknown_keys_too(tag: dict[str, Any]) -> None:
    tokenizer = byte_tokenizer()
    vocabulary = vocabulary_of(tokenizer, tokenizer.vocab_size, tokenizer.eos_ids)
    with pytest.raises(RequestError, match="odd"):
        llguidance_grammar(Grammar("structural_tag", json.dumps(tag)), JsonStyle(), vocabulary)


def test_what_clients_send_back_is_taken(http: httpx.Client) -> None:
    """A streamed call has an index, a part may be marked for the cache, and what is null counts as left out."""
    marked = {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}, "odd": None}
    call = CALL | {"index": 0, "odd": None}
    litellm = {"provider_specific_fields": {"refusal": None}}
    answer = {"role": "assistant", "content": None, "tool_calls": [call | litellm], "annotations": []} | litellm
    for path, body in (
        (CHAT, {"messages": [{"role": "user", "content": [marked]}]}),
        (CHAT, called(call)),
        (CHAT, {"messages": [*HI, answer, {"role": "tool", "tool_call_id": "c", "content": "4"}]}),
        (OLLAMA, called({"function": {"name": "f", "arguments": {}, "index": 0}, "id": "c"}) | {"stream": False}),
    ):
        response = http.post(path, json=body)
        assert response.status_code == 200, response.text


def test_the_walk_sees_a_struct_that_is_not_strict() -> None:
    loose = msgspec.defstruct("Loose", [("a", int)])
    outer = msgspec.defstruct("Outer", [("parts", list[loose])], forbid_unknown_fields=True)  # type: ignore[valid-type]
    assert ("parts[]", loose) in list(places(inspect.type_info(outer)))
