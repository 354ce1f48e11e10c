"""Bad requests: each is refused with a status, the field, and what would be right; none hurts the server."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pippin.config import ServerConfig
from pippin.server.protocol import IGNORED, NEUTRAL
from tests.fake_core import CONTEXT, RAISE
from tests.server.conftest import Serve

CHAT, TEXT, GENERATE = "/v1/chat/completions", "/v1/completions", "/generate"
HI: list[Any] = [{"role": "user", "content": "hi"}]
GOOD: dict[str, dict[str, Any]] = {
    CHAT: {"messages": HI, "max_tokens": 2},
    TEXT: {"prompt": "a", "max_tokens": 2},
    GENERATE: {"text": "a", "sampling_params": {"max_new_tokens": 2}},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [97]},
    "/abort_request": {"rid": "none"},
}

TOOLS = [{"type": "function", "function": {"name": "now"}}]

REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    # endpoint, what is sent beside good fields, the field that is named, a part of the message
    (TEXT, {"prompt": None}, "prompt", "required"),
    (TEXT, {"prompt": ""}, "prompt", "empty"),
    (TEXT, {"prompt": []}, "prompt", "empty"),
    (TEXT, {"prompt": [[]]}, "prompt", "empty"),
    (TEXT, {"prompt": ["a", 1]}, "prompt", "only texts"),
    (TEXT, {"prompt": 5}, "prompt", "str"),
    (TEXT, {"prompt": [300]}, "prompt", "between 0 and 299"),
    (TEXT, {"prompt": [-1]}, "prompt", "between 0 and 299"),
    (TEXT, {"prompt": "a" * CONTEXT}, "prompt", str(CONTEXT)),
    (TEXT, {"max_tokens": -1}, "max_tokens", "at least 1"),
    (TEXT, {"max_tokens": 1.5}, "max_tokens", "int"),
    (TEXT, {"max_tokens": "many"}, "max_tokens", "int"),
    (TEXT, {"min_tokens": 3}, "min_tokens", "max_tokens"),
    (TEXT, {"temperature": -1}, "temperature", "between 0 (greedy) and 1000000"),
    (TEXT, {"temperature": "hot"}, "temperature", "float"),
    (TEXT, {"top_p": 0}, "top_p", "above 0"),
    (TEXT, {"top_p": 1.1}, "top_p", "at most 1"),
    (TEXT, {"top_k": 0}, "top_k", "-1 (off)"),
    (TEXT, {"top_k": 2**70}, "top_k", "-1 (off)"),
    (TEXT, {"min_p": 2}, "min_p", "between 0 and 1"),
    (TEXT, {"frequency_penalty": 3}, "frequency_penalty", "between -2 and 2"),
    (TEXT, {"presence_penalty": -3}, "presence_penalty", "between -2 and 2"),
    (TEXT, {"repetition_penalty": 0}, "repetition_penalty", "above 0"),
    (TEXT, {"seed": 2**64}, "seed", "64 bits"),
    (TEXT, {"n": 0}, "n", "between 1 and 128"),
    (TEXT, {"n": True}, "n", "int"),
    (TEXT, {"logprobs": -1}, "logprobs", "between 0 and 100"),
    (TEXT, {"logprobs": True}, "logprobs", "int"),
    (TEXT, {"stop": [""]}, "stop", "not empty"),
    (TEXT, {"stop": 7}, "stop", "str"),
    (TEXT, {"stop_token_ids": [300]}, "stop_token_ids", "between 0 and 299"),
    (TEXT, {"stop_token_ids": ["a"]}, "stop_token_ids[0]", "int"),
    (TEXT, {"logit_bias": {"a": 1}}, "logit_bias", "int"),
    (TEXT, {"logit_bias": {"1": 101}}, "logit_bias", "between -100 and 100"),
    (TEXT, {"logit_bias": {"300": 1}}, "logit_bias", "between 0 and 299"),
    (TEXT, {"priority": 2**40}, "priority", "int"),
    (TEXT, {"stream_options": {"includeusage": True}}, "stream_options", "includeusage"),
    (TEXT, {"temprature": 1}, "temprature", "did you mean temperature?"),
    (TEXT, {"messages": HI}, "messages", "unknown field"),
    (TEXT, {"stream": True, "echo": True, "logprobs": 1, "n": 2}, "n", "need n to be 1"),
    (TEXT, {"best_of": 3}, "best_of", "not supported yet"),
    (TEXT, {"suffix": "end"}, "suffix", "not supported yet"),
    (CHAT, {"messages": None}, "messages", "required"),
    (CHAT, {"messages": []}, "messages", "at least one"),
    (CHAT, {"messages": "hi"}, "messages", "array"),
    (CHAT, {"messages": ["hi"]}, "messages[0]", "object"),
    (CHAT, {"messages": [{"role": "king", "content": "a"}]}, "messages[0].role", "user"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "string"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[0].type",
        "text parts",
    ),
    (CHAT, {"prompt": "a"}, "prompt", "unknown field"),
    (CHAT, {"logprobs": 3}, "logprobs", "bool"),
    (CHAT, {"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
    (CHAT, {"top_logprobs": 21, "logprobs": True}, "top_logprobs", "between 0 and 20"),
    (CHAT, {"max_completion_tokens": 5}, "max_tokens", "send one"),
    (CHAT, {"tools": [{"type": "function"}]}, "tools[0]", "function"),
    (CHAT, {"tools": TOOLS}, "tools", "no tools"),
    (CHAT, {"tool_choice": "required"}, "tool_choice", "needs tools"),
    (CHAT, {"tool_choice": "all"}, "tool_choice", "'all'"),
    (CHAT, {"reasoning_effort": "huge"}, "reasoning_effort", "huge"),
    (CHAT, {"thinking_budget": 0}, "thinking_budget", ">= 1"),
    (CHAT, {"messages": [{"role": "user", "content": "a", "mood": "good"}]}, "messages[0].mood", "unknown field"),
    (CHAT, {"response_format": {"type": "yaml"}}, "response_format.type", "text, json_object"),
    (CHAT, {"audio": {"voice": "x"}}, "audio", "not supported yet"),
    (CHAT, {"store": True}, "store", "not supported yet"),
    (CHAT, {"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs", "tokenize"),
    (GENERATE, {"text": None}, "text", "input_ids"),
    (GENERATE, {"input_ids": [97]}, "text", "input_ids"),
    (GENERATE, {"text": 5}, "text", "string"),
    (GENERATE, {"text": None, "input_ids": ["a"]}, "input_ids", "token ids"),
    (GENERATE, {"sampling_params": {"temprature": 1}}, "sampling_params.temprature", "temperature"),
    (GENERATE, {"sampling_params": {"top_p": 7}}, "sampling_params.top_p", "at most 1"),
    (GENERATE, {"sampling_params": {"top_p": "x"}}, "sampling_params.top_p", "float"),
    (GENERATE, {"sampling_params": {"logprobs": True}}, "sampling_params.logprobs", "return_logprob"),
    (GENERATE, {"sampling_params": [{}, {}]}, "sampling_params", "2 entries"),
    (GENERATE, {"sampling_params": 5}, "sampling_params", "object"),
    (GENERATE, {"rid": ["a", "b"]}, "rid", "2 entries"),
    (GENERATE, {"text": ["a", "b"], "rid": ["r", "r"]}, "rid", "of its own"),
    (GENERATE, {"stream": 3}, "stream", "bool"),
    ("/tokenize", {"prompt": 5}, "prompt", "str"),
    ("/tokenize", {"text": "a"}, "text", "unknown field"),
    ("/detokenize", {"tokens": ["a"]}, "tokens[0]", "int"),
    ("/detokenize", {"tokens": [1, [2]]}, "tokens", "not both"),
    ("/detokenize", {"tokens": [-1]}, "tokens", "0 or above"),
    ("/abort_request", {"rid": None}, "rid", "required"),
]


def named(response: httpx.Response) -> tuple[str | None, str]:
    """The field and the message of an error in OpenAI's shape."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text
    return error["param"], error["message"]


