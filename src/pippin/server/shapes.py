"""How errors look, by path: each API has a shape of its own, and OpenAI's is that of all others."""

from __future__ import annotations

from pippin.server import anthropic, ollama, weights
from pippin.server.http import ErrorJson, error_body

SHAPES: dict[str, ErrorJson] = {
    "/v1/messages": anthropic.error_json,
    "/api/": ollama.error_json,
    "/update_weights": weights.error_json,
}


def shape_of(path: str) -> ErrorJson:
    """How errors look there."""
    return next((shape for start, shape in SHAPES.items() if path.startswith(start)), error_body)
