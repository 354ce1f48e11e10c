"""What the routes of every dialect share: the engine's client, the text layer, names and metrics."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, aclosing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import msgspec

from pippin.client import EngineClient
from pippin.completion import Client, Delta, answer_ids, check_prompt, complete, longest_prompt, merge
from pippin.config import ServerConfig
from pippin.embedding import Prompt, Vector, at_most, check_tokens, vectors_of
from pippin.errors import RequestError
from pippin.messages import ModelInfo
from pippin.server.admission import Admission, in_seconds, in_time
from pippin.server.history import History
from pippin.server.http import off_loop
from pippin.server.metrics import Metrics
from pippin.server.request_log import RequestLog
from pippin.server.store import Store
from pippin.text.chat import ChatTemplate
from pippin.text.reply import Speech
from pippin.text.tokenizer import Tokenizer
from pippin.types import Pooling, SamplingParams

if TYPE_CHECKING:
    from pippin.server.weights import Weights

Held = AbstractContextManager[None]

Track = AbstractContextManager[Callable[[Delta], None]]
"""Gives what is to be told of each delta; how the block ends, and when, is how the request did."""


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt and how to go on from it.

    ``rid`` is the client's name for the whole request. ``shown`` are special tokens that its text is to have;
    ``client`` stands in for the service's own.
    """

    tokens: list[int]
    params: SamplingParams
    rid: str
    priority: int = 0
    shown: frozenset[int] = frozenset()
    client: Client | None = None


def encode(tokenizer: Tokenizer, text: str, add_special_tokens: bool, most: int, field: str) -> list[int]:
    tokenizer.check_length(text, most, field)
    return tokenizer.encode(text, add_special_tokens)


