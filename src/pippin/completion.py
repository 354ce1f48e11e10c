"""A prompt's tokens to streamed text: the one place between tokens and text.

The server's routes and ``Engine`` both stand on ``complete``. The engine knows neither text nor ``n``: it gets one
request per answer, and stop strings are found here.
"""

from __future__ import annotations

import asyncio
import secrets
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol, TypeVar

import msgspec

from pippin.errors import RequestError
from pippin.messages import ModelInfo, Output
from pippin.profile.timeline import DETOKENIZING, Timeline
from pippin.text.detokenizer import NONE, TextStream
from pippin.text.stops import StopAutomaton
from pippin.text.tokenizer import Tokenizer
from pippin.types import CacheMiss, Finish, SamplingParams, TokenLogprob

T = TypeVar("T")


class Client(Protocol):
    """What completion asks of an EngineClient."""

    @property
    def info(self) -> ModelInfo: ...

    @property
    def timeline(self) -> Timeline | None: ...

    def submit(
        self, tokens: Sequence[int], params: SamplingParams, priority: int = 0, id: str | None = None
    ) -> AsyncGenerator[Output, None]:
        """Closing it aborts the request, if it is in the engine."""
        ...

    def abort(self, id: str) -> None: ...


class Delta(msgspec.Struct, frozen=True):
    """What one step added to answer ``index`` of a request.

    ``text`` may be empty while ``tokens`` are not (half a character, or what may become a stop string). Tokens after
    the one that completed a stop string appear nowhere. ``logprobs`` align with ``tokens`` if they were asked for;
    ``prompt_logprobs`` come once, with answer 0. ``waited`` counts seconds in the engine's queue. The last Delta of
    each answer has ``finish``.
    """

    index: int
    text: str
    tokens: list[int] = []
    logprobs: list[TokenLogprob] = []
    prompt_logprobs: list[TokenLogprob] = []
    num_prompt: int = 0
    num_cached: int = 0
    finish: Finish | None = None
    miss: CacheMiss | None = None
    waited: float = 0.0


def unanswered(delta: Delta) -> Delta:
    """The delta of a request that asks for no tokens, of which the engine draws one: without that."""
    ended = delta.finish is not None and delta.finish.reason == "stop"
    finish = Finish("length") if ended else delta.finish
    return msgspec.structs.replace(delta, text="", tokens=[], logprobs=[], finish=finish)


def check_prompt(
    tokens: Sequence[int], params: SamplingParams, info: ModelInfo, field: str = "prompt"
) -> SamplingParams:
    """Raises RequestError for a prompt that can't be served; else params that fit the context.

    ``max_new_tokens`` beyond the room that the prompt leaves is cut to it: the answer then ends with ``length``.
    """
    if not tokens:
        raise RequestError("the prompt is empty", field)
    if any(not 0 <= t < info.vocab_size for t in tokens):
        raise RequestError(f"token ids must be between 0 and {info.vocab_size - 1}", field)
    for name, ids in (("stop_token_ids", params.stop_token_ids), ("logit_bias", params.logit_bias)):
        if any(not 0 <= t < info.vocab_size for t in ids):
            raise RequestError(f"{name} must name tokens between 0 and {info.vocab_size - 1}", name)
    most = longest_prompt(info) + 1
    room = most - len(tokens)
    if room < 1:
        limit = "the context" if most == info.context_length else "the KV store (--max-total-tokens)"
        raise RequestError(
            f"the prompt has {len(tokens)} tokens, but {limit} holds {most} and the answer needs at least one", field
        )
    if params.max_new_tokens <= room:
        return params
    return msgspec.structs.replace(params, max_new_tokens=room, min_new_tokens=min(params.min_new_tokens, room))


def longest_prompt(info: ModelInfo) -> int:
    """Tokens that a prompt may have at most, so that one of an answer has room."""
    return min(info.context_length, info.max_total_tokens) - 1


def answer_ids(rid: str, n: int) -> list[str]:
    """The engine's ids of a request's answers: abort each to abort the request."""
    return [rid] if n == 1 else [f"{rid}-{i}" for i in range(n)]


def new_id() -> str:
    return uuid.uuid4().hex


