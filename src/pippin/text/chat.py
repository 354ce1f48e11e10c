"""Messages to the prompt that a model was trained on, by its chat template.

Templates are programs from strangers: they run in Jinja's immutable sandbox (transformers compiles them so), and what
they raise becomes a RequestError.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateSyntaxError

from pippin.errors import ConfigError, RequestError
from pippin.text.tokenizer import Tokenizer

ROLES = ("system", "developer", "user", "assistant", "tool")

# What a message may hold; templates get to see all of it. Some templates say `thinking` or `reasoning` for the third.
FIELDS = frozenset(
    {"role", "content", "reasoning_content", "reasoning", "thinking", "name", "tool_calls", "tool_call_id", "refusal"}
)
# What clients keep of an answer and send back with it, to no effect: litellm's notes, and OpenAI's quotations.
SENT_BACK = frozenset({"provider_specific_fields", "annotations"})
CALL_FIELDS = frozenset({"id", "type", "index", "function"})
FUNCTION_FIELDS = frozenset({"name", "arguments"})
PART_FIELDS = frozenset({"type", "text", "cache_control"})  # of the last, nothing comes: all prompts are cached

Message = Mapping[str, Any]


class ChatTemplate:
    """Renders conversations for one tokenizer.

    ``source`` replaces the tokenizer's own template (Jinja text, see ``read_template``).
    """

    def __init__(self, tokenizer: Tokenizer, source: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._source = source
        # What chat_template_kwargs may not set: it is either a field of its own or none of the client's business.
        self._reserved = {*inspect.signature(tokenizer.hf.apply_chat_template).parameters, "messages"}

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """The prompt's text, special tokens and all: encode it with ``add_special_tokens=False``.

        ``messages`` are OpenAI's: a role of ``ROLES``, content a string or a list of text parts (joined with newlines),
        an assistant's ``tool_calls`` (their arguments, JSON in a string, reach the template as objects, as templates
        expect), whatever else they hold is passed on. ``continue_final_message`` leaves the last message open, and
        needs ``add_generation_prompt`` off. Raises RequestError.
        """
        if not messages:
            raise RequestError("messages must hold at least one message", "messages")
        if continue_final_message and add_generation_prompt:
            raise RequestError(
                "continue_final_message needs add_generation_prompt to be false", "continue_final_message"
            )
        options = dict(chat_template_kwargs or {})
        if clash := sorted(self._reserved & options.keys()):
            raise RequestError(f"{clash[0]} can't be set in chat_template_kwargs", "chat_template_kwargs")
        chat = [_message(m, i, self._knows_developer(tools)) for i, m in enumerate(messages)]
        try:
            return str(
                self._tokenizer.hf.apply_chat_template(
                    chat,
                    tools=[dict(t) for t in tools] if tools else None,
                    chat_template=self._template(tools),
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    tokenize=False,
                    **options,
                )
            )
        except RequestError:
            raise
        except Exception as error:  # a template may fail in any way that Python can
            reason = str(error).strip() or type(error).__name__
            raise RequestError(f"the chat template refused the messages: {reason}", "messages") from error

    def encode(self, messages: Sequence[Message], **options: Any) -> list[int]:
        """``render``'s options; gives the prompt's token ids."""
        return self._tokenizer.encode(self.render(messages, **options), add_special_tokens=False)

    def source(self, tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """The Jinja text in use; a tokenizer may have another one for tools. Raises RequestError if there is none."""
        return self._template(tools)

    def known(self) -> str | None:
        """All templates in use, joined; None if there is none."""
        if self._source is not None:
            return self._source
        found = _sources(self._tokenizer.hf.chat_template)
        return "\n".join(found) if found else None

    def fault(self) -> str | None:
        """Where a template in use is no Jinja, and why; None if all can be read."""
        sources = [self._source] if self._source is not None else _sources(self._tokenizer.hf.chat_template)
        return next((fault for fault in map(fault_of, sources) if fault), None)

    def _template(self, tools: Sequence[Mapping[str, Any]] | None) -> str:
        if self._source is not None:
            return self._source
        if not self._tokenizer.has_chat_template:
            raise RequestError(
                "this model's tokenizer has no chat template; start the server with --chat-template FILE, "
                "or send a plain prompt to /v1/completions",
                "messages",
            )
        try:
            return str(self._tokenizer.hf.get_chat_template(tools=tools or None))
        except ValueError as error:  # several templates, none of them the default
            raise RequestError(f"{error}".splitlines()[0], "messages") from error

    def _knows_developer(self, tools: Sequence[Mapping[str, Any]] | None) -> bool:
        return "developer" in self._template(tools)


def _sources(templates: str | dict[str, str] | None) -> list[str]:
    """A tokenizer's own, which may be several with a name each."""
    return list(templates.values()) if isinstance(templates, dict) else [templates] if templates else []


