"""``Engine``: generate from Python, without a server. Names and shapes are those of SGLang's offline Engine."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import dataclasses
import difflib
import pkgutil
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from itertools import accumulate
from queue import SimpleQueue
from random import Random
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec

from pippin.client import EngineClient
from pippin.completion import Delta, complete, merge
from pippin.config import EngineConfig
from pippin.embedding import Prompt, Vector, check_tokens, encoded, longest_text, text_pooling, vectors_of
from pippin.errors import ConfigError, EngineError, ModelError, RequestError
from pippin.exchange import Door, config_for
from pippin.handover import hand_over
from pippin.messages import ModelInfo, Progress
from pippin.preflight import check
from pippin.profile.control import ProfileOptions
from pippin.sglang import Answers, Arguments, Asked
from pippin.text.chat import ChatTemplate, Message, read_template
from pippin.text.tokenizer import Tokenizer, load_tokenizer
from pippin.worker import CORE, Core, Load

T = TypeVar("T")
Answered = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """What one call asks for; ``single`` if it was for one prompt. ``model``: as ``Door`` counts them."""

    asked: list[Asked]
    single: bool
    priority: int
    model: int


class Engine:
    """A model in this process, its engine in a thread of its own.

    ``model_path`` is a directory or hub id, the shipped demo model if None. ``chat_template`` is a file for ``chat``.
    ``progress`` is called, in another thread, while the model loads. The options are the fields of ``EngineConfig``.
    Raises ModelError or ConfigError if the model can't be served.

    Usable from any thread, and where an event loop runs already (Jupyter). Use it as a context manager, or call
    ``shutdown``.
    """

    def __init__(
        self,
        model_path: str | None = None,
        *,
        chat_template: str | None = None,
        progress: Callable[[Progress], None] | None = None,
        **options: Any,
    ) -> None:
        config = _config(model_path, options)
        template = read_template(chat_template) if chat_template is not None else None

        def load_of(config: EngineConfig) -> Load:
            def load(tell: Callable[[Progress], None]) -> Core:
                def hear(event: Progress) -> None:
                    if not self._open:  # Ctrl-C while loading
                        raise EngineError("the engine was shut down while it loaded", 503)
                    (progress or tell)(event)

                core: Core = pkgutil.resolve_name(CORE)(config, hear)
                return core

            return load

        self._begin(EngineClient.in_thread(load_of(config), config.random_seed, load_of), config, template)

    @classmethod
    def over(cls, client: EngineClient, tokenizer: Tokenizer, config: EngineConfig | None = None) -> Self:
        """An Engine of ready parts; ``client`` is not started yet."""
        engine = cls.__new__(cls)
        engine._begin(client, config or EngineConfig(), None, tokenizer)
        return engine

    def _begin(
        self, client: EngineClient, config: EngineConfig, template: str | None, tokenizer: Tokenizer | None = None
    ) -> None:
        self.config = self._started = config
        self._client = client
        self._template = template
        self._door = Door()
        self._updating = asyncio.Lock()
        self._seeds = Random(config.random_seed)
        self._open = True
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="pippin-loop", daemon=True)
        self._thread.start()
        atexit.register(self.shutdown)  # a thread that computes while the interpreter ends would crash it
        try:
            self.info: ModelInfo = self._wait(client.start())
            self.tokenizer = tokenizer or _read_tokenizer(self.info.tokenizer_path, config)
        except BaseException:
            self.shutdown()
            raise
        self._chat = ChatTemplate(self.tokenizer, template)

    # --- generate ---

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        return_logprob: bool | Sequence[bool] = False,
        logprob_start_len: int | Sequence[int] | None = None,
        top_logprobs_num: int | Sequence[int] | None = None,
        rid: str | Sequence[str] | None = None,
        stream: bool = False,
        priority: int = 0,
    ) -> Any:
        """A dict for one prompt, a list of dicts for a list of them (or ``n`` > 1); with ``stream``, an iterator.

        Each dict is ``{"text", "output_ids", "meta_info": {"id", "finish_reason", "prompt_tokens",
        "completion_tokens", "cached_tokens", …}}``. Streamed dicts hold all text so far, and if there is more than one
        answer, ``index``: the place in the list that would be returned without ``stream``.
        Raises RequestError that names the argument or key.
        """
        arguments = Arguments(
            prompt, input_ids, sampling_params, return_logprob, logprob_start_len, top_logprobs_num, rid
        )
        self._door.wait()
        call = self._prepared(arguments, priority)
        return self._iterate(call) if stream else self._wait(self._collect(call))

    async def async_generate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        return_logprob: bool | Sequence[bool] = False,
        logprob_start_len: int | Sequence[int] | None = None,
        top_logprobs_num: int | Sequence[int] | None = None,
        rid: str | Sequence[str] | None = None,
        stream: bool = False,
        priority: int = 0,
    ) -> Any:
        """``generate`` for a running event loop: awaiting gives the same, or with ``stream`` an async iterator.

        Cancelling the task, or closing the iterator, aborts the request.
        """
        arguments = Arguments(
            prompt, input_ids, sampling_params, return_logprob, logprob_start_len, top_logprobs_num, rid
        )
        if not self._door.is_open:
            await asyncio.to_thread(self._door.wait)
        call = self._prepared(arguments, priority)
        if stream:
            return self._iterate_async(call)
        return await asyncio.wrap_future(self._call(self._collect(call), Future()))

    def chat(
        self,
        messages: Sequence[Message],
        sampling_params: Mapping[str, Any] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        stream: bool = False,
    ) -> Any:
        """``generate`` for a conversation, rendered with the model's chat template."""
        self._door.wait()
        tokens = self._chat.encode(messages, tools=tools, chat_template_kwargs=chat_template_kwargs)
        return self.generate(input_ids=tokens, sampling_params=sampling_params, stream=stream)

    def _prepared(self, arguments: Arguments, priority: int) -> Call:
        model = self._door.model  # looked at first: what is prepared for a model that goes is told so
        asked, single = arguments.resolve(self.tokenizer, self.info)
        return Call(asked, single, priority, model)

    async def _deltas(self, call: Call) -> AsyncGenerator[tuple[int, Delta], None]:
        """All prompts' deltas as they come, each with its prompt's number."""
        async with aclosing(merge([self._numbered(i, one, call) for i, one in enumerate(call.asked)])) as merged:
            async for numbered in merged:
                yield numbered

    async def _numbered(self, i: int, asked: Asked, call: Call) -> AsyncGenerator[tuple[int, Delta], None]:
        async with aclosing(self._complete(asked, call)) as deltas:
            async for delta in deltas:
                yield i, delta

    async def _collect(self, call: Call) -> Any:
        tasks = [asyncio.create_task(self._collect_one(one, call)) for one in call.asked]
        try:
            found = [answer for answers in await asyncio.gather(*tasks) for answer in answers]
        finally:
            for task in tasks:
                task.cancel()
        return found[0] if call.single and len(found) == 1 else found

    async def _collect_one(self, asked: Asked, call: Call) -> list[Answered]:
        answers = Answers(asked)
        async with aclosing(self._complete(asked, call)) as deltas:
            async for delta in deltas:
                answers.add(delta)
        return [answer.as_dict() for answer in answers.each]

    async def _complete(self, asked: Asked, call: Call) -> AsyncGenerator[Delta, None]:
        async with self._door.inside(call.model):
            deltas = complete(
                self._client,
                self.tokenizer,
                asked.tokens,
                asked.params,
                call.priority,
                asked.id,
                lambda: self._seeds.getrandbits(63),
            )
            async with aclosing(deltas):
                async for delta in deltas:
                    yield delta

    # --- encode ---

    def encode(
        self,
        prompt: str | Sequence[str] | None = None,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        rid: str | Sequence[str] | None = None,
        dimensions: int | None = None,
        priority: int = 0,
    ) -> Any:
        """The vector of a text, as ``{"embedding": [...], "meta_info": {...}}``; a list of these for several.

        Raises RequestError that names the argument.
        """
        self._door.wait()
        arguments, model = Arguments(prompt, input_ids, rid=rid), self._door.model
        tokens, single = arguments.prompts(self.tokenizer, "prompt", longest_text(self.info))
        for one in tokens:
            check_tokens(one, self.info, "prompt" if prompt is not None else "input_ids")
        asked = [
            Prompt(one, text_pooling(self.info), id)
            for one, id in zip(tokens, arguments.rids(len(tokens)), strict=True)
        ]
        found = self._wait(self._vectors(asked, priority, model))
        answers = [encoded(v, one.id, self.info, dimensions) for v, one in zip(found, asked, strict=True)]
        return answers[0] if single else answers

    async def _vectors(self, asked: list[Prompt], priority: int, model: int) -> list[Vector]:
        async with self._door.inside(model):
            return await vectors_of(self._client, asked, priority)

    # --- another model ---

    def update_weights_from_disk(self, model_path: str, load_format: str | None = None) -> tuple[bool, str, int]:
        """Serves the weights at ``model_path`` from here on, of the same model or of another; SGLang's method.

        Gives whether that went well, why not, and how many calls waited. What runs is finished first, and calls that
        come meanwhile wait. There is memory for one model: the one that is served ends first, and is loaded again
        where the other can't be. Options are those of the start; a tokenizer stays where the directory has none.
        Raises RequestError that names the argument, or another PippinError if neither can be served.
        """
        if load_format not in (None, "auto", "safetensors"):
            raise RequestError(f"must be auto or safetensors, not {load_format!r}", "load_format")
        if not model_path:
            raise RequestError("must name a directory or a hub id", "model_path")
        return self._wait(self._update(model_path))

    async def _update(self, path: str) -> tuple[bool, str, int]:
        if self._updating.locked():
            raise RequestError("the model is being replaced already; try again when that is done", "model_path", 409)
        async with self._updating:
            config = config_for(self._started, self.info, self._client.adapters, path)
            try:
                await check(config)
                tokenizer = await asyncio.to_thread(_read_tokenizer, config.tokenizer_path or path, config)
                async with self._door.alone():
                    swap = asyncio.create_task(self._swap(config, tokenizer))
                    try:
                        await asyncio.shield(swap)
                    finally:
                        await asyncio.wait([swap])
            except (ModelError, ConfigError, EngineError) as error:
                if self._client.trouble is not None:
                    raise
                return False, f"{str(error).rstrip('.')}; {self.info.model_path} is served on", self._door.waited
            return True, f"{self.info.model_path} is served now", self._door.waited

    async def _swap(self, config: EngineConfig, tokenizer: Tokenizer) -> None:
        self.info = await self._client.replace(config)
        self.config, self.tokenizer = config, tokenizer
        self._chat = ChatTemplate(tokenizer, self._template)
        self._door.model += 1

    # --- the rest ---

    def flush_cache(self) -> bool:
        """Empty the prefix cache; False if requests run."""
        return self._wait(self._client.flush()).ok

    def start_profile(
        self,
        output_dir: str | None = None,
        num_steps: int | None = None,
        start_step: int | None = None,
        profile_by_stage: bool = False,
        profile_id: str | None = None,
        activities: Sequence[str] | None = None,
    ) -> list[str]:
        """Record a timeline until ``stop_profile``, or for ``num_steps``; the files that it will be written to.

        The arguments are those of /start_profile (docs/profiling.md). Raises RequestError that names the argument.
        """
        options = ProfileOptions(
            output_dir=output_dir,
            num_steps=num_steps,
            start_step=start_step,
            profile_by_stage=profile_by_stage,
            profile_id=profile_id,
            activities=None if activities is None else list(activities),
        )
        return [str(path) for path in self._wait(self._client.profiler.start(options))]

    def stop_profile(self) -> list[str]:
        """End the profile; its files, complete. Raises RequestError if none runs."""
        return [str(path) for path in self._wait(self._client.profiler.stop())]

    def get_server_info(self) -> dict[str, Any]:
        """Options, what was loaded, and the engine's counts now, in one dict."""
        return {
            **dataclasses.asdict(self.config),
            **msgspec.structs.asdict(self.info),
            **msgspec.structs.asdict(self._client.stats),
        }

    def shutdown(self) -> None:
        """End the engine; requests that still run fail with EngineError. A second call does nothing."""
        with self._lock:
            if not self._open:
                return
            self._open = False
        atexit.unregister(self.shutdown)
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        await self._client.close()
        # What was waiting for tokens has its error now, and must pass it on before the loop stops.
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*rest, return_exceptions=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()

    # --- between the caller's thread and the loop's ---

    def _call(self, work: Coroutine[Any, Any, T], future: Future[T]) -> Future[T]:
        """Begins the work, of which the future hears; cancelling it ends the work."""
        with self._lock:  # between the question and the answer the loop must not stop
            if self._open:
                hand_over(work, self._loop, future)
                return future
        work.close()
        raise EngineError("the engine was shut down", 503)

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        future = Future[T]()
        try:
            return self._call(work, future).result()
        except BaseException:
            future.cancel()  # Ctrl-C while waiting: the request must not run on
            raise

    def _iterate(self, call: Call) -> Generator[Answered, None, None]:
        box: SimpleQueue[tuple[int, Delta] | None] = SimpleQueue()
        future = Future[None]()
        so_far = SoFar(call.asked, call.single)
        item: tuple[int, Delta] | None = None
        try:
            self._call(_pump(self._deltas(call), box.put), future)
            while (item := box.get()) is not None:
                yield so_far.add(*item)
            future.result()
        finally:
            future.cancel()
            while item is not None:  # its slots are being freed; wait for that
                item = box.get()

    async def _iterate_async(self, call: Call) -> AsyncGenerator[Answered, None]:
        loop = asyncio.get_running_loop()
        box: asyncio.Queue[tuple[int, Delta] | None] = asyncio.Queue()
        future = Future[None]()
        so_far = SoFar(call.asked, call.single)
        try:
            self._call(_pump(self._deltas(call), lambda item: _call_in(loop, box.put_nowait, item)), future)
            while (item := await box.get()) is not None:
                yield so_far.add(*item)
            await asyncio.wrap_future(future)
        finally:
            future.cancel()


