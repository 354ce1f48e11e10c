"""Vectors of texts: OpenAI's /v1/embeddings, SGLang's /encode, Ollama's /api/embed and /api/embeddings."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from pippin.completion import new_id
from pippin.embedding import Values, encoded, longest_text, text_pooling
from pippin.errors import RequestError
from pippin.server.http import JsonResponse, off_loop, read_body, unless_gone
from pippin.server.openai import prompts
from pippin.server.protocol import Body, Int32, respell
from pippin.server.service import Service
from pippin.sglang import Arguments

# Characters of a token, on the average of a whole text, are never more.
_LONGEST_TOKEN = 64

Dimensions = Annotated[int, msgspec.Meta(ge=1)] | None


class EmbeddingRequest(Body, kw_only=True):
    """POST /v1/embeddings."""

    input: str | list[str | int | list[int]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Dimensions = None
    rid: str | None = None
    priority: Int32 = 0


class EncodeRequest(Body, kw_only=True):
    """SGLang's /encode; what ``text``, ``input_ids`` and ``rid`` may hold is checked by ``sglang.Arguments``."""

    text: Any = None
    input_ids: Any = None
    rid: Any = None
    dimensions: Dimensions = None
    priority: Int32 = 0

    neutral: ClassVar = {**Body.neutral, "sampling_params": ({},)}


class OllamaEmbedRequest(Body, kw_only=True):
    """POST /api/embed. ``truncate``: a text that is too long loses its end, instead of being refused."""

    model: str
    input: str | list[str]
    truncate: bool = True
    dimensions: Dimensions = None

    ignored: ClassVar = {
        "keep_alive": "the model stays loaded for as long as the server runs",
        "options": "none of them concerns vectors",
    }
    neutral: ClassVar = {}


class OllamaEmbeddingsRequest(Body, kw_only=True):
    """POST /api/embeddings, Ollama's older one."""

    model: str
    prompt: str

    ignored: ClassVar = OllamaEmbedRequest.ignored
    neutral: ClassVar = {}


async def embeddings(service: Service, http: Request) -> Response:
    """POST /v1/embeddings."""
    request = await read_body(http, EmbeddingRequest)
    model = service.check_model(request.model)
    try:
        texts = prompts(request.input)
    except RequestError as error:
        raise respell(error, {"prompt": "input"}) from error
    most = longest_text(service.info)
    tokens = [await service.encode(t, most=most, field="input") if isinstance(t, str) else t for t in texts]
    rid = request.rid or f"embd-{new_id()}"
    run = service.vectors(tokens, text_pooling(service.info), rid, request.priority, "input")
    found = await unless_gone(http, run)
    values = [vector.scaled(service.info.normalizes, request.dimensions) for vector in found]
    count = sum(vector.num_prompt for vector in found)
    data = [
        {"object": "embedding", "index": i, "embedding": spelled(v, request.encoding_format)}
        for i, v in enumerate(values)
    ]
    usage = {"prompt_tokens": count, "total_tokens": count}
    return JsonResponse({"object": "list", "data": data, "model": model, "usage": usage})


def spelled(values: Values, form: str) -> list[float] | str:
    """A vector as JSON: numbers, or base64 of little-endian float32."""
    if form == "base64":
        return base64.b64encode(values.astype("<f4").tobytes()).decode()
    found: list[float] = values.tolist()
    return found


async def encode(service: Service, http: Request) -> Response:
    """POST /encode: a dict for a single text, else a list of them."""
    request = await read_body(http, EncodeRequest)
    arguments = Arguments(request.text, request.input_ids, rid=request.rid)
    size = len(request.text) if isinstance(request.text, str) else 0
    tokens, single = await off_loop(size, arguments.prompts, service.tokenizer, "text", longest_text(service.info))
    rids = arguments.rids(len(tokens))
    named = "text" if request.text is not None else "input_ids"
    run = service.vectors(tokens, text_pooling(service.info), rids, request.priority, named)
    found = await unless_gone(http, run)
    answers = [encoded(v, rid, service.info, request.dimensions) for v, rid in zip(found, rids, strict=True)]
    return JsonResponse(answers[0] if single else answers)


async def ollama_embed(service: Service, http: Request) -> Response:
    """POST /api/embed."""
    request = await read_body(http, OllamaEmbedRequest)
    model, began = service.check_model(request.model), time.perf_counter_ns()
    texts = [request.input] if isinstance(request.input, str) else request.input
    found, count = await ollama_vectors(service, http, texts, request.truncate, request.dimensions, "input")
    return JsonResponse(
        {
            "model": model,
            "embeddings": found,
            "total_duration": time.perf_counter_ns() - began,
            "load_duration": 0,
            "prompt_eval_count": count,
        }
    )


async def ollama_embeddings(service: Service, http: Request) -> Response:
    """POST /api/embeddings."""
    request = await read_body(http, OllamaEmbeddingsRequest)
    service.check_model(request.model)
    found, _ = await ollama_vectors(service, http, [request.prompt], True, None, "prompt")
    return JsonResponse({"embedding": found[0]})


async def ollama_vectors(
    service: Service, http: Request, texts: Sequence[str], truncate: bool, dimensions: int | None, field: str
) -> tuple[list[list[float]], int]:
    """Each text's vector, and how many tokens they have together; no texts give none."""
    info, most = service.info, longest_text(service.info)
    if truncate:
        texts = [text[: most * _LONGEST_TOKEN] for text in texts]
        tokens = [(await service.encode(text, most=len(text) + 1))[:most] for text in texts]
    else:
        tokens = [await service.encode(text, most=most, field=field) for text in texts]
    run = service.vectors(tokens, text_pooling(info), f"embd-{new_id()}", 0, field)
    found = await unless_gone(http, run)
    values = [vector.scaled(info.normalizes, dimensions).tolist() for vector in found]
    return values, sum(vector.num_prompt for vector in found)
