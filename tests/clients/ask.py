"""What each client library is asked, and what the shipped model must answer."""

from __future__ import annotations

import json
import sys
from typing import Any

URL = sys.argv[1] if len(sys.argv) > 1 else ""
SUM = "What is 12 + 30?"
WEATHER = "What is the weather in Oslo?"
DESCRIPTION = "Get the current weather in a city."
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "get_weather", "description": DESCRIPTION, "parameters": SCHEMA},
}
RESULT = '{"temperature": 7, "sky": "rain"}'


def check_sum(whole: str, pieces: list[str]) -> None:
    """An answer, and the same one streamed."""
    assert "42" in whole, whole
    assert "".join(pieces) == whole, pieces
    assert len([piece for piece in pieces if piece]) > 1, pieces


def check_call(name: str | None, arguments: str | dict[str, Any]) -> None:
    found = json.loads(arguments) if isinstance(arguments, str) else arguments
    assert (name, found) == ("get_weather", {"city": "Oslo"}), (name, found)


def check_result(words: str) -> None:
    """The answer that was made from the tool's result."""
    assert "7" in words, words
