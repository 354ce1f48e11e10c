"""What an answer's text is made of: words for the reader, reasoning, and calls of tools."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Text:
    """Words for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """What the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A tool is called; ``id`` is the model's own name for the call, if its format has one."""

    name: str
    id: str | None = None


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the JSON object that the call's arguments are. What was sent so far always begins some object."""

    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """The call is whole: its arguments, joined, are a JSON object."""


@dataclass(frozen=True, slots=True)
class CallBroken:
    """What looked like a call is none, and is text as the model wrote it. A CallBegin before it is taken back."""

    text: str


Part = Text | Reasoning | CallBegin | CallArguments | CallEnd | CallBroken
