"""Calls that a grammar sees to: a ``tool_choice`` that forces one, and strict tools; and grammars behind reasoning."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pippin.errors import RequestError
from pippin.grammar.tools import HERMES, ToolMarkup, tool_arguments, tool_grammar
from pippin.text.reasoning import ReasoningFormat
from pippin.text.reply import HARMONY
from pippin.text.tools import FORMATS, ToolFormat
from pippin.text.tools.named_formats import (
    CALL_BEGIN,
    CALL_END,
    CALLS_BEGIN,
    CALLS_END,
    KIMI_ARGUMENTS,
    KIMI_BEGIN,
    KIMI_END,
    SECTION_BEGIN,
    SECTION_END,
    SEP,
)
from pippin.text.tools.offered import Offered
from pippin.types import Grammar

JSON = ToolMarkup('{"name": "{name}", "arguments": ', "}", '{"name": "')

# Formats whose arguments are JSON. A call that is forced in another one is written as plain JSON.
MARKUPS: Mapping[str, ToolMarkup] = {
    "qwen": HERMES,
    "llama3": ToolMarkup('{"name": "{name}", "parameters": ', "}", '{"name": "', "; "),
    "mistral": ToolMarkup('[TOOL_CALLS][{"name": "{name}", "arguments": ', "}]", "[TOOL_CALLS]", ""),
    "deepseekv3": ToolMarkup(
        f"{CALLS_BEGIN}{CALL_BEGIN}{{name}}{SEP}", f"{CALL_END}{CALLS_END}", CALLS_BEGIN, ""
    ),
    "kimi_k2": ToolMarkup(
        f"{SECTION_BEGIN}{KIMI_BEGIN}functions.{{name}}:0{KIMI_ARGUMENTS}",
        f"{KIMI_END}{SECTION_END}",
        SECTION_BEGIN,
        "",
    ),
    "gpt-oss": ToolMarkup(
        "<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>",
        "<|call|>",
        "<|channel|>commentary to=",
        "<|start|>assistant",
    ),
    "phi4": ToolMarkup(
        '<|tool_call|>[{"name": "{name}", "arguments": ', "}]<|/tool_call|>", "<|tool_call|>", ""
    ),
    "json": JSON,
}  # fmt: skip
IN_TAGS = ("qwen3_coder", "glm")
"""Formats whose arguments are no JSON, and whose calls stand between BEGIN and END."""
BEGIN, END = "<tool_call>", "</tool_call>"
FINAL = {"type": "const_string", "value": "<|channel|>final<|message|>"}
MISTRAL_V11 = ToolMarkup("[TOOL_CALLS]{name}[ARGS]", "", "[TOOL_CALLS]", "")


def forced_calls(
    format: ToolFormat, template: str, offered: Offered, choice: str | tuple[str], parallel: bool
) -> tuple[Grammar | None, ToolFormat]:
    """The grammar that sees to an answer's calls, if there must be one, and the format that they are written in.

    Raises RequestError for strict tools in a format whose arguments are no JSON.
    """
    markup = markup_of(format, template)
    if choice == "auto":
        if not offered.strict:
            return None, format
        if markup is None:
            raise RequestError(
                f"strict tools are not supported in this model's format of calls ({format.name})", "tools"
            )
        return tool_grammar(offered.functions, markup, parallel=parallel), format
    if markup is None:
        markup, format = JSON, FORMATS["json"]
    functions = [f for f in offered.functions if choice == "required" or f["name"] in choice]
    parallel = parallel and choice == "required"
    return tool_grammar(functions, markup, required=True, parallel=parallel), format


def markup_of(format: ToolFormat, template: str) -> ToolMarkup | None:
    """How the format writes a call, if its arguments are JSON."""
    return MISTRAL_V11 if format.name == "mistral" and "[ARGS]" in template else MARKUPS.get(format.name)


def calls_or(answer: Grammar, format: ToolFormat, template: str, offered: Offered, parallel: bool) -> Grammar:
    """The grammar of answers that are calls, or words as ``answer`` says: both were asked for, and the model chooses.

    Raises RequestError for a format whose calls it can't describe.
    """
    markup = markup_of(format, template)
    if markup is not None and markup.begin.startswith("{"):
        calls = one_of([as_json(function, markup) for function in offered.functions], markup.separator, parallel)
    elif markup is not None:
        calls = as_format(tool_grammar(offered.functions, markup, required=True, parallel=parallel, loose=True))
    elif format.name in IN_TAGS:
        calls = one_of([{"begin": BEGIN, "content": {"type": "any_text"}, "end": END}], "\n", parallel)
    else:
        raise RequestError(
            f"{answer.field} beside tools is not supported in this model's format of calls ({format.name}); "
            "leave one of them out, or send a tool_choice other than auto",
            answer.field,
        )
    words = as_format(answer)
    if format.name == HARMONY:
        words = {"type": "sequence", "elements": [FINAL, words]}
    return structural({"type": "or", "elements": [calls, words]}, answer.field)


def one_of(tags: Sequence[Any], separator: str, parallel: bool) -> Any:
    """One of the tags, or several if ``parallel``."""
    shape = {"type": "tags_with_separator", "separator": separator, "tags": tags}
    return shape | {"at_least_one": True, "stop_after_first": not parallel}


def as_json(function: Mapping[str, Any], markup: ToolMarkup) -> Any:
    """A call that is JSON and nothing else: its text and another JSON's begin alike, so that both must be schemas."""
    arguments = tool_arguments(function, bool(function.get("strict")))
    names = [name for name in ("$defs", "definitions") if name in arguments]
    key = "parameters" if '"parameters"' in markup.begin else "arguments"
    schema = {
        "type": "object",
        "properties": {
            "name": {"const": function["name"]},
            key: {k: v for k, v in arguments.items() if k not in names},
        },
        "required": ["name", key],
        "additionalProperties": False,
        **{name: arguments[name] for name in names},  # what $ref refers to, from the root
    }
    return {"begin": "", "content": {"type": "json_schema", "json_schema": schema}, "end": ""}