@dataclass
class Service:
    """Ready parts, given once; the routes hold no other state."""

    client: EngineClient
    tokenizer: Tokenizer
    chat: ChatTemplate
    config: ServerConfig
    weights: Weights | None = None
    weight_version: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    running: dict[str, list[str]] = field(default_factory=dict)
    responses: Store = field(default_factory=Store)
    history: History = field(default_factory=History)

    def __post_init__(self) -> None:
        self.weight_version = self.weight_version or self.config.weight_version

    @cached_property
    def speech(self) -> Speech:
        """The formats of calls and reasoning that the served model writes."""
        return self.speech_of(self.tokenizer, self.chat)

    def speech_of(self, tokenizer: Tokenizer, chat: ChatTemplate) -> Speech:
        """Those of another model. Raises ConfigError where the parsers that were asked for don't go with it."""
        return Speech.of(tokenizer, chat.known(), self.config.tool_call_parser, self.config.reasoning_parser)

    def change_text(self, tokenizer: Tokenizer, chat: ChatTemplate, version: str | None) -> None:
        """Another model is served, in which no request is yet: its text layer, and the version of its weights."""
        self.tokenizer, self.chat = tokenizer, chat
        self.weight_version = version or self.weight_version
        for made in ("speech", "request_log"):
            vars(self).pop(made, None)
        self.metrics.rename(self.model_name)

    @cached_property
    def admission(self) -> Admission:
        return Admission(self.client, self.config)

    @cached_property
    def request_log(self) -> RequestLog | None:
        config = self.config
        return RequestLog(self.tokenizer, config.log_requests_level) if config.log_requests else None

    @cached_property
    def metrics(self) -> Metrics:
        return Metrics(self.client, self.model_name)

    @property
    def info(self) -> ModelInfo:
        return self.client.info

    @property
    def model_name(self) -> str:
        return self.config.served_model_name or self.info.model_path

    def check_model(self, model: str | None) -> str:
        """The name to answer with. Raises RequestError (404) for another model's if names are strict."""
        if self.config.strict_model_name and model not in (None, self.model_name) and not self.adapter_of(model):
            raise RequestError(f"there is no model {model!r} here; this is {self.model_name!r}", "model", 404)
        return model or self.model_name

    async def encode(
        self, text: str, add_special_tokens: bool = True, most: int | None = None, field: str = "prompt"
    ) -> list[int]:
        """The tokens of a prompt, which may be long. Raises RequestError for one that is too long by far."""
        return await off_loop(
            len(text), encode, self.tokenizer, text, add_special_tokens, most or longest_prompt(self.info), field
        )

    def adapter_of(self, model: str | None) -> str | None:
        """The LoRA adapter that a model's name asks for: by its own, or behind the model's (``base:adapter``).

        Raises RequestError (404) for one behind the model's name that isn't there.
        """
        if model is None or model == self.model_name:
            return None
        base, _, name = model.rpartition(":")
        if base == self.model_name and name not in self.client.adapters:
            raise RequestError(f"there is no LoRA adapter {name!r} here", "model", 404)
        return next((n for n in (model, name) if n in self.client.adapters), None)

    def adapted(self, params: SamplingParams, model: str | None, lora_path: str | None = None) -> SamplingParams:
        """With the LoRA adapter that a request asks for, by SGLang's field or by the model's name.

        Raises RequestError (404) if it isn't loaded.
        """
        if lora_path is not None and lora_path not in self.client.adapters:
            raise RequestError(f"there is no LoRA adapter {lora_path!r} here", "lora_path", 404)
        name = lora_path or self.adapter_of(model)
        return params if name is None else msgspec.structs.replace(params, lora_path=name)

    def job(self, tokens: list[int], params: SamplingParams, rid: str, priority: int, field: str) -> Job:
        """A checked job. Raises RequestError if the prompt doesn't fit."""
        return Job(tokens, check_prompt(tokens, params, self.info, field), rid, priority)

    def run(self, jobs: Sequence[Job], rid: str | None = None) -> AsyncGenerator[tuple[int, Delta], None]:
        """Deltas of all jobs as they come, each with its job's number. Closing it aborts what is unfinished.

        ``rid`` names them all, if their own ids don't.
        """
        held = self._held(jobs, rid)
        deltas = self._one(0, jobs[0], held) if len(jobs) == 1 else self._several(jobs, held)
        limit = self.config.request_timeout
        return deltas if limit is None else in_time(deltas, limit)

    @contextmanager
    def _held(self, jobs: Sequence[Job], rid: str | None) -> Iterator[None]:
        """While this lasts, the jobs have been taken in. Raises EngineError or RequestError if they can't be."""
        ids = {job.rid: answer_ids(job.rid, job.params.n) for job in jobs}
        if rid is not None:
            ids[rid] = [id for part in ids.values() for id in part]
        sizes = [len(job.tokens) for job in jobs]
        with self.admission.admit(sum(job.params.n for job in jobs), sizes), self._named(ids):
            yield

    async def _several(self, jobs: Sequence[Job], held: Held) -> AsyncGenerator[tuple[int, Delta], None]:
        with held:
            async with aclosing(merge([self._one(i, job, nullcontext()) for i, job in enumerate(jobs)])) as deltas:
                async for delta in deltas:
                    yield delta

    async def vectors(
        self, prompts: Sequence[list[int]], pooling: Pooling, rid: str | Sequence[str], priority: int, field: str
    ) -> list[Vector]:
        """A vector for each prompt; ``rid`` names them all, or each. Raises RequestError for one that won't do."""
        for tokens in prompts:
            check_tokens(tokens, self.info, field)
        if isinstance(rid, str):
            ids = answer_ids(rid, len(prompts))
            names = {rid: ids}
        else:
            ids = list(rid)
            names = {id: [id] for id in ids}
        at_once, sizes = at_most(len(prompts), self.info), [len(tokens) for tokens in prompts]
        with self.admission.admit(at_once, sizes), self._named(names):
            asked = [Prompt(tokens, pooling, id) for tokens, id in zip(prompts, ids, strict=True)]
            return await in_seconds(vectors_of(self.client, asked, priority), self.config.request_timeout)

    @contextmanager
    def _named(self, ids: dict[str, list[str]]) -> Iterator[None]:
        """While this lasts, requests can be aborted by name. Raises RequestError if a name is in use."""
        for name in ids.keys() & self.running.keys():
            raise RequestError(f"request id {name!r} is in use by a request that has not ended", "rid")
        self.running |= ids
        try:
            yield
        finally:
            for name in ids:
                del self.running[name]

    async def _one(self, number: int, job: Job, held: Held) -> AsyncGenerator[tuple[int, Delta], None]:
        with held, ExitStack() as stack:
            notes = [stack.enter_context(track) for track in self._tracks(job)]
            async with aclosing(self._answers(job)) as deltas:
                async for delta in deltas:
                    for note in notes:
                        note(delta)
                    yield number, delta

    def _answers(self, job: Job) -> AsyncGenerator[Delta, None]:
        return complete(
            job.client or self.client,
            self.tokenizer,
            job.tokens,
            job.params,
            job.priority,
            job.rid,
            self.client.draw_seed,
            job.shown,
        )

    def _tracks(self, job: Job) -> list[Track]:
        """Whoever wants to know of a job's deltas."""
        n, log = job.params.n, self.request_log
        tracks: list[Track] = [self.metrics.track(n), self.history.track(job.rid, len(job.tokens), n)]
        return tracks if log is None else [*tracks, log.track(job.rid, job.tokens, job.params)]

    def abort(self, rid: str) -> None:
        """End a request, by the id that its client gave it or was told. Unknown ids are ignored."""
        for id in self.running.get(rid, ()):
            self.client.abort(id)

    def abort_all(self) -> None:
        for id in self.client.live:
            self.client.abort(id)
