"""Conversations: their parts, and the template that turns them into text."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

Message = dict[str, Any]
Tool = dict[str, Any]

TEMPLATE = Path(__file__).with_name("chat_template.jinja").read_text()
HELD_OUT = 32  # one key in this many is never trained on

_environment = jinja2.Environment()
_environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
_template = _environment.from_string(TEMPLATE)


@dataclass(frozen=True, slots=True)
class Exchange:
    """A question and its answer, with tool calls between them if it has any.

    ``keys`` name what must not be in both training and evaluation (operands, a sentence, a wording): what the
    exchange is about comes first, what else its answer shows after it.
    ``check`` says how a reply is compared with the reference: see `evaluate.matches`; "" is not checked.
    """

    messages: tuple[Message, ...]
    keys: tuple[str, ...] = ()
    check: str = ""
    tools: tuple[Tool, ...] = ()


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def system(text: str) -> Message:
    return {"role": "system", "content": text}


def ask(question: str, answer: str, *keys: str, check: str = "") -> Exchange:
    """A question answered at once."""
    return Exchange((user(question), assistant(answer)), keys, check)


def held_out(key: str) -> bool:
    """Whether a key belongs to the evaluation; the same on every machine."""
    return zlib.crc32(key.encode()) % HELD_OUT == 0


def trainable(exchange: Exchange) -> bool:
    return not any(map(held_out, exchange.keys))


def render(messages: Sequence[Message], tools: Sequence[Tool] = (), add_generation_prompt: bool = False) -> str:
    """The text that the model sees, from the template that ships with it."""
    return _template.render(messages=messages, tools=tools, add_generation_prompt=add_generation_prompt)
