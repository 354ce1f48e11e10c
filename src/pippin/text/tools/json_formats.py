"""Calls that are JSON objects: Qwen's and Hermes', Llama 3's, Mistral's, Phi's, and JSON with nothing round it."""

from __future__ import annotations

from pippin.text.parts import CallBroken, Text
from pippin.text.scan import Scan, Source, capture, literal, plain, space
from pippin.text.tools.calls import call_with, close, framed, object_calls
from pippin.text.tools.offered import Offered


def hermes(source: Source, tools: Offered) -> Scan[None]:
    """``<tool_call>{"name": …, "arguments": …}</tool_call>``, one after the other: Hermes 2, Qwen 2.5 and 3."""
    yield from framed(source, tools, ("<tool_call>",), ("</tool_call>",), object_calls)


def phi4(source: Source, tools: Offered) -> Scan[None]:
    """``<|tool_call|>[{"name": …, "arguments": …}]<|/tool_call|>``, and ``functools[…]`` of Phi-4-mini."""
    begins, ends = ("<|tool_call|>", "functools"), ("<|/tool_call|>",)
    while (begin := (yield from plain(source, begins))) is not None:
        source.mark()
        if (yield from object_calls(source, tools)):
            yield from close(source, begins, ends)
            continue
        if begin == "<|tool_call|>":
            yield from capture(source, ends)
        yield CallBroken(begin + source.since_mark())


def llama3(source: Source, tools: Offered) -> Scan[None]:
    """``{"name": …, "parameters": …}`` and nothing else, several separated by ``;``, maybe after ``<|python_tag|>``."""
    yield from bare(source, tools, "<|python_tag|>")


def json_only(source: Source, tools: Offered) -> Scan[None]:
    """A JSON object or a list of objects with name and arguments, and nothing else, maybe in a code fence."""
    yield from bare(source, tools, "```json")


def bare(source: Source, tools: Offered, begin: str) -> Scan[None]:
    """Calls from the first character on, or after the marker ``begin``; any other answer is text."""
    source.mark()
    yield from space(source)
    marked = yield from literal(source, begin)
    while True:
        if (yield from space(source)) not in ("{", "["):
            read = source.since_mark()
            if read.strip():
                yield CallBroken(read)
            elif read:
                yield Text(read)
            break
        if not (yield from object_calls(source, tools)):
            yield CallBroken(source.since_mark())
            break
        source.mark()
        if (yield from space(source, ";")) == "" or (marked == "```json" and (yield from literal(source, "```"))):
            return
    if marked is None and (yield from plain(source, (begin,))) is not None:
        yield from after(source, tools, begin)
    else:
        yield from plain(source, ())


def after(source: Source, tools: Offered, begin: str) -> Scan[None]:
    """Calls behind a marker in the middle of a text."""
    source.mark()
    if not (yield from object_calls(source, tools)):
        yield CallBroken(begin + source.since_mark())
    else:
        source.since_mark()
        yield from space(source, "`")
    yield from plain(source, ())


def mistral(source: Source, tools: Offered) -> Scan[None]:
    """``[TOOL_CALLS][{"name": …, "arguments": …}]``, or ``[TOOL_CALLS]name[ARGS]{…}`` of tokenizers from v11 on."""
    begin = "[TOOL_CALLS]"
    found = yield from plain(source, (begin,))
    while found is not None:
        source.mark()
        fine = yield from mistral_calls(source, tools)
        broken = begin + source.since_mark()
        if not fine:
            yield CallBroken(broken)
        found = yield from plain(source, (begin,))


def mistral_calls(source: Source, tools: Offered) -> Scan[bool]:
    if (yield from space(source)) in ("[", "{"):
        return (yield from object_calls(source, tools))
    while True:
        head, found = yield from capture(source, ("[ARGS]", "{", "\n"))
        if found != "[ARGS]":
            return False
        name, _, id = head.strip().partition("[CALL_ID]")
        if not (yield from call_with(source, name, id or None, tools)):
            return False
        if not following_word((yield from space(source, ","))):
            return True


def following_word(char: str) -> bool:
    """Whether another name begins; text after calls is not foreseen by the format."""
    return char.isalnum() or char == "_"