class SoFar:
    """Deltas of several prompts to the dicts that a stream yields."""

    def __init__(self, asked: Sequence[Asked], single: bool) -> None:
        self._answers = [Answers(one) for one in asked]
        self._first = list(accumulate((one.params.n for one in asked), initial=0))
        self._alone = single and asked[0].params.n == 1

    def add(self, i: int, delta: Delta) -> Answered:
        answer = self._answers[i].add(delta).as_dict()
        return answer if self._alone else answer | {"index": self._first[i] + delta.index}


async def _pump(stream: AsyncGenerator[T, None], put: Callable[[T | None], None]) -> None:
    """Hands a stream's items to another thread, and None at its end, however it ends."""
    try:
        async with aclosing(stream):
            async for item in stream:
                put(item)
    finally:
        put(None)


def _call_in(loop: asyncio.AbstractEventLoop, function: Callable[[T], None], item: T) -> None:
    with contextlib.suppress(RuntimeError):  # the caller's loop is closed: nobody waits any more
        loop.call_soon_threadsafe(function, item)


def _read_tokenizer(path: str, config: EngineConfig) -> Tokenizer:
    return load_tokenizer(path, revision=config.revision, trust_remote_code=config.trust_remote_code)


def _config(model_path: str | None, options: dict[str, Any]) -> EngineConfig:
    names = [f.name for f in dataclasses.fields(EngineConfig)]
    for name in options:
        if name not in names:
            close = difflib.get_close_matches(name, names, 1)
            raise ConfigError("there is no such option" + (f"; did you mean {close[0]}?" if close else ""), name)
    try:
        return msgspec.convert({"model_path": model_path, **options}, EngineConfig)
    except msgspec.ValidationError as error:
        said, _, where = str(error).partition(" - at `$.")
        raise ConfigError(said, where.rstrip("`") or None) from error
