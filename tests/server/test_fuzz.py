"""Requests drawn from the server's own description of itself: whatever is sent, it answers, and lives."""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pippin.server.app import ROUTES
from tests.server.conftest import Running, serving
from tests.server.drawn import Drawn

# A path; in CI all of them take about six seconds.
EXAMPLES = 500 if os.environ.get("HYPOTHESIS_PROFILE") == "sweep" else 25

# What a body must have so that it is not refused at once, and bounds, so that an answer is short.
SHORT: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3},
    "/v1/completions": {"prompt": "a", "max_tokens": 3},
    "/v1/responses": {"input": "a", "max_output_tokens": 3},
    "/v1/messages": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "a"}]},
    "/api/chat": {"model": "m", "messages": [{"role": "user", "content": "a"}], "options": {"num_predict": 3}},
    "/api/generate": {"model": "m", "prompt": "a", "options": {"num_predict": 3}},
    "/generate": {"text": "a", "sampling_params": {"max_new_tokens": 3}},
    "/v1/embeddings": {"input": "a"},
    "/encode": {"text": "a"},
    "/v1/rerank": {"query": "a", "documents": ["b"]},
    "/v2/rerank": {"query": "a", "documents": ["b"]},
    "/rerank": {"query": "a", "documents": ["b"]},
    "/v1/score": {"text_1": "a", "text_2": "b"},
    "/score": {"query": "a", "items": "b", "label_token_ids": [97, 98]},
    "/api/embed": {"model": "m", "input": "a"},
    "/api/embeddings": {"model": "m", "prompt": "a"},
    "/load_lora_adapter": {"lora_name": "a", "lora_path": "b"},
    "/v1/load_lora_adapter": {"lora_name": "a", "lora_path": "b"},
    "/unload_lora_adapter": {"lora_name": "a"},
    "/v1/unload_lora_adapter": {"lora_name": "a"},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [97]},
    "/start_profile": {"num_steps": 1},
}
REFUSED = {"/update_weights_from_disk"}  # by an engine in a thread of this process, always; test_weights.py has another
BODIES = sorted({(method, path) for method, path, _, body in ROUTES if body is not None})


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[tuple[Running, httpx.Client, dict[str, Any]]]:
    """A server, a client, and the server's description."""
    with serving(seconds=0.0) as running, running.http() as http:
        yield running, http, http.get("/openapi.json").json()


def schema_of(page: dict[str, Any], method: str, path: str) -> dict[str, Any]:
    """The schema of a path's body."""
    reference = page["paths"][path][method.lower()]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    found: dict[str, Any] = page["components"]["schemas"][reference.rpartition("/")[2]]
    return found


def check(response: httpx.Response, path: str) -> None:
    assert response.status_code < 500, f"{path}: {response.text}"
    assert "Traceback" not in response.text
    if response.status_code != 200:
        assert response.status_code in (400, 404, 409), response.text
        assert response.json()


@pytest.mark.parametrize(("method", "path"), BODIES)
def test_bodies_of_the_description_are_answered(
    fuzzed: tuple[Running, httpx.Client, dict[str, Any]], method: str, path: str, tmp_path: Path
) -> None:
    _, http, page = fuzzed
    strategy = Drawn(page["components"]["schemas"]).objects(schema_of(page, method, path))
    answered: list[int] = []

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(body=strategy, keep=st.booleans())
    def run(body: dict[str, Any], keep: bool) -> None:
        body = {**body, **SHORT.get(path, {})} if keep else {**SHORT.get(path, {}), **body}
        body.pop("n", None)  # many answers take long, and are tested elsewhere
        if path == "/start_profile":  # it writes where it is told to
            body["output_dir"] = str(tmp_path / "profile")
        response = http.request(method, path, json=body)
        check(response, path)
        if path == "/start_profile":
            check(http.post("/stop_profile"), path)
        answered.append(response.status_code)

    run()
    assert (200 in answered) == (path not in REFUSED), "nothing got past the checks"
    assert http.get("/health").status_code == 200
    assert {found.name for found in tmp_path.iterdir()} <= {"profile"}, "a file lies elsewhere"


def test_the_server_still_works(fuzzed: tuple[Running, httpx.Client, dict[str, Any]]) -> None:
    running, http, _ = fuzzed
    answer = http.post("/v1/completions", json={"prompt": "abc", "max_tokens": 5, "temperature": 0})
    assert len(answer.json()["choices"][0]["text"]) == 5
    assert running.client.live == ()


@pytest.mark.parametrize(("method", "path"), sorted({(m, p) for m, p, _, b in ROUTES if b is None}))
@settings(max_examples=8)
@given(name=st.text(max_size=12), query=st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2))
def test_paths_with_any_name_are_answered(
    fuzzed: tuple[Running, httpx.Client, dict[str, Any]], method: str, path: str, name: str, query: dict[str, str]
) -> None:
    spelled = urllib.parse.quote(name.encode("utf-8", "surrogatepass"), safe="") or "x"
    path = path.replace("{id}", spelled).replace("{model:path}", spelled)
    response = fuzzed[1].request(method, path, params={k: v for k, v in query.items() if k.isprintable()})
    assert response.status_code < 500, response.text
    assert "Traceback" not in response.text