def fault_of(source: str) -> str | None:
    """The line where a template is no Jinja, and why; None if it can be read. Nothing of it is run."""
    try:
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source)
    except TemplateSyntaxError as error:
        if "unknown tag 'generation'" not in str(
            error.message
        ):  # a tag of transformers' own, which marks an assistant's words
            return f"line {error.lineno}: {error.message}"
    return None


def read_template(path: str) -> str:
    """The template in a file: Jinja text, or JSON with a ``chat_template`` field. Raises ConfigError."""
    source = _read_source(path)
    if (fault := fault_of(source)) is not None:
        raise ConfigError(f"{path} is no Jinja template: {fault}", "--chat-template")
    return source


def _read_source(path: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{path} can't be read ({error})", "--chat-template") from error
    if not path.endswith(".json"):
        return text
    try:
        source = json.loads(text)["chat_template"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no JSON object with a chat_template", "--chat-template") from error
    return str(source)


def _message(message: Message, index: int, knows_developer: bool) -> dict[str, Any]:
    field = f"messages[{index}]"
    role = message.get("role")
    if role not in ROLES:
        raise RequestError(f"role must be one of {', '.join(ROLES)}, not {role!r}", f"{field}.role")
    told = {name: value for name, value in message.items() if value is not None and value != []}
    message = {name: value for name, value in told.items() if name not in SENT_BACK}
    _check_known(message, FIELDS, field, "a message")
    # OpenAI renamed system to developer; few templates have followed.
    role = "system" if role == "developer" and not knows_developer else role
    result = {**message, "role": role, "content": _content(message.get("content"), f"{field}.content")}
    calls = message.get("tool_calls")
    if calls is not None:
        if not isinstance(calls, Sequence) or isinstance(calls, str):
            raise RequestError("tool_calls must be a list", f"{field}.tool_calls")
        result["tool_calls"] = [_tool_call(call, f"{field}.tool_calls[{i}]") for i, call in enumerate(calls)]
    return result


def _content(content: object, field: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise RequestError("content must be a string or a list of text parts", field)
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise RequestError(f"only text parts are supported, not {kind!r}", f"{field}[{i}].type")
        if not isinstance(part.get("text"), str):
            raise RequestError("a text part needs its text, a string", f"{field}[{i}].text")
        _check_known(part, PART_FIELDS, f"{field}[{i}]", "a text part")
        texts.append(part["text"])
    return "\n".join(texts)


def _tool_call(call: object, field: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise RequestError("a tool call needs a function with name and arguments", f"{field}.function")
    call = {name: value for name, value in call.items() if name not in SENT_BACK}
    _check_known(call, CALL_FIELDS, field, "a tool call")
    _check_known(function, FUNCTION_FIELDS, f"{field}.function", "a tool call's function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except ValueError as error:
            raise RequestError(f"arguments must be JSON: {error}", f"{field}.function.arguments") from error
    return {**call, "function": {**function, "arguments": arguments}}


def _check_known(given: Mapping[str, Any], known: frozenset[str], field: str, what: str) -> None:
    """Raises RequestError for what would be ignored in silence."""
    if unknown := sorted(str(name) for name, value in given.items() if value is not None and name not in known):
        raise RequestError(f"unknown field {unknown[0]} in {what}", f"{field}.{unknown[0]}")
