"""SGLang's own shapes: the arguments of ``generate`` and the dicts that it returns, for ``Engine`` and ``/generate``.

Source: SGLang's ``Engine.generate``, ``GenerateReqInput`` and ``meta_info``.
"""

from __future__ import annotations

import difflib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from pippin.completion import Delta, check_prompt, longest_prompt, new_id, unanswered
from pippin.errors import RequestError
from pippin.grammar.fields import grammar_of
from pippin.messages import ModelInfo
from pippin.text.tokenizer import Tokenizer
from pippin.types import CacheMiss, Finish, SamplingParams, TokenLogprob

TextOf = Callable[[int], str | None]

_NAMES = tuple(f.name for f in msgspec.structs.fields(SamplingParams))
# What `generate` says in arguments of its own, so it is no key of sampling_params.
_NOT_KEYS = {"logprobs", "top_logprobs", "prompt_logprobs", "grammar", "lora_path"}
_GRAMMARS = ("json_schema", "regex", "ebnf", "structural_tag")


@dataclass(frozen=True, slots=True)
class Asked:
    """One prompt of a ``generate`` call, ready for ``complete``.

    ``unanswered``: only the prompt is computed (``max_new_tokens`` 0, as SGLang's frontend scores choices); the one
    token that the engine draws all the same is told to nobody.
    """

    id: str
    tokens: list[int]
    params: SamplingParams
    logprob_start: int = -1
    unanswered: bool = False


@dataclass(frozen=True, slots=True)
class Arguments:
    """What ``generate`` was given. Each of those beside the prompts is one value for all of them, or a list.

    ``logprob_start_len`` -1 means: none of the prompt's; another value: the prompt's from that token on.
    """

    prompt: str | Sequence[str] | None = None
    input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None
    sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None
    return_logprob: bool | Sequence[bool] | None = None
    logprob_start_len: int | Sequence[int] | None = None
    top_logprobs_num: int | Sequence[int] | None = None
    rid: str | Sequence[str] | None = None

    def resolve(self, tokenizer: Tokenizer, info: ModelInfo, prompt_field: str = "prompt") -> tuple[list[Asked], bool]:
        """All prompts, and whether it is a single one (then the answer is no list). Raises RequestError."""
        prompts, single = self.prompts(tokenizer, prompt_field, longest_prompt(info))
        named = prompt_field if self.prompt is not None else "input_ids"
        count = len(prompts)
        params = _each(self.sampling_params, count, "sampling_params")
        wanted = _each(self.return_logprob, count, "return_logprob")
        starts = _each(self.logprob_start_len, count, "logprob_start_len")
        tops = _each(self.top_logprobs_num, count, "top_logprobs_num")
        rids = self.rids(count)
        asked = []
        for i, tokens in enumerate(prompts):
            start = -1 if starts[i] is None or not wanted[i] else _integer(starts[i], "logprob_start_len")
            given = params[i]
            unanswered = isinstance(given, Mapping) and str(given.get("max_new_tokens")) == "0"
            one = sampling_params(
                {**given, "max_new_tokens": 1} if unanswered else given,
                logprobs=bool(wanted[i]),
                top_logprobs=_integer(tops[i] or 0, "top_logprobs_num") if wanted[i] else 0,
                prompt_logprobs=start >= 0,
            )
            one = check_prompt(tokens, one, info, named)
            asked.append(Asked(rids[i], tokens, one, start, unanswered))
        return asked, single

    def prompts(self, tokenizer: Tokenizer, prompt_field: str, most: int) -> tuple[list[list[int]], bool]:
        """The token ids of each prompt, which can have ``most``, and whether it is one alone. Raises RequestError."""
        if (self.prompt is None) == (self.input_ids is None):
            raise RequestError(f"give either {prompt_field} or input_ids", prompt_field)
        if self.input_ids is not None:
            return _token_lists(self.input_ids)
        texts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        if not isinstance(texts, Sequence) or not texts or not all(isinstance(t, str) for t in texts):
            raise RequestError(f"{prompt_field} must be a string or a list of strings", prompt_field)
        for text in texts:
            tokenizer.check_length(text, most, prompt_field)
        return [tokenizer.encode(t) for t in texts], isinstance(self.prompt, str)

    def rids(self, count: int) -> list[str]:
        """An id for each of so many prompts. Raises RequestError if those given won't do."""
        rids = _each(self.rid, count, "rid")
        if not all(rid is None or isinstance(rid, str) for rid in rids):
            raise RequestError("rid must be a string, or a list of strings", "rid")
        if self.rid is not None and len(set(rids)) < count:
            raise RequestError("each prompt needs an rid of its own", "rid")
        return [rid or new_id() for rid in rids]


