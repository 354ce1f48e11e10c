"""Structured output over HTTP, with the shipped model: every spelling, streamed and not, by a real client too."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from pippin.client import EngineClient
from pippin.config import EngineConfig
from pippin.loading import load_core
from pippin.text.tokenizer import load_tokenizer
from tests.server.conftest import Running, serving

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 10}, "warm": {"type": "boolean"}},
    "required": ["city", "warm"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA, "strict": True}}
MESSAGES: Any = [{"role": "user", "content": "The weather in Rome?"}]


@pytest.fixture(scope="module")
def demo() -> Iterator[Running]:
    config = EngineConfig(max_total_tokens=4000)
    with serving(
        make_client=lambda core: EngineClient.in_thread(lambda progress: load_core(config), seed=0),
        tokenizer=load_tokenizer(None),
    ) as running:
        yield running


def body(**fields: Any) -> dict[str, Any]:
    return {"messages": MESSAGES, "max_tokens": 120, "seed": 4, **fields}


FITS = [
    ({"response_format": FORMAT}, SCHEMA),
    ({"json_schema": json.dumps(SCHEMA)}, SCHEMA),
    ({"guided_json": SCHEMA}, SCHEMA),
    ({"structured_outputs": {"json": SCHEMA}}, SCHEMA),
    ({"regex": "(warm|cold), [0-9]{1,2} degrees"}, "(warm|cold), [0-9]{1,2} degrees"),
    ({"guided_regex": "[A-Z]{3}"}, "[A-Z]{3}"),
    ({"ebnf": 'root ::= ("rain" | "sun") "!"'}, "(rain|sun)!"),
    ({"guided_grammar": 'start: ("rain" | "sun") "!"'}, "(rain|sun)!"),
    ({"guided_choice": ["yes, it is", "yes, it was", "no"]}, "yes, it (is|was)|no"),
    (
        {
            "structural_tag": {
                "format": {
                    "type": "tag",
                    "begin": "<w>",
                    "content": {"type": "regex", "pattern": "[a-z]{4}"},
                    "end": ".",
                }
            }
        },
        r"<w>[a-z]{4}\.",
    ),
]


@pytest.mark.parametrize(("fields", "expected"), FITS, ids=lambda v: next(iter(v)) if isinstance(v, dict) else "")
def test_each_spelling_makes_the_answer_fit(demo: Running, fields: dict[str, Any], expected: Any) -> None:
    with demo.http() as http:
        answer = http.post("/v1/chat/completions", json=body(**fields))
        assert answer.status_code == 200, answer.text
        (choice,) = answer.json()["choices"]
    text = choice["message"]["content"]
    assert choice["finish_reason"] == "stop"
    if isinstance(expected, str):
        assert re.fullmatch(expected, text)
    else:
        value = json.loads(text)
        assert [*value] == ["city", "warm"]
        assert len(value["city"]) <= 10


def test_a_real_client_streams_what_it_gets_whole_for_each_choice(demo: Running) -> None:
    with demo.openai() as client:
        asked: Any = {"model": "m", "response_format": FORMAT, **body(n=3, logprobs=True, top_logprobs=2)}
        whole = client.chat.completions.create(**asked)
        streamed = ["", "", ""]
        reasons: list[str | None] = [None] * 3
        tokens: list[list[str]] = [[], [], []]
        for chunk in client.chat.completions.create(**asked, stream=True):
            for part in chunk.choices:
                streamed[part.index] += part.delta.content or ""
                reasons[part.index] = part.finish_reason or reasons[part.index]
                tokens[part.index] += [t.token for t in (part.logprobs.content or [])] if part.logprobs else []
    assert streamed == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices] == ["stop"] * 3
    assert [[t.token for t in c.logprobs.content or []] for c in whole.choices if c.logprobs] == tokens
    assert len({*streamed}) > 1
    assert all(json.loads(text) for text in streamed)


def test_parsed_by_the_clients_own_helper(demo: Running) -> None:
    """Which sends the schema that pydantic makes of a class, and reads the answer back into it."""
    pydantic = pytest.importorskip("pydantic")
    weather = pydantic.create_model("Weather", warm=(bool, ...), degrees=(int, ...))
    with demo.openai() as client:
        done = client.chat.completions.parse(model="m", messages=MESSAGES, response_format=weather, max_tokens=200)
    parsed = done.choices[0].message.parsed
    assert isinstance(parsed, weather)


def test_generate_and_completions(demo: Running) -> None:
    with demo.http() as http:
        params = [{"regex": "a{3}"}, {"json_schema": json.dumps(SCHEMA), "max_new_tokens": 99}, {"max_new_tokens": 3}]
        answers = http.post("/generate", json={"text": ["x", "y", "z"], "sampling_params": params}).json()
        assert answers[0]["text"] == "aaa"
        assert json.loads(answers[1]["text"])
        assert answers[0]["meta_info"]["finish_reason"]["type"] == "stop"
        cut = http.post("/v1/completions", json={"prompt": "x", "regex": "[a-z]{50}", "max_tokens": 4}).json()
        assert cut["choices"][0]["finish_reason"] == "length"
        assert re.fullmatch("[a-z]*", cut["choices"][0]["text"])


REFUSED = [
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"not": {}}}}},
        "schema",
        "not",
    ),
    ({"regex": "(a"}, "regex", "unclosed group"),
    ({"ebnf": "start: nothing"}, "ebnf", "nothing"),
    ({"guided_json": SCHEMA, "regex": "a"}, "guided_json", "both"),
    ({"structured_outputs": {"regexp": "a"}}, "structured_outputs.regexp", "unknown"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("fields", "field", "said"), REFUSED, ids=lambda v: "" if isinstance(v, dict) else v)
def test_what_cant_be_is_a_400_that_names_the_field(
    demo: Running, fields: dict[str, Any], field: str, said: str, stream: bool
) -> None:
    with demo.http() as http:
        answer = http.post("/v1/chat/completions", json=body(**fields, stream=stream))
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert field in error["param"]
        assert said in error["message"]
        assert http.get("/health").status_code == 200


def test_in_a_batch_only_the_wrong_one_is_refused(demo: Running) -> None:
    with demo.http() as http:
        params = [{"regex": "a{3}"}, {"regex": "(a"}]
        answer = http.post("/generate", json={"text": ["x", "y"], "sampling_params": params})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "sampling_params.regex"


def test_forced_tokens_are_counted(demo: Running) -> None:
    def count(http: httpx.Client) -> float:
        return float(re.findall(r"^pippin:forced_tokens_total\S* (\S+)", http.get("/metrics").text, re.M)[0])

    with demo.http() as http:
        before = count(http)
        http.post("/v1/chat/completions", json=body(guided_choice=["a rather long choice of words"]))
        assert count(http) > before


def test_openais_error_has_the_schemas_keyword(demo: Running) -> None:
    bad: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "array", "uniqueItems": True}}}
    with demo.openai() as client, pytest.raises(openai.BadRequestError, match="uniqueItems"):
        client.chat.completions.create(model="m", messages=MESSAGES, response_format=bad)
