"""SGLang's own endpoints: /generate, tokens to text and back, what is served, flushing and aborting."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

import pippin
from pippin.completion import Delta, new_id
from pippin.embedding import text_pooling
from pippin.errors import EngineError, RequestError
from pippin.server.http import DONE, EventStream, JsonResponse, event, next_of, off_loop, read_body, unless_gone
from pippin.server.protocol import AbortRequest, DetokenizeRequest, GenerateRequest, TokenizeRequest
from pippin.server.service import Job, Service
from pippin.sglang import Answers, Arguments
from pippin.types import SamplingParams

HEALTH_SECONDS = 20.0

LONGEST_COUNTED = 2**18
"""Tokens that /tokenize counts of a text at least, whatever the context."""

Deltas = AsyncGenerator[tuple[int, Delta], None]


async def generate(service: Service, http: Request) -> Response:
    """/generate: a dict for a single prompt with one answer, else a list of them; streamed with all text so far."""
    request = await read_body(http, GenerateRequest)
    arguments = Arguments(
        request.text,
        request.input_ids,
        request.sampling_params,
        request.return_logprob,
        request.logprob_start_len,
        request.top_logprobs_num,
        request.rid,
    )
    asked, single = await off_loop(
        num_characters(request.text), arguments.resolve, service.tokenizer, service.info, "text"
    )
    names = request.lora_path if isinstance(request.lora_path, list) else [request.lora_path] * len(asked)
    if len(names) != len(asked):
        raise RequestError(f"lora_path has {len(names)} names for {len(asked)} prompts", "lora_path")
    params = [service.adapted(one.params, None, name) for one, name in zip(asked, names, strict=True)]
    jobs = [Job(one.tokens, p, one.id, request.priority) for one, p in zip(asked, params, strict=True)]
    deltas = service.run(jobs)
    text_of = service.tokenizer.token_text if request.return_text_in_logprobs else None
    answers = [Answers(one, text_of, {"weight_version": service.weight_version}) for one in asked]
    single = single and asked[0].params.n == 1
    if request.stream:
        first = await unless_gone(http, next_of(deltas))
        return EventStream(stream(answers, single, first, deltas))
    found = await unless_gone(http, collect(answers, deltas))
    return JsonResponse(found[0] if single else found)


def num_characters(text: object) -> int:
    """How long a request's text is, one or many."""
    return len(text) if isinstance(text, str) else sum(map(num_characters, text)) if isinstance(text, list) else 0


async def collect(answers: list[Answers], deltas: Deltas) -> list[dict[str, Any]]:
    async with aclosing(deltas):
        async for number, delta in deltas:
            answers[number].add(delta)
    return [answer.as_dict() for prompt in answers for answer in prompt.each]


async def stream(
    answers: list[Answers], single: bool, first: tuple[int, Delta], deltas: Deltas
) -> AsyncGenerator[bytes, None]:
    starts = [sum(len(prompt.each) for prompt in answers[:i]) for i in range(len(answers))]

    def told(number: int, delta: Delta) -> bytes:
        answer = answers[number].add(delta).as_dict()
        return event(answer if single else answer | {"index": starts[number] + delta.index})

    async with aclosing(deltas):
        yield told(*first)
        async for number, delta in deltas:
            yield told(number, delta)
    yield DONE


async def tokenize(service: Service, http: Request) -> Response:
    """/tokenize: the tokens of a text, or of each of several."""
    request = await read_body(http, TokenizeRequest)
    service.check_model(request.model)
    texts = [request.prompt] if isinstance(request.prompt, str) else request.prompt
    most = max(service.info.context_length, LONGEST_COUNTED)
    found = [await service.encode(text, request.add_special_tokens, most) for text in texts]
    counts = [len(tokens) for tokens in found]
    single = isinstance(request.prompt, str)
    return JsonResponse(
        {
            "tokens": found[0] if single else found,
            "count": counts[0] if single else counts,
            "max_model_len": service.info.context_length,
        }
    )


async def detokenize(service: Service, http: Request) -> Response:
    """/detokenize: the text of a list of tokens, or of each of several."""
    request = await read_body(http, DetokenizeRequest)
    service.check_model(request.model)
    flat = [t for t in request.tokens if isinstance(t, int)]
    lists = [t for t in request.tokens if not isinstance(t, int)]
    if flat and lists:
        raise RequestError("tokens must be token ids, or lists of them, not both", "tokens")
    decode, skip = service.tokenizer.decode, request.skip_special_tokens
    texts = [await off_loop(len(ids), decode, ids, skip) for ids in (lists or [flat])]
    return JsonResponse({"text": texts if lists else texts[0]})


