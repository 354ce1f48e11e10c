"""What an answer's text is made of: words for the reader, reasoning, and calls of tools."""

from __future__ import annotations

from msgspec import Struct


class Text(Struct, frozen=True):
    """Words for the reader."""

    text: str


class Reasoning(Struct, frozen=True):
    """What the model thinks before it answers."""

    text: str


class CallBegin(Struct, frozen=True):
    """A tool is called; ``id`` is the model's own name for the call, if its format has one."""

    name: str
    id: str | None = None


class CallArguments(Struct, frozen=True):
    """More of the JSON object that the call's arguments are. What was sent so far always begins some object."""

    text: str


class CallEnd(Struct, frozen=True):
    """The call is whole: its arguments, joined, are a JSON object."""


class CallBroken(Struct, frozen=True):
    """What looked like a call is none, and is text as the model wrote it. A CallBegin before it is taken back."""

    text: str


Part = Text | Reasoning | CallBegin | CallArguments | CallEnd | CallBroken