def structural(shape: Any, field: str) -> Grammar:
    return Grammar("structural_tag", json.dumps({"type": "structural_tag", "format": shape}), field)


def after_reasoning(grammar: Grammar, format: ReasoningFormat, prompt: str, calls: bool) -> Grammar:
    """The grammar of answers that reason first, and then are what ``grammar`` says: ``calls``, or words.

    A prompt may have begun the reasoning; if it hasn't, the model may, unless the prompt ended it.
    """
    thinks = format.thinks(prompt)
    if not thinks and prompt.rstrip().endswith(format.end.rstrip()):
        return grammar
    begin = "" if thinks else format.begin
    reasoning = {"type": "tag", "begin": begin, "content": {"type": "any_text"}, "end": format.end}
    between: Any = {"type": "regex", "pattern": r"\s*"}
    answer = as_format(grammar)
    if format.name == HARMONY:
        between = {"type": "const_string", "value": "<|start|>assistant"}
        if not calls:
            answer = {"type": "sequence", "elements": [FINAL, answer]}
    shape: Any = {"type": "sequence", "elements": [reasoning, between, answer]}
    if not thinks:
        shape = {"type": "or", "elements": [shape, answer]}
    return structural(shape, grammar.field)


def as_format(grammar: Grammar) -> Any:
    """A grammar as a part of a structural tag."""
    match grammar.kind:
        case "json_schema":
            return {"type": "json_schema", "json_schema": json.loads(grammar.text)}
        case "json_object":
            return {"type": "json_schema", "json_schema": {"type": "object"}}
        case "regex":
            return {"type": "regex", "pattern": grammar.text}
        case "grammar":
            return {"type": "grammar", "grammar": grammar.text}
        case "choice":
            choices = [{"type": "const_string", "value": choice} for choice in json.loads(grammar.text)]
            return {"type": "or", "elements": choices}
    tag = json.loads(grammar.text)
    if "format" not in tag:
        raise RequestError("a structural tag behind reasoning needs the newer spelling, with a format", grammar.field)
    return tag["format"]
