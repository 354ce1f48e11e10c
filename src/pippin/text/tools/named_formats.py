"""Calls whose name stands before their JSON arguments, between special tokens: DeepSeek's and Kimi's."""

from __future__ import annotations

from pippin.text.parts import CallBroken
from pippin.text.scan import Scan, Source, capture, literal, plain, space
from pippin.text.tools.calls import call_with
from pippin.text.tools.offered import Offered

CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
SEP = "<｜tool▁sep｜>"

SECTION_BEGIN, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
KIMI_BEGIN, KIMI_ARGUMENTS, KIMI_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"

DEEPSEEK = (CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEP)
KIMI = (SECTION_BEGIN, SECTION_END, KIMI_BEGIN, KIMI_ARGUMENTS, KIMI_END)


def deepseek(source: Source, tools: Offered) -> Scan[None]:
    """DeepSeek V3, R1 (``function｜sep｜name``, arguments in a code fence) and V3.1 (``name｜sep｜arguments``)."""
    section = (CALLS_BEGIN, CALLS_END, CALL_BEGIN)
    while (found := (yield from plain(source, section))) is not None:
        if found != CALL_BEGIN:
            continue
        source.mark()
        if (yield from deepseek_call(source, tools)):
            source.since_mark()
            if (yield from space(source, "`}")):
                yield from literal(source, CALL_END)
            yield from space(source)
        else:
            yield from capture(source, (CALL_END,))
            yield CallBroken(CALL_BEGIN + source.since_mark())


def deepseek_call(source: Source, tools: Offered) -> Scan[bool]:
    head, sep = yield from capture(source, (SEP, CALL_END))
    if sep != SEP:
        return False
    name = head.strip()
    if name == "function":
        name, fence = yield from capture(source, ("```json", CALL_END))
        if fence != "```json":
            return False
    return (yield from call_with(source, name.strip(), None, tools))


def kimi_k2(source: Source, tools: Offered) -> Scan[None]:
    """Kimi K2: ``functions.NAME:INDEX`` is the call's id, and the next turn must repeat it."""
    while (found := (yield from plain(source, (SECTION_BEGIN, SECTION_END, KIMI_BEGIN)))) is not None:
        if found != KIMI_BEGIN:
            continue
        source.mark()
        if (yield from kimi_call(source, tools)):
            source.since_mark()
            if (yield from space(source, "}")):
                yield from literal(source, KIMI_END)
            yield from space(source)
        else:
            yield from capture(source, (KIMI_END,))
            yield CallBroken(KIMI_BEGIN + source.since_mark())


def kimi_call(source: Source, tools: Offered) -> Scan[bool]:
    head, found = yield from capture(source, (KIMI_ARGUMENTS, KIMI_END))
    if found != KIMI_ARGUMENTS:
        return False
    id = head.strip()
    name = id.removeprefix("functions.").rpartition(":")[0] or id
    return (yield from call_with(source, name, id, tools))
