"""Reasoning over HTTP: an engine whose answers are known, and a template that begins to think."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any

import pytest

from pippin.client import EngineClient
from pippin.config import EngineConfig, ServerConfig
from pippin.errors import ConfigError
from pippin.messages import Output
from pippin.server import create_app
from pippin.server.launch import run
from pippin.text.chat import ChatTemplate
from pippin.types import Finish, SamplingParams
from tests.fake_core import EOS, FakeCore
from tests.server.conftest import Running, byte_tokenizer, serving

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.reasoning_content or '' }}{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% if enable_thinking is not defined or enable_thinking %}<think>\n"
    "{% else %}<think>\n\n</think>\n\n{% endif %}{% if reasoning_effort %}{{ reasoning_effort }}{% endif %}{% endif %}"
)
ANSWER = b"I wonder. \n</think>\n\nForty-two. "
HI: list[Any] = [{"role": "user", "content": "hi"}]


class Thinker(EngineClient):
    """Every answer is ANSWER; behind a prompt that has ended the reasoning, what follows it there.

    ``prompts`` are those that were asked, with how many of their tokens count as the prompt.
    """

    prompts: list[tuple[bytes, int | None]]

    async def submit(
        self, tokens: Sequence[int], params: SamplingParams, *rest: Any, **_: Any
    ) -> AsyncGenerator[Output, None]:
        prompt = bytes(t for t in tokens if t < 256)
        self.prompts.append((prompt, rest[2] if len(rest) > 2 else None))  # priority, id, num_prompt
        said = ANSWER.partition(b"</think>\n\n")[2]
        closed = prompt.rfind(b"</think>") > prompt.rfind(b"assistant:")
        text = said if closed else ANSWER
        for token in text[: params.max_new_tokens]:
            await asyncio.sleep(0)
            yield Output("", [token], num_cached=3, waited=0.25)
        reason = Finish("length") if len(text) >= params.max_new_tokens else Finish("stop", EOS)
        yield Output("", [EOS] if reason.reason == "stop" else [], num_cached=3, finish=reason)


@pytest.fixture(scope="module")
def thinker() -> Iterator[Running]:
    def make(core: Any) -> EngineClient:
        client = Thinker.in_thread(lambda progress: core, seed=0)
        client.prompts = []  # type: ignore[attr-defined]
        return client

    with serving(make_client=make, tokenizer=byte_tokenizer(TEMPLATE)) as running:
        yield running


def parts(config: ServerConfig) -> tuple[EngineClient, Any, ChatTemplate, ServerConfig]:
    """What a server is made of, without an engine that has started."""
    tokenizer = byte_tokenizer(TEMPLATE)
    client = EngineClient.in_thread(lambda progress: FakeCore(), seed=0)
    return client, tokenizer, ChatTemplate(tokenizer), config


def chat(running: Running, **more: Any) -> dict[str, Any]:
    with running.http() as http:
        response = http.post("/v1/chat/completions", json={"messages": HI, "max_tokens": 200} | more)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()["choices"][0]["message"]
    return found


def streamed(running: Running, **more: Any) -> list[dict[str, Any]]:
    with running.openai() as ai:
        chunks = ai.chat.completions.create(model="m", messages=HI, max_tokens=200, stream=True, extra_body=more)
        return [c.choices[0].delta.model_dump(exclude_none=True) for c in chunks]


def test_reasoning_and_words_are_fields_of_their_own(thinker: Running) -> None:
    message = chat(thinker)
    assert (message["reasoning_content"], message["content"]) == ("I wonder.", "Forty-two. ")
    deltas = streamed(thinker)
    assert "".join(d.get("reasoning_content", "") for d in deltas) == "I wonder."
    assert "".join(d.get("content", "") for d in deltas) == "Forty-two. "
    assert len([d for d in deltas if d.get("reasoning_content")]) > 1


def test_reasoning_may_be_left_where_it_is_or_sent_at_once(thinker: Running) -> None:
    assert chat(thinker, separate_reasoning=False)["content"] == ANSWER.decode()
    deltas = streamed(thinker, stream_reasoning=False)
    assert [d["reasoning_content"] for d in deltas if d.get("reasoning_content")] == ["I wonder."]


@pytest.mark.parametrize("off", [{"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}])
def test_thinking_is_turned_off_by_the_template(thinker: Running, off: dict[str, Any]) -> None:
    message = chat(thinker, **off)
    assert "reasoning_content" not in message
    assert message["content"] == "Forty-two. "


def test_effort_reaches_the_template(thinker: Running) -> None:
    chat(thinker, reasoning_effort="high")
    assert thinker.client.prompts[-1][0].endswith(b"<think>\nhigh")  # type: ignore[attr-defined]


@pytest.mark.parametrize("stream", [False, True])
def test_a_budget_ends_reasoning_and_the_answer_goes_on(thinker: Running, stream: bool) -> None:
    if stream:
        deltas = streamed(thinker, thinking_budget=4)
        reasoning = "".join(d.get("reasoning_content", "") for d in deltas)
        content = "".join(d.get("content", "") for d in deltas)
    else:
        message = chat(thinker, thinking_budget=4)
        reasoning, content = message["reasoning_content"], message["content"]
    assert (reasoning, content) == ("I wo", "Forty-two. ")
    prompt, num_prompt = thinker.client.prompts[-1]  # type: ignore[attr-defined]
    assert prompt == b"user:hi\nassistant:<think>\nI wo\n</think>\n\n"
    assert num_prompt == len(b"user:hi\nassistant:<think>\n")


def test_a_budget_that_is_not_spent_changes_nothing(thinker: Running) -> None:
    assert chat(thinker, thinking_budget=100)["reasoning_content"] == "I wonder."
    assert chat(thinker, thinking_budget=len(ANSWER))["content"] == "Forty-two. "


def test_usage_counts_what_was_written_for_the_model_too(thinker: Running) -> None:
    with thinker.http() as http:
        body = {"messages": HI, "max_tokens": 200, "thinking_budget": 4}
        usage = http.post("/v1/chat/completions", json=body).json()["usage"]
    assert usage["completion_tokens"] == len(b"I wo\n</think>\n\nForty-two. ") + 1
    assert usage["prompt_tokens_details"]["cached_tokens"] == 3


def test_a_budget_of_one_token_loses_nothing_of_the_first_step(thinker: Running) -> None:
    def queued() -> float:
        with thinker.http() as http:
            lines = http.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("pippin:queue_time_seconds_sum"))

    before = queued()
    chat(thinker, thinking_budget=1)
    assert queued() == pytest.approx(before + 0.25)


def test_usage_tells_reasoning_apart(thinker: Running) -> None:
    """As far as steps tell: what closes the reasoning counts as none."""
    with thinker.openai() as ai:
        options: Any = {"model": "m", "messages": HI, "max_tokens": 200}
        whole = ai.chat.completions.create(**options).usage
        *_, last = ai.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
        off = ai.chat.completions.create(**options, reasoning_effort="none").usage
    for usage in (whole, last.usage):
        assert usage is not None
        assert usage.completion_tokens_details is not None
        assert len("I wonder.") <= (usage.completion_tokens_details.reasoning_tokens or 0) < usage.completion_tokens
    assert off is not None
    assert off.completion_tokens_details is not None
    assert off.completion_tokens_details.reasoning_tokens == 0
    with thinker.http() as http:
        thinking = {"type": "enabled", "budget_tokens": 1024}
        body = {"model": "m", "max_tokens": 200, "messages": HI, "thinking": thinking}
        told = http.post("/v1/messages", json=body).json()["usage"]
    assert len("I wonder.") <= told["output_tokens_details"]["thinking_tokens"] < told["output_tokens"]


def test_anthropics_thinking_blocks(thinker: Running) -> None:
    with thinker.http() as http:
        body: dict[str, Any] = {"model": "m", "max_tokens": 200, "messages": HI}
        thinking = {"type": "enabled", "budget_tokens": 1024}
        content = http.post("/v1/messages", json=body | {"thinking": thinking}).json()["content"]
        assert [(c["type"], c.get("thinking", c.get("text"))) for c in content] == [
            ("thinking", "I wonder."),
            ("text", "Forty-two. "),
        ]
        omitted = http.post("/v1/messages", json=body | {"thinking": thinking | {"display": "omitted"}}).json()
        assert omitted["content"][0]["thinking"] == ""
        history = [*HI, {"role": "assistant", "content": content}, {"role": "user", "content": "so?"}]
        plain = http.post("/v1/messages", json=body | {"messages": history}).json()["content"]
        assert [c["type"] for c in plain] == ["text"]
        text = http.post("/v1/messages", json=body | {"thinking": thinking, "stream": True}).text
    assert text.index("thinking_delta") < text.index("signature_delta") < text.index("text_delta")
    assert b"I wonder." in thinker.client.prompts[-2][0]  # type: ignore[attr-defined]


def test_ollamas_thinking_and_reasoning_items(thinker: Running) -> None:
    with thinker.http() as http:
        body = {"model": "m", "messages": HI, "stream": False, "think": True}
        message = http.post("/api/chat", json=body).json()["message"]
        assert (message["thinking"], message["content"]) == ("I wonder.", "Forty-two. ")
    with thinker.openai() as ai:
        include: Any = ["reasoning.encrypted_content"]
        first = ai.responses.create(model="m", input="hi", include=include, max_output_tokens=200)
        kinds = [item.type for item in first.output]
        assert kinds == ["reasoning", "message"]
        assert first.usage is not None
        assert first.usage.output_tokens_details.reasoning_tokens > 5
        item = first.output[0].model_dump(exclude_none=True, exclude={"content"})
        ai.responses.create(model="m", input=[*HI, item, *HI], max_output_tokens=5)
        assert b"I wonder." in thinker.client.prompts[-1][0]  # type: ignore[attr-defined]
        events = [e.type for e in ai.responses.create(model="m", input="hi", stream=True, max_output_tokens=200)]
    assert events.index("response.reasoning_text.done") < events.index("response.output_text.delta")


def test_the_parsers_can_be_asked_alone(thinker: Running) -> None:
    tools = [{"type": "function", "function": {"name": "now"}}]
    with thinker.http() as http:
        body: dict[str, Any] = {"text": "<think>hm</think>so"}
        assert http.post("/separate_reasoning", json=body).json() == {"reasoning_text": "hm", "text": "so"}
        body = {"text": 'Well. <tool_call>{"name": "now"}</tool_call>', "tools": tools, "tool_call_parser": "qwen25"}
        found = http.post("/parse_function_call", json=body).json()
        assert found == {"normal_text": "Well.", "calls": [{"tool_index": 0, "name": "now", "parameters": "{}"}]}
        response = http.post("/parse_function_call", json=body | {"tool_call_parser": "nobody's"})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "tool_call_parser")
        response = http.post("/separate_reasoning", json={"text": "a", "reasoning_parser": "nobody's"})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "reasoning_parser")


def test_an_unknown_parser_is_refused_at_the_start() -> None:
    unknown: list[dict[str, Any]] = [{"tool_call_parser": "x"}, {"reasoning_parser": "x"}]
    for options in unknown:
        config = ServerConfig(**options)
        with pytest.raises(ConfigError, match="must be none, auto or one of"):
            create_app(*parts(config))
        with pytest.raises(ConfigError, match="-parser: must be"):  # before a model is loaded
            run(EngineConfig(), config)
