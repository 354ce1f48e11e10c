"""The grammars that see to calls, in every format: what they allow is what the format's parser finds, and no more."""

from __future__ import annotations

import pytest

from pippin.errors import RequestError
from pippin.server.forced import MARKUPS, MISTRAL_V11, after_reasoning, calls_or, forced_calls
from pippin.text.reasoning import FORMATS as REASONING
from pippin.text.reply import Reply, Speech
from pippin.text.tools import FORMATS
from pippin.text.tools.offered import Offered
from pippin.types import Grammar
from tests.test_grammar_fields import accepts
from tests.test_text_tools import calls_of, parse

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = Offered(
    [
        {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA, "strict": True}},
        {"type": "function", "function": {"name": "now"}},
    ]
)
JSON = '{"city": "Oslo"}'


def written(name: str, template: str, calls: list[tuple[str, str]]) -> str:
    """Calls as the format's markup has them."""
    markup = MISTRAL_V11 if "[ARGS]" in template else MARKUPS[name]
    return markup.separator.join(
        markup.begin.replace("{name}", tool) + arguments + markup.end for tool, arguments in calls
    )


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize(("name", "template"), [*((name, "") for name in sorted(MARKUPS)), ("mistral", "[ARGS]")])
def test_a_forced_call_is_one_that_the_parser_finds(name: str, template: str, parallel: bool) -> None:
    grammar, format = forced_calls(FORMATS[name], template, TOOLS, "required", parallel)
    assert grammar is not None
    assert format.name == name
    one, two = (written(name, template, [("get_weather", JSON), ("now", "{}")][:n]) for n in (1, 2))
    assert accepts(grammar, one)
    assert accepts(grammar, two) == parallel
    assert not accepts(grammar, "Hello.")
    assert not accepts(grammar, one.replace("Oslo", "Oslo\n"))
    assert not accepts(grammar, one.replace('"city"', '"town"'))
    found = calls_of(parse(Reply(Speech(None, format), "", TOOLS), list(two)))
    assert found == [("get_weather", {"city": "Oslo"}), ("now", {})]


@pytest.mark.parametrize("name", ["glm", "qwen3_coder", "pythonic", "gemma4"])
def test_formats_without_json_force_plain_json(name: str) -> None:
    grammar, format = forced_calls(FORMATS[name], "", TOOLS, ("now",), True)
    assert grammar is not None
    assert format.name == "json"
    text = '{"name": "now", "arguments": {}}'
    assert accepts(grammar, text)
    assert not accepts(grammar, written("json", "", [("get_weather", JSON)]))
    assert calls_of(parse(Reply(Speech(None, format), "", TOOLS), [text])) == [("now", {})]


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize(("name", "template"), [*((name, "") for name in sorted(MARKUPS)), ("mistral", "[ARGS]")])
def test_calls_or_words_of_a_shape(name: str, template: str, parallel: bool) -> None:
    """``response_format`` beside tools: the model may still call, and what it says to nobody's tool has the shape."""
    grammar = calls_or(ANSWER, FORMATS[name], template, TOOLS, parallel)
    one, two = (written(name, template, [("get_weather", JSON), ("now", "{}")][:n]) for n in (1, 2))
    said = '<|channel|>final<|message|>{"a": 1}' if name == "gpt-oss" else '{"a": 1}'
    assert accepts(grammar, one)
    assert accepts(grammar, two) == parallel
    assert accepts(grammar, said)
    assert accepts(grammar, written(name, template, [("now", '{"x": [1]}')]))  # whose schema nobody asked to keep to
    assert not accepts(grammar, one.replace('"city"', '"town"'))
    for wrong in ("Hello.", said.replace("1", '"b"'), one + said, said + one):
        assert not accepts(grammar, wrong)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("glm", "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n</tool_call>"),
        (
            "qwen3_coder",
            "<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>",
        ),
    ],
)
def test_calls_in_tags_or_words_of_a_shape(name: str, call: str) -> None:
    for parallel in (False, True):
        grammar = calls_or(ANSWER, FORMATS[name], "", TOOLS, parallel)
        assert accepts(grammar, call)
        assert accepts(grammar, f"{call}\n{call}") or not parallel
        assert accepts(grammar, '{"a": 1}')
        assert not accepts(grammar, "Hello.")
    assert calls_of(parse(Reply(Speech(None, FORMATS[name]), "", TOOLS), [call])) == [("get_weather", {"city": "Oslo"})]


def test_calls_that_no_grammar_describes_are_refused_beside_a_shape() -> None:
    with pytest.raises(RequestError, match="pythonic") as caught:
        calls_or(ANSWER, FORMATS["pythonic"], "", TOOLS, True)
    assert caught.value.field == ANSWER.field


ANSWER = Grammar("json_schema", '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}')


@pytest.mark.parametrize(
    "grammar", [ANSWER, Grammar("json_object"), Grammar("regex", r'\{"a": \d\}'), Grammar("choice", r'["{\"a\": 1}"]')]
)
def test_grammars_begin_where_reasoning_ends(grammar: Grammar) -> None:
    format = REASONING["qwen3"]
    opened = after_reasoning(grammar, format, "assistant\n<think>\n", calls=False)
    assert accepts(opened, 'hm, {x}\n</think>\n\n{"a": 1}')
    assert not accepts(opened, '{"a": 1}')
    may = after_reasoning(grammar, format, "assistant\n", calls=False)
    assert accepts(may, '<think>hm</think>\n\n{"a": 1}')
    assert accepts(may, '{"a": 1}')
    assert not accepts(may, "<think>hm</think>\n\nno")
    assert after_reasoning(grammar, format, "assistant\n<think>\n\n</think>\n\n", calls=False) == grammar
