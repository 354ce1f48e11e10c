"""SGLang's endpoints."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import httpx
import pytest

import pippin
from tests.fake_core import CONTEXT, expected
from tests.server.conftest import Running
from tests.server.test_openai import events, told
from tests.waiting import until

FOUR = {"max_new_tokens": 4, "temperature": 0}


def test_generate_one(http: httpx.Client) -> None:
    until(lambda: http.post("/flush_cache").status_code == 200)  # of what other tests have asked
    answer = http.post("/generate", json={"text": "abc", "sampling_params": FOUR, "rid": "r1"}).json()
    assert answer["text"] == told("abc", 4)
    assert answer["output_ids"] == expected(list(b"abc"), 4)
    meta = answer["meta_info"]
    assert meta.pop("e2e_latency") > 0
    assert meta == {
        "id": "r1",
        "finish_reason": {"type": "length", "length": 4},
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "cached_tokens": 0,
        "cache_miss": None,
        "weight_version": "default",
    }


@pytest.mark.parametrize("method", ["POST", "PUT", "GET"])
def test_generate_by_any_method_and_from_token_ids(http: httpx.Client, method: str) -> None:
    answer = http.request(method, "/generate", json={"input_ids": [97, 98], "sampling_params": FOUR}).json()
    assert answer["text"] == told("ab", 4)


def test_generate_a_batch_with_parameters_for_each(http: httpx.Client) -> None:
    params = [{**FOUR, "stop": "q"}, {"max_new_tokens": 2, "temperature": 0}]
    answers = http.post("/generate", json={"text": ["ab", "c"], "sampling_params": params, "rid": ["x", "y"]}).json()
    assert [a["meta_info"]["id"] for a in answers] == ["x", "y"]
    assert answers[1]["text"] == told("c", 2)
    answers = http.post("/generate", json={"text": "ab", "sampling_params": {**FOUR, "n": 2}}).json()
    assert [a["text"] for a in answers] == [told("ab", 4)] * 2


def test_generate_takes_sglangs_name_of_the_seed(http: httpx.Client) -> None:
    params = {"max_new_tokens": 4, "sampling_seed": 3}
    assert http.post("/generate", json={"text": "ab", "sampling_params": params}).json()["text"] == told("ab", 4, 3)


def test_generate_streams_all_text_so_far(http: httpx.Client) -> None:
    found = events(http.post("/generate", json={"text": "abc", "sampling_params": FOUR, "stream": True}))
    counts = [e["meta_info"]["completion_tokens"] for e in found]  # under load, several tokens may come at once
    assert counts == sorted(set(counts))
    assert counts[-1] == 4
    assert [e["text"] for e in found] == [told("abc", count) for count in counts]
    assert [e["meta_info"]["finish_reason"] is None for e in found] == [True] * (len(found) - 1) + [False]
    assert "index" not in found[0]


def test_generate_streams_a_batch_with_indexes(http: httpx.Client) -> None:
    params = [{**FOUR, "n": 2}, FOUR]
    found = events(http.post("/generate", json={"text": ["ab", "c"], "sampling_params": params, "stream": True}))
    last = {e["index"]: e["text"] for e in found}
    assert last == {0: told("ab", 4), 1: told("ab", 4), 2: told("c", 4)}


def test_generate_logprobs_are_triples(http: httpx.Client) -> None:
    body: dict[str, Any] = {"text": "abc", "sampling_params": FOUR, "return_logprob": True, "top_logprobs_num": 2}
    meta = http.post("/generate", json=body).json()["meta_info"]
    assert [t[1] for t in meta["output_token_logprobs"]] == expected(list(b"abc"), 4)
    assert meta["output_top_logprobs"] == [[[-1.0, 97, None], [-2.0, 98, None]]] * 4
    assert meta["input_token_logprobs"] == []
    spelled = http.post("/generate", json=body | {"return_text_in_logprobs": True}).json()["meta_info"]
    assert "".join(t[2] for t in spelled["output_token_logprobs"]) == told("abc", 4)
    assert spelled["output_top_logprobs"][0] == [[-1.0, 97, "a"], [-2.0, 98, "b"]]
    meta = http.post("/generate", json=body | {"logprob_start_len": 0}).json()["meta_info"]
    assert [t[1] for t in meta["input_token_logprobs"]] == [97, 98, 99]
    assert meta["input_token_logprobs"][0][0] is None


def test_tokenize_and_back(http: httpx.Client) -> None:
    answer = http.post("/tokenize", json={"prompt": "aé"}).json()
    assert answer == {"tokens": [97, 0xC3, 0xA9], "count": 3, "max_model_len": CONTEXT}
    answer = http.post("/tokenize", json={"prompt": ["a", "bc"]}).json()
    assert (answer["tokens"], answer["count"]) == ([[97], [98, 99]], [1, 2])
    assert http.post("/detokenize", json={"tokens": [97, 0xC3, 0xA9, 256]}).json() == {"text": "aé"}
    body = {"tokens": [[97], [98, 256]], "skip_special_tokens": False}
    assert http.post("/detokenize", json=body).json() == {"text": ["a", "b<|end|>"]}


def test_health_and_what_is_served(http: httpx.Client) -> None:
    assert http.get("/health").status_code == 200
    assert http.get("/health_generate").status_code == 200
    for path in ("/get_model_info", "/model_info"):
        assert http.get(path).json()["model_path"] == "fake"
    for path in ("/get_server_info", "/server_info"):
        info = http.get(path).json()
        assert info["version"] == pippin.__version__
        assert info["max_total_tokens"] == 100_000
        assert info["internal_states"][0]["slots_total"] == 100_000


def test_flush_cache(server: Running, http: httpx.Client) -> None:
    body = {"text": "something to cache", "sampling_params": FOUR}
    http.post("/generate", json=body)
    assert http.post("/generate", json=body).json()["meta_info"]["cached_tokens"] > 0
    for method in ("GET", "POST"):
        assert http.request(method, "/flush_cache").status_code == 200
    assert http.post("/generate", json=body).json()["meta_info"]["cached_tokens"] == 0


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"text": "a", "sampling_params": {"max_new_tokens": 4000}, "rid": "long"}),
        ("/generate", {"text": "a", "sampling_params": {"max_new_tokens": 4000, "n": 3}, "rid": "long"}),
        ("/v1/completions", {"prompt": "a", "max_tokens": 4000, "rid": "long"}),
        ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 4000, "rid": "long"}),
    ],
)
@pytest.mark.parametrize("abort", [{"rid": "long"}, {"abort_all": True}])
def test_abort_ends_a_request_with_its_reason(server: Running, path: str, body: Any, abort: Any) -> None:
    found: list[httpx.Response] = []

    def ask() -> None:
        with server.http() as http:
            found.append(http.post(path, json=body))

    thread = threading.Thread(target=ask)
    thread.start()
    with server.http() as http:
        while not server.core.running:
            time.sleep(0.001)
        assert http.post("/flush_cache").status_code == 409
        assert http.post("/abort_request", json={"rid": "unknown"}).status_code == 200
        assert http.post("/abort_request", json=abort).status_code == 200
    thread.join(10)
    answer = found[0].json()
    if path == "/generate":
        answers = answer if isinstance(answer, list) else [answer]
        assert {a["meta_info"]["finish_reason"]["type"] for a in answers} == {"abort"}
    else:
        assert answer["choices"][0]["finish_reason"] == "abort"
    assert server.core.running == {}


def test_an_rid_in_use_is_refused(server: Running) -> None:
    body = {"prompt": "a", "max_tokens": 4000, "rid": "taken", "stream": True}
    with server.http() as http, http.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        with server.http() as other:
            refused = other.post("/generate", json={"text": "b", "rid": "taken"})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "rid")
        # The one that was there first is not disturbed.
        assert json.loads(next(line for line in lines if line).removeprefix("data: "))["choices"]


def test_metrics(server: Running, http: httpx.Client) -> None:
    def value(name: str, page: str) -> float:
        return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith(f"pippin:{name}{{"))

    while server.client.live:  # of other tests
        time.sleep(0.001)
    before = http.get("/metrics").text
    http.post("/generate", json={"text": "metrics", "sampling_params": {"max_new_tokens": 5, "n": 2}})
    page = http.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    after = page.text
    for name, more in {
        "generation_tokens_total": 10,
        "num_requests_total": 2,
        "time_to_first_token_seconds_count": 2,
        "inter_token_latency_seconds_count": 8,
        "e2e_request_latency_seconds_count": 2,
        "prompt_tokens_total": 14,
    }.items():
        assert value(name, after) - value(name, before) == more, name
    assert value("max_total_num_tokens", after) == 100_000
    assert value("num_running_reqs", after) == 0
    assert 0 <= value("token_usage", after) <= 1
    assert (
        value("num_used_tokens", after) + value("num_evictable_tokens", after) + value("num_free_tokens", after)
        == 100_000
    )
    assert 'outcome="length"' in after
