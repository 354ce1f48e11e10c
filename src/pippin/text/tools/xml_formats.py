"""Calls in tags, an argument each: Qwen3-Coder's, GLM's and DeepSeek V3.2's.

Values stand there without quotes. One that its schema calls a string is streamed as it is written; any other is read
when it is whole.
"""

from __future__ import annotations

import json
import re

from pippin.text.parts import CallArguments, CallBegin, CallEnd
from pippin.text.scan import Scan, Source, capture, literal, plain, space
from pippin.text.tools.calls import framed
from pippin.text.tools.offered import Offered


class Arguments:
    """A call's arguments, written as the JSON object that they come to."""

    def __init__(self, tools: Offered, name: str) -> None:
        self._tools, self._name = tools, name
        self._seen: set[str] = set()

    def key(self, key: str) -> CallArguments:
        comma = ", " if self._seen else "{"
        self._seen.add(key)
        return CallArguments(f"{comma}{quoted(key)}: ")

    def read(self, source: Source, key: str, end: str, *, trims: bool = False, is_text: bool = False) -> Scan[bool]:
        """Read a value up to ``end``. ``trims``: a newline on either side is no part of it. False if it never ends."""
        if key in self._seen:
            return False
        if trims:
            yield from literal(source, "\n")
        ends = (f"\n{end}", end) if trims else (end,)
        if not is_text and not self._tools.is_text(self._name, key):
            text, found = yield from capture(source, ends)
            if found is not None:
                yield self.key(key)
                value = self._tools.value(self._name, key, text)
                yield CallArguments(json.dumps(value, ensure_ascii=False, allow_nan=False))
            return found is not None
        yield self.key(key)
        yield CallArguments('"')
        found = yield from plain(source, ends, lambda text: CallArguments(quoted(text)[1:-1]))
        if found is not None:
            yield CallArguments('"')
        return found is not None

    def end(self) -> Scan[bool]:
        yield CallArguments("}" if self._seen else "{}")
        yield CallEnd()
        return True


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def qwen3_coder(source: Source, tools: Offered) -> Scan[None]:
    """``<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>``; the outer tag may lack."""

    def outer(source: Source, tools: Offered) -> Scan[bool]:
        yield from space(source)
        if not (yield from literal(source, "<function=")):
            return False
        return (yield from qwen3_coder_call(source, tools))

    yield from framed(source, tools, ("<tool_call>",), ("</tool_call>",), outer)


def qwen3_coder_call(source: Source, tools: Offered) -> Scan[bool]:
    name, found = yield from capture(source, (">", "\n"))
    if found != ">" or name.strip() not in tools:
        return False
    yield CallBegin(name.strip())
    arguments = Arguments(tools, name.strip())
    while True:
        yield from space(source)
        tag = yield from literal(source, "<parameter=", "</function>")
        if tag == "</function>":
            return (yield from arguments.end())
        if tag is None:
            return False
        key, found = yield from capture(source, (">", "\n"))
        if found != ">" or not (yield from arguments.read(source, key.strip(), "</parameter>", trims=True)):
            return False


def glm(source: Source, tools: Offered) -> Scan[None]:
    """GLM 4.5 to 4.7: ``<tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value></tool_call>``."""
    yield from framed(source, tools, ("<tool_call>",), ("</tool_call>",), glm_call)


def glm_call(source: Source, tools: Offered) -> Scan[bool]:
    name, tag = yield from capture(source, ("<arg_key>", "</tool_call>"))
    name = name.strip()
    if tag is None or name not in tools:
        return False
    yield CallBegin(name)
    arguments = Arguments(tools, name)
    while tag == "<arg_key>":
        key, found = yield from capture(source, ("</arg_key>", "</tool_call>"))
        yield from space(source)
        if found != "</arg_key>" or not (yield from literal(source, "<arg_value>")):
            return False
        if not (yield from arguments.read(source, key.strip(), "</arg_value>")):
            return False
        yield from space(source)
        tag = yield from literal(source, "<arg_key>", "</tool_call>")
    return tag is not None and (yield from arguments.end())


ATTRIBUTES = re.compile(r'(\w+)="([^"]*)"')
DSML = "<｜DSML｜"


def deepseek_v32(source: Source, tools: Offered) -> Scan[None]:
    """DeepSeek V3.2: ``<｜DSML｜function_calls>``, in it ``invoke`` with a name, in it ``parameter`` with its value."""
    begin = f"{DSML}function_calls>"
    yield from framed(source, tools, (begin,), (f"</{DSML[1:]}function_calls>",), deepseek_v32_calls)


def deepseek_v32_calls(source: Source, tools: Offered) -> Scan[bool]:
    while True:
        yield from space(source)
        if not (yield from literal(source, f"{DSML}invoke")):
            return False
        head, found = yield from capture(source, (">",))
        name = dict(ATTRIBUTES.findall(head)).get("name")
        if found is None or name not in tools or not (yield from deepseek_v32_call(source, tools, str(name))):
            return False
        following = yield from space(source)
        if following != "<" or not (yield from peek(source, f"{DSML}invoke")):
            return True


def deepseek_v32_call(source: Source, tools: Offered, name: str) -> Scan[bool]:
    yield CallBegin(name)
    arguments = Arguments(tools, name)
    while True:
        yield from space(source)
        tag = yield from literal(source, f"{DSML}parameter", f"</{DSML[1:]}invoke>")
        if tag is None:
            return False
        if tag.startswith("</"):
            return (yield from arguments.end())
        head, found = yield from capture(source, (">",))
        given = dict(ATTRIBUTES.findall(head))
        end, is_text = f"</{DSML[1:]}parameter>", given.get("string") == "true"
        if found is None or not (yield from arguments.read(source, given.get("name", ""), end, is_text=is_text)):
            return False


def peek(source: Source, expected: str) -> Scan[bool]:
    """Whether the text goes on so; reads nothing."""
    while len(source.text) < len(expected) and expected.startswith(source.text) and not source.ended:
        yield None
    return source.text.startswith(expected)
