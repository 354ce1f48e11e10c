"""What a request asks for, as a grammar in llguidance's words, or a refusal that says what it can't do."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llguidance import LLMatcher, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark

from pippin.errors import RequestError
from pippin.grammar.tags import grammar_of_tag
from pippin.types import Grammar

# The longest gap between two of JSON's tokens: enough for an indented line, and it ends.
WHITESPACE = r"[\x20\x0A\x0D\x09]{0,32}"

# Keywords of JSON schemas that constrain, of any draft, which llguidance passes over without a word.
_PASSED_OVER = ("dependencies", "$recursiveRef", "divisibleBy", "disallow", "extends")
# llguidance's own has a 29th of February in any year; a year 0000 is more than Python's datetime can read.
_YEAR = "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = f"{_YEAR}-(?:0[13-9]|1[0-2]|02-(?:[01]|2[0-8]))|{_LEAP_YEAR}-02-29"

_SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_SCHEMA_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_SCHEMAS = ("additionalProperties", "items", "additionalItems")


@dataclass(frozen=True, slots=True)
class JsonStyle:
    """How answers lay out JSON: as ``json.dumps`` does if ``compact``, else with any ``whitespace`` (a regex)."""

    compact: bool = False
    whitespace: str = WHITESPACE

    @property
    def options(self) -> Any:
        """As llguidance spells it."""
        if self.compact:
            return {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        return {"whitespace_pattern": self.whitespace}


def llguidance_grammar(grammar: Grammar, style: JsonStyle, vocabulary: LLTokenizer) -> str:
    """The grammar for an LLMatcher, which may yet refuse it. Raises RequestError without the field in front."""
    match grammar.kind:
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(schema_text(grammar.text), overrides=style.options)
        case "json_object":
            return LLMatcher.grammar_from_json_schema('{"type": "object"}', overrides=style.options)
        case "regex":
            return LLMatcher.grammar_from_regex(whole(grammar.text))
        case "grammar":
            return LLMatcher.grammar_from_lark(lark_of_text(grammar.text))
        case "choice":
            return LLMatcher.grammar_from_lark(lark_of_choices(parsed(grammar.text)))
        case "structural_tag":
            tag = parsed(grammar.text)
            for schema in schemas_of_tag(tag):
                complete(schema)
            return grammar_of_tag(tag, style.options, vocabulary, lark_of_text)


def parsed(text: str) -> Any:
    """A JSON text's value. Raises RequestError."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"it is not valid JSON: {error}") from error


def schema_text(text: str) -> str:
    """A JSON schema, checked for what llguidance would ignore. Raises RequestError naming the keyword."""
    schema = parsed(text)
    if not isinstance(schema, dict | bool):
        raise RequestError("a JSON schema must be an object")
    complete(schema)
    # A schema that is true allows any value, but llguidance wants an object here.
    return "{}" if schema is True else json.dumps(schema if schema is not False else {"enum": []})


def complete(schema: Any) -> None:
    """Adds to a schema, in place, what llguidance would let pass: dates that no calendar has.

    Raises RequestError for keywords that constrain, and that it would pass over.
    """
    for part in subschemas(schema):
        for keyword in _PASSED_OVER:
            if keyword in part:
                raise RequestError(f"the schema keyword {keyword} is not supported")
        for keyword in ("exclusiveMinimum", "exclusiveMaximum"):
            if isinstance(part.get(keyword), bool):
                raise RequestError(f"the schema keyword {keyword} must be a number, as since draft 6")
        if part.get("format") in ("date", "date-time"):
            more = part.get("allOf", [])
            if not isinstance(more, list):
                raise RequestError("the schema keyword allOf must be a list")
            part["allOf"] = [*more, {"pattern": f"^(?:{_DATE})"}]


def schemas_of_tag(tag: Any) -> Iterator[Any]:
    """The JSON schemas in a structural tag."""
    waiting = [tag]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            waiting += part
        elif isinstance(part, dict):
            yield from (part[name] for name in ("json_schema", "schema") if name in part)
            waiting += [value for name, value in part.items() if name not in ("json_schema", "schema")]


def subschemas(schema: Any) -> Iterator[dict[str, Any]]:
    """The schema and all schemas in it, outermost first; not what only looks like one, in ``const`` or ``enum``."""
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if not isinstance(part, dict):
            continue
        yield part
        for name in _SCHEMA_MAPS:
            waiting += part[name].values() if isinstance(part.get(name), dict) else ()
        for name in _SCHEMA_LISTS:
            waiting += part[name] if isinstance(part.get(name), list) else ()
        for name in _SCHEMAS:
            waiting.append(part.get(name))


def whole(regex: str) -> str:
    """A regex that the whole answer matches, without the anchors that say so."""
    inner = regex.removeprefix("^")
    backslashes = len(inner) - len(inner.removesuffix("$").rstrip("\\")) - 1
    return inner[:-1] if inner.endswith("$") and backslashes % 2 == 0 else inner


def lark_of_text(text: str) -> str:
    """GBNF (``root ::= …``) or Lark (``start: …``) as Lark. Raises RequestError."""
    try:
        return any_to_lark(text)
    except Exception as error:  # the converter raises its own error and others
        raise RequestError(f"it is neither GBNF nor Lark: {error}") from error


def lark_of_choices(choices: Any) -> str:
    """One of several texts."""
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c for c in choices):
        raise RequestError("the choices must be a list of strings that are not empty")
    return "start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)


_UNIMPLEMENTED = re.compile(r"Unimplemented keys: \[(.*)\]")


def explained(grammar: Grammar, said: str) -> RequestError:
    """llguidance's refusal, in words of the request."""
    if match := _UNIMPLEMENTED.search(said):
        names = match[1].replace('"', "")
        return RequestError(f"the schema keyword{'s' * (',' in names)} {names} can't be enforced; leave out, or reword")
    if "oneOf constraints" in said:
        return RequestError(
            "the schema keyword oneOf can be enforced only where no value fits two of its branches; use anyOf"
        )
    lines = [line.strip() for line in said.strip().splitlines() if line.strip(" ^")] or ["no reason given"]
    cause = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    kind = {"json_schema": "the JSON schema", "regex": "the regex"}.get(grammar.kind, "the grammar")
    return RequestError(f"{kind} can't be compiled: {cause[:400]}")
