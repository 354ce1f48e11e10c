"""A conversation and its answers, as no API in particular says them: what every chat surface translates to and from."""

from __future__ import annotations

import secrets
import string
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

import msgspec

from pippin.completion import Delta, answer_ids
from pippin.errors import RequestError
from pippin.server.forced import after_reasoning, calls_or, forced_calls
from pippin.server.protocol import Json
from pippin.server.service import Job, Service
from pippin.server.thinking import Budgeted
from pippin.text.parts import CallArguments, CallBegin, CallBroken, CallEnd, Part, Reasoning, Text
from pippin.text.reply import Reply, Speech
from pippin.text.tools.offered import Offered
from pippin.types import Finish, SamplingParams, TokenLogprob

NO_THINKING = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What is asked of the model.

    ``messages`` and ``tools`` are OpenAI's. ``tool_choice`` is none, auto, required or a tool's name in a tuple.
    ``thinking`` turns reasoning on or off in templates that can; ``effort`` is OpenAI's ``reasoning_effort``;
    ``budget`` limits the tokens of reasoning. ``template`` are more variables for the template.
    """

    messages: Sequence[Json]
    params: SamplingParams
    rid: str
    tools: Sequence[Json] = ()
    tool_choice: str | tuple[str] = "auto"
    parallel: bool = True
    thinking: bool | None = None
    effort: str | None = None
    budget: int | None = None
    template: Json = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    separate_reasoning: bool = True
    stream_reasoning: bool = True
    priority: int = 0


class Step(msgspec.Struct, frozen=True):
    """What one delta added: its parts, where every CallBegin has an id, and how the answer ended, if it has.

    ``called``: the answer has whole calls, and they are why it ended.
    """

    index: int
    parts: list[Part]
    delta: Delta
    finish: Finish | None = None
    called: bool = False
    reasoning_tokens: int = 0


@dataclass
class Usage:
    """Tokens so far. A prompt is counted, and cached, once, however many answers it has."""

    prompt: int = 0
    cached: int = 0
    generated: int = 0
    reasoning: int = 0

    def add(self, step: Step) -> None:
        delta = step.delta
        if delta.index == 0:
            self.prompt, self.cached = delta.num_prompt, delta.num_cached
        self.generated += len(delta.tokens)
        self.reasoning += step.reasoning_tokens


@dataclass
class Call:
    id: str
    name: str
    arguments: str = ""


@dataclass
class Message:
    """What an answer's parts have come to."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: Finish | None = None
    called: bool = False
    _open: Call | None = None

    def take(self, parts: Sequence[Part]) -> None:
        for part in parts:
            self._add(part)

    def add(self, step: Step) -> None:
        self.take(step.parts)
        self.logprobs += step.delta.logprobs
        self.finish, self.called = step.finish or self.finish, step.called

    def _add(self, part: Part) -> None:
        match part:
            case Text(text):
                self.content += text
            case Reasoning(text):
                self.reasoning += text
            case CallBegin(name, id):
                self._open = Call(id or "", name)
            case CallArguments(text) if self._open is not None:
                self._open.arguments += text
            case CallEnd() if self._open is not None:
                self.calls.append(self._open)
                self._open = None
            case CallBroken(text):
                self._open = None
                self.content += text


class Conversation:
    """One Ask on its way: made by ``begin``, then ``steps``."""

    def __init__(
        self, service: Service, ask: Ask, job: Job, prompt: str, offered: Offered | None, speech: Speech | None = None
    ) -> None:
        self.job = job
        self._service = service
        self._ask = ask
        self._speech = speech or service.speech
        self._answers = [self._answer(prompt, offered, id) for id in answer_ids(job.rid, job.params.n)]

    def _answer(self, prompt: str, offered: Offered | None, id: str) -> AnswerParts:
        speech = self._speech
        reply = Reply(speech, prompt, offered, self._ask.separate_reasoning)
        return AnswerParts(reply, id, speech.tools.id_length if speech.tools else None, self._ask)

    async def steps(self) -> AsyncGenerator[Step, None]:
        """Every delta's parts as they come. Closing it aborts what is unfinished."""
        async with aclosing(self._service.run([self.job])) as deltas:
            async for _, delta in deltas:
                yield self.step(delta)

    def step(self, delta: Delta) -> Step:
        """A delta's parts. Each delta is asked about once, in order."""
        answer = self._answers[delta.index]
        step = answer.step(delta)
        if answer.enough:
            self._service.client.abort(answer.id)
        return step


class AnswerParts:
    """One answer's deltas to steps."""

    def __init__(self, reply: Reply, id: str, id_length: int | None, ask: Ask) -> None:
        self.id = id
        self.enough = False  # one call is all that was asked for, and it is there
        self._reply = reply
        self._id_length = id_length
        self._ask = ask
        self._calls = 0
        self._ids: set[str] = set()
        self._thought: list[str] = []
        self._reasoning = False

    def step(self, delta: Delta) -> Step:
        parts = [] if self.enough else self._reply.push(delta.text)
        if delta.finish is not None and not self.enough:
            parts += self._reply.finish()
        shown = self._shown(parts, delta.finish is not None)
        finish = delta.finish
        if finish is not None and self.enough:
            finish = Finish("stop")
        called = finish is not None and finish.reason == "stop" and self._calls > 0
        thought = len(delta.tokens) if self._reasons(parts) else 0
        return Step(delta.index, shown, delta, finish, called, thought)

    def _reasons(self, parts: Sequence[Part]) -> bool:
        """Whether a step's tokens are reasoning, as far as parts tell: one that closes it counts as none."""
        if parts:
            self._reasoning = isinstance(parts[-1], Reasoning)
        return self._reasoning

    def _shown(self, parts: list[Part], ended: bool) -> list[Part]:
        if self._ask.stream_reasoning and all(isinstance(part, Text | Reasoning) for part in parts):
            return parts
        found: list[Part] = []
        for part in parts:
            if isinstance(part, Reasoning) and not self._ask.stream_reasoning:
                self._thought.append(part.text)
                continue
            found += self._thoughts()
            if isinstance(part, CallBegin):
                if part.id is None or part.id in self._ids:
                    part = CallBegin(part.name, call_id(self._id_length))
                self._ids.add(str(part.id))
            found.append(part)
            if isinstance(part, CallEnd):
                self._calls += 1
                if not self._ask.parallel:
                    self.enough = True
                    return found
        return [*found, *self._thoughts()] if ended else found

    def _thoughts(self) -> list[Part]:
        thought, self._thought = "".join(self._thought), []
        return [Reasoning(thought)] if thought else []


