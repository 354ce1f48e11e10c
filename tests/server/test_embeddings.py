"""Embeddings and scores over HTTP, by the official clients; and the shipped model's against mlx-lm."""

from __future__ import annotations

import base64
import math
from typing import Any

import httpx
import mlx.core as mx
import numpy as np
import numpy.typing as npt
import ollama
import openai
import pytest
from mlx_lm.utils import load_model

from pippin.demo import demo_model_path
from pippin.embedding import unit
from pippin.engine import Engine
from pippin.errors import RequestError
from pippin.text.tokenizer import load_tokenizer
from pippin.types import Pooling
from tests.fake_core import CONTEXT, fake_vector
from tests.server.clients import ollama_client
from tests.server.conftest import Running

TEXTS = ["hello there", "a", "hello there, again"]


def fake(text: str | list[int]) -> npt.NDArray[np.float32]:
    tokens = list(text.encode()) if isinstance(text, str) else text
    return unit(np.array(fake_vector(tokens, Pooling("last")), np.float32))


@pytest.mark.parametrize("form", ["float", "base64", None])
def test_openais_client_gets_vectors(ai: openai.OpenAI, form: Any) -> None:
    options = {"encoding_format": form} if form else {}  # left out, the client asks for base64 and decodes it
    found = ai.embeddings.create(model="m", input=TEXTS, **options)
    assert [d.index for d in found.data] == [0, 1, 2]
    for text, item in zip(TEXTS, found.data, strict=True):
        given: Any = item.embedding
        values = np.frombuffer(base64.b64decode(given), "<f4") if form == "base64" else given
        np.testing.assert_allclose(values, fake(text), atol=1e-6)
    assert found.usage.prompt_tokens == found.usage.total_tokens == sum(map(len, TEXTS))


def test_token_ids_one_and_many(ai: openai.OpenAI) -> None:
    one = ai.embeddings.create(model="m", input=[5, 6, 7], encoding_format="float")
    np.testing.assert_allclose(one.data[0].embedding, fake([5, 6, 7]), atol=1e-6)
    many = ai.embeddings.create(model="m", input=[[5, 6, 7], [8]], encoding_format="float")
    np.testing.assert_allclose(many.data[1].embedding, fake([8]), atol=1e-6)


