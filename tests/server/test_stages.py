"""An exception in each stage of the HTTP process fails the request that it is about, in its API's shape."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pippin import completion
from pippin.config import ServerConfig
from pippin.server import anthropic, http, ollama, openai, responses
from pippin.text.detokenizer import TextStream
from pippin.text.scan import Parser
from tests.server.conftest import Running, byte_tokenizer, serving
from tests.server.test_openai import told
from tests.waiting import until

SAYS = "the server failed on this request"
COUNT = 77
"""Tokens that are asked for where something is to fail, and nowhere else."""

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{% if m.content == 'divide' %}{{ 1 // 0 }}{% endif %}{{ m.content }}\n"
    "{% endfor %}{% if tools %}{{ tools }}{% endif %}assistant:"
)
HI = [{"role": "user", "content": "hi"}]
CHATS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HI, "max_tokens": COUNT},
    "/v1/messages": {"messages": HI, "max_tokens": COUNT},
    "/v1/responses": {"input": HI, "max_output_tokens": COUNT},
    "/api/chat": {"model": "m", "messages": HI, "options": {"num_predict": COUNT}},
}
ALL: dict[str, dict[str, Any]] = CHATS | {
    "/v1/completions": {"prompt": "hi", "max_tokens": COUNT},
    "/generate": {"text": "hi", "sampling_params": {"max_new_tokens": COUNT}},
    "/api/generate": {"model": "m", "prompt": "hi", "raw": True, "options": {"num_predict": COUNT}},
}
ENDS = {"/v1/messages": "event: error", "/v1/responses": "event: response.failed"}
"""What introduces an error in a stream; elsewhere it is ``{"error": …}``."""


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    """A model that is taken to reason and to call tools; what it says is letters."""
    config = ServerConfig(tool_call_parser="qwen25", reasoning_parser="qwen3")
    with serving(config, tokenizer=byte_tokenizer(TEMPLATE)) as running:
        yield running


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def parsers(patch: pytest.MonkeyPatch) -> None:
    """Of reasoning and of calls; text completions have none."""
    patch.setattr(Parser, "push", broken)


def detokenizer(patch: pytest.MonkeyPatch) -> None:
    class Broken(TextStream):
        def __init__(self, tokenizer: Any, params: Any, *more: Any) -> None:
            super().__init__(tokenizer, params, *more)
            self._breaks = params.max_new_tokens == COUNT
            self._pushed = 0

        def push(self, tokens: Any) -> Any:
            self._pushed += len(tokens)
            return broken() if self._breaks and self._pushed > 9 else super().push(tokens)

    patch.setattr(completion, "TextStream", Broken)


def encoders(patch: pytest.MonkeyPatch) -> None:
    """All but of what names the model ``good``, of choices, round which there are such names, and of errors."""
    real = http.encode

    def encode(content: Any) -> bytes:
        said = real(content)
        choice = said.startswith(b'{"index":')
        return said if choice or b'"good"' in said or SAYS.encode() in said else broken()

    for module in (http, anthropic, ollama, openai, responses):
        if "encode" in vars(module):
            patch.setattr(module, "encode", encode)


def broken(*_: Any, **__: Any) -> Any:
    raise ZeroDivisionError("planted")


def ask(running: Running, path: str, body: dict[str, Any]) -> tuple[int, str]:
    with running.http() as client:
        answer = client.post(path, json=body)
    return answer.status_code, answer.text


def good(running: Running) -> str:
    """A stream beside; it goes on while the other fails."""
    body = {"prompt": "a", "max_tokens": 300, "stream": True, "temperature": 0, "model": "good"}
    _, text = ask(running, "/v1/completions", body)
    return "".join(json.loads(e)["choices"][0]["text"] for e in re.findall(r"data: (\{.*\})", text))


CASES = [
    (stage, path)
    for stage, paths in ((parsers, CHATS), (detokenizer, ALL), (encoders, ALL))
    for path in paths
]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("stage", "path"), CASES, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_a_stage_that_fails_fails_one_request(
    running: Running,
    monkeypatch: pytest.MonkeyPatch,
    stage: Callable[[pytest.MonkeyPatch], None],
    path: str,
    stream: bool,
) -> None:
    body = ALL[path] | {"stream": stream}
    with ThreadPoolExecutor(1) as threads, monkeypatch.context() as patch:
        stage(patch)
        beside = threads.submit(good, running)
        status, text = ask(running, path, body)
        assert beside.result() == told("a", 300)
    assert SAYS in text, text
    assert "planted" not in text
    assert (status == 200) <= stream
    if status == 200:
        last = text.strip().splitlines()[-1]
        assert SAYS in last, "nothing comes after it"
        if path in ENDS:
            assert text.strip().splitlines()[-2] == ENDS[path]
        else:
            assert json.loads(last.removeprefix("data: "))["error"]
    else:
        assert status == 500
        assert "error" in json.loads(text)
    until(lambda: running.core.running == {} and running.client.live == ())
    assert ask(running, path, ALL[path] | {"stream": stream})[0] == 200


@pytest.mark.parametrize("path", CHATS)
def test_a_template_that_fails_on_one_conversation(running: Running, path: str) -> None:
    messages = [{"role": "user", "content": "divide"}]
    body = {name: messages if value is HI else value for name, value in CHATS[path].items()}
    status, text = ask(running, path, body)
    assert status == 400
    assert "template" in text
    assert "Traceback" not in text
    assert ask(running, path, CHATS[path])[0] == 200
