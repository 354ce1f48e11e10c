"""LoRA adapters over HTTP: by SGLang's field, by the model's name, loaded and forgotten while serving."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest

from pippin.config import ServerConfig
from tests.server.conftest import Running, serving

HI = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serving(ServerConfig(served_model_name="base")) as running, running.http() as http:
        response = http.post("/load_lora_adapter", json={"lora_name": "sql", "lora_path": "/adapters/sql"})
        assert response.json() == {"success": True, "loaded_adapters": {"sql": "/adapters/sql"}}
        yield running


@pytest.fixture
def http(running: Running) -> Iterator[httpx.Client]:
    with running.http() as client:
        yield client


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", HI | {"model": "base:sql"}),
        ("/v1/chat/completions", HI | {"model": "sql"}),
        ("/v1/chat/completions", HI | {"model": "base", "lora_path": "sql"}),
        ("/v1/completions", {"model": "base:sql", "prompt": "a", "max_tokens": 1}),
        ("/v1/responses", {"model": "base:sql", "input": "a", "max_output_tokens": 1}),
        ("/v1/messages", HI | {"model": "base:sql"}),
        ("/api/generate", {"model": "base:sql", "prompt": "a", "stream": False, "options": {"num_predict": 1}}),
        ("/generate", {"text": "a", "lora_path": "sql", "sampling_params": {"max_new_tokens": 1}}),
        ("/generate", {"text": ["a", "b"], "lora_path": [None, "sql"], "sampling_params": {"max_new_tokens": 1}}),
    ],
)
def test_a_request_names_its_adapter(running: Running, http: httpx.Client, path: str, body: dict[str, object]) -> None:
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    assert "sql" in [s.params.lora_path for s in running.core.asked[-2:]]


def test_others_have_none(running: Running, http: httpx.Client) -> None:
    for name in ("base", "anything", "any:thing"):
        assert http.post("/v1/chat/completions", json=HI | {"model": name}).status_code == 200
        assert running.core.asked[-1].params.lora_path is None


@pytest.mark.parametrize(
    ("body", "field"), [({"model": "base:other"}, "model"), ({"model": "base", "lora_path": "other"}, "lora_path")]
)
def test_an_adapter_that_is_not_there_is_a_404(http: httpx.Client, body: dict[str, str], field: str) -> None:
    response = http.post("/v1/chat/completions", json=HI | body)
    assert response.status_code == 404
    assert response.json()["error"]["param"] == field


def test_models_lists_adapters(running: Running) -> None:
    with running.openai() as ai:
        assert {m.id for m in ai.models.list()} == {"base", "sql"}
        assert ai.models.retrieve("sql").model_extra["parent"] == "base"
        with pytest.raises(openai.NotFoundError):
            ai.models.retrieve("other")


def test_adapters_come_and_go(http: httpx.Client) -> None:
    loaded = http.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "p"}).json()
    assert set(loaded["loaded_adapters"]) == {"sql", "x"}
    assert http.post("/unload_lora_adapter", json={"lora_name": "x"}).json()["loaded_adapters"].keys() == {"sql"}
    assert http.post("/unload_lora_adapter", json={"lora_name": "missing"}).status_code == 400
    missing = http.post("/load_lora_adapter", json={"lora_name": "y", "lora_path": "missing"})
    assert missing.status_code == 400
    assert "holds no LoRA adapter" in missing.json()["error"]["message"]
    assert http.post("/load_lora_adapter", json={"lora_name": "a:b", "lora_path": "p"}).status_code == 400
