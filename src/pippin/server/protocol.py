"""What clients send: the fields of each endpoint, their types, and how a wrong one is refused.

Reading is strict. A field that we don't know, or know and don't support, is a RequestError that names it, unless its
value asks for nothing (clients send ``"tools": null`` and the like); a field whose value is null counts as left out.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import msgspec
from msgspec import Struct
from msgspec.structs import asdict, fields

from pippin.errors import RequestError
from pippin.grammar.fields import KINDS, grammar_of
from pippin.types import Grammar, SamplingParams

T = TypeVar("T", bound="Body")

Json = dict[str, Any]

# Accepted, and without effect: they concern OpenAI's accounts, storage and routing, not the answer.
IGNORED = frozenset(
    {
        "user",
        "metadata",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "custom_labels",
    }
)

# Not supported yet: what each may be all the same, because it asks for nothing.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning": (),
    "verbosity": ("medium",),
    "moderation": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "return_hidden_states": (False,),
    "return_routed_experts": (False,),
    "return_cached_tokens_details": (False,),
    "return_token_ids": (False,),
    "return_prompt_token_ids": (False,),
    "log_metrics": (True,),
    "lora_path": (),
    "session_id": (),
    "session_params": (),
    "session_rid": (),
    "stop_regex": ([], ""),
    "custom_params": (),
    "custom_logit_processor": (),
    "cache_salt": (),
    "extra_key": (),
    "input_embeds": (),
    "image_data": (),
    "video_data": (),
    "audio_data": (),
    "modalities_data": (),
    "token_ids_logprob": (),
    "data_parallel_rank": (),
    "bootstrap_host": (),
    "bootstrap_port": (),
    "bootstrap_room": (),
}

PATH = re.compile(r"^(.*) - at (?:`key` in )?`\$\.?(.*)`$", re.DOTALL)
KIND = re.compile(r"^Invalid (?:enum )?value ('.*')$")
Int32 = Annotated[int, msgspec.Meta(ge=-(2**31), lt=2**31)]


class Body(Struct, kw_only=True, forbid_unknown_fields=True):
    """A request's body. ``ignored``: fields that are accepted and have no effect, with the reason. ``neutral``: fields
    that aren't supported, with the values that they may have all the same, because those ask for nothing.
    """

    ignored: ClassVar[Mapping[str, str]] = dict.fromkeys(IGNORED, "concerns OpenAI's accounts, storage or routing")
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = NEUTRAL


class StreamOptions(Struct, kw_only=True, forbid_unknown_fields=True):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class OpenAIRequest(Body, kw_only=True):
    """What both of OpenAI's endpoints share, with SGLang's additions."""

    model: str | None = None
    n: int = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    stop: str | list[str] = []
    stop_token_ids: list[int] = []
    min_tokens: int = 0
    max_tokens: int | None = None
    ignore_eos: bool = False
    no_stop_trim: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    priority: Int32 = 0
    rid: str | None = None
    lora_path: str | None = None
    response_format: Json | None = None
    structured_outputs: Json | None = None
    json_schema: Json | str | bool | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: Json | str | None = None
    guided_json: Json | str | bool | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    def params(self, max_tokens: int, **others: Any) -> SamplingParams:
        """The engine's parameters. Raises RequestError with the fields' names as OpenAI spells them."""
        try:
            return SamplingParams(
                max_new_tokens=max_tokens,
                min_new_tokens=self.min_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                min_p=self.min_p,
                frequency_penalty=self.frequency_penalty,
                presence_penalty=self.presence_penalty,
                repetition_penalty=self.repetition_penalty,
                logit_bias=self.logit_bias,
                seed=self.seed,
                n=self.n,
                stop=stop_strings(self.stop),
                stop_token_ids=tuple(self.stop_token_ids),
                ignore_eos=self.ignore_eos,
                no_stop_trim=self.no_stop_trim,
                skip_special_tokens=self.skip_special_tokens,
                spaces_between_special_tokens=self.spaces_between_special_tokens,
                grammar=self.grammar,
                **others,
            )
        except RequestError as error:
            raise respell(error, {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}) from error

    @property
    def grammar(self) -> Grammar | None:
        """What the answer must be. Raises RequestError naming the field that doesn't say."""
        names = ("response_format", "structured_outputs", *KINDS)
        given = asdict(self)
        return grammar_of({name: given[name] for name in names})

    @property
    def usage_at_end(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def usage_always(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats


class CompletionRequest(OpenAIRequest, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[str | int | list[int]]
    echo: bool = False
    logprobs: int | None = None


class Function(Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A tool's name, what it is for, and the JSON schema of its arguments."""

    name: str
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None


class Tool(Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["function"] = "function"
    function: Function

    def as_dict(self) -> Json:
        """The tool as templates want it."""
        return {"type": "function", "function": msgspec.to_builtins(self.function)}


class FunctionName(Struct, kw_only=True, forbid_unknown_fields=True):
    name: str


class NamedTool(Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="function"):
    function: FunctionName


class AllowedFunctions(Struct, kw_only=True, forbid_unknown_fields=True):
    mode: Literal["auto", "required"]
    tools: tuple[NamedTool, ...]


class AllowedTools(Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="allowed_tools"):
    allowed_tools: AllowedFunctions


class ChatRequest(OpenAIRequest, kw_only=True):
    """POST /v1/chat/completions. ``messages`` are checked one by one where the template is rendered."""

    messages: list[Json]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: Json = {}
    tools: list[Tool] = []
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools | None = None
    parallel_tool_calls: bool = True
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    thinking_budget: Annotated[int, msgspec.Meta(ge=1)] | None = None
    separate_reasoning: bool = True
    stream_reasoning: bool = True

    def chosen(self) -> tuple[list[Json], str | tuple[str]]:
        """The tools that may be called, as templates want them, and which of them must be. Raises RequestError."""
        tools, choice = [tool.as_dict() for tool in self.tools], self.tool_choice or "auto"
        if isinstance(choice, str):
            return tools, choice
        if isinstance(choice, NamedTool):
            return tools, (choice.function.name,)
        return allowed(tools, choice.allowed_tools), choice.allowed_tools.mode

    @property
    def limit(self) -> int | None:
        """Most tokens to generate; None is up to the end of the context."""
        both = {n for n in (self.max_tokens, self.max_completion_tokens) if n is not None}
        if len(both) > 1:
            raise RequestError("max_tokens and max_completion_tokens differ; send one of them", "max_tokens")
        return both.pop() if both else None


def allowed(tools: Sequence[Json], choice: AllowedFunctions) -> list[Json]:
    """The tools that ``tool_choice`` leaves. Raises RequestError for one that isn't there."""
    names = [tool.function.name for tool in choice.tools]
    given = {tool["function"]["name"] for tool in tools}
    for i, name in enumerate(names):
        if name not in given:
            raise RequestError(f"there is no tool {name!r} among the tools", f"tool_choice.allowed_tools.tools[{i}]")
    return [tool for tool in tools if tool["function"]["name"] in names]


class GenerateRequest(Body, kw_only=True):
    """SGLang's /generate. What each field may hold is checked by ``sglang.Arguments``, which Engine shares."""

    text: Any = None
    input_ids: Any = None
    sampling_params: Any = None
    rid: Any = None
    return_logprob: Any = None
    logprob_start_len: Any = None
    top_logprobs_num: Any = None
    return_text_in_logprobs: bool = False
    stream: bool = False
    priority: Int32 = 0
    lora_path: str | list[str | None] | None = None


class TokenizeRequest(Body, kw_only=True):
    prompt: str | list[str]
    add_special_tokens: bool = True
    model: str | None = None


class DetokenizeRequest(Body, kw_only=True):
    tokens: list[int | list[int]]
    skip_special_tokens: bool = True
    model: str | None = None


class AbortRequest(Body, kw_only=True):
    rid: str = ""
    abort_all: bool = False


def read(body: bytes, kind: type[T]) -> T:
    """A request's JSON as its struct. Raises RequestError that names the field."""
    try:
        raw = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise RequestError(f"the body is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise RequestError("the body must be a JSON object")
    return build(raw, kind)


def build(raw: Mapping[str, Any], kind: type[T], strict: bool = True) -> T:
    """A JSON object as a struct; not ``strict``, numbers may be text. Raises RequestError that names the field."""
    known = names_of(kind)
    given = {
        name: value for name, value in raw.items() if value is not None and name not in kind.ignored.keys() - known
    }
    for name in [n for n in given if n not in known]:
        refuse_or_drop(given, name, kind, known)
    try:
        return msgspec.convert(given, kind, str_keys=True, strict=strict)
    except RecursionError as error:
        raise RequestError("the body is nested too deeply") from error
    except msgspec.ValidationError as error:
        raise type_error(str(error)) from error


@cache
def names_of(kind: type[Body]) -> frozenset[str]:
    """Its fields, as JSON spells them. Kept: msgspec finds them out anew each time, in a millisecond."""
    return frozenset(field.encode_name for field in fields(kind))


def refuse_or_drop(given: dict[str, Any], name: str, kind: type[Body], known: Collection[str]) -> None:
    """Drop a field that asks for nothing; raise for one that is unknown or not supported."""
    neutral = kind.neutral.get(name)
    if neutral is None:
        close = difflib.get_close_matches(name, known, n=1)
        raise RequestError(f"unknown field {name}" + (f"; did you mean {close[0]}?" if close else ""), name)
    if not any(given[name] == value and type(given[name]) is type(value) for value in neutral):
        allowed = "".join(f", or send {msgspec.json.encode(value).decode()}" for value in neutral[:1])
        raise RequestError(f"{name} is not supported yet; leave it out{allowed}", name)
    del given[name]


def type_error(message: str) -> RequestError:
    """msgspec's words, with the field's name in front."""
    if match := PATH.match(message):
        text, path = match[1], match[2]
        if (kind := KIND.match(text)) and path.rpartition(".")[2] in ("type", "role"):
            return RequestError(f"{path}: {kind[1]} is not supported", path)
        return RequestError(f"{path}: {text[:1].lower()}{text[1:]}", path)
    if match := re.match(r"Object missing required field `(.*)`", message):
        return RequestError(f"{match[1]} is required", match[1])
    return RequestError(message)


def respell(error: RequestError, names: Mapping[str, str]) -> RequestError:
    """The same error, with fields called what this endpoint calls them."""
    message = error.message
    for inner, outer in names.items():
        message = re.sub(rf"\b{inner}\b", outer, message)
    return RequestError(message, names.get(error.field or "", error.field), error.status)


def stop_strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    return (stop,) if isinstance(stop, str) else tuple(stop)
