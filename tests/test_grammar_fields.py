"""The spellings of structured output, and what is said of those that are wrong."""

from __future__ import annotations

import datetime
import json
from concurrent.futures import Future
from functools import cache
from typing import Any

import pytest
from llguidance import LLTokenizer

from pippin.errors import RequestError
from pippin.grammar.compiler import GrammarCompiler
from pippin.grammar.fields import grammar_of
from pippin.grammar.matcher import GrammarMatcher
from pippin.grammar.source import JsonStyle, whole
from pippin.grammar.tools import HERMES, ToolMarkup, tool_grammar
from pippin.grammar.vocabulary import vocabulary_of
from pippin.server.protocol import ChatRequest, build
from pippin.sglang import sampling_params
from pippin.types import Grammar
from tests.tokenizers_for_tests import byte_level

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
TAG = {
    "type": "structural_tag",
    "structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}],
    "triggers": ["<f"],
}


def openai_format(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, **more}}


SPELLINGS: list[tuple[dict[str, Any], Grammar | None]] = [
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": None, "regex": None}, None),
    ({"response_format": {"type": "json_object"}}, Grammar("json_object", "", "response_format")),
    (
        {"response_format": openai_format(SCHEMA, strict=True, description="d")},
        Grammar("json_schema", json.dumps(SCHEMA), "response_format.json_schema.schema"),
    ),
    ({"response_format": TAG}, Grammar("structural_tag", json.dumps(TAG), "response_format")),
    ({"json_schema": json.dumps(SCHEMA)}, Grammar("json_schema", json.dumps(SCHEMA), "json_schema")),
    ({"json_schema": SCHEMA}, Grammar("json_schema", json.dumps(SCHEMA), "json_schema")),
    ({"regex": "a+"}, Grammar("regex", "a+", "regex")),
    ({"ebnf": 'root ::= "a"'}, Grammar("grammar", 'root ::= "a"', "ebnf")),
    ({"structural_tag": json.dumps(TAG)}, Grammar("structural_tag", json.dumps(TAG), "structural_tag")),
    ({"guided_json": SCHEMA}, Grammar("json_schema", json.dumps(SCHEMA), "guided_json")),
    ({"guided_regex": "a+"}, Grammar("regex", "a+", "guided_regex")),
    ({"guided_choice": ["a", "b"]}, Grammar("choice", '["a", "b"]', "guided_choice")),
    ({"guided_grammar": 'start: "a"'}, Grammar("grammar", 'start: "a"', "guided_grammar")),
    ({"structured_outputs": {"choice": ["a"]}}, Grammar("choice", '["a"]', "structured_outputs.choice")),
    ({"structured_outputs": {"json_object": True}}, Grammar("json_object", "", "structured_outputs.json_object")),
]


@pytest.mark.parametrize(
    ("given", "expected"), SPELLINGS, ids=lambda v: json.dumps(v)[:40] if isinstance(v, dict) else ""
)
def test_each_spelling_asks_for_its_grammar(given: dict[str, Any], expected: Grammar | None) -> None:
    assert grammar_of(given) == expected
    request = build({"messages": [], **given}, ChatRequest)
    assert request.grammar == request.params(5).grammar == expected


