"""What servers speak: SGLang's /generate, OpenAI's completions and chat. A request's body, and what comes back.

Only what is published of each is used, so that any server of the kind can be measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]
Said = Sequence["str | list[int]"]
"""A conversation so far: the user's message, the answer, the next message, and so on. Token ids stand alone."""


@dataclass(slots=True)
class Answer:
    """One request and what came of it. Times are seconds of one clock.

    ``due`` is when it was to be sent, ``sent`` when it was. ``arrivals`` are the times at which text came, and
    ``counts`` the tokens of each (1 where the server does not say). Numbers of tokens are the server's own, None where
    it gives none. ``warm``: the run asked something earlier that begins alike, for at least half of this prompt.
    ``error`` is its kind if it failed, ``detail`` one instance of it.
    """

    due: float = 0.0
    sent: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    end: float = 0.0
    text: str = ""
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    finished: bool = False
    warm: bool = False
    error: str | None = None
    detail: str = ""

    def fail(self, kind: str, detail: object = "") -> None:
        """Keeps the first failure."""
        if self.error is None:
            self.error, self.detail = kind, " ".join(str(detail).split())[:300]

    def arrive(self, now: float, text: str, tokens: int = 1) -> None:
        self.text += text
        self.arrivals.append(now)
        self.counts.append(tokens)


class BadEvent(ValueError):
    """An event that is not of the form that the server's kind is known for."""


@dataclass(frozen=True, slots=True)
class Api:
    """One endpoint: its path, the body that asks it, and how an event (or a whole answer) of its is read.

    ``body(model, said, output_len, stream)`` is a request for one greedy answer; ``read(event, answer, now)`` adds what
    an event says. Raises BadEvent (or KeyError, TypeError) for an event of another form.
    """

    path: str
    body: Callable[[str, Said, int, bool], Json]
    read: Callable[[Json, Answer, float], None]
    takes_tokens: bool = True


def generate_body(model: str, said: Said, output_len: int, stream: bool) -> Json:
    prompt: Json = {"input_ids": said[0]} if isinstance(said[0], list) else {"text": _joined(said)}
    return {**prompt, "sampling_params": {"temperature": 0.0, "max_new_tokens": output_len}, "stream": stream}


def completions_body(model: str, said: Said, output_len: int, stream: bool) -> Json:
    prompt = said[0] if isinstance(said[0], list) else _joined(said)
    return {"model": model, "prompt": prompt, "max_tokens": output_len, **_openai(stream)}


def chat_body(model: str, said: Said, output_len: int, stream: bool) -> Json:
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    return {"model": model, "messages": messages, "max_tokens": output_len, **_openai(stream)}


def _openai(stream: bool) -> Json:
    options = {"stream_options": {"include_usage": True}} if stream else {}
    return {"temperature": 0.0, "stream": stream, **options}


def _joined(said: Said) -> str:
    return "".join(text for text in said if isinstance(text, str))


def read_generate(event: Json, answer: Answer, now: float) -> None:
    """SGLang's event: all text so far (or what is new, where the server streams so), and counts so far."""
    _refuse_error(event)
    meta = event["meta_info"]
    text = event["text"]
    new = text[len(answer.text) :] if text.startswith(answer.text) else text
    before = answer.output_tokens or 0
    total = meta.get("completion_tokens")
    if new or (total or 0) > before:
        answer.arrive(now, new, max(1, total - before) if total else 1)
    answer.output_tokens = total
    answer.prompt_tokens = meta.get("prompt_tokens", answer.prompt_tokens)
    answer.cached_tokens = meta.get("cached_tokens", answer.cached_tokens)
    if finish := meta.get("finish_reason"):
        answer.finished = True
        if isinstance(finish, Mapping) and finish.get("type") == "abort":
            answer.fail("aborted", finish.get("message", ""))


def read_completions(event: Json, answer: Answer, now: float) -> None:
    """An event of OpenAI's completions, or the whole answer."""
    for choice in _choices(event):
        _read_text(choice, choice.get("text"), answer, now)
    _read_usage(event, answer)


def read_chat(event: Json, answer: Answer, now: float) -> None:
    """An event of OpenAI's chat completions, or the whole answer; reasoning counts as text, by either of its names."""
    for choice in _choices(event):
        said = choice["delta"] if "delta" in choice else choice["message"]
        thought = said.get("reasoning_content") or said.get("reasoning") or ""
        _read_text(choice, thought + (said.get("content") or ""), answer, now)
    _read_usage(event, answer)


def _read_text(choice: Json, text: str | None, answer: Answer, now: float) -> None:
    if text:
        answer.arrive(now, text)
    if choice.get("finish_reason"):
        answer.finished = True


def _choices(event: Json) -> list[Json]:
    _refuse_error(event)
    found = event["choices"]
    if not isinstance(found, list):
        raise BadEvent("choices is no list")
    return found


def _read_usage(event: Json, answer: Answer) -> None:
    if usage := event.get("usage"):
        answer.prompt_tokens = usage.get("prompt_tokens", answer.prompt_tokens)
        answer.output_tokens = usage.get("completion_tokens", answer.output_tokens)
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        answer.cached_tokens = answer.cached_tokens if cached is None else cached


class ErrorEvent(Exception):
    """The server ended a stream that had begun with an error."""


def _refuse_error(event: Json) -> None:
    if not isinstance(event, dict):
        raise BadEvent("an event is no JSON object")
    if error := event.get("error"):
        raise ErrorEvent(error.get("message", error) if isinstance(error, dict) else error)


GENERATE = Api("/generate", generate_body, read_generate)
COMPLETIONS = Api("/v1/completions", completions_body, read_completions)
CHAT = Api("/v1/chat/completions", chat_body, read_chat, takes_tokens=False)


@dataclass(frozen=True, slots=True)
class Backend:
    """A kind of server; ``ignore_eos`` if it knows that field, which OpenAI's own refuses."""

    api: Api
    port: int
    ignore_eos: bool = True


BACKENDS: dict[str, Backend] = {
    "sglang": Backend(GENERATE, 30000),
    "sglang-native": Backend(GENERATE, 30000),
    "sglang-oai": Backend(COMPLETIONS, 30000),
    "sglang-oai-chat": Backend(CHAT, 30000),
    "vllm": Backend(COMPLETIONS, 8000),
    "vllm-chat": Backend(CHAT, 8000),
    "lmdeploy": Backend(COMPLETIONS, 23333),
    "lmdeploy-chat": Backend(CHAT, 23333),
    "openai": Backend(COMPLETIONS, 8080, ignore_eos=False),
    "openai-chat": Backend(CHAT, 8080, ignore_eos=False),
}


def request_body(backend: Backend, model: str, said: Said, output_len: int, *, stream: bool, to_length: bool) -> Json:
    """What to send: greedy, and of exactly ``output_len`` tokens if ``to_length`` and the backend can."""
    body = backend.api.body(model, said, output_len, stream)
    if to_length and backend.ignore_eos:
        inner: Json = body.get("sampling_params", body)
        inner["ignore_eos"] = True
    return body
