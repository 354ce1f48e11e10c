"""Calls that are a Python list: ``[get_weather(city="Oslo"), now()]``. Llama 4's, Llama 3.2's and LFM2's."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any

from pippin.text.parts import CallBroken, Part
from pippin.text.scan import Scan, Source, capture, literal, plain, space
from pippin.text.tools.calls import whole
from pippin.text.tools.offered import CONSTANTS, Offered

MARKERS = ("<|python_start|>", "<|python_end|>", "<|tool_call_start|>", "<|tool_call_end|>")
BEGINS = MARKERS[::2]
BEGUN = re.compile(r"\[\s*([A-Za-z_][\w.]*\s*(\(.*)?)?", re.DOTALL)


def pythonic(source: Source, tools: Offered) -> Scan[None]:
    """Calls from the first character on, or between markers; any other answer is text."""
    source.mark()
    yield from space(source)
    if (yield from literal(source, *BEGINS)) is None and not source.text.startswith("["):
        if read := source.since_mark():
            yield CallBroken(read)
    else:
        yield from calls(source, tools)
    while (found := (yield from plain(source, MARKERS))) is not None:
        if found in BEGINS:
            source.mark()
            yield from calls(source, tools, found)


def calls(source: Source, tools: Offered, begin: str = "") -> Scan[None]:
    """A list of calls, and its end marker if there is one."""
    yield from space(source)
    length = yield from bracketed(source)
    found = list(read_calls(source.text[:length], tools) or ()) if length else []
    if found:
        source.take(length)
        source.since_mark()
        yield from found
        yield from space(source)
        yield from literal(source, *MARKERS[1::2])
        return
    if begin:
        yield from capture(source, MARKERS[1::2])
    yield CallBroken(begin + source.since_mark())


def bracketed(source: Source) -> Scan[int]:
    """The length of a Python list that the text begins with, nothing read; 0 if it is none, or holds no calls."""
    depth, quote, at = 0, "", 0
    while True:
        while at < len(source.text):
            char = source.text[at]
            if at == 0 and char != "[":
                return 0
            if quote:
                at += char == "\\"
                quote = "" if char == quote else quote
            elif char in "'\"":
                quote = char
            elif char in "([{":
                depth += 1
            elif char in ")]}":
                depth -= 1
                if depth == 0:
                    return at + 1
            at += 1
        if source.ended or not BEGUN.fullmatch(source.text):
            return 0
        yield None


def read_calls(text: str, tools: Offered) -> Iterator[Part] | None:
    """The calls of a list; None if anything in it is not a call of an offered tool with keywords."""
    try:
        body = ast.parse(text.strip(), mode="eval").body
        found = [read_call(node) for node in body.elts] if isinstance(body, ast.List) else []
        if any(name not in tools for name, _ in found):
            return None
        return iter([part for name, arguments in found for part in whole(name, None, arguments)])
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


def read_call(node: ast.expr) -> tuple[str, dict[str, Any]]:
    if not isinstance(node, ast.Call) or node.args or any(k.arg is None for k in node.keywords):
        raise ValueError("not a call with keywords")
    return ast.unparse(node.func), {str(k.arg): ast.literal_eval(Literals().visit(k.value)) for k in node.keywords}


class Literals(ast.NodeTransformer):
    """JSON's constants, which models write among Python's."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(CONSTANTS[node.id]) if node.id in CONSTANTS else node
