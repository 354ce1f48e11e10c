"""Every route of OpenAI's, Anthropic's and Ollama's by that API's own client: whole, and streamed where it can be."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import anthropic
import httpx
import httpx2
import ollama
import openai
import pytest

from pippin.server.app import ROUTES
from tests.server.clients import SUM
from tests.server.conftest import Running

M: Any = {"model": "m"}
CHAT: Any = M | {"messages": SUM, "max_tokens": 4}
RESPONSE: Any = M | {"input": "a", "max_output_tokens": 4}
LLAMA: Any = {"num_predict": 4}


class Clients(NamedTuple):
    """Each tells ``paths`` which method and path it asked for."""

    openai: openai.OpenAI
    claude: anthropic.Anthropic
    llama: ollama.Client
    paths: list[str]


@pytest.fixture(scope="module")
def clients(server: Running) -> Iterator[Clients]:
    paths: list[str] = []

    def note(request: Any) -> None:
        paths.append(f"{request.method} {request.url.path}")

    hooks: dict[str, Any] = {"event_hooks": {"request": [note]}, "verify": False, "timeout": 100}
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0, http_client=httpx.Client(**hooks)) as ai,
        anthropic.Anthropic(
            base_url=server.url, api_key="-", max_retries=0, http_client=httpx2.Client(**hooks)
        ) as claude,
        ollama.Client(server.url, **hooks) as llama,
    ):
        yield Clients(ai, claude, llama, paths)


def kept(c: Clients) -> str:
    return str(c.openai.responses.create(**RESPONSE).id)


def refused(c: Clients) -> str:
    with pytest.raises(openai.BadRequestError, match="background"):
        c.openai.responses.cancel(kept(c))
    return "refused"


def helped(c: Clients) -> list[Any]:
    """The events by the client's own helper, which adds to them what it has understood."""
    with c.claude.messages.stream(**CHAT) as stream:
        events = list(stream)
    assert stream.get_final_message().stop_reason == "max_tokens"
    return events


Call = Callable[[Clients], Any]
DRIVEN: dict[str, tuple[Call, Call | None]] = {
    "POST /v1/chat/completions": (
        lambda c: c.openai.chat.completions.create(**CHAT).choices[0].finish_reason == "length",
        lambda c: list(c.openai.chat.completions.create(**CHAT, stream=True)),
    ),
    "POST /v1/completions": (
        lambda c: c.openai.completions.create(**M, prompt="a", max_tokens=4).choices[0].finish_reason == "length",
        lambda c: list(c.openai.completions.create(**M, prompt="a", max_tokens=4, stream=True)),
    ),
    "POST /v1/responses": (
        lambda c: c.openai.responses.create(**RESPONSE).status == "incomplete",
        lambda c: list(c.openai.responses.create(**RESPONSE, stream=True)),
    ),
    "POST /v1/responses/input_tokens": (
        lambda c: c.openai.responses.input_tokens.count(**M, input="a").input_tokens,
        None,
    ),
    "GET /v1/responses/{id}": (lambda c: c.openai.responses.retrieve(kept(c)).status == "incomplete", None),
    "DELETE /v1/responses/{id}": (lambda c: c.openai.responses.delete(kept(c)) is None, None),
    "POST /v1/responses/{id}/cancel": (refused, None),
    "GET /v1/responses/{id}/input_items": (lambda c: c.openai.responses.input_items.list(kept(c)).data, None),
    "POST /v1/embeddings": (lambda c: c.openai.embeddings.create(**M, input="a").data[0].embedding, None),
    "GET /v1/models": (lambda c: c.openai.models.list().data and c.claude.models.list().data, None),
    "GET /v1/models/{model:path}": (lambda c: c.openai.models.retrieve(c.openai.models.list().data[0].id).id, None),
    "POST /v1/messages": (lambda c: c.claude.messages.create(**CHAT).stop_reason == "max_tokens", helped),
    "POST /v1/messages/count_tokens": (lambda c: c.claude.messages.count_tokens(**M, messages=SUM).input_tokens, None),
    "POST /api/chat": (
        lambda c: c.llama.chat("m", SUM, options=LLAMA).done_reason == "length",
        lambda c: list(c.llama.chat("m", SUM, options=LLAMA, stream=True)),
    ),
    "POST /api/generate": (
        lambda c: c.llama.generate("m", "a", options=LLAMA).done_reason == "length",
        lambda c: list(c.llama.generate("m", "a", options=LLAMA, stream=True)),
    ),
    "POST /api/embed": (lambda c: c.llama.embed("m", "a").embeddings, None),
    "POST /api/embeddings": (lambda c: c.llama.embeddings("m", "a").embedding, None),
    "POST /api/show": (lambda c: c.llama.show("m").modelinfo, None),
    "GET /api/tags": (lambda c: c.llama.list().models, None),
    "GET /api/ps": (lambda c: c.llama.ps().models, None),
}
NO_CLIENT = {"GET /api/version"}
"""Which no method of Ollama's client asks for; tests/server/test_ollama.py does."""


def matches(template: str, asked: str) -> bool:
    return re.fullmatch(re.sub(r"\\{\w+(:path)?\\}", ".+", re.escape(template)), asked) is not None


def test_every_route_of_theirs_is_listed() -> None:
    theirs = {f"{method} {path}" for method, path, _, _ in ROUTES if path.startswith(("/v1/", "/api/"))}
    sglangs = {path for path in theirs if re.search(r"rerank|score|lora|tokenize$|detokenize$", path)}
    assert theirs - sglangs - NO_CLIENT == set(DRIVEN)


@pytest.mark.parametrize("route", DRIVEN)
def test_its_own_client_drives_it(clients: Clients, route: str) -> None:
    whole, stream = DRIVEN[route]
    clients.paths.clear()
    assert whole(clients)
    assert any(matches(route, asked) for asked in clients.paths), clients.paths
    if stream is not None:
        clients.paths.clear()
        assert len(stream(clients)) > 2
        assert clients.paths == [route]
