"""OpenAI's endpoints, as the official client and plain HTTP see them."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fake_core import CONTEXT, EOS, expected
from tests.server.conftest import Running, Serve, byte_tokenizer

HI: list[Any] = [{"role": "user", "content": "hi"}]
HI_PROMPT = "user:hi\nassistant:"


def told(prompt: str, count: int, seed: int = 0) -> str:
    """The text that the engine answers a prompt with."""
    return bytes(expected(list(prompt.encode()), count, seed)).decode()


def events(response: httpx.Response) -> list[Any]:
    """The JSON of a stream's events; its last line must be [DONE]."""
    lines = response.text.split("\n\n")
    assert lines.pop() == ""
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_the_first_request_anyone_tries(http: httpx.Client) -> None:
    body = {"model": "TinyLlama", "prompt": "Hello, how are you?"}
    answer = http.post("/v1/completions", json=body).json()
    assert answer["object"] == "text_completion"
    assert answer["model"] == "TinyLlama"
    assert answer["choices"][0]["finish_reason"] == "length"
    assert len(answer["choices"][0]["text"]) == 16
    assert answer["usage"] == {
        "prompt_tokens": 19,
        "completion_tokens": 16,
        "total_tokens": 35,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


@pytest.mark.parametrize("stream", [False, True])
def test_completion_through_the_official_client(ai: openai.OpenAI, stream: bool) -> None:
    options: Any = {"model": "m", "prompt": "abc", "max_tokens": 9, "temperature": 0}
    if stream:
        chunks = list(ai.completions.create(stream=True, stream_options={"include_usage": True}, **options))
        text, reason = "".join(c.choices[0].text for c in chunks[:-1]), chunks[-2].choices[0].finish_reason
        assert chunks[-1].choices == []
        usage = chunks[-1].usage
        assert all(c.usage is None for c in chunks[:-1])
    else:
        answer = ai.completions.create(**options)
        text, reason, usage = answer.choices[0].text, answer.choices[0].finish_reason, answer.usage
    assert (text, reason) == (told("abc", 9), "length")
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (3, 9, 12)


@pytest.mark.parametrize("stream", [False, True])
def test_chat_through_the_official_client(ai: openai.OpenAI, stream: bool) -> None:
    options: Any = {"model": "m", "messages": HI, "max_completion_tokens": 9, "temperature": 0}
    if stream:
        chunks = list(ai.chat.completions.create(stream=True, **options))
        assert chunks[0].choices[0].delta.role == "assistant"
        text = "".join(c.choices[0].delta.content or "" for c in chunks)
        reason = chunks[-1].choices[0].finish_reason
        assert len({c.id for c in chunks}) == 1
    else:
        answer = ai.chat.completions.create(**options)
        assert answer.choices[0].message.role == "assistant"
        text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert (text, reason) == (told(HI_PROMPT, 9), "length")


def test_chat_goes_on_to_the_end_of_the_context(ai: openai.OpenAI) -> None:
    answer = ai.chat.completions.create(model="m", messages=HI, temperature=0)
    assert answer.usage is not None
    assert answer.usage.total_tokens == CONTEXT
    assert answer.choices[0].finish_reason == "length"


def test_messages_parts_and_template_options_reach_the_template(http: httpx.Client) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "x"},
    ]
    body = {"messages": messages, "max_tokens": 4, "temperature": 0, "chat_template_kwargs": {"suffix": "!"}}
    answer = http.post("/v1/chat/completions", json=body).json()
    prompt = "system:be brief\nuser:a\nb\nassistant:!"
    assert answer["choices"][0]["message"]["content"] == told(prompt, 4)


def test_continue_final_message_leaves_it_open(http: httpx.Client) -> None:
    messages = [*HI, {"role": "assistant", "content": "I think"}]
    body = {"messages": messages, "max_tokens": 4, "temperature": 0, "continue_final_message": True}
    answer = http.post("/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"] == told("user:hi\nassistant:I think", 4)


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [("ab", ["ab"]), ([97, 98], ["ab"]), (["ab", "c"], ["ab", "c"]), ([[97, 98], [99]], ["ab", "c"])],
)
@pytest.mark.parametrize("stream", [False, True])
def test_all_forms_of_prompts_with_echo(http: httpx.Client, prompt: Any, texts: list[str], stream: bool) -> None:
    body = {"prompt": prompt, "max_tokens": 3, "temperature": 0, "echo": True, "stream": stream}
    response = http.post("/v1/completions", json=body)
    found = dict.fromkeys(range(len(texts)), "")
    for part in events(response) if stream else [response.json()]:
        for choice in part["choices"]:
            found[choice["index"]] += choice["text"]
    assert found == {i: text + told(text, 3) for i, text in enumerate(texts)}


