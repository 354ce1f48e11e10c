"""The fields by which a request asks for structured output, in all their spellings, to one Grammar.

Only what can be told without the model is checked here; the grammar itself is checked where it is compiled.
Sources: OpenAI's ``response_format``; SGLang's sampling parameters ``json_schema``, ``regex``, ``ebnf`` and
``structural_tag``; vLLM's ``guided_…`` fields and ``structured_outputs``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pippin.errors import RequestError
from pippin.types import Grammar, GrammarKind

LONGEST = 2**20  # characters; llguidance has limits of its own on what it takes to compile

# Fields that hold a grammar, by name.
KINDS: Mapping[str, GrammarKind] = {
    "json_schema": "json_schema",
    "regex": "regex",
    "ebnf": "grammar",
    "structural_tag": "structural_tag",
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
# The keys of vLLM's structured_outputs.
_OUTPUTS: Mapping[str, GrammarKind] = {
    "json": "json_schema",
    "regex": "regex",
    "choice": "choice",
    "grammar": "grammar",
    "structural_tag": "structural_tag",
}


def grammar_of(fields: Mapping[str, Any], prefix: str = "") -> Grammar | None:
    """The grammar that a request's fields ask for, None if they ask for none; None values count as left out.

    ``fields`` may hold ``response_format``, ``structured_outputs`` and those in KINDS. Raises RequestError naming the
    field, with ``prefix`` in front, if one is wrong, or if there are two.
    """
    found = []
    for name, value in fields.items():
        if value is None:
            continue
        if name == "response_format":
            found.append(_response_format(value, prefix + name))
        elif name == "structured_outputs":
            found.append(_structured_outputs(value, prefix + name))
        else:
            found.append(_grammar(KINDS[name], value, prefix + name))
    grammars = [grammar for grammar in found if grammar is not None]
    if len(grammars) > 1:
        first, second = grammars[0].field, grammars[1].field
        raise RequestError(f"{first} and {second} both say what the answer must be; send one of them", second)
    return grammars[0] if grammars else None


def _grammar(kind: GrammarKind, value: Any, field: str) -> Grammar:
    match kind:
        case "json_schema":
            fits, need = isinstance(value, dict | bool) or _is_json(value), "a JSON schema: an object, or its text"
        case "structural_tag":
            fits, need = isinstance(value, dict) or _is_json(value), "a structural tag: an object, or its text"
        case "choice":
            fits = isinstance(value, list) and bool(value) and all(isinstance(c, str) and c for c in value)
            need = "a list of strings that are not empty"
        case _:
            fits, need = isinstance(value, str) and bool(value), "a string that is not empty"
    if not fits:
        raise RequestError(f"{field} must be {need}", field)
    text = value if isinstance(value, str) else json.dumps(value)
    if len(text) > LONGEST:
        raise RequestError(f"{field} is longer than {LONGEST} characters", field)
    return Grammar(kind, text, field)


def _is_json(value: Any) -> bool:
    """Whether it is a text of JSON."""
    try:
        json.loads(value if isinstance(value, str) else "")
    except (ValueError, RecursionError):
        return False
    return True


def _response_format(value: Any, field: str) -> Grammar | None:
    """OpenAI's. ``strict`` may say False: the answer keeps to the schema all the same."""
    kind = value.get("type") if isinstance(value, dict) else None
    match kind:
        case "text":
            _only(value, {"type"}, field)
            return None
        case "json_object":
            _only(value, {"type"}, field)
            return Grammar("json_object", "", field)
        case "json_schema":
            _only(value, {"type", "json_schema"}, field)
            return _named_schema(value.get("json_schema"), f"{field}.json_schema")
        case "structural_tag":
            return _grammar("structural_tag", value, field)
    known = "text, json_object, json_schema or structural_tag"
    raise RequestError(f"{field}.type must be {known}, not {kind!r}", f"{field}.type")


def _named_schema(value: Any, field: str) -> Grammar:
    if not isinstance(value, dict):
        raise RequestError(f"{field} must be an object with a name and a schema", field)
    _only(value, {"name", "description", "schema", "strict"}, field)
    if "schema" not in value:
        raise RequestError(f"{field}.schema is required", f"{field}.schema")
    return _grammar("json_schema", value["schema"], f"{field}.schema")


def _structured_outputs(value: Any, field: str) -> Grammar | None:
    """vLLM's."""
    if not isinstance(value, dict):
        raise RequestError(f"{field} must be an object", field)
    _only(value, {*_OUTPUTS, "json_object"}, field)
    found = [_grammar(_OUTPUTS[n], v, f"{field}.{n}") for n, v in value.items() if n in _OUTPUTS and v is not None]
    if value.get("json_object"):
        found.append(Grammar("json_object", "", f"{field}.json_object"))
    if len(found) != 1:
        raise RequestError(f"{field} must have one of {', '.join([*_OUTPUTS, 'json_object'])}", field)
    return found[0]


def _only(value: Mapping[str, Any], known: set[str], field: str) -> None:
    for name in value:
        if name not in known:
            raise RequestError(f"unknown field {field}.{name}", f"{field}.{name}")
