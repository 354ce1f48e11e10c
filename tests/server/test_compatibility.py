"""Strictness: every field that an official client can send is supported, refused by name, or listed as no effect."""

from __future__ import annotations

from typing import Any

import anthropic.types as anthropic_types
import compatibility
import httpx
import msgspec
import ollama
import pytest
from anthropic.types import message_create_params
from anthropic.types.beta import message_create_params as beta_params
from openai.types import completion_create_params as text_params
from openai.types import embedding_create_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import (
    input_item_list_params,
    input_token_count_params,
    response_create_params,
    response_retrieve_params,
)

from pippin.server.anthropic import CountRequest, MessagesRequest
from pippin.server.embeddings import EmbeddingRequest, OllamaEmbeddingsRequest, OllamaEmbedRequest
from pippin.server.native import NOT_HERE
from pippin.server.ollama import OllamaChatRequest, OllamaGenerateRequest, Options
from pippin.server.protocol import Body, ChatRequest, CompletionRequest
from pippin.server.responses import PromptRequest, ResponsesRequest
from pippin.server.stored import ItemsQuery, RetrieveQuery
from tests.server.conftest import Running

HI: list[Any] = [{"role": "user", "content": "hi"}]
GOOD: dict[type[Body], tuple[str, dict[str, Any]]] = {
    ChatRequest: ("/v1/chat/completions", {"messages": HI, "max_tokens": 1}),
    CompletionRequest: ("/v1/completions", {"prompt": "a", "max_tokens": 1}),
    ResponsesRequest: ("/v1/responses", {"input": "a", "max_output_tokens": 1}),
    PromptRequest: ("/v1/responses/input_tokens", {"input": "a"}),
    MessagesRequest: ("/v1/messages", {"messages": HI, "max_tokens": 1}),
    CountRequest: ("/v1/messages/count_tokens", {"messages": HI}),
    OllamaChatRequest: ("/api/chat", {"model": "m", "messages": HI, "options": {"num_predict": 1}, "stream": False}),
    OllamaGenerateRequest: ("/api/generate", {"model": "m", "prompt": "a", "options": {"num_predict": 1}}),
    EmbeddingRequest: ("/v1/embeddings", {"input": "a"}),
    OllamaEmbedRequest: ("/api/embed", {"model": "m", "input": "a"}),
    OllamaEmbeddingsRequest: ("/api/embeddings", {"model": "m", "prompt": "a"}),
}
SENT: list[tuple[type[Body], set[str]]] = [
    (ChatRequest, set(chat_params.CompletionCreateParamsBase.__annotations__)),
    (CompletionRequest, set(text_params.CompletionCreateParamsBase.__annotations__)),
    (ResponsesRequest, set(response_create_params.ResponseCreateParamsBase.__annotations__)),
    (PromptRequest, set(input_token_count_params.InputTokenCountParams.__annotations__)),
    (RetrieveQuery, set(response_retrieve_params.ResponseRetrieveParamsStreaming.__annotations__)),
    (ItemsQuery, set(input_item_list_params.InputItemListParams.__annotations__)),
    (MessagesRequest, set(message_create_params.MessageCreateParamsBase.__annotations__)),
    (MessagesRequest, set(beta_params.MessageCreateParamsBase.__annotations__)),
    (CountRequest, set(anthropic_types.MessageCountTokensParams.__annotations__)),
    (OllamaChatRequest, set(ollama._types.ChatRequest.model_fields)),
    (OllamaGenerateRequest, set(ollama._types.GenerateRequest.model_fields)),
    (EmbeddingRequest, set(embedding_create_params.EmbeddingCreateParams.__annotations__)),
    (OllamaEmbedRequest, set(ollama._types.EmbedRequest.model_fields)),
    (OllamaEmbeddingsRequest, set(ollama._types.EmbeddingsRequest.model_fields)),
    (Options, set(ollama.Options.model_fields)),
]


def known(body: type[Body]) -> set[str]:
    return {f.encode_name for f in msgspec.structs.fields(body)} | set(body.neutral) | set(body.ignored)


@pytest.mark.parametrize(("body", "sent"), SENT, ids=lambda x: x.__name__ if isinstance(x, type) else "")
def test_every_field_of_the_official_clients_is_known(body: type[Body], sent: set[str]) -> None:
    assert len(sent) > 3
    assert sent - known(body) == set()


def test_the_page_is_current() -> None:
    assert compatibility.PAGE.read_text(encoding="utf-8") == compatibility.render(), "run `make docs`"


def test_every_body_has_a_test() -> None:
    assert {b for b, _ in SENT} - {Options, RetrieveQuery, ItemsQuery} == set(GOOD)


CASES = [(body, name) for body in GOOD for name in body.neutral if name not in body.__struct_fields__]


@pytest.mark.parametrize(("body", "name"), CASES, ids=lambda x: x.__name__ if isinstance(x, type) else x)
def test_what_is_not_supported_is_refused_by_name_unless_it_asks_for_nothing(
    http: httpx.Client, body: type[Body], name: str
) -> None:
    path, good = GOOD[body]
    response = http.post(path, json=good | {name: {"odd": ["value"]}})
    assert response.status_code == 400
    assert f"{name} is not supported" in response.text
    for value in body.neutral[name]:
        assert http.post(path, json=good | {name: value}).status_code == 200


@pytest.mark.parametrize("body", GOOD, ids=lambda body: body.__name__)
def test_fields_without_effect_are_accepted_and_unknown_ones_are_not(http: httpx.Client, body: type[Body]) -> None:
    path, good = GOOD[body]
    plain = http.post(path, json=good)
    assert plain.status_code == 200, plain.text
    extra = {name: {"any": "thing"} for name in body.ignored if name not in body.__struct_fields__}
    assert http.post(path, json=good | extra).status_code == 200
    response = http.post(path, json=good | {"no_such_field": 1})
    assert response.status_code == 400
    assert "no_such_field" in response.text


@pytest.mark.parametrize("path", [path for paths in NOT_HERE.values() for path in paths])
def test_what_is_not_here_says_so(server: Running, http: httpx.Client, path: str) -> None:
    for response in (http.get(path), http.post(path, json={})):
        assert response.status_code == 400
        assert f"{path} is not supported" in response.text
