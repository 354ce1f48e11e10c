"""How one choice of an OpenAI answer looks: ``message`` and ``delta`` in a chat, ``text`` in a completion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pippin.completion import Delta
from pippin.server.logprobs import TextLogprobs, chat_logprobs
from pippin.server.protocol import CompletionRequest, Json
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


class Shape(Protocol):
    """An endpoint's way to write choices. ``whole`` and ``chunk`` name its objects, ``prefix`` begins its ids."""

    whole: str
    chunk: str
    prefix: str

    def choice(self, index: int, choice: Choice, first: Choice) -> Json:
        """A finished choice; ``first`` is the first one of the same prompt."""

    def parts(self, index: int, number: int, delta: Delta) -> list[Json]:
        """A delta as choices of chunks, one for each event; none if it shows nothing."""


class ChatShape:
    """Chat completions."""

    whole, chunk, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, tokenizer: Tokenizer, logprobs: bool) -> None:
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._started: set[int] = set()

    def choice(self, index: int, choice: Choice, first: Choice) -> Json:
        return {
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": chat_logprobs(self._tokenizer, choice.logprobs) if self._logprobs else None,
            **ending(choice.finish),
        }

    def parts(self, index: int, number: int, delta: Delta) -> list[Json]:
        found = []
        if index not in self._started:
            self._started.add(index)
            found.append(self._part(index, {"role": "assistant", "content": ""}))
        if delta.text or delta.logprobs:
            logprobs = chat_logprobs(self._tokenizer, delta.logprobs) if delta.logprobs else None
            found.append(self._part(index, {"content": delta.text}, logprobs))
        if delta.finish is not None:
            found.append({"index": index, "delta": {}, "logprobs": None, **ending(delta.finish)})
        return found

    def _part(self, index: int, delta: Json, logprobs: Json | None = None) -> Json:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}


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


def ending(finish: Finish | None) -> Json:
    """How a choice ended, with SGLang's ``matched_stop``."""
    if finish is None:
        return {"finish_reason": None}
    return {"finish_reason": finish.reason, "matched_stop": finish.matched}