@pytest.mark.parametrize("stream", [False, True])
def test_n_answers_differ_and_are_repeatable_by_seed(http: httpx.Client, stream: bool) -> None:
    body = {"prompt": ["ab", "c"], "max_tokens": 5, "n": 3, "seed": 40, "stream": stream}
    response = http.post("/v1/completions", json=body)
    found = dict.fromkeys(range(6), "")
    for part in events(response) if stream else [response.json()]:
        for choice in part["choices"]:
            found[choice["index"]] += choice["text"]
    assert found == {3 * p + i: told(text, 5, 40 + i) for p, text in enumerate(["ab", "c"]) for i in range(3)}


def test_usage_counts_each_prompt_once_and_every_answer(http: httpx.Client) -> None:
    usage = http.post("/v1/completions", json={"prompt": ["abc", "de"], "max_tokens": 5, "n": 3}).json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (5, 30, 35)


def test_cached_tokens_are_reported(http: httpx.Client) -> None:
    body = {"prompt": "a prompt that comes again", "max_tokens": 2}
    first, second = (http.post("/v1/completions", json=body).json()["usage"] for _ in range(2))
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["prompt_tokens_details"]["cached_tokens"] == len(str(body["prompt"])) - 1


def test_stop_strings_and_stop_tokens(http: httpx.Client) -> None:
    text = told("abc", 12)
    stop = text[5:7]
    body = {"prompt": "abc", "max_tokens": 12, "temperature": 0, "stop": stop}
    choice = http.post("/v1/completions", json=body).json()["choices"][0]
    assert choice["text"] == text[: text.index(stop)]
    assert (choice["finish_reason"], choice["matched_stop"]) == ("stop", stop)
    choice = http.post("/v1/completions", json=body | {"stop": [stop], "no_stop_trim": True}).json()["choices"][0]
    assert choice["text"] == text[: text.index(stop) + 2]
    body = {"prompt": "abc", "max_tokens": 12, "temperature": 0, "stop_token_ids": [ord(text[4])]}
    choice = http.post("/v1/completions", json=body).json()["choices"][0]
    assert choice["text"] == text[: text.index(text[4])]
    assert choice["matched_stop"] == ord(text[4])


def test_a_stop_string_frees_the_engine(server: Running, http: httpx.Client) -> None:
    body = {"prompt": "abc", "max_tokens": 4000, "temperature": 0, "stop": [told("abc", 3)[-1]]}
    http.post("/v1/completions", json=body)
    http.post("/v1/completions", json={"prompt": "x", "max_tokens": 3})
    assert server.core.running == {}