def sampling_params(given: Mapping[str, Any] | None, **more: Any) -> SamplingParams:
    """SGLang's ``sampling_params`` dict, checked; keys that are None take their default. ``sampling_seed`` is ``seed``.

    Raises RequestError that names the key: one that is unknown, of a wrong type, or out of range.
    """
    if given is not None and not isinstance(given, Mapping):
        raise RequestError("sampling_params must be an object", "sampling_params")
    values = {name: value for name, value in (given or {}).items() if value is not None}
    if "sampling_seed" in values:
        values.setdefault("seed", values.pop("sampling_seed"))
    grammar = grammar_of({name: values.pop(name, None) for name in _GRAMMARS}, "sampling_params.")
    if unknown := [name for name in values if name not in _NAMES or name in _NOT_KEYS]:
        raise RequestError(_unknown(str(unknown[0])), f"sampling_params.{unknown[0]}")
    if isinstance(values.get("stop"), str):
        values["stop"] = [values["stop"]] if values["stop"] else []
    try:
        # Not strict: JSON spells the keys of logit_bias as strings, and 1 is a fine temperature.
        values = {k: _loose_ints(v) if k == "logit_bias" else v for k, v in values.items()}
        params = msgspec.convert(values | more, SamplingParams)
        return params if grammar is None else msgspec.structs.replace(params, grammar=grammar)
    except msgspec.ValidationError as error:
        name = (re.search(r"`\$\.(\w+)", str(error)) or ["", ""])[1]
        said = str(error).split(" - at")[0]
        raise RequestError(f"{name or 'sampling_params'}: {said}", f"sampling_params.{name}".rstrip(".")) from error
    except RequestError as error:
        raise RequestError(error.message, f"sampling_params.{error.field}") from error


class Answer:
    """One answer as its deltas come; ``as_dict`` gives SGLang's dict at any moment.

    ``text_of`` spells the tokens in its logprobs; without it their text is None. ``more`` is ``meta_info`` beside.
    """

    def __init__(
        self, asked: Asked, index: int = 0, text_of: TextOf | None = None, more: Mapping[str, str] | None = None
    ) -> None:
        self._asked = asked
        self._more = more or {}
        self._text_of: TextOf = text_of or (lambda token: None)
        self._id = asked.id if asked.params.n == 1 else f"{asked.id}-{index}"
        self._began = time.perf_counter()
        self._texts: list[str] = []
        self.tokens: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._prompt_logprobs: list[TokenLogprob] = []
        self._num_cached = 0
        self._miss: CacheMiss | None = None
        self.finish: Finish | None = None

    def add(self, delta: Delta) -> None:
        if self._asked.unanswered:
            delta = unanswered(delta)
        self._texts.append(delta.text)
        self.tokens += delta.tokens
        self._logprobs += delta.logprobs
        self._prompt_logprobs += delta.prompt_logprobs
        self._num_cached = delta.num_cached
        self._miss = delta.miss
        self.finish = delta.finish

    @property
    def text(self) -> str:
        if len(self._texts) > 1:
            self._texts = ["".join(self._texts)]
        return self._texts[0] if self._texts else ""

    def as_dict(self) -> dict[str, Any]:
        """``text`` and ``output_ids`` are all so far; ``finish_reason`` is None until the end."""
        meta: dict[str, Any] = {
            "id": self._id,
            "finish_reason": finish_reason(self.finish, len(self.tokens)),
            "prompt_tokens": len(self._asked.tokens),
            "completion_tokens": len(self.tokens),
            "cached_tokens": self._num_cached,
            "cache_miss": msgspec.to_builtins(self._miss),
            "e2e_latency": time.perf_counter() - self._began,
            **self._more,
        }
        if self._asked.params.logprobs:
            prompt = self._prompt_logprobs[self._asked.logprob_start :] if self._prompt_logprobs else []
            meta["input_token_logprobs"] = _logprobs(prompt, self._text_of)
            meta["output_token_logprobs"] = _logprobs(self._logprobs, self._text_of)
            if self._asked.params.top_logprobs:
                meta["input_top_logprobs"] = _tops(prompt, self._text_of)
                meta["output_top_logprobs"] = _tops(self._logprobs, self._text_of)
        return {"text": self.text, "output_ids": list(self.tokens), "meta_info": meta}