def test_dimensions_cut_and_scale_again(ai: openai.OpenAI, http: httpx.Client) -> None:
    found = ai.embeddings.create(model="m", input="a", dimensions=3, encoding_format="float").data[0].embedding
    np.testing.assert_allclose(found, unit(fake("a")[:3]), atol=1e-6)
    response = http.post("/v1/embeddings", json={"input": "a", "dimensions": 9})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "dimensions"
    assert "at most 8" in response.text


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", [1]]}, "input"),
        ({"input": [1, 10**6]}, "input"),
        ({"input": "a" * (CONTEXT + 1)}, "input"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({}, "input"),
    ],
)
def test_bad_embedding_requests_name_the_field(http: httpx.Client, body: dict[str, Any], field: str) -> None:
    response = http.post("/v1/embeddings", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field


def test_a_failing_text_leaves_nothing_behind(server: Running, http: httpx.Client) -> None:
    """A request id that is in use twice fails the second, and both are free again afterwards."""
    for _ in range(2):
        assert http.post("/v1/embeddings", json={"input": TEXTS, "rid": "mine"}).status_code == 200
    assert server.client.live == ()


def test_sglangs_encode(http: httpx.Client) -> None:
    one = http.post("/encode", json={"text": "hello", "rid": "x"}).json()
    np.testing.assert_allclose(one["embedding"], fake("hello"), atol=1e-6)
    assert one["meta_info"]["id"] == "x"
    assert one["meta_info"]["prompt_tokens"] == 5
    many = http.post("/encode", json={"input_ids": [[5, 6], [7]]}).json()
    np.testing.assert_allclose(many[1]["embedding"], fake([7]), atol=1e-6)
    assert http.post("/encode", json={"text": "a", "input_ids": [1]}).status_code == 400


def test_ollamas_client_gets_vectors(server: Running) -> None:
    with ollama_client(server) as client:
        found = client.embed(model="m", input=TEXTS)
        np.testing.assert_allclose(found.embeddings[2], fake(TEXTS[2]), atol=1e-6)
        assert found.prompt_eval_count == sum(map(len, TEXTS))
        np.testing.assert_allclose(client.embeddings(model="m", prompt="a").embedding, fake("a"), atol=1e-6)
        long = client.embed(model="m", input="b" * (CONTEXT + 9))
        np.testing.assert_allclose(long.embeddings[0], fake("b" * CONTEXT), atol=1e-6)
        with pytest.raises(ollama.ResponseError, match="at most"):
            client.embed(model="m", input="b" * (CONTEXT + 9), truncate=False)


# --- scores ---


def test_rerank_orders_by_score(http: httpx.Client) -> None:
    documents = ["one", {"text": "two"}, "three", "four"]
    found = http.post("/v1/rerank", json={"query": "q", "documents": documents, "model": "m"}).json()
    scores = [r["relevance_score"] for r in found["results"]]
    assert scores == sorted(scores, reverse=True)
    assert sorted(r["index"] for r in found["results"]) == [0, 1, 2, 3]
    assert all(0 <= s <= 1 for s in scores)
    names = ["one", "two", "three", "four"]
    assert all(r["document"]["text"] == names[r["index"]] for r in found["results"])
    assert found["usage"]["total_tokens"] > 0
    best = http.post("/rerank", json={"query": "q", "documents": documents, "top_n": 2, "return_documents": False})
    assert best.json()["results"] == [{k: r[k] for k in ("index", "relevance_score")} for r in found["results"][:2]]


def test_sglangs_scores_are_probabilities_of_labels(http: httpx.Client) -> None:
    body = {"query": "is it?", "items": ["yes", "no"], "label_token_ids": [97, 98]}
    found = http.post("/v1/score", json=body).json()
    for item, scores in zip(body["items"], found["scores"], strict=True):
        logprobs = fake_vector(list(f"is it?{item}".encode()), Pooling("labels", (97, 98)))
        assert scores == pytest.approx([math.exp(p) for p in logprobs])
    soft = http.post("/v1/score", json=body | {"apply_softmax": True, "item_first": True}).json()["scores"]
    logprobs = fake_vector(list(b"yesis it?"), Pooling("labels", (97, 98)))
    assert soft[0] == pytest.approx([math.exp(p) / sum(map(math.exp, logprobs)) for p in logprobs])
    tokens = http.post("/v1/score", json={"query": [1, 2], "items": [[3]], "label_token_ids": [5]}).json()["scores"]
    assert tokens == [[pytest.approx(math.exp(fake_vector([1, 2, 3], Pooling("labels", (5,)))[0]))]]


def test_vllms_scores_of_pairs(http: httpx.Client) -> None:
    one = http.post("/score", json={"text_1": "a", "text_2": ["b", "c"]}).json()
    two = http.post("/v1/score", json={"text_1": ["a", "a"], "text_2": ["b", "c"]}).json()
    assert [d["score"] for d in one["data"]] == [d["score"] for d in two["data"]]
    assert [d["index"] for d in one["data"]] == [0, 1]


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/rerank", {"query": "q", "documents": []}, "documents"),
        ("/v1/rerank", {"query": "q", "documents": ["a"], "top_n": 0}, "top_n"),
        ("/v1/rerank", {"documents": ["a"]}, "query"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["c", "d", "e"]}, "text_1"),
        ("/v1/score", {"text_1": "a"}, "text_2"),
        ("/v1/score", {"text_1": "a", "text_2": "b", "query": "c"}, "query"),
        ("/v1/score", {"query": "a", "items": ["b"]}, "label_token_ids"),
        ("/v1/score", {"query": "a", "items": [[1]], "label_token_ids": [1]}, "items[0]"),
        ("/v1/score", {"items": ["b"], "label_token_ids": [1]}, "query"),
    ],
)
def test_bad_score_requests_name_the_field(http: httpx.Client, path: str, body: dict[str, Any], field: str) -> None:
    response = http.post(path, json=body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == field


# --- the shipped model ---


def hidden_of(tokens: list[int]) -> npt.NDArray[np.float32]:
    model, _ = load_model(demo_model_path())
    model.set_dtype(mx.float32)
    found: npt.NDArray[np.float32] = np.array(model.model(mx.array([tokens])))[0]
    return found


def test_the_shipped_models_vectors_are_mlx_lms(demo: Running) -> None:
    tokenizer = load_tokenizer(None)
    with demo.openai() as ai:
        found = ai.embeddings.create(model="m", input=TEXTS).data
    for text, item in zip(TEXTS, found, strict=True):
        want = unit(hidden_of(tokenizer.encode(text))[-1])
        np.testing.assert_allclose(item.embedding, want, atol=1e-5)


def test_an_embedding_model_compares_vectors_and_generates_nothing(demo: Running) -> None:
    with Engine(device="cpu", max_total_tokens=2000, is_embedding=True, pooling="mean") as engine:
        one, two = engine.encode(TEXTS[:2])
        want = unit(hidden_of(engine.tokenizer.encode(TEXTS[0])).mean(axis=0))
        np.testing.assert_allclose(one["embedding"], want, atol=1e-5)
        assert engine.encode(TEXTS[1])["embedding"] == pytest.approx(two["embedding"], abs=1e-5)
        with pytest.raises(RequestError, match="generates none"):
            engine.generate("a")