def test_logit_bias_and_the_end_of_text(http: httpx.Client) -> None:
    body = {"prompt": "abc", "max_tokens": 4, "logit_bias": {"120": 100}}
    assert http.post("/v1/completions", json=body).json()["choices"][0]["text"] == "xxxx"
    body = {"messages": HI, "max_tokens": 4, "logit_bias": {str(EOS): 100}}
    choice = http.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("", "stop")
    body = {"prompt": "abc", "max_tokens": 4, "logit_bias": {str(EOS): 100}, "ignore_eos": True}
    assert http.post("/v1/completions", json=body).json()["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_completion_logprobs(ai: openai.OpenAI, stream: bool) -> None:
    options: Any = {"model": "m", "prompt": "aé", "max_tokens": 3, "temperature": 0, "logprobs": 2, "echo": True}
    parts = list(ai.completions.create(stream=True, **options)) if stream else [ai.completions.create(**options)]
    found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for part in parts:
        for name, values in found.items():
            values.extend(getattr(part.choices[0].logprobs, name))
    answer = list(bytes(expected(list("aé".encode()), 3)).decode())
    assert found["tokens"] == ["a", "\ufffd", "\ufffd", *answer]
    assert found["text_offset"] == [0, 1, 2, 2, 3, 4]
    assert found["token_logprobs"][0] is None
    assert all(-0.7 < x < -0.69 for x in found["token_logprobs"][1:])
    assert found["top_logprobs"] == [None, *[{"a": -1.0, "b": -2.0}] * 5]


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs(ai: openai.OpenAI, stream: bool) -> None:
    options: Any = {"model": "m", "messages": HI, "max_tokens": 3, "temperature": 0, "logprobs": True}
    options["top_logprobs"] = 2
    if stream:
        chunks = list(ai.chat.completions.create(stream=True, **options))
        content = [x for c in chunks if c.choices[0].logprobs for x in c.choices[0].logprobs.content]
    else:
        logprobs = ai.chat.completions.create(**options).choices[0].logprobs
        assert logprobs is not None
        content = logprobs.content
    text = told(HI_PROMPT, 3)
    assert [x.token for x in content] == list(text)
    assert [x.bytes for x in content] == [[ord(c)] for c in text]
    assert [[(t.token, t.logprob) for t in x.top_logprobs] for x in content] == [[("a", -1.0), ("b", -2.0)]] * 3


def test_no_logprobs_unless_asked_for(http: httpx.Client) -> None:
    assert http.post("/v1/completions", json={"prompt": "a"}).json()["choices"][0]["logprobs"] is None
    answer = http.post("/v1/chat/completions", json={"messages": HI, "max_tokens": 2}).json()
    assert answer["choices"][0]["logprobs"] is None
    answer = http.post("/v1/completions", json={"prompt": "a", "logprobs": 0}).json()
    assert answer["choices"][0]["logprobs"]["top_logprobs"] == [{}] * 16


def test_what_clients_send_without_meaning_it_is_accepted(http: httpx.Client) -> None:
    body = {
        "messages": HI, "max_tokens": 2, "n": 1, "tools": [], "tool_choice": "none", "functions": None,
        "response_format": {"type": "text"}, "user": "u", "store": False, "metadata": {"a": "b"}, "seed": None,
        "stop": None, "logit_bias": None, "logprobs": None, "top_logprobs": None, "stream_options": None,
        "service_tier": "auto", "modalities": ["text"], "parallel_tool_calls": True, "regex": None, "audio": None,
    }  # fmt: skip
    assert http.post("/v1/chat/completions", json=body).status_code == 200
    body = {"prompt": "a", "best_of": 1, "suffix": None, "echo": False, "stream": None, "model": None}
    assert http.post("/v1/completions", json=body).status_code == 200


def test_continuous_usage(http: httpx.Client) -> None:
    options = {"continuous_usage_stats": True, "include_usage": True}
    body = {"prompt": "abc", "max_tokens": 4, "stream": True, "stream_options": options}
    found = events(http.post("/v1/completions", json=body))
    counts = [e["usage"]["completion_tokens"] for e in found]
    assert counts == sorted(counts)
    assert counts[-2:] == [4, 4]


def test_the_id_of_an_answer_is_the_clients_if_it_gives_one(http: httpx.Client) -> None:
    assert http.post("/v1/completions", json={"prompt": "a", "rid": "mine"}).json()["id"] == "mine"
    assert (
        http.post("/v1/chat/completions", json={"messages": HI, "max_tokens": 1}).json()["id"].startswith("chatcmpl-")
    )


def test_models(ai: openai.OpenAI) -> None:
    (model,) = ai.models.list().data
    assert ai.models.retrieve(model.id).id == model.id == "fake"
    with pytest.raises(openai.NotFoundError, match="no model"):
        ai.models.retrieve("other/one")


def test_a_strict_server_answers_to_its_name_only(serve: Serve) -> None:
    from pippin.config import ServerConfig

    with serve(ServerConfig(served_model_name="pip", strict_model_name=True)) as running, running.openai() as ai:
        assert ai.completions.create(model="pip", prompt="a").model == "pip"
        with pytest.raises(openai.NotFoundError, match="pip") as caught:
            ai.completions.create(model="other", prompt="a")
        assert caught.value.code == "model_not_found"
        with running.http() as http:
            assert http.post("/v1/completions", json={"prompt": "a"}).json()["model"] == "pip"


def test_a_model_without_a_chat_template_says_so(serve: Serve) -> None:
    with serve(tokenizer=byte_tokenizer(template=None)) as running, running.http() as http:
        response = http.post("/v1/chat/completions", json={"messages": HI})
        assert response.status_code == 400
        assert "--chat-template" in response.json()["error"]["message"]


def test_sixteen_streams_at_once_equal_sixteen_alone(server: Running) -> None:
    async def one(client: openai.AsyncOpenAI, i: int) -> str:
        stream = await client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": f"number {i}"}], max_tokens=40, temperature=0, stream=True
        )
        return "".join([c.choices[0].delta.content or "" async for c in stream])

    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
            return await asyncio.gather(*(one(client, i) for i in range(16)))

    assert asyncio.run(main()) == [told(f"user:number {i}\nassistant:", 40) for i in range(16)]


@settings(max_examples=25)
@given(
    prompt=st.text(min_size=1, max_size=20),
    count=st.integers(1, 12),
    n=st.integers(1, 3),
    stop=st.lists(st.text("abcdefgh", min_size=1, max_size=2), max_size=2),
    logprobs=st.none() | st.integers(0, 2),
    echo=st.booleans(),
    seed=st.integers(0, 9),
)
def test_a_stream_joined_equals_the_whole(
    http: httpx.Client, prompt: str, count: int, n: int, stop: list[str], logprobs: int | None, echo: bool, seed: int
) -> None:
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": count, "n": n, "stop": stop, "echo": echo, "seed": seed}
    if logprobs is not None and not (echo and n > 1):
        body["logprobs"] = logprobs
    whole = http.post("/v1/completions", json=body)
    stream = http.post("/v1/completions", json=body | {"stream": True, "stream_options": {"include_usage": True}})
    assert whole.status_code == 200, whole.text
    parts = events(stream)
    assert parts[-1]["usage"]["completion_tokens"] == whole.json()["usage"]["completion_tokens"]
    for choice in whole.json()["choices"]:
        mine = [c for p in parts for c in p["choices"] if c["index"] == choice["index"]]
        assert "".join(c["text"] for c in mine) == choice["text"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
        assert [c["finish_reason"] for c in mine[:-1]] == [None] * (len(mine) - 1)
        if choice["logprobs"]:
            for name, values in choice["logprobs"].items():
                assert [x for c in mine for x in c["logprobs"][name]] == values