@dataclass(slots=True)
class Answers:
    """The ``n`` answers of one prompt."""

    asked: Asked
    text_of: TextOf | None = None
    more: Mapping[str, str] = field(default_factory=dict)
    each: list[Answer] = field(init=False)

    def __post_init__(self) -> None:
        self.each = [Answer(self.asked, i, self.text_of, self.more) for i in range(self.asked.params.n)]

    def add(self, delta: Delta) -> Answer:
        """The answer that the delta belongs to, now with it."""
        self.each[delta.index].add(delta)
        return self.each[delta.index]


def finish_reason(finish: Finish | None, num_tokens: int) -> dict[str, Any] | None:
    """SGLang's ``finish_reason`` object."""
    match finish:
        case None:
            return None
        case Finish("stop", matched):
            return {"type": "stop", "matched": matched}
        case Finish("length"):
            return {"type": "length", "length": num_tokens}
        case Finish(_, _, message):
            return {"type": "abort", "message": message or "the request was aborted"}
    raise AssertionError(finish)


def _logprobs(found: Sequence[TokenLogprob], text_of: TextOf) -> list[tuple[float | None, int, str | None]]:
    return [(x.logprob, x.token, text_of(x.token)) for x in found]


def _tops(found: Sequence[TokenLogprob], text_of: TextOf) -> list[list[tuple[float, int, str | None]] | None]:
    return [[(logprob, token, text_of(token)) for token, logprob in x.top] or None for x in found]


def _token_lists(given: Sequence[int] | Sequence[Sequence[int]]) -> tuple[list[list[int]], bool]:
    def are_ids(value: object) -> bool:
        return isinstance(value, Sequence) and all(type(t) is int for t in value)

    if not isinstance(given, str) and isinstance(given, Sequence) and given:
        if are_ids(given):
            return [list(given)], True  # type: ignore[arg-type]
        if all(are_ids(one) and not isinstance(one, str) for one in given):
            return [list(one) for one in given], False  # type: ignore[arg-type]
    raise RequestError("input_ids must be a list of token ids, or a list of such lists", "input_ids")


def _each(value: Any, count: int, name: str) -> list[Any]:
    """One value for every prompt."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != count:
            raise RequestError(f"{name} has {len(value)} entries for {count} prompts", name)
        return list(value)
    if isinstance(value, str) and count > 1:  # an rid
        return [f"{value}-{i}" for i in range(count)]
    return [value] * count


def _integer(value: object, name: str) -> int:
    if type(value) is not int:
        raise RequestError(f"{name} must be an integer, not {value!r}", name)
    return value


def _loose_ints(value: object) -> object:
    """A dict whose keys JSON made strings, with integers again; anything else as it is, for msgspec to refuse."""
    if not isinstance(value, Mapping):
        return value
    return {int(k) if isinstance(k, str) and k.isascii() and k.isdigit() else k: v for k, v in value.items()}


def _unknown(name: str) -> str:
    if name in _NOT_KEYS:
        return f"{name} is no key of sampling_params: use return_logprob and top_logprobs_num beside it"
    close = difflib.get_close_matches(name, [n for n in _NAMES if n not in _NOT_KEYS], 1)
    known = ", ".join(n for n in _NAMES if n not in _NOT_KEYS)
    return f"{name} is not supported" + (f"; did you mean {close[0]}?" if close else f"; supported are {known}")
