"""The tools that a request offers, as parsers need to know them."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any

Schema = Mapping[str, Any]


class Offered:
    """Tools by name. ``list`` is what the chat template gets: OpenAI's, ``{"type": "function", "function": …}``.

    ``functions`` are what is in there, with ``strict``; ``strict``: whether any of them is.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        self.functions = [dict(tool["function"]) for tool in tools]
        self.list = [
            {"type": "function", "function": {k: v for k, v in f.items() if k != "strict"}} for f in self.functions
        ]
        self.strict = any(f.get("strict") for f in self.functions)
        self._schemas = {str(t["function"]["name"]): t["function"].get("parameters") or {} for t in tools}

    def __contains__(self, name: object) -> bool:
        return name in self._schemas

    @property
    def names(self) -> list[str]:
        return list(self._schemas)

    def parameters(self, name: str) -> Schema:
        """The JSON schema of a tool's arguments."""
        schema = self._schemas.get(name)
        return schema if isinstance(schema, Mapping) else {}

    def types(self, name: str, parameter: str) -> frozenset[str]:
        """The JSON types that a parameter may have, as far as its schema says; empty if it doesn't."""
        properties = self.parameters(name).get("properties")
        schema = properties.get(parameter) if isinstance(properties, Mapping) else None
        return frozenset(types_of(schema))

    def is_text(self, name: str, parameter: str) -> bool:
        return self.types(name, parameter) == {"string"}

    def value(self, name: str, parameter: str, text: str) -> Any:
        """What a parameter written without quotes stands for: JSON (or Python) if that suits its schema, else text."""
        types = self.types(name, parameter)
        if types == {"string"}:
            return text
        found = read_value(text.strip())
        if found is NOTHING or (types and json_type(found) not in types and not fits_number(found, types)):
            return text
        return found


NOTHING = object()
CONSTANTS = {"true": True, "false": False, "null": None}


def read_value(text: str) -> Any:
    """JSON's or Python's value, or NOTHING."""
    if text.lower() in CONSTANTS:
        return CONSTANTS[text.lower()]
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(text)
            json.dumps(found, allow_nan=False)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
        return found
    return NOTHING


def types_of(schema: object) -> list[str]:
    if not isinstance(schema, Mapping):
        return []
    kind = schema.get("type")
    if isinstance(kind, str):
        return [kind]
    if isinstance(kind, Sequence):
        return [k for k in kind if isinstance(k, str)]
    for name in ("anyOf", "oneOf"):
        if isinstance(parts := schema.get(name), Sequence):
            return [k for part in parts for k in types_of(part)]
    if isinstance(values := schema.get("enum"), Sequence):
        return [json_type(value) for value in values]
    return [json_type(schema["const"])] if "const" in schema else []


def json_type(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
        case Mapping():
            return "object"
    return "array"


def fits_number(value: object, types: frozenset[str]) -> bool:
    """An integer is a number too, and 3.0 an integer."""
    return (json_type(value) == "integer" and "number" in types) or (
        isinstance(value, float) and value.is_integer() and "integer" in types
    )
