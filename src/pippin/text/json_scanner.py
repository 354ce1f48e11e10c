"""Reads a JSON value (RFC 8259) character by character, so that it is known at each point to be the start of one."""

from __future__ import annotations

import re

MOST_DEEP = 100  # objects and lists in one another; those who read the value afterwards recurse

NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?", re.ASCII)
NUMBER_BEGUN = re.compile(r"-?((0|[1-9]\d*)(\.\d*|(\.\d+)?[eE][+-]?\d*)?)?", re.ASCII)
WORDS = ("true", "false", "null")
SPACE = " \t\r\n"
PLAIN = re.compile(r'[^"\\\x00-\x1f]+')


class JsonScanner:
    """``feed`` takes characters for as long as they go on with the value.

    ``done``: the value is whole. ``broken``: the next character can't follow. A number at the top ends only where
    something else follows it, or at the end of the text (``could_end``).
    """

    def __init__(self) -> None:
        self.done = False
        self.broken = False
        self._open: list[str] = []  # "{" and "[" that are not closed
        self._expects = "value"  # value, key, key or end, colon, comma, value or end; string, escape, hex; scalar
        self._after = ""  # what a string's end leads to
        self._scalar = ""
        self._hex = 0

    @property
    def could_end(self) -> bool:
        return self.done or (self._expects == "scalar" and not self._open and self._whole())

    def feed(self, text: str) -> int:
        """How many characters of the text belong to the value."""
        at = 0
        while at < len(text) and not (self.done or self.broken):
            if self._expects == "string" and (run := PLAIN.match(text, at)):
                at = run.end()
                continue
            if self._expects == "scalar" and not self._goes_on(text[at]):
                self._end_scalar()
                continue
            if not self._take(text[at]):
                self.broken = True
                break
            at += 1
        return at

    def _take(self, char: str) -> bool:
        match self._expects:
            case "string":
                return self._in_string(char)
            case "escape":
                self._expects, self._hex = ("hex", 4) if char == "u" else ("string", 0)
                return char in '"\\/bfnrtu'
            case "hex":
                self._hex -= 1
                self._expects = "hex" if self._hex else "string"
                return char in "0123456789abcdefABCDEF"
            case "scalar":
                self._scalar += char
                return True
        return char in SPACE or self._structure(char)

    def _in_string(self, char: str) -> bool:
        if char == '"':
            self._end_value() if self._after == "value" else self._expect("colon")
            return True
        self._expect("escape")
        return char == "\\"  # the rest of what PLAIN leaves out are control characters

    def _structure(self, char: str) -> bool:
        expects = self._expects
        if char == '"' and expects in ("value", "value or end", "key", "key or end"):
            self._after = "value" if expects.startswith("value") else "key"
            self._expect("string")
        elif char in "{[" and expects.startswith("value") and len(self._open) < MOST_DEEP:
            self._open.append(char)
            self._expect("key or end" if char == "{" else "value or end")
        elif char in "}]" and expects in ("comma", "key or end", "value or end"):
            if not self._open or self._open.pop() + char not in ("{}", "[]"):
                return False
            self._end_value()
        elif char == "," and expects == "comma":
            self._expect("key" if self._open[-1] == "{" else "value")
        elif char == ":" and expects == "colon":
            self._expect("value")
        elif expects.startswith("value") and self._goes_on(char):
            self._expect("scalar")
            self._scalar = char
        else:
            return False
        return True

    def _expect(self, what: str) -> None:
        self._expects = what

    def _end_value(self) -> None:
        self._expect("comma")
        self.done = not self._open

    def _goes_on(self, char: str) -> bool:
        text = self._scalar + char
        return any(word.startswith(text) for word in WORDS) or NUMBER_BEGUN.fullmatch(text) is not None

    def _whole(self) -> bool:
        return self._scalar in WORDS or NUMBER.fullmatch(self._scalar) is not None

    def _end_scalar(self) -> None:
        if self._whole():
            self._end_value()
            self._scalar = ""
        else:
            self.broken = True
