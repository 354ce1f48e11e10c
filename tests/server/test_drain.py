"""A server that is told to stop ends each API's streams as that API ends them."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import byte_tokenizer
from tests.server.test_lifecycle import ask, free_port, program
from tests.server.test_reasoning import HI, TEMPLATE

STREAMS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HI},
    "/v1/completions": {"prompt": "a", "max_tokens": 900},
    "/v1/messages": {"messages": HI, "max_tokens": 900, "thinking": {"type": "enabled", "budget_tokens": 800}},
    "/v1/responses": {"input": "hi"},
    "/api/chat": {"model": "m", "messages": HI},
    "/api/generate": {"model": "m", "prompt": "hi", "raw": True},
    "/generate": {"text": "a", "sampling_params": {"max_new_tokens": 900}},
}
SAYS = "the server is shutting down"


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """All that came of a stream of each kind that was open as the server was told to stop."""
    model: Path = tmp_path_factory.mktemp("model") / "0.05"
    byte_tokenizer(TEMPLATE).hf.save_pretrained(model)
    port = free_port()
    with program(str(model), port) as process:
        assert process.stdout is not None
        process.stdout.readline()
        address = "127.0.0.1", port
        streams = {path: ask(address, path, body | {"stream": True}) for path, body in STREAMS.items()}
        found = {path: stream.recv(4096) for path, stream in streams.items()}
        process.send_signal(signal.SIGTERM)
        for path, stream in streams.items():
            with stream:
                while part := stream.recv(65536):
                    found[path] += part
        assert process.wait(20) == 0
    return found


def events(answer: bytes) -> list[Any]:
    return [json.loads(e) for e in re.findall(rb"^(?:data: )?(\{.*\})\r?$", answer, re.MULTILINE)]


@pytest.mark.parametrize("path", STREAMS)
def test_the_answer_is_whole_and_its_last_event_says_why(ended: dict[str, bytes], path: str) -> None:
    answer = ended[path]
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.endswith(b"\r\n0\r\n\r\n"), "as HTTP goes"
    *before, last = events(answer)
    assert before
    match path:
        case "/v1/messages":
            assert (last["type"], last["error"]["type"]) == ("error", "overloaded_error")
            assert SAYS in last["error"]["message"]
            assert before[0]["type"] == "message_start"
            assert b"event: error\n" in answer
        case "/v1/responses":
            assert last["type"] == "response.failed"
            assert last["response"]["status"] == "failed"
            assert SAYS in last["response"]["error"]["message"]
            assert last["sequence_number"] == len(before)
            assert b"event: response.failed\n" in answer
        case "/api/chat" | "/api/generate":
            assert SAYS in last["error"]
            assert not any(event["done"] for event in before)
        case _:
            assert (last["error"]["type"], last["error"]["code"]) == ("server_error", None)
            assert SAYS in last["error"]["message"]
            assert b"[DONE]" not in answer


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses", "/api/chat"])
def test_it_was_in_the_middle_of_its_reasoning(ended: dict[str, bytes], path: str) -> None:
    names = {
        "/v1/chat/completions": b'"reasoning_content":"',
        "/v1/messages": b'"thinking_delta"',
        "/v1/responses": b"response.reasoning_text.delta",
        "/api/chat": b'"thinking":"',
    }
    assert names[path] in ended[path]
