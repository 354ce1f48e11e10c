"""A model's text to parts: reasoning, words, calls. One place that knows which formats a model speaks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from pippin.errors import ConfigError
from pippin.text import reasoning, tools
from pippin.text.parts import CallBegin, CallBroken, CallEnd, Part, Reasoning, Text
from pippin.text.reasoning import ReasoningFormat
from pippin.text.scan import Parser, Scan, Source, plain
from pippin.text.tokenizer import Tokenizer
from pippin.text.tools import ToolFormat
from pippin.text.tools.offered import Offered

T = TypeVar("T")

HARMONY = "gpt-oss"
OFF = "none"


@dataclass(frozen=True, slots=True)
class Speech:
    """The formats that a model writes in; None where it has none, or is not to be parsed.

    ``specials`` are the formats' markers that the tokenizer holds to be special tokens, with their ids: parsers must
    see them, readers must not.
    """

    reasoning: ReasoningFormat | None = None
    tools: ToolFormat | None = None
    specials: Mapping[str, int] | None = None

    @classmethod
    def of(
        cls, tokenizer: Tokenizer, template: str | None, tool_parser: str = "auto", reasoning_parser: str = "auto"
    ) -> Speech:
        """By the chat template, unless parsers are named (``none`` is off). Raises ConfigError for unknown names."""
        calls, thinks = named_formats(tool_parser, reasoning_parser)
        if reasoning_parser == "auto":
            thinks = reasoning.format_of(template or "")
        if tool_parser == "auto":
            calls = tools.format_of(template or "")
        markers = [*(thinks.markers if thinks else ()), *(calls.markers if calls else ())]
        return cls(thinks, calls, tokenizer.specials_in(markers))

    @property
    def shown(self) -> frozenset[int]:
        """Special tokens that the text must have for the parsers."""
        return frozenset((self.specials or {}).values())

    @property
    def formats(self) -> tuple[ToolFormat | None, ReasoningFormat | None]:
        return self.tools, self.reasoning

    @property
    def is_harmony(self) -> bool:
        """Reasoning and calls are one format."""
        return HARMONY in (self.reasoning and self.reasoning.name, self.tools and self.tools.name)


def named_formats(tool_parser: str, reasoning_parser: str) -> tuple[ToolFormat | None, ReasoningFormat | None]:
    """The formats of these names, None for auto and none. Raises ConfigError for unknown ones."""
    calls, thinks = None, None
    if tool_parser not in ("auto", OFF):
        calls = named(tools.format_named(tool_parser), "--tool-call-parser", tools.FORMATS)
    if reasoning_parser not in ("auto", OFF):
        thinks = named(reasoning.format_named(reasoning_parser), "--reasoning-parser", reasoning.FORMATS)
    return calls, thinks


def named(format: T | None, option: str, known: Mapping[str, object]) -> T:
    if format is None:
        raise ConfigError(f"must be {OFF}, auto or one of {', '.join(sorted(known))}", option)
    return format


class Reply:
    """One answer's text, parsed as it comes.

    ``prompt`` is the text before it. ``offered`` are the tools that it may call, None to look for no calls.
    ``separate``: tell reasoning apart; else it stays where it is.
    """

    def __init__(self, speech: Speech, prompt: str, offered: Offered | None, separate: bool = True) -> None:
        hidden = tuple(speech.specials or ())
        also_end = [m for m in (speech.tools.markers[:1] if speech.tools and offered else ()) if m in hidden]
        self._separate = separate
        self._reasoning: Parser | None = None
        self._tools: Parser | None = None
        if speech.is_harmony:
            self._tools = tools.FORMATS[HARMONY].parser(offered or Offered([]))
        else:
            if speech.reasoning is not None and separate:
                self._reasoning = speech.reasoning.parser(prompt, also_end)
            if speech.tools is not None and offered is not None:
                self._tools = speech.tools.parser(offered)
        self._tidy = Tidy(hidden, trims=self._tools is not None)

    def push(self, text: str) -> list[Part]:
        """The parts that are certain now."""
        if self._reasoning is None and self._tools is None:
            return [Text(text)] if text else []
        return self._arrange(self._call(self._reason(text)))

    def finish(self) -> list[Part]:
        """What is left when the answer has ended."""
        parts = self._call(self._reasoning.finish()) if self._reasoning is not None else []
        if self._tools is not None:
            parts += self._tools.finish()
        return [*self._arrange(parts), *self._tidy.finish()]

    def _reason(self, text: str) -> list[Part]:
        return self._reasoning.push(text) if self._reasoning is not None else [Text(text)]

    def _call(self, parts: Sequence[Part]) -> list[Part]:
        if self._tools is None:
            return list(parts)
        found: list[Part] = []
        for part in parts:
            found += self._tools.push(part.text) if isinstance(part, Text) else [part]
        return found

    def _arrange(self, parts: Sequence[Part]) -> list[Part]:
        if not self._separate:
            parts = [Text(p.text) if isinstance(p, Reasoning) else p for p in parts]
        return [tidied for part in parts for tidied in self._tidy.push(part)]


class Tidy:
    """Takes white space out from where parts meet, and special tokens' names out of what is read.

    White space before a call goes, since templates put their own there, and so the next turn's prompt begins with this
    turn's tokens.
    """

    def __init__(self, hidden: Sequence[str], trims: bool) -> None:
        self._hidden = tuple(hidden)
        self._trims = trims
        self._cleaner = self._clean()
        self._blank = ""  # held back: the end of the text so far
        self._reason_blank = ""
        self._lost = ""  # taken out before a call that may still prove to be none
        self._fresh = False  # behind a call: white space is dropped

    def _clean(self) -> Parser:
        return Parser(partial(without, markers=self._hidden))

    def push(self, part: Part) -> list[Part]:
        if isinstance(part, Text):
            return self._texts(self._cleaner.push(part.text))
        if isinstance(part, Reasoning):
            return self._reasoning(part.text)
        found = self._texts(self._cleaner.finish())
        self._cleaner = self._clean()
        self._reason_blank = ""
        if isinstance(part, CallBegin):
            self._lost, self._blank = self._blank, ""
        elif isinstance(part, CallEnd):
            self._lost, self._fresh = "", True
        elif isinstance(part, CallBroken):
            text = part.text
            for name in self._hidden:
                text = text.replace(name, "")
            part, self._lost, self._blank, self._fresh = CallBroken(self._lost + self._blank + text), "", "", False
        return [*found, part]

    def finish(self) -> list[Part]:
        found = self._texts(self._cleaner.finish())
        rest, self._blank = self._blank, ""
        return [*found, Text(rest)] if rest else found

    def _texts(self, parts: Sequence[Part]) -> list[Part]:
        text = self._blank + "".join(part.text for part in parts if isinstance(part, Text))
        if not text:
            return []
        if self._fresh:
            text = text.lstrip()
            self._fresh = not text
        self._reason_blank = ""
        kept = text.rstrip() if self._trims else text
        self._blank = text[len(kept) :]
        return [Text(kept)] if kept else []

    def _reasoning(self, text: str) -> list[Part]:
        text = self._reason_blank + text
        kept = text.rstrip()
        self._reason_blank = text[len(kept) :]
        return [Reasoning(kept)] if kept else []


def without(source: Source, markers: Sequence[str]) -> Scan[None]:
    while (yield from plain(source, markers)) is not None:
        pass
