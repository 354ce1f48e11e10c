"""The real clients, without what makes them slow in tests, and what they are asked."""

from __future__ import annotations

from typing import Any

import anthropic
import httpx2
import ollama

from tests.server.conftest import Running

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
ASK: list[Any] = [{"role": "user", "content": "What is the weather in Oslo?"}]
SUM: list[Any] = [{"role": "user", "content": "What is 12 + 30?"}]
DESCRIPTION = "Get the current weather in a city."
FUNCTION: dict[str, Any] = {"name": "get_weather", "description": DESCRIPTION, "parameters": SCHEMA}


def anthropic_client(running: Running, key: str = "none") -> anthropic.Anthropic:
    http = httpx2.Client(timeout=100, verify=False)
    return anthropic.Anthropic(base_url=running.url, api_key=key, max_retries=0, http_client=http)


def ollama_client(running: Running) -> ollama.Client:
    return ollama.Client(host=running.url, verify=False)