ALPHABET = string.ascii_letters + string.digits


def call_id(length: int | None) -> str:
    """A new call's id; of so many letters and digits, where templates insist on it."""
    if length is None:
        return f"call_{uuid.uuid4().hex[:24]}"
    return "".join(secrets.choice(ALPHABET) for _ in range(length))


async def plain(service: Service, ask: Ask, text: str) -> Conversation:
    """A prompt without a template, answered as text."""
    job = service.job(await service.encode(text), ask.params, ask.rid, ask.priority, "prompt")
    return Conversation(service, replace(ask, separate_reasoning=False), job, text, None)


async def begin(service: Service, ask: Ask, before: Sequence[int] = ()) -> Conversation:
    """Render, encode and check. ``before`` are tokens that come before the prompt.

    Raises RequestError that names OpenAI's fields.
    """
    offered = offer(service, ask)
    text = service.chat.render(
        ask.messages,
        tools=offered.list if offered else None,
        chat_template_kwargs=template_variables(ask),
        add_generation_prompt=ask.add_generation_prompt and not ask.continue_final_message,
        continue_final_message=ask.continue_final_message,
    )
    tokens = [*before, *await service.encode(text, False)]
    opening = last_words(ask.messages) if ask.continue_final_message else text
    params, speech = grammared(service, ask, offered, opening)
    job = service.job(tokens, params, ask.rid, ask.priority, "messages")
    job = replace(job, shown=service.speech.shown)
    if ask.budget is not None and service.speech.reasoning is not None:  # a model that doesn't reason keeps any limit
        job = replace(job, client=budgeted(service, ask, opening))
    return Conversation(service, ask, job, opening, offered, speech)


def grammared(service: Service, ask: Ask, offered: Offered | None, opening: str) -> tuple[SamplingParams, Speech]:
    """The parameters with the grammar that the answer must follow, and the formats that it is read in."""
    speech, grammar, calls = service.speech, ask.params.grammar, False
    if offered is not None and speech.tools is not None:
        template = service.chat.known() or ""
        # A structural tag says itself what a call is.
        if grammar is not None and ask.tool_choice == "auto" and grammar.kind != "structural_tag":
            grammar, calls = calls_or(grammar, speech.tools, template, offered, ask.parallel), True
        else:  # where a call must be made, there are no words to have a shape
            forced, format = forced_calls(speech.tools, template, offered, ask.tool_choice, ask.parallel)
            grammar, calls, speech = forced or grammar, forced is not None, replace(speech, tools=format)
    if grammar is None:
        return ask.params, speech
    if speech.reasoning is not None and ask.separate_reasoning:
        grammar = after_reasoning(grammar, speech.reasoning, opening, calls)
    return msgspec.structs.replace(ask.params, grammar=grammar), speech


def offer(service: Service, ask: Ask) -> Offered | None:
    """The tools that the model gets to see; None for none."""
    if not ask.tools or ask.tool_choice == "none":
        if isinstance(ask.tool_choice, tuple) or ask.tool_choice == "required":
            raise RequestError("tool_choice needs tools to choose from", "tool_choice")
        return None
    if service.speech.tools is None:
        raise RequestError("this model's chat template has no tools; --tool-call-parser names a format", "tools")
    offered = Offered(ask.tools)
    if isinstance(ask.tool_choice, tuple) and ask.tool_choice[0] not in offered:
        raise RequestError(f"there is no tool {ask.tool_choice[0]!r} among the tools", "tool_choice")
    return offered


def template_variables(ask: Ask) -> Json:
    """``chat_template_kwargs`` and what other fields say to templates. Those that a template has no use for, it drops.

    ``enable_thinking`` is Qwen's and GLM's switch, ``thinking`` DeepSeek's and Kimi's, ``reasoning_effort`` gpt-oss'.
    """
    found: Json = {}
    thinking = False if ask.effort == NO_THINKING and ask.thinking is None else ask.thinking
    if thinking is not None:
        found |= {"enable_thinking": thinking, "thinking": thinking}
    if ask.effort is not None and ask.effort != NO_THINKING:
        found["reasoning_effort"] = ask.effort
    return found | ask.template


def last_words(messages: Sequence[Json]) -> str:
    content = messages[-1].get("content")
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text", "")) for part in content or [] if isinstance(part, dict))


def budgeted(service: Service, ask: Ask, opening: str) -> Budgeted:
    if ask.params.logprobs:
        raise RequestError("thinking_budget and logprobs don't go together: forced tokens have none", "logprobs")
    assert ask.budget is not None
    return Budgeted(service.client, service.tokenizer, service.speech, opening, ask.budget)
