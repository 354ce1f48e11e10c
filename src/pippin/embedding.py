"""Vectors of texts and scores of pairs, from token ids: what the server's routes and ``Engine`` share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pippin.errors import RequestError
from pippin.messages import ModelInfo, Output
from pippin.types import Pooling, SamplingParams

Values = npt.NDArray[np.float32]

PARAMS = SamplingParams(temperature=0.0, max_new_tokens=1)
ABORTED = 499


class Client(Protocol):
    """What is asked of an EngineClient."""

    @property
    def info(self) -> ModelInfo: ...

    @property
    def submit(self) -> Callable[..., AsyncIterator[Output]]: ...


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, what is asked of them, and the engine's id for it."""

    tokens: Sequence[int]
    pooling: Pooling
    id: str


@dataclass(frozen=True, slots=True)
class Vector:
    """What a prompt gave: float32 [n], as the model computed it, and how many of its tokens the cache had."""

    values: Values
    num_prompt: int
    num_cached: int

    def scaled(self, normalize: bool, dimensions: int | None = None) -> Values:
        """The first ``dimensions`` values, scaled to length 1 where asked, and wherever some were cut off.

        Raises RequestError if there are fewer.
        """
        found = self.values
        if dimensions is not None and dimensions > len(found):
            raise RequestError(f"dimensions is at most {len(found)} for this model, not {dimensions}", "dimensions")
        cut = dimensions is not None and dimensions < len(found)
        return unit(found[:dimensions]) if normalize or cut else found


def unit(values: Values) -> Values:
    """Scaled to length 1; zeros stay zeros."""
    return values / np.float32(max(float(np.linalg.norm(values)), 1e-12))


def text_pooling(info: ModelInfo) -> Pooling:
    """How the served model makes a vector of a text."""
    return Pooling("mean" if info.pooling == "mean" else "last")


def longest_text(info: ModelInfo) -> int:
    """Tokens that a text may have at most."""
    return min(info.context_length, info.max_total_tokens)


def at_most(count: int, info: ModelInfo) -> int:
    """How many of ``count`` prompts are with the engine at a time: enough to fill its steps."""
    return max(1, min(count, 2 * info.max_running_requests))


def check_tokens(tokens: Sequence[int], info: ModelInfo, field: str) -> None:
    """Raises RequestError for a prompt that gives no vector; ``field`` is what the client calls it."""
    if not tokens:
        raise RequestError("the text is empty; a vector needs at least one token", field)
    if any(not 0 <= t < info.vocab_size for t in tokens):
        raise RequestError(f"token ids must be between 0 and {info.vocab_size - 1}", field)
    most = longest_text(info)
    if len(tokens) > most:
        raise RequestError(f"the text has {len(tokens)} tokens, and at most {most} fit; shorten it", field)


async def vectors_of(client: Client, prompts: Sequence[Prompt], priority: int = 0) -> list[Vector]:
    """Each prompt's vector. They run together, as many as ``at_most`` says at a time.

    If one fails, or this is cancelled, the others are aborted.
    """
    places = asyncio.Semaphore(at_most(len(prompts), client.info))

    async def one(prompt: Prompt) -> Vector:
        async with places:
            return await _vector_of(client, prompt, priority)

    tasks = [asyncio.create_task(one(prompt)) for prompt in prompts]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _vector_of(client: Client, prompt: Prompt, priority: int) -> Vector:
    outputs: Any = client.submit(prompt.tokens, PARAMS, priority=priority, id=prompt.id, pooling=prompt.pooling)
    async with aclosing(outputs):
        async for output in outputs:
            if output.finish is not None and output.finish.reason != "abort":
                values = np.frombuffer(output.pooled, "<f4")
                return Vector(values, len(prompt.tokens), output.num_cached)
    raise RequestError("the request was aborted", "rid", ABORTED)


def encoded(vector: Vector, id: str, info: ModelInfo, dimensions: int | None = None) -> dict[str, Any]:
    """A vector as SGLang's /encode and ``Engine.encode`` give it."""
    return {
        "embedding": vector.scaled(info.normalizes, dimensions).tolist(),
        "meta_info": {
            "id": id,
            "finish_reason": {"type": "stop", "matched": None},
            "prompt_tokens": vector.num_prompt,
            "cached_tokens": vector.num_cached,
        },
    }


def label_scores(vector: Vector, softmax: bool) -> list[float]:
    """Probabilities of a prompt's labels as its next token; with ``softmax``, among each other."""
    odds = np.exp(vector.values - (vector.values.max() if softmax else 0))
    found: list[float] = (odds / odds.sum() if softmax else odds).tolist()
    return found


def similarity(a: Vector, b: Vector) -> float:
    """The cosine of the angle between two vectors."""
    return float(unit(a.values) @ unit(b.values))