@pytest.mark.parametrize("name", ["json_schema", "regex", "ebnf", "structural_tag"])
def test_sampling_params_has_sglangs(name: str) -> None:
    value = json.dumps(TAG) if name == "structural_tag" else json.dumps(SCHEMA)
    grammar = sampling_params({name: value, "temperature": 0}).grammar
    assert grammar is not None
    assert (grammar.text, grammar.field) == (value, f"sampling_params.{name}")
    assert sampling_params({name: None}).grammar is None


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {"type": "yaml"}}, "response_format.type", "json_schema or structural_tag, not 'yaml'"),
    ({"response_format": {}}, "response_format.type", "not None"),
    ({"response_format": {"type": "json_object", "x": 1}}, "response_format.x", "unknown field"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "a name and a schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
        "response_format.json_schema.schema",
        "required",
    ),
    ({"response_format": openai_format(3)}, "response_format.json_schema.schema", "an object"),
    ({"json_schema": "{"}, "json_schema", "JSON schema"),
    ({"regex": ""}, "regex", "not empty"),
    ({"guided_choice": []}, "guided_choice", "not empty"),
    ({"guided_choice": [""]}, "guided_choice", "not empty"),
    ({"regex": "a", "ebnf": 'root ::= "a"'}, "ebnf", "regex and ebnf both"),
    ({"structured_outputs": {}}, "structured_outputs", "must have one of"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "must have one of"),
    ({"structured_outputs": {"backend": "x"}}, "structured_outputs.backend", "unknown field"),
    ({"regex": "a" * (2**20 + 1)}, "regex", "longer than"),
]


@pytest.mark.parametrize(("given", "field", "said"), WRONG, ids=lambda v: v[:30] if isinstance(v, str) else "")
def test_what_is_wrong_is_named(given: dict[str, Any], field: str, said: str) -> None:
    with pytest.raises(RequestError) as caught:
        grammar_of(given)
    assert caught.value.field == field
    assert said in caught.value.message


# --- what is compiled ---


@cache
def compiler(compact: bool = False) -> GrammarCompiler:
    tokenizer = byte_level()
    future: Future[LLTokenizer] = Future()
    future.set_result(vocabulary_of(tokenizer, tokenizer.vocab_size, tokenizer.eos_ids))
    return GrammarCompiler(future, tokenizer.vocab_size, tokenizer.eos_ids, JsonStyle(compact))


def compiled(grammar: Grammar, compact: bool = False) -> GrammarMatcher:
    return compiler(compact).submit(grammar, (), False).result(20)


