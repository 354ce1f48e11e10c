"""The whole way, with a real model in a child process: HTTP, queue, engine, MLX, and back."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from pippin.client import EngineClient
from pippin.config import EngineConfig
from tests.checkpoints import make_checkpoint
from tests.server.conftest import Running, byte_tokenizer, serving
from tests.server.test_lifecycle import ask
from tests.waiting import until

LETTERS = {str(token): 100 for token in range(97, 123)}  # a random model's text must survive being sent back as text
SLOTS = 3000


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A random Qwen3 of three layers, byte by byte."""
    path = make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3", max_position_embeddings=1024)
    byte_tokenizer().hf.save_pretrained(path)
    config = EngineConfig(model_path=str(path), max_total_tokens=SLOTS, chunked_prefill_size=64, device="cpu")
    with serving(make_client=lambda core: EngineClient.spawn(config)) as running:
        yield running


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1, "seed": 5, "top_p": 0.9}])
def test_sixteen_streams_at_once_equal_sixteen_alone(real: Running, options: dict[str, Any]) -> None:
    prompts = [f"number {i} of sixteen prompts " * (1 + i % 5) for i in range(16)]

    async def one(client: openai.AsyncOpenAI, prompt: str) -> str:
        stream = await client.completions.create(
            model="m", prompt=prompt, max_tokens=24, logit_bias=LETTERS, stream=True, **options
        )
        return "".join([c.choices[0].text async for c in stream])

    async def main() -> tuple[list[str], list[str]]:
        async with openai.AsyncOpenAI(base_url=f"{real.url}/v1", api_key="-", max_retries=0) as client:
            together = await asyncio.gather(*(one(client, p) for p in prompts))
            return together, [await one(client, p) for p in prompts]

    together, alone = asyncio.run(main())
    assert together == alone
    assert len(set(alone)) > 8


def test_a_chat_reads_only_what_is_new(real: Running) -> None:
    messages: list[dict[str, str]] = []
    before = 0
    with real.http() as http:
        for turn in range(5):
            messages.append({"role": "user", "content": f"this is turn {turn}"})
            body = {"messages": messages, "max_tokens": 20, "temperature": 0, "logit_bias": LETTERS}
            answer = http.post("/v1/chat/completions", json=body).json()
            usage = answer["usage"]
            cached = usage["prompt_tokens_details"]["cached_tokens"]
            assert before - 1 <= cached <= before
            before = usage["total_tokens"]
            messages.append(answer["choices"][0]["message"])


def test_whoever_goes_away_leaves_no_slot_behind(real: Running) -> None:
    for stream in (False, True):
        connection = ask(real.address, "/v1/completions", {"prompt": "a", "max_tokens": 900, "stream": stream})
        until(lambda: real.client.stats.num_running == 1)
        connection.close()
        until(lambda: real.client.live == ())
    with real.http() as http:
        until(lambda: http.post("/flush_cache").status_code == 200)
        (stats,) = http.get("/get_server_info").json()["internal_states"]
    assert (stats["num_running"], stats["num_waiting"], stats["slots_cached"]) == (0, 0, 0)
    assert stats["slots_free"] == stats["slots_total"] == SLOTS


def test_what_is_only_cached_is_not_in_use(real: Running) -> None:
    """``token_usage`` is SGLang's: slots that running requests hold. What is cached gives way, and alarms nobody."""
    with real.http() as http:

        def gauge(name: str) -> float:
            line = next(x for x in http.get("/metrics").text.splitlines() if x.startswith(f"pippin:{name}{{"))
            return float(line.split()[-1])

        def parts() -> float:
            return sum(map(gauge, ("num_used_tokens", "num_evictable_tokens", "num_free_tokens")))

        until(lambda: real.client.live == () and http.post("/flush_cache").status_code == 200)
        http.post("/generate", json={"text": "a prompt that stays", "sampling_params": {"max_new_tokens": 4}})
        until(lambda: gauge("num_running_reqs") == 0)
        assert (gauge("token_usage"), gauge("num_used_tokens")) == (0, 0)
        assert gauge("num_evictable_tokens") == gauge("num_cached_tokens") > 0
        assert parts() == SLOTS
        # Who runs holds what it shares with the cache, too.
        body = {"prompt": "a prompt that stays, and goes on", "max_tokens": 900, "stream": True}
        connection = ask(real.address, "/v1/completions", body)
        until(lambda: real.client.stats.decode_tokens > 0 and gauge("num_used_tokens") > 33)
        assert gauge("token_usage") > 0
        assert gauge("num_evictable_tokens") < gauge("num_cached_tokens")
        connection.close()
        until(lambda: real.client.live == () and gauge("num_used_tokens") == 0)


def test_a_miss_says_why_in_meta_info_and_metrics(real: Running) -> None:
    with real.http() as http:

        def misses() -> dict[str, float]:
            found = re.findall(r'^pippin:cache_misses_total{.*reason="(\w+)"} (\S+)', http.get("/metrics").text, re.M)
            return {reason: float(number) for reason, number in found}

        def miss_of(text: str) -> dict[str, Any] | None:
            body = {"text": text, "sampling_params": {"max_new_tokens": 2, "ignore_eos": True}}
            miss: dict[str, Any] | None = http.post("/generate", json=body).json()["meta_info"]["cache_miss"]
            return miss

        until(lambda: real.client.live == () and http.post("/flush_cache").status_code == 200)
        before = misses()
        assert miss_of("zebras at the zoo") == {"reason": "cold", "token": 0}
        assert miss_of("zebras, and others") == {"reason": "diverged", "token": len("zebras")}
        assert miss_of("zebras, and others") is None
        until(lambda: real.client.live == () and http.post("/flush_cache").status_code == 200)
        assert miss_of("zebras, and others") == {"reason": "evicted", "token": 0}
        counted = misses()
        told = {reason: number - before.get(reason, 0) for reason, number in counted.items()}
        assert {reason: number for reason, number in told.items() if number} == {"cold": 1, "diverged": 1, "evicted": 1}


def test_streamed_and_whole_answers_agree_with_their_logprobs(real: Running) -> None:
    body: dict[str, Any] = {
        "text": "some prompt",
        "return_logprob": True,
        "top_logprobs_num": 3,
        "logprob_start_len": 0,
    }
    body["sampling_params"] = {"max_new_tokens": 6, "temperature": 0, "ignore_eos": True}
    with real.http() as http:
        first, second = (http.post("/generate", json=body).json() for _ in range(2))
    for name in ("input_token_logprobs", "output_token_logprobs", "output_top_logprobs"):
        close(first["meta_info"][name], second["meta_info"][name])
    for (logprob, token, _), top in zip(
        first["meta_info"]["output_token_logprobs"], first["meta_info"]["output_top_logprobs"], strict=True
    ):
        assert top[0][:2] == [logprob, token]  # greedy takes the likeliest


def close(one: Any, other: Any) -> None:
    if isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            close(a, b)
    else:
        assert one == pytest.approx(other, abs=1e-4)


def test_what_the_engine_refuses_names_the_field(real: Running) -> None:
    with real.http() as http:
        response: httpx.Response = http.post("/v1/completions", json={"prompt": "x" * 1024})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")
        assert "1024" in response.json()["error"]["message"]