async def health(service: Service, http: Request) -> Response:
    """/health: 200 while requests are taken, also while the engine restarts and they wait; else 503 with the reason."""
    if (trouble := service.client.trouble) is not None:
        raise trouble
    return Response()


async def ready(service: Service, http: Request) -> Response:
    """/ready: 200 where a request would be taken in now, 503 with the reason where it would not."""
    if (refusal := service.admission.refusal()) is not None:
        raise refusal
    return Response()


async def health_generate(service: Service, http: Request) -> Response:
    """/health_generate: 200 if the engine really generates a token, 503 if it doesn't in time."""
    params = SamplingParams(max_new_tokens=1, temperature=0.0, ignore_eos=True)
    pooling = text_pooling(service.info) if service.info.is_embedding else None
    outputs = service.client.submit([0], params, id=f"health-{new_id()}", pooling=pooling)

    async def one_token() -> None:
        async with aclosing(outputs):
            async for _ in outputs:
                pass

    try:
        await unless_gone(http, asyncio.wait_for(one_token(), HEALTH_SECONDS))
    except TimeoutError as error:
        raise EngineError(f"the engine generated nothing in {HEALTH_SECONDS:.0f} seconds", 503) from error
    return Response()


async def model_info(service: Service, http: Request) -> Response:
    """/get_model_info"""
    info = service.info
    return JsonResponse(
        {
            "model_path": info.model_path,
            "tokenizer_path": info.tokenizer_path,
            "is_generation": not info.is_embedding,
            "model_type": info.model_type,
            "served_model_name": service.model_name,
            "context_length": info.context_length,
            "vocab_size": info.vocab_size,
            "dtype": info.dtype,
            "quantization": info.quantization,
            "weight_version": service.weight_version,
        }
    )


async def server_info(service: Service, http: Request) -> Response:
    """/get_server_info: options, what was loaded, and the engine's counts now; never the key."""
    options = dataclasses.asdict(service.config) | {"api_key": None}
    return JsonResponse(
        {
            **options,
            **msgspec.structs.asdict(service.info),
            "served_model_name": service.model_name,
            "weight_version": service.weight_version,
            "version": pippin.__version__,
            "internal_states": [msgspec.structs.asdict(service.client.stats)],
        }
    )


async def flush_cache(service: Service, http: Request) -> Response:
    """/flush_cache: empties the prefix cache; 409 while requests run."""
    flushed = await service.client.flush()
    if not flushed.ok:
        raise RequestError(flushed.message, status=409)
    return PlainTextResponse("Cache flushed.\n")


async def abort_request(service: Service, http: Request) -> Response:
    """/abort_request: ends a request by its id, or all; unknown ids are ignored, since they may just have ended."""
    request = await read_body(http, AbortRequest)
    if request.abort_all:
        service.abort_all()
    elif request.rid:
        service.abort(request.rid)
    else:
        raise RequestError("rid is required, unless abort_all is true", "rid")
    return Response()


# What SGLang, OpenAI and Ollama have and Pippin has not, and why.
NOT_HERE = {
    "this server knows no classes": ("/classify", "/v1/classify", "/v1/moderations"),
    "this server generates text; it reads and makes no sound or pictures": (
        "/v1/audio/transcriptions", "/v1/audio/translations", "/v1/audio/speech", "/v1/images/generations",
        "/v1/images/edits", "/v1/videos",
    ),
    "a server serves the model that it was started with": (
        "/api/pull", "/api/push", "/api/create", "/api/copy", "/api/delete", "/get_weights_by_name",
        "/release_memory_occupation", "/resume_memory_occupation",
    ),
    "weights come from files: /update_weights_from_disk": (
        "/update_weights_from_tensor", "/update_weights_from_distributed", "/init_weights_update_group",
    ),
    "the prefix cache keeps what requests have in common; there are no sessions to open": (
        "/open_session", "/close_session",
    ),
    "this is set when the server starts": ("/set_internal_state", "/configure_logging"),
    "files and batches are not supported; send the requests": (
        "/v1/files", "/v1/batches", "/v1/messages/batches", "/v1/uploads", "/v1/vector_stores",
    ),
    "a conversation goes on from a response, by previous_response_id": ("/v1/conversations",),
    "send the conversation as it is; what of it was computed before is found in the cache": ("/v1/responses/compact",),
    "models are trained elsewhere": ("/v1/fine_tuning/jobs",),
}  # fmt: skip


async def not_here(service: Service, http: Request) -> Response:
    """Refused, with the reason."""
    path = http.url.path
    reason = next(reason for reason, paths in NOT_HERE.items() if path in paths)
    raise RequestError(f"{path} is not supported: {reason}")


async def metrics(service: Service, http: Request) -> Response:
    """/metrics, in Prometheus' text format."""
    return Response(service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")