def accepts(grammar: Grammar, text: str, compact: bool = False) -> bool:
    """Whether a text, as the tokenizer writes it, is an answer that may end."""
    matcher = compiled(grammar, compact)
    try:
        for token in byte_level().encode(text):
            matcher.take(token)
        if not matcher.ended:
            matcher.take(byte_level().eos_ids[0])
    except RequestError:
        return False
    return matcher.ended


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"not": {"type": "string"}}, "not"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "items": {"contains": {}}}, "contains"),
        ({"if": {}, "then": {"type": "string"}}, "if, then"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({"type": "object", "propertyNames": {"pattern": "a"}}, "propertyNames"),
        ({"type": "object", "unevaluatedProperties": False}, "unevaluatedProperties"),
        ({"$dynamicRef": "#a"}, "$dynamicRef"),
        ({"type": "object", "properties": {"x": {"dependencies": {"a": ["b"]}}}}, "dependencies"),
        ({"anyOf": [{"$recursiveRef": "#"}]}, "$recursiveRef"),
        ({"type": "number", "exclusiveMinimum": True, "minimum": 3}, "exclusiveMinimum"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"type": "string", "format": "credit-card"}, "credit-card"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"$ref": "#/$defs/nothing"}, "/$defs/nothing"),
        ({"$ref": "https://example.com/schema"}, "example.com"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
        (False, "Unsatisfiable"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_schema_that_cant_be_enforced_is_refused_by_keyword(schema: Any, keyword: str) -> None:
    with pytest.raises(RequestError) as caught:
        compiled(Grammar("json_schema", json.dumps(schema), "response_format.json_schema.schema"))
    assert caught.value.field == "response_format.json_schema.schema"
    assert keyword in caught.value.message
    assert "\n" not in caught.value.message


def test_what_only_looks_like_a_keyword_is_none() -> None:
    schema = {
        "type": "object",
        "properties": {"not": {"const": {"not": 1, "dependencies": {}}}, "dependencies": {"type": "null"}},
        "required": ["not", "dependencies"],
        "additionalProperties": False,
    }
    text = '{"not": {"not": 1, "dependencies": {}}, "dependencies": null}'
    assert accepts(Grammar("json_schema", json.dumps(schema)), text)


def test_dates_are_in_the_calendar() -> None:
    """Every day of some years of each kind, and the days that aren't."""
    date, time = (Grammar("json_schema", json.dumps({"type": "string", "format": f})) for f in ("date", "date-time"))
    for year in (1, 4, 1900, 2000, 2023, 2024, 2100, 9996):
        for month, day in [(1, 31), (2, 28), (2, 29), (2, 30), (4, 30), (4, 31), (10, 10), (12, 31), (13, 1), (0, 1)]:
            text = f"{year:04}-{month:02}-{day:02}"
            try:
                datetime.date.fromisoformat(text)
                real = True
            except ValueError:
                real = False
            assert accepts(date, json.dumps(text)) == real, text
            assert accepts(time, json.dumps(f"{text}T12:30:00Z")) == real, text
    assert not accepts(date, '"0000-01-01"')
    nullable = {"type": ["string", "null"], "format": "date", "pattern": "^20", "allOf": [{"pattern": "1$"}]}
    for text, ok in (('"2023-02-01"', True), ('"2023-02-02"', False), ('"1999-01-01"', False), ("null", True)):
        assert accepts(Grammar("json_schema", json.dumps(nullable)), text) == ok, text


def test_json_is_laid_out_as_asked() -> None:
    grammar = Grammar("json_schema", json.dumps(SCHEMA | {"properties": {"a": {"type": "array"}}}))
    loose, tight = '{ "a" : [\n1,2 ]\n}', '{"a": [1, 2]}'
    assert [accepts(grammar, text) for text in (loose, tight, f'{{{" " * 33}"a": []}}')] == [True, True, False]
    assert [accepts(grammar, text, compact=True) for text in (loose, tight)] == [False, True]
    assert accepts(Grammar("json_schema", "true"), "[1]")
    assert not accepts(Grammar("json_object"), "[1]")


@pytest.mark.parametrize(
    ("regex", "inner"), [("^a$", "a"), ("^a", "a"), (r"a\$", r"a\$"), (r"a\\$", r"a\\"), ("a", "a"), ("$", "")]
)
def test_anchors_of_a_whole_match_say_nothing_new(regex: str, inner: str) -> None:
    assert whole(regex) == inner


def test_grammars_and_choices() -> None:
    gbnf = Grammar("grammar", 'root ::= item ("," item)*\nitem ::= [a-c]{2} | "no"')
    lark = Grammar("grammar", 'start: item ("," item)*\nitem: /[a-c]{2}/ | "no"')
    for text, ok in (("ab", True), ("ab,no", True), ("a", False), ("ab,", False)):
        assert accepts(gbnf, text) == accepts(lark, text) == ok
    choice = Grammar("choice", json.dumps(['say "yes"', "日本\n", "a/b\\c"]))
    assert all(accepts(choice, text) for text in ('say "yes"', "日本\n", "a/b\\c"))
    assert not accepts(choice, "say")


# --- tags and tools ---


def tagged(**more: Any) -> Grammar:
    return Grammar("structural_tag", json.dumps(TAG | more))


def test_a_structural_tag_binds_what_its_trigger_begins() -> None:
    for text, ok in (
        ("no tag at all < f >", True),
        ('call <f>{"a": 1}</f> and <f>{"a":2}</f>.', True),
        ("<f>{}</f>", False),
        ('<fn>{"a": 1}</fn>', False),
        ('<f>{"a": 1}', False),
    ):
        assert accepts(tagged(), text) == ok, text


def formatted(part: dict[str, Any]) -> Grammar:
    return Grammar("structural_tag", json.dumps({"type": "structural_tag", "format": part}))


def test_the_newer_formats() -> None:
    schema = {"type": "json_schema", "json_schema": SCHEMA}
    think = {"type": "tag", "begin": "<t>", "content": {"type": "any_text"}, "end": "</t>"}
    sequence = {"type": "sequence", "elements": [think, {"type": "regex", "pattern": "/?[0-9]{2}"}, schema]}
    assert accepts(formatted(sequence), '<t>some < thoughts</t>/42{"a": 1}')
    assert not accepts(formatted(sequence), '<t>some</t> 42{"a": 1}')
    either = {"type": "or", "elements": [{"type": "const_string", "value": "no"}, {"type": "any_text"}]}
    assert accepts(formatted(either), "anything")
    nested = {"type": "grammar", "grammar": 'root ::= "x" [0-9]'}
    assert accepts(formatted({"type": "sequence", "elements": [nested, nested]}), "x1x2")
    tags = [{"begin": f"<{n}>", "content": schema, "end": f"</{n}>"} for n in "fg"]
    row = {"type": "tags_with_separator", "tags": tags, "separator": ", ", "at_least_one": True}
    assert accepts(formatted(row), '<f>{"a": 1}</f>, <g>{"a": 2}</g>')
    assert not accepts(formatted(row), "")
    assert not accepts(formatted(row | {"stop_after_first": True}), '<f>{"a": 1}</f>, <g>{"a": 2}</g>')


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"type": "spiral"}, "'spiral' is not supported"),
        ({"type": "sequence", "elements": []}, "elements must be a list"),
        ({"type": "sequence", "elements": [{"type": "any_text"}, {"type": "const_string", "value": "a"}]}, "come last"),
        ({"type": "triggered_tags", "triggers": ["<g"], "tags": [{"begin": "<f>"}]}, "start with one of the triggers"),
        (
            {"type": "tag", "begin": "<f>", "content": {"type": "json_schema", "json_schema": {"not": {}}}},
            "keyword not",
        ),
        ({"type": "json_schema", "json_schema": {"dependencies": {}}}, "keyword dependencies"),
    ],
)
def test_a_wrong_tag_is_refused(part: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        compiled(formatted(part))


def test_special_tokens_in_begins_are_those_tokens() -> None:
    start = byte_level().encode("<|im_start|>")
    tag = {"type": "tag", "begin": "<|im_start|>call\n", "content": {"type": "any_text"}, "end": "<|im_end|>"}
    matcher = compiled(formatted({"type": "triggered_tags", "triggers": ["<|im_start|>"], "tags": [tag]}))
    for token in [*byte_level().encode("text "), *start]:
        matcher.take(token)
    assert byte_level().decode(matcher.forced(), False).startswith("call")


TOOLS: list[dict[str, Any]] = [
    {"name": "add", "parameters": SCHEMA, "strict": True},
    {"name": "now", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
]
ADD = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {"x": 1}}\n</tool_call>'


def test_tools_as_a_grammar() -> None:
    auto = tool_grammar(TOOLS, HERMES)
    assert accepts(auto, "no call")
    assert accepts(auto, f"Let me see. {ADD}\n{NOW}")
    assert not accepts(auto, ADD.replace("1", '"1"'))
    assert not accepts(tool_grammar(TOOLS, HERMES, strict=True), NOW)
    required = tool_grammar(TOOLS, HERMES, required=True)
    assert accepts(required, f"{ADD}\n{ADD}")
    assert not accepts(required, "no call")
    assert not accepts(required, NOW)
    assert not accepts(tool_grammar(TOOLS, HERMES, required=True, parallel=False), f"{ADD}\n{ADD}")
    markup = ToolMarkup("<function={name}>", "</function>", "<function=")
    assert accepts(tool_grammar(TOOLS, markup), 'Now <function=add>{"a": 4}</function>')
    assert not accepts(tool_grammar(TOOLS, markup), 'Now <function=sub>{"a": 4}</function>')
