"""Parsers of text that is still being written, as generators.

A parser is a generator that yields parts, or None where it can't go on without more text. It reads from a ``Source``
only through the functions here, none of which decides anything by where the text happens to be cut: so its parts,
joined, are the same for any cut.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

from pippin.text.json_scanner import JsonScanner
from pippin.text.parts import CallArguments, Part, Text

T = TypeVar("T")

Scan = Generator[Part | None, None, T]


class Source:
    """Text not read yet. ``ended``: no more will come. ``mark`` begins a record of what is read from there on."""

    def __init__(self) -> None:
        self.text = ""
        self.ended = False
        self._record: list[str] | None = None

    def take(self, count: int) -> str:
        taken, self.text = self.text[:count], self.text[count:]
        if self._record is not None and taken:
            self._record.append(taken)
        return taken

    def mark(self) -> None:
        self._record = []

    def since_mark(self) -> str:
        """What was read since ``mark``; the record ends here."""
        record, self._record = self._record or [], None
        return "".join(record)


class Parser:
    """Runs a scan over a stream of text. ``push`` and ``finish`` give the parts that are certain by then."""

    def __init__(self, scan: Callable[[Source], Scan[None]]) -> None:
        self._source = Source()
        self._steps = scan(self._source)
        self._done = False

    def push(self, text: str) -> list[Part]:
        self._source.text += text
        return self._run() if self._source.text else []

    def finish(self) -> list[Part]:
        self._source.ended = True
        return self._run()

    def _run(self) -> list[Part]:
        parts: list[Part] = []
        for part in self._steps:
            if part is None:
                break
            parts.append(part)
        return parts


def held(text: str, markers: Sequence[str]) -> int:
    """How many characters at the text's end may be the beginning of a marker."""
    longest = min(max(map(len, markers), default=1) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if any(m.startswith(text[-n:]) for m in markers)), 0)


def first_of(text: str, markers: Sequence[str]) -> tuple[int, str] | None:
    """Where the first marker begins, and which it is; of several at one place, the longest."""
    found = [(i, -len(m), m) for m in markers if (i := text.find(m)) >= 0]
    if not found:
        return None
    at, _, marker = min(found)
    return at, marker


def plain(source: Source, markers: Sequence[str], kind: Callable[[str], Part] = Text) -> Scan[str | None]:
    """Pass text on as parts of a kind, up to a marker, which is read too and returned; None at the end of all text.

    No marker may begin with another one.
    """
    while True:
        if (found := first_of(source.text, markers)) is not None:
            at, marker = found
            if at:
                yield kind(source.take(at))
            source.take(len(marker))
            return marker
        ready = len(source.text) - (0 if source.ended else held(source.text, markers))
        if ready:
            yield kind(source.take(ready))
        if source.ended:
            return None
        yield None


def capture(source: Source, markers: Sequence[str]) -> Scan[tuple[str, str | None]]:
    """The text up to a marker, which is read too, and the marker; at the end of all text, the rest and None."""
    taken: list[str] = []
    scan = plain(source, markers)
    while True:
        try:
            part = next(scan)
        except StopIteration as stop:
            return "".join(taken), stop.value
        if part is None:
            yield None
        elif isinstance(part, Text):
            taken.append(part.text)


def space(source: Source, extra: str = "") -> Scan[str]:
    """Read white space (and characters of ``extra``); the character after it, not read, or "" at the end."""
    while True:
        rest = source.text.lstrip(" \t\r\n" + extra)
        source.take(len(source.text) - len(rest))
        if rest or source.ended:
            return rest[:1]
        yield None


def literal(source: Source, *choices: str) -> Scan[str | None]:
    """Read the choice that the text goes on with, and return it; None, and nothing read, if there is none."""
    while True:
        if found := [c for c in choices if source.text.startswith(c)]:
            return source.take(len(max(found, key=len)))
        if source.ended or not any(c.startswith(source.text) for c in choices):
            return None
        yield None


def json_value(source: Source, streamed: bool = False) -> Scan[tuple[str, bool]]:
    """Read a JSON value: its text, and whether it is whole. If ``streamed``, its pieces become CallArguments too."""
    scanner, taken = JsonScanner(), list[str]()
    while True:
        if piece := source.take(scanner.feed(source.text)):
            taken.append(piece)
            if streamed:
                yield CallArguments(piece)
        if scanner.done or scanner.broken:
            return "".join(taken), scanner.done
        if source.ended:
            return "".join(taken), scanner.could_end
        yield None
