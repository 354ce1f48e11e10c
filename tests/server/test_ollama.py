"""/api as Ollama's own client sees it, with the shipped model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import ollama
import pytest

from tests.server.clients import ASK, FUNCTION, SUM, ollama_client
from tests.server.conftest import Running

GREEDY = {"temperature": 0, "num_ctx": 4096}
TOOL: dict[str, Any] = {"type": "function", "function": FUNCTION}


@pytest.fixture(scope="module")
def llama(demo: Running) -> Iterator[ollama.Client]:
    with ollama_client(demo) as client:
        yield client


def joined(parts: list[Any]) -> dict[str, Any]:
    """What a stream's messages add up to."""
    return {
        "content": "".join(p.message.content or "" for p in parts),
        "calls": [(c.function.name, c.function.arguments) for p in parts for c in p.message.tool_calls or []],
        "done": [p.done for p in parts].count(True),
        "reason": parts[-1].done_reason,
        "counts": (parts[-1].prompt_eval_count, parts[-1].eval_count),
        "logprobs": [entry.model_dump() for p in parts for entry in p.logprobs or []],
    }


@pytest.mark.parametrize(
    "more",
    [
        {"messages": SUM},
        {"messages": ASK, "tools": [TOOL]},
        {"messages": SUM, "options": GREEDY | {"num_predict": 3}},
        {"messages": SUM, "logprobs": True, "top_logprobs": 2},
        {"messages": [*SUM, {"role": "assistant", "content": "12 + 30 ="}]},
    ],
)
def test_chat_streamed_and_whole_are_the_same(llama: ollama.Client, more: dict[str, Any]) -> None:
    options: Any = {"model": "demo", "options": GREEDY} | more
    whole = joined([llama.chat(**options)])
    streamed = joined(list(llama.chat(**options, stream=True)))
    for found in (whole, streamed):
        for entry in found["logprobs"]:
            for one in [entry, *entry["top_logprobs"]]:
                one["logprob"] = round(one["logprob"], 3)
    assert streamed == whole


def test_a_sum(llama: ollama.Client) -> None:
    answer = llama.chat(model="demo", messages=SUM, options=GREEDY)
    assert (answer.message.content, answer.done_reason, answer.model) == ("12 + 30 = 42", "stop", "demo")
    assert answer.eval_count
    assert answer.total_duration
    cut = llama.chat(model="demo", messages=SUM, options=GREEDY | {"num_predict": 2})
    assert (cut.done_reason, cut.eval_count) == ("length", 2)


def test_a_call_and_its_result(llama: ollama.Client) -> None:
    answer = llama.chat(model="demo", messages=ASK, tools=[TOOL], options=GREEDY)
    assert answer.message.tool_calls
    (call,) = answer.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("get_weather", {"city": "Oslo"})
    result = {"role": "tool", "tool_name": "get_weather", "content": '{"temperature": 7, "sky": "rain"}'}
    final = llama.chat(model="demo", messages=[*ASK, answer.message, result], tools=[TOOL], options=GREEDY)
    assert "7" in (final.message.content or "")


def test_generate_streamed_whole_and_continued(llama: ollama.Client) -> None:
    whole = llama.generate(model="demo", prompt="What is 12 + 30?", options=GREEDY)
    parts = list(llama.generate(model="demo", prompt="What is 12 + 30?", options=GREEDY, stream=True))
    assert whole.response == "".join(p.response or "" for p in parts) == "12 + 30 = 42"
    assert whole.context == parts[-1].context
    assert whole.context
    more = llama.generate(model="demo", prompt="Say hello.", context=whole.context, options=GREEDY)
    assert more.prompt_eval_count
    assert more.prompt_eval_count > len(whole.context)
    raw = llama.generate(model="demo", prompt="12 + 30 =", raw=True, options=GREEDY | {"num_predict": 4})
    assert raw.context is None


def test_what_is_served(llama: ollama.Client, demo: Running) -> None:
    (listed,) = llama.list().models
    assert listed.model == "pippin-demo"
    assert listed.size
    (running,) = llama.ps().models
    assert (running.model, running.context_length) == ("pippin-demo", 4096)
    shown = llama.show("pippin-demo")
    assert shown.capabilities == ["completion", "tools"]
    assert shown.modelinfo
    assert shown.modelinfo["qwen3.context_length"] == 4096
    with demo.http() as http:
        assert http.get("/api/version").json()["version"]
    assert llama.generate(model="demo", prompt="").done_reason == "load"
    assert llama.chat(model="demo", messages=[]).done_reason == "load"


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ({"format": "xml"}, "format"),
        ({"options": {"mirostat": 1}}, "mirostat is not supported"),
        ({"options": {"temprature": 1}}, "did you mean temperature"),
        ({"options": {"top_p": 7}}, "options.top_p"),
        ({"options": {"repeat_penalty": 1.1, "repeat_last_n": 64}}, "repeat_last_n"),
        ({"messages": [{"role": "user", "content": "a", "images": ["x"]}]}, "images"),
        ({"think": "much"}, "think"),
        ({"model": None}, "model is required"),
        ({"foo": 1}, "unknown field foo"),
    ],
)
def test_what_can_not_be_done_is_refused_by_name(demo: Running, body: dict[str, Any], part: str) -> None:
    with demo.http() as http:
        response = http.post("/api/chat", json={"model": "m", "messages": SUM} | body)
    assert response.status_code == 400, response.text
    assert set(response.json()) == {"error"}
    assert part in response.json()["error"]


def test_what_ollama_has_and_pippin_has_not(llama: ollama.Client) -> None:
    for call in (llama.pull, llama.delete):
        with pytest.raises(ollama.ResponseError, match="not supported") as caught:
            call("m")
        assert caught.value.status_code == 400


def test_lines_are_json(demo: Running) -> None:
    with demo.http() as http:
        response = http.post("/api/chat", json={"model": "m", "messages": SUM, "options": {"num_predict": 3}})
    assert response.headers["content-type"].startswith("application/x-ndjson")
    lines = [json.loads(line) for line in response.text.splitlines()]
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
