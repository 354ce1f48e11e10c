"""Scores of pairs: /v1/rerank as Jina, Cohere and vLLM have it, /v1/score as SGLang and vLLM do.

A model that generates judges each pair: asked whether the document meets the query, how likely is "yes" against "no" as
its next token (Qwen3-Reranker's way). An embedding model compares the two texts' vectors.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from pippin.completion import new_id
from pippin.embedding import Vector, label_scores, longest_text, similarity, text_pooling
from pippin.errors import RequestError
from pippin.server.http import JsonResponse, read_body, unless_gone
from pippin.server.protocol import Body, Int32, Json
from pippin.server.service import Service
from pippin.types import Pooling

# The words that Qwen3-Reranker was trained with, from its model card; they do for others as well as any.
JUDGE = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)
INSTRUCT = "Given a web search query, retrieve relevant passages that answer the query"
LABELS = ("yes", "no")


class Document(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    text: str


class RerankRequest(Body, kw_only=True):
    """POST /v1/rerank. ``instruct`` is SGLang's: what makes a document fit, in words."""

    query: str
    documents: list[str | Document]
    model: str | None = None
    top_n: Annotated[int, msgspec.Meta(ge=1)] | None = None
    return_documents: bool = True
    instruct: str | None = None
    rid: str | None = None
    priority: Int32 = 0


class ScoreRequest(Body, kw_only=True):
    """POST /v1/score: SGLang's ``query``, ``items`` and ``label_token_ids``, or vLLM's ``text_1`` and ``text_2``."""

    model: str | None = None
    query: str | list[int] | None = None
    items: str | list[str | list[int]] | None = None
    label_token_ids: list[int] | None = None
    apply_softmax: bool = False
    item_first: bool = False
    text_1: str | list[str] | None = None
    text_2: str | list[str] | None = None
    rid: str | None = None
    priority: Int32 = 0


async def rerank(service: Service, http: Request) -> Response:
    """POST /v1/rerank, /v2/rerank and /rerank: documents by how well they fit the query, best first."""
    request = await read_body(http, RerankRequest)
    model = service.check_model(request.model)
    texts = [d if isinstance(d, str) else d.text for d in request.documents]
    if not texts:
        raise RequestError("documents is an empty list; it needs at least one", "documents")
    rid = request.rid or f"rerank-{new_id()}"
    pairs = [(request.query, text) for text in texts]
    scores, count = await unless_gone(http, score_pairs(service, pairs, request.instruct, rid, request.priority))
    best = sorted(range(len(texts)), key=lambda i: -scores[i])[: request.top_n]
    results = [
        {"index": i, "relevance_score": scores[i]}
        | ({"document": {"text": texts[i]}} if request.return_documents else {})
        for i in best
    ]
    return JsonResponse({"id": rid, "model": model, "results": results, "usage": usage(count)})


async def score(service: Service, http: Request) -> Response:
    """POST /v1/score and /score."""
    request = await read_body(http, ScoreRequest)
    model = service.check_model(request.model)
    rid = request.rid or f"score-{new_id()}"
    if request.text_1 is None and request.text_2 is None:
        vectors = await unless_gone(http, score_labels(service, request, rid))
        scores = [label_scores(vector, request.apply_softmax) for vector in vectors]
        count = sum(vector.num_prompt for vector in vectors)
        return JsonResponse({"scores": scores, "model": model, "usage": usage(count), "object": "scoring"})
    values, count = await unless_gone(http, score_pairs(service, text_pairs(request), None, rid, request.priority))
    data = [{"index": i, "object": "score", "score": value} for i, value in enumerate(values)]
    head = {"id": rid, "object": "list", "created": int(time.time()), "model": model}
    return JsonResponse({**head, "data": data, "usage": usage(count)})


def usage(count: int) -> Json:
    return {"prompt_tokens": count, "total_tokens": count, "completion_tokens": 0}


