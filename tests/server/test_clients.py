"""The recipes of docs/clients.md: their files can be read, and SGLang's frontend language finds its calls."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

import pippin
from pippin.server.app import ROUTES
from tests.server.conftest import Running

PAGE = (Path(pippin.__file__).resolve().parents[2] / "docs" / "clients.md").read_text()
PATHS = {path for _, path, _, _ in ROUTES}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.M | re.S)


def test_the_settings_can_be_read() -> None:
    (codex,) = map(tomllib.loads, blocks("toml"))
    assert codex["model_providers"][codex["model_provider"]]["wire_api"] == "responses"
    (opencode,) = map(json.loads, blocks("json"))
    provider, _, model = opencode["model"].partition("/")
    assert model in opencode["provider"][provider]["models"]
    assert [yaml.safe_load(text) for text in blocks("yaml")]
    addresses = re.findall(r"http://127\.0\.0\.1:30000(/[\w/]*)?", PAGE)
    assert set(addresses) <= {"", "/v1", "/"}
    assert {"/v1/responses", "/v1/chat/completions", "/v1/messages", "/generate", "/api/chat"} <= PATHS


def generate(running: Running, **body: Any) -> Any:
    with running.http() as http:
        response = http.post("/generate", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_the_frontend_languages_select(demo: Running) -> None:
    """``sgl.select``: the prompt is put into the cache, then each choice behind it is scored, and nothing is said."""
    with demo.http() as http:
        assert http.get("/get_model_info").json()["model_path"]
    prompt, choices = "Question: What is 12 + 30? Answer: ", ["42", "seventeen"]
    first = generate(demo, text=prompt, sampling_params={"max_new_tokens": 0})
    assert (first["text"], first["output_ids"]) == ("", [])
    start = max(first["meta_info"]["prompt_tokens"] - 2, 0)
    answers = generate(
        demo,
        text=[prompt + choice for choice in choices],
        sampling_params={"max_new_tokens": 0, "temperature": 0},
        return_logprob=True,
        return_text_in_logprobs=True,
        logprob_start_len=start,
    )
    for answer in answers:
        meta = answer["meta_info"]
        assert (answer["text"], meta["completion_tokens"], meta["output_token_logprobs"]) == ("", 0, [])
        assert meta["finish_reason"] == {"type": "length", "length": 0}
        assert len(meta["input_token_logprobs"]) == meta["prompt_tokens"] - start
        assert all(logprob <= 0 for logprob, _, _ in meta["input_token_logprobs"])
    streamed = generate(demo, text=prompt, sampling_params={"max_new_tokens": 0, "n": 2})
    assert [answer["text"] for answer in streamed] == ["", ""]


def test_the_frontend_languages_gen(demo: Running) -> None:
    with demo.http() as http:
        body = {"text": "Number: ", "sampling_params": {"max_new_tokens": 8, "regex": r"\d{3}"}, "stream": True}
        lines = [line for line in http.post("/generate", json=body).text.splitlines() if line.startswith("data: {")]
    texts = [json.loads(line[6:])["text"] for line in lines]
    assert re.fullmatch(r"\d{3}", texts[-1])
    assert all(texts[-1].startswith(text) for text in texts)