def complete(
    client: Client,
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    params: SamplingParams,
    priority: int = 0,
    rid: str | None = None,
    draw_seed: Callable[[], int] = lambda: secrets.randbits(63),
    shown: frozenset[int] = NONE,
) -> AsyncGenerator[Delta, None]:
    """Streams ``params.n`` answers to a prompt, as they come, told apart by ``Delta.index``.

    Answer i is drawn with ``seed + i``; without a seed, ``draw_seed`` gives one, so that answers differ and yet each
    is reproducible. The tokenizer's own end-of-text ends an answer too, unless ``ignore_eos``, and so does a stop
    string that is a special token's name, which skipped text would never show. ``shown`` are special tokens that the
    text has even if others are skipped: a parser's markers. Closing the generator (use
    ``aclosing``) aborts what is unfinished. Call ``check_prompt`` first.
    """
    seed = draw_seed() if params.seed is None else params.seed
    stops = StopAutomaton(params.stop) if params.stop else None
    named = {token: stop for stop in params.stop if (token := tokenizer.special_id(stop)) is not None}
    ends = _ends(params, {*named, *(() if params.ignore_eos else tokenizer.eos_ids)}, client.info)
    answers = []
    for i, id in enumerate(answer_ids(rid or new_id(), params.n)):
        one = msgspec.structs.replace(
            params,
            n=1,
            seed=_nth_seed(seed, i),
            prompt_logprobs=params.prompt_logprobs and i == 0,
            stop_token_ids=ends,
        )
        stream = TextStream(tokenizer, one, stops, shown)
        answers.append(_answer(client, _Answer(i, stream, one, len(tokens), named), tokens, priority, id))
    return answers[0] if len(answers) == 1 else merge(answers)


def _ends(params: SamplingParams, more: set[int], info: ModelInfo) -> tuple[int, ...]:
    """``stop_token_ids``, with those of the text layer that the model can draw and does not end at anyway."""
    known = {*params.stop_token_ids, *(() if params.ignore_eos else info.eos_token_ids)}
    return (*params.stop_token_ids, *sorted(t for t in more - known if t < info.vocab_size))


def _nth_seed(seed: int, i: int) -> int:
    return seed + i if seed + i < 2**64 else seed + i - 2**64


@dataclass(frozen=True, slots=True)
class _Answer:
    """One answer in the making: its number, its text, and the stop strings that are tokens."""

    index: int
    stream: TextStream
    params: SamplingParams
    num_prompt: int
    named: Mapping[int, str]

    def delta(self, output: Output) -> Delta:
        """What an Output adds; with a finish of its own if a stop string was completed."""
        finish, tokens = output.finish, output.tokens
        # The token that ended the answer is counted and reported, but it is no text.
        ended = finish is not None and finish.reason == "stop" and bool(tokens) and finish.matched == tokens[-1]
        piece = self.stream.push(tokens[:-1] if ended and not self.params.no_stop_trim else tokens)
        text, matched = piece.text, piece.matched
        if matched is not None:
            tokens = tokens[: piece.num_tokens]
        elif finish is not None:
            rest = self.stream.finish()
            text, matched = text + rest.text, rest.matched or (self.named.get(tokens[-1]) if ended else None)
        return Delta(
            self.index,
            text,
            tokens,
            output.logprobs and output.logprobs[: len(tokens)],
            output.prompt_logprobs,
            self.num_prompt,
            output.num_cached,
            finish if matched is None else Finish("stop", matched),
            output.miss,
            output.waited,
        )


async def _answer(
    client: Client, answer: _Answer, tokens: Sequence[int], priority: int, id: str
) -> AsyncGenerator[Delta, None]:
    # Closing is what aborts: the id may be of somebody else's request, as whose this one was refused.
    async with aclosing(client.submit(tokens, answer.params, priority=priority, id=id)) as outputs:
        async for output in outputs:
            timeline = client.timeline
            if timeline is None:
                delta = answer.delta(output)
            else:
                delta = timeline.timed(DETOKENIZING, "detokenize", answer.delta, output)
            if delta.finish is not None and output.finish is None:
                client.abort(id)  # a stop string: the engine does not know yet
            yield delta
            if delta.finish is not None:
                return


async def merge(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """All streams' items as they come. Closing it, or an error in one, closes all."""
    queue: asyncio.Queue[T | BaseException | None] = asyncio.Queue()

    async def drain(stream: AsyncGenerator[T, None]) -> None:
        try:
            async with aclosing(stream):
                async for delta in stream:
                    queue.put_nowait(delta)
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(drain(stream)) for stream in streams]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