def text_pairs(request: ScoreRequest) -> list[tuple[str, str]]:
    """vLLM's pairs: one text with each of several, or two lists of the same length."""
    for name, value in (("text_1", request.text_1), ("text_2", request.text_2)):
        if not value:
            raise RequestError(f"{name} is required, and must not be empty", name)
    other = {"query": request.query, "items": request.items, "label_token_ids": request.label_token_ids}
    for name in (name for name, value in other.items() if value is not None):
        raise RequestError(f"{name} is of another form of this request than text_1 and text_2; send one", name)
    left, right = ([t] if isinstance(t, str) else list(t or ()) for t in (request.text_1, request.text_2))
    left = left * len(right) if len(left) == 1 else left
    if len(left) != len(right):
        raise RequestError(f"text_1 has {len(left)} texts and text_2 {len(right)}; send one, or as many", "text_1")
    return list(zip(left, right, strict=True))


async def score_labels(service: Service, request: ScoreRequest, rid: str) -> list[Vector]:
    """SGLang's scores: how likely each label is behind the query and each item, written one after the other."""
    if request.query is None:
        raise RequestError("query is required (or text_1 and text_2)", "query")
    if not request.label_token_ids:
        raise RequestError("label_token_ids is required: tokens, whose probabilities are the scores", "label_token_ids")
    items = [request.items] if isinstance(request.items, str) else request.items
    if not items:
        raise RequestError("items is required, and must not be empty", "items")
    prompts = []
    for i, item in enumerate(items):
        first, second = (item, request.query) if request.item_first else (request.query, item)
        if isinstance(first, str) and isinstance(second, str):
            prompts.append(await service.encode(first + second, most=longest_text(service.info), field="items"))
        elif isinstance(first, list) and isinstance(second, list):
            prompts.append(first + second)
        else:
            raise RequestError("query and items must both be texts, or both token ids", f"items[{i}]")
    pooling = Pooling("labels", tuple(request.label_token_ids))
    return await service.vectors(prompts, pooling, rid, request.priority, "items")


async def score_pairs(
    service: Service, pairs: Sequence[tuple[str, str]], instruct: str | None, rid: str, priority: int
) -> tuple[list[float], int]:
    """A score from 0 to 1 for each pair (-1 to 1 by vectors), and how many tokens were read."""
    if not service.info.is_embedding:
        return await judge(service, pairs, instruct or INSTRUCT, rid, priority)
    if instruct is not None:
        raise RequestError("an embedding model takes no instruct here; put it into the query", "instruct")
    texts = {text: i for i, text in enumerate(dict.fromkeys(t for pair in pairs for t in pair))}
    tokens = [await service.encode(text, most=longest_text(service.info), field="documents") for text in texts]
    found = await service.vectors(tokens, text_pooling(service.info), rid, priority, "documents")
    scores = [similarity(found[texts[a]], found[texts[b]]) for a, b in pairs]
    return scores, sum(vector.num_prompt for vector in found)


async def judge(
    service: Service, pairs: Sequence[tuple[str, str]], instruct: str, rid: str, priority: int
) -> tuple[list[float], int]:
    """How likely "yes" is against "no", for each pair."""
    yes, no = (service.tokenizer.encode(label, add_special_tokens=False)[0] for label in LABELS)
    if yes == no:
        raise RequestError("this model's tokenizer begins yes and no with the same token, so they tell nothing apart")
    prompts = []
    for query, document in pairs:
        text = service.chat.render(
            [
                {"role": "system", "content": JUDGE},
                {"role": "user", "content": f"<Instruct>: {instruct}\n<Query>: {query}\n<Document>: {document}"},
            ],
            chat_template_kwargs={"enable_thinking": False},
        )
        prompts.append(await service.encode(text, False, longest_text(service.info), "documents"))
    found = await service.vectors(prompts, Pooling("labels", (yes, no)), rid, priority, "documents")
    return [label_scores(vector, True)[0] for vector in found], sum(vector.num_prompt for vector in found)