@pytest.mark.parametrize(("path", "change", "field", "part"), REFUSED)
def test_refused_with_the_field_and_the_mend(
    http: httpx.Client, path: str, change: dict[str, Any], field: str, part: str
) -> None:
    response = http.post(path, json=GOOD[path] | change)
    assert response.status_code == 400, response.text
    found, message = named(response)
    assert found == field
    assert part in message
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_streams_are_refused_with_a_status_too(http: httpx.Client, path: str) -> None:
    response = http.post(path, json=GOOD[path] | {"stream": True, "top_p": 5})
    assert (response.status_code, named(response)[0]) == (400, "top_p")


@pytest.mark.parametrize("name", sorted(NEUTRAL))
def test_what_is_not_supported_yet_is_named_or_neutral(http: httpx.Client, name: str) -> None:
    response = http.post(TEXT, json=GOOD[TEXT] | {name: {"odd": ["value"]}})
    assert (response.status_code, named(response)[0]) == (400, name)
    for value in NEUTRAL[name]:
        assert http.post(TEXT, json=GOOD[TEXT] | {name: value}).status_code == 200


@pytest.mark.parametrize("name", sorted(IGNORED))
def test_what_concerns_accounts_is_ignored(http: httpx.Client, name: str) -> None:
    assert http.post(CHAT, json=GOOD[CHAT] | {name: {"any": "thing"}}).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"null", b"[]", b'"text"', b"\xff\xfe", b'{"prompt": "\\ud800"}', b'{"prompt": NaN}',
        b'{"n": 1e999}', b"[" * 100_000, b'{"metadata": ' + b"[" * 100_000, b'{"a":1,' * 1000, b'{"prompt": "\x00"',
        b"\x00" * 100,
    ],
    ids=lambda b: repr(b[:16]),
)  # fmt: skip
@pytest.mark.parametrize("path", sorted(GOOD))
def test_what_is_no_json_is_refused(http: httpx.Client, path: str, body: bytes) -> None:
    response = http.post(path, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    named(response)


def test_a_lone_surrogate_is_refused(http: httpx.Client) -> None:
    for path, field in ((TEXT, "prompt"), (GENERATE, "text")):
        body = json.dumps(GOOD[path] | {field: "a\ud800b"}).encode()
        response = http.post(path, content=body, headers={"content-type": "application/json"})
        assert response.status_code == 400, response.text


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_only_json_is_taken(http: httpx.Client, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    response = http.post(TEXT, content=b'{"prompt": "a"}', headers=headers)
    assert response.status_code == 415
    assert "application/json" in named(response)[1]


def test_unknown_paths_and_methods(http: httpx.Client) -> None:
    assert http.get("/v1/nothing").status_code == 404
    assert "/v1/nothing" in named(http.get("/v1/nothing"))[1]
    assert http.get(CHAT).status_code == 405
    assert "POST" in named(http.get(CHAT))[1]


def test_the_description_holds_every_field(http: httpx.Client) -> None:
    page = http.get("/openapi.json").json()
    assert set(page["paths"]["/generate"]) == {"get", "post", "put"}
    for path, body in GOOD.items():
        content = page["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        schema = page["components"]["schemas"][content["schema"]["$ref"].rpartition("/")[2]]
        assert body.keys() <= schema["properties"].keys()


def test_a_body_that_is_too_long_is_refused(serve: Serve) -> None:
    with serve(ServerConfig(max_body_mb=1)) as running, running.http() as http:
        refused_if_too_long(http)


def refused_if_too_long(http: httpx.Client) -> None:
    body = json.dumps({"prompt": "a" * 2**20}).encode()
    headers = {"content-type": "application/json"}

    def parts() -> Iterator[bytes]:
        yield body

    for content in (body, parts()):
        response = http.post(TEXT, content=content, headers=headers)
        assert response.status_code == 413
        assert "1048576 bytes (--max-body-mb)" in named(response)[1]
    assert http.post(TEXT, json=GOOD[TEXT]).status_code == 200


def test_the_engines_own_failure_is_a_500_without_a_traceback(http: httpx.Client) -> None:
    with_trouble = GOOD[TEXT] | {"prompt": [RAISE]}
    for body in (with_trouble, with_trouble | {"stream": True}):
        logging.disable(logging.CRITICAL)
        try:
            response = http.post(TEXT, json=body)
        finally:
            logging.disable(logging.NOTSET)
        assert response.status_code == 500
        assert "ZeroDivisionError" in named(response)[1]
        assert response.json()["error"]["type"] == "server_error"
    assert http.post(TEXT, json=GOOD[TEXT]).status_code == 200


def test_what_nobody_foresaw_is_a_500_that_tells_nothing(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr("pippin.server.protocol.stop_strings", broken)
    logging.disable(logging.CRITICAL)
    try:
        response = http.post(TEXT, json=GOOD[TEXT])
    finally:
        logging.disable(logging.NOTSET)
    assert response.status_code == 500
    assert "secret" not in response.text
    named(response)


# --- who may ask ---


def test_the_key_is_asked_for(serve: Serve) -> None:
    with serve(ServerConfig(api_key="right key")) as running:
        with running.openai("right key") as ai:
            assert ai.completions.create(model="m", prompt="a").usage is not None
        with running.openai("wrong") as ai, pytest.raises(openai.AuthenticationError) as caught:
            ai.completions.create(model="m", prompt="a")
        assert caught.value.code == "invalid_api_key"
        with running.http() as http:
            for path in ("/health", "/health_generate", "/metrics"):
                assert http.get(path).status_code == 200
            for path in ("/v1/models", "/get_server_info", "/flush_cache", "/nothing", "/health/"):
                response = http.get(path)
                assert response.status_code == 401
                assert response.headers["www-authenticate"] == "Bearer"
                named(response)
            for value in ("right key", "Bearer", "Bearer right", "Basic right key", "Bearer rïght key"):
                headers = httpx.Headers({"authorization": value}, encoding="latin-1")
                assert http.get("/v1/models", headers=headers).status_code == 401
            for value in ("Bearer right key", "bearer right key"):
                assert http.get("/v1/models", headers={"authorization": value}).status_code == 200
            info = http.get("/get_server_info", headers={"authorization": "Bearer right key"})
            assert "right key" not in info.text


# --- fuzz ---

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "a", "\x00", "🙂", "user", "text"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["role", "content", "1", "type"]), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
FIELDS = [
    "prompt", "messages", "text", "input_ids", "sampling_params", "max_tokens", "n", "stop", "logprobs", "top_logprobs",
    "temperature", "seed", "stream", "stream_options", "logit_bias", "rid", "echo", "tools", "priority", "tokens",
    "min_tokens", "stop_token_ids", "return_logprob", "logprob_start_len", "top_logprobs_num", "chat_template_kwargs",
    "continue_final_message", "add_generation_prompt", "model", "skip_special_tokens", "unknown",
]  # fmt: skip


@settings(max_examples=150)
@given(path=st.sampled_from(sorted(GOOD)), change=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3))
def test_fuzz_never_fails_the_server(http: httpx.Client, path: str, change: dict[str, Any]) -> None:
    response = http.post(path, json=GOOD[path] | change)
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        named(response)
    assert http.get("/health").status_code == 200


@settings(max_examples=60)
@given(path=st.sampled_from(sorted(GOOD)), body=st.binary(max_size=60))
def test_fuzz_bytes_never_fail_the_server(http: httpx.Client, path: str, body: bytes) -> None:
    response = http.post(path, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    named(response)
