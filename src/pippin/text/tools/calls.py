"""The pieces that formats of tool calls are made of: JSON objects with a name, and markers round them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from pippin.text.parts import CallArguments, CallBegin, CallBroken, CallEnd, Part
from pippin.text.scan import Scan, Source, capture, json_value, literal, plain, space
from pippin.text.tools.offered import Offered

Body = Callable[[Source, Offered], Scan[bool]]
"""Reads what is between two markers: one or more calls. False, with what was read on the source's record, if not."""

ARGUMENTS = ("arguments", "parameters", "args")
NAMES = ("name", "tool_name")
IDS = ("id", "tool_call_id")


def framed(source: Source, tools: Offered, begins: Sequence[str], ends: Sequence[str], body: Body) -> Scan[None]:
    """Calls between markers, text round them. A call whose end marker is missing at the end of all text is whole."""
    while (begin := (yield from plain(source, begins))) is not None:
        source.mark()
        fine = yield from body(source, tools)
        if fine:
            yield from close(source, begins, ends)
            continue
        if ends:
            yield from capture(source, ends)  # onto the record
        yield CallBroken(begin + source.since_mark())


def close(source: Source, begins: Sequence[str], ends: Sequence[str]) -> Scan[None]:
    """Read an end marker, and brackets too many before it, unless something else follows."""
    source.since_mark()
    if ends and (yield from space(source, "}])")):
        yield from literal(source, *ends)


def object_call(source: Source, tools: Offered) -> Scan[bool]:
    """A JSON object with a name and arguments, in any order."""
    call = Call(tools)
    if not (yield from literal(source, "{")):
        return False
    if (yield from space(source)) == "}":
        return False
    while True:
        if (yield from space(source)) != '"':
            return False
        key, fine = yield from json_value(source)
        if not fine or (yield from space(source)) != ":":
            return False
        source.take(1)
        yield from space(source)
        if not (yield from call.member(source, str(json.loads(key)))):
            return False
        following = yield from space(source)
        if following not in (",", "}"):
            return False
        source.take(1)
        if following == "}":
            return (yield from call.end())
        yield from space(source)


class Call:
    """What is known of the call that is being read."""

    def __init__(self, tools: Offered) -> None:
        self._tools = tools
        self._name: str | None = None
        self._id: str | None = None
        self._held: str | None = None  # arguments that came before the name
        self._begun = False

    def member(self, source: Source, key: str) -> Scan[bool]:
        """Read one of the object's values. Arguments are streamed if the name is known."""
        if key in ARGUMENTS and not self._begun and self._name is not None and source.text[:1] == "{":
            yield self._begin()
            _, fine = yield from json_value(source, streamed=True)
            return fine
        if key not in (*NAMES, *IDS, *ARGUMENTS, "type"):
            return False  # at once: some other JSON is an answer, and should be streamed
        text, fine = yield from json_value(source)
        if not fine:
            return False
        value = json.loads(text)
        if key in NAMES and isinstance(value, str) and value in self._tools:
            self._name = value
        elif key in IDS and isinstance(value, str):
            self._id = value
        elif key in ARGUMENTS:
            self._held = arguments_of(text)
            return self._held is not None
        return key not in NAMES or self._name is not None

    def end(self) -> Scan[bool]:
        if self._name is None:
            return False
        if not self._begun:  # no arguments at all are none
            yield self._begin()
            yield CallArguments(self._held or "{}")
        yield CallEnd()
        return True

    def _begin(self) -> Part:
        assert self._name is not None
        self._begun = True
        return CallBegin(self._name, self._id)


def arguments_of(text: str) -> str | None:
    """A JSON object's text, from JSON that holds one, or null, or either in a string; None if it doesn't."""
    value = json.loads(text)
    if isinstance(value, str):
        text = value.strip() or "{}"
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return None
    if value is None:
        return "{}"
    return text if isinstance(value, dict) else None


def object_calls(source: Source, tools: Offered) -> Scan[bool]:
    """A JSON object that is a call, or a list of such."""
    if (yield from space(source)) != "[":
        return (yield from object_call(source, tools))
    source.take(1)
    while True:
        yield from space(source)
        if not (yield from object_call(source, tools)):
            return False
        following = yield from space(source)
        if following not in (",", "]"):
            return False
        source.take(1)
        if following == "]":
            return True


def call_with(source: Source, name: str, id: str | None, tools: Offered) -> Scan[bool]:
    """The arguments of a call whose name has been read: a JSON object."""
    if name not in tools or (yield from space(source)) != "{":
        return False
    yield CallBegin(name, id)
    _, fine = yield from json_value(source, streamed=True)
    if fine:
        yield CallEnd()
    return fine


def whole(name: str, id: str | None, arguments: object) -> list[Part]:
    """A call that is known at once."""
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    return [CallBegin(name, id), CallArguments(text), CallEnd()]
