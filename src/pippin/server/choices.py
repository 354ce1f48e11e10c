"""How one choice of an OpenAI answer looks: ``message`` and ``delta`` in a chat, ``text`` in a completion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from pippin.completion import Delta
from pippin.server.chat import Call, Conversation, Message, Step
from pippin.server.logprobs import TextLogprobs, chat_logprobs
from pippin.server.protocol import CompletionRequest, Json
from pippin.server.service import Job
from pippin.text.parts import CallArguments, CallBegin, CallBroken, Part, Reasoning, Text
from pippin.text.tokenizer import Tokenizer
from pippin.types import Finish, TokenLogprob


@dataclass
class Choice:
    """What an answer to prompt ``number`` has come to."""

    number: int
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: Finish | None = None

    def add(self, delta: Delta) -> None:
        self.texts.append(delta.text)
        self.logprobs += delta.logprobs
        self.prompt_logprobs += delta.prompt_logprobs
        self.finish = delta.finish or self.finish

    @property
    def text(self) -> str:
        return "".join(self.texts)


class Collected(Protocol):
    """A finished choice in the making."""

    def add(self, delta: Delta) -> None: ...


C = TypeVar("C", bound=Collected)


class Shape(Protocol[C]):
    """An endpoint's way to write choices. ``whole`` and ``chunk`` name its objects, ``prefix`` begins its ids."""

    whole: str
    chunk: str
    prefix: str

    def collect(self, number: int) -> C:
        """A choice for prompt ``number``, without anything in it."""

    def choice(self, index: int, choice: C, first: C) -> Json:
        """A finished choice; ``first`` is the first one of the same prompt."""

    def parts(self, index: int, number: int, delta: Delta) -> list[Json]:
        """A delta as choices of chunks, one for each event; none if it shows nothing."""

    def usage(self) -> Json:
        """What more there is to say of the tokens so far."""


class ChatChoice:
    """A message, as its deltas come."""

    def __init__(self, step: Callable[[Delta], Step]) -> None:
        self.message = Message()
        self._step = step

    def add(self, delta: Delta) -> None:
        self.message.add(self._step(delta))


class ChatShape:
    """Chat completions of one conversation."""

    whole, chunk, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, tokenizer: Tokenizer, logprobs: bool) -> None:
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._conversation: Conversation | None = None
        self._calls: dict[int, int] = {}  # how many each choice has begun
        self._reasoning = 0

    def of(self, conversation: Conversation) -> Job:
        """Begin to write this conversation's answers; its job."""
        self._conversation = conversation
        return conversation.job

    def usage(self) -> Json:
        return {"completion_tokens_details": {"reasoning_tokens": self._reasoning}}

    def collect(self, number: int) -> ChatChoice:
        return ChatChoice(self._step)

    def _step(self, delta: Delta) -> Step:
        assert self._conversation is not None
        step = self._conversation.step(delta)
        self._reasoning += step.reasoning_tokens
        return step

    def choice(self, index: int, choice: ChatChoice, first: ChatChoice) -> Json:
        message = choice.message
        shown: Json = {"role": "assistant", "content": message.content, "refusal": None}
        if message.reasoning:
            shown["reasoning_content"] = message.reasoning
        if message.calls:
            shown["content"] = message.content or None
            shown["tool_calls"] = [tool_call(call) for call in message.calls]
        return {
            "index": index,
            "message": shown,
            "logprobs": chat_logprobs(self._tokenizer, message.logprobs) if self._logprobs else None,
            **ending(message.finish, message.called),
        }

    def parts(self, index: int, number: int, delta: Delta) -> list[Json]:
        step = self._step(delta)
        found = []
        if index not in self._calls:
            self._calls[index] = 0
            found.append(self._part(index, {"role": "assistant", "content": ""}))
        shown = [self._part(index, content) for part in step.parts if (content := self._content(index, part))]
        if delta.logprobs:  # of all tokens, whatever their text came to
            shown = shown or [self._part(index, {"content": ""})]
            shown[0]["logprobs"] = chat_logprobs(self._tokenizer, delta.logprobs)
        found += shown
        if step.finish is not None:
            found.append({"index": index, "delta": {}, "logprobs": None, **ending(step.finish, step.called)})
        return found

    def _content(self, index: int, part: Part) -> Json:
        match part:
            case Text(text) | CallBroken(text):
                return {"content": text}
            case Reasoning(text):
                return {"reasoning_content": text}
            case CallBegin(name, id):
                self._calls[index] += 1
                function = {"name": name, "arguments": ""}
                call = {"index": self._calls[index] - 1, "id": id, "type": "function", "function": function}
                return {"tool_calls": [call]}
            case CallArguments(text):
                return {"tool_calls": [{"index": self._calls[index] - 1, "function": {"arguments": text}}]}
        return {}

    def _part(self, index: int, delta: Json) -> Json:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def tool_call(call: Call) -> Json:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


class TextShape:
    """Completions. ``echoes`` are the prompts' texts, if they are to be repeated before the answers."""

    whole, chunk, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, tokenizer: Tokenizer, request: CompletionRequest, echoes: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._request = request
        self._echoes = echoes
        self._echoed: set[int] = set()
        self._offsets: dict[int, TextLogprobs] = {}
        self._prompt_logprobs: dict[int, list[TokenLogprob]] = {}

    def usage(self) -> Json:
        return {}

    def collect(self, number: int) -> Choice:
        return Choice(number)

    def choice(self, index: int, choice: Choice, first: Choice) -> Json:
        logprobs = self._part_logprobs(index, first.prompt_logprobs + choice.logprobs)
        text = self._echoes[choice.number] + choice.text if self._echoes else choice.text
        return {"index": index, "text": text, "logprobs": logprobs, **ending(choice.finish)}

    def parts(self, index: int, number: int, delta: Delta) -> list[Json]:
        found = []
        if self._echoes and index not in self._echoed:
            # A prompt's logprobs come in as many parts as the prompt was computed in.
            entries = self._prompt_logprobs.setdefault(index, [])
            entries += delta.prompt_logprobs
            if not delta.tokens and delta.finish is None:
                return []
            self._echoed.add(index)
            found.append(self._part(index, self._echoes[number], entries, None))
        if delta.text or delta.logprobs or delta.finish is not None:
            found.append(self._part(index, delta.text, delta.logprobs, delta.finish))
        return found

    def _part(self, index: int, text: str, entries: Sequence[TokenLogprob], finish: Finish | None) -> Json:
        return {"index": index, "text": text, "logprobs": self._part_logprobs(index, entries), **ending(finish)}

    def _part_logprobs(self, index: int, entries: Sequence[TokenLogprob]) -> Json | None:
        if self._request.logprobs is None:
            return None
        if index not in self._offsets:
            self._offsets[index] = TextLogprobs(self._tokenizer, self._request.skip_special_tokens)
        return self._offsets[index].part(entries)


def ending(finish: Finish | None, called: bool = False) -> Json:
    """How a choice ended, with SGLang's ``matched_stop``. ``called``: with calls of tools."""
    if finish is None:
        return {"finish_reason": None}
    return {"finish_reason": "tool_calls" if called else finish.reason, "matched_stop": finish.matched}
