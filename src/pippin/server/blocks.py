"""An answer as a list of blocks: reasoning, text and calls in the order that they were written.

Anthropic's content and the items of OpenAI's Responses are such lists.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from pippin.text.parts import CallArguments, CallBegin, CallBroken, CallEnd, Part, Reasoning, Text


@dataclass(eq=False)
class Block:
    """``text`` is a call's arguments, as JSON; ``number`` counts the blocks that were opened before."""

    kind: Literal["reasoning", "text", "call"]
    text: str = ""
    name: str = ""
    id: str = ""
    number: int = 0


@dataclass(frozen=True, slots=True)
class Change:
    """A block was opened, grew by ``text``, was closed as complete, or dropped: a call that is none."""

    what: Literal["opened", "grew", "closed", "dropped"]
    block: Block
    text: str = ""


class Blocks:
    """``push`` parts, ``finish`` at the end; both say what changed. ``done`` are those that were closed."""

    def __init__(self) -> None:
        self.done: list[Block] = []
        self._open: Block | None = None
        self._count = 0

    def push(self, parts: Sequence[Part]) -> Iterator[Change]:
        for part in parts:
            match part:
                case Text(text):
                    yield from self._grow("text", text)
                case Reasoning(text):
                    yield from self._grow("reasoning", text)
                case CallBegin(name, id):
                    yield from self._close()
                    yield self._begin(Block("call", name=name, id=id or ""))
                case CallArguments(text):
                    yield from self._grow("call", text)
                case CallEnd():
                    yield from self._close()
                case CallBroken(text):
                    if self._open is not None and self._open.kind == "call":
                        dropped, self._open = self._open, None
                        yield Change("dropped", dropped)
                    yield from self._grow("text", text)

    def finish(self) -> Iterator[Change]:
        yield from self._close()

    def _grow(self, kind: Literal["reasoning", "text", "call"], text: str) -> Iterator[Change]:
        if self._open is None or self._open.kind != kind:
            yield from self._close()
            yield self._begin(Block(kind))
        assert self._open is not None
        self._open.text += text
        yield Change("grew", self._open, text)

    def _begin(self, block: Block) -> Change:
        block.number, self._count = self._count, self._count + 1
        self._open = block
        return Change("opened", block)

    def _close(self) -> Iterator[Change]:
        if self._open is not None:
            closed, self._open = self._open, None
            self.done.append(closed)
            yield Change("closed", closed)
