"""Tool calls as grammars: what a strict tool schema, or a tool choice of "required", makes of an answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pippin.types import Grammar


@dataclass(frozen=True, slots=True)
class ToolMarkup:
    """How a model family writes a call: ``begin``, the arguments as JSON, ``end``.

    ``{name}`` in ``begin`` and ``end`` stands for the tool's name. ``trigger`` is how every ``begin`` begins: free text
    ends where the model writes it. ``separator`` stands between calls where a call must be made.
    """

    begin: str
    end: str
    trigger: str
    separator: str = "\n"


HERMES = ToolMarkup('<tool_call>\n{"name": "{name}", "arguments": ', "}\n</tool_call>", "<tool_call>")
"""Hermes 2 Pro's, and Qwen's."""


def tool_grammar(
    tools: Sequence[Mapping[str, Any]],
    markup: ToolMarkup,
    *,
    required: bool = False,
    parallel: bool = True,
    strict: bool = False,
    loose: bool = False,
    field: str = "tools",
) -> Grammar:
    """The grammar of answers that call any of ``tools``, OpenAI's functions (``name``, ``parameters``, ``strict``).

    ``required``: the answer is one call, or several if ``parallel``, and nothing else. Otherwise it is free text, in
    which every call is well-formed. ``strict``: arguments follow each tool's schema, whether or not it says ``strict``;
    otherwise those of tools that don't are any JSON object; with ``required`` they follow it, unless ``loose``. Schemas
    are checked where the grammar is compiled.
    """
    tags = [
        {
            "type": "tag",
            "begin": markup.begin.replace("{name}", str(tool["name"])),
            "content": {"type": "json_schema", "json_schema": tool_arguments(tool, strict or (required and not loose))},
            "end": markup.end.replace("{name}", str(tool["name"])),
        }
        for tool in tools
    ]
    shape: dict[str, Any] = {"tags": tags, "at_least_one": required, "stop_after_first": not parallel}
    if required:
        shape |= {"type": "tags_with_separator", "separator": markup.separator}
    else:
        shape |= {"type": "triggered_tags", "triggers": [markup.trigger]}
    return Grammar("structural_tag", json.dumps({"type": "structural_tag", "format": shape}), field)


def tool_arguments(tool: Mapping[str, Any], strict: bool) -> Any:
    """A tool's schema for its arguments; any object if it has none, or need not be kept to."""
    schema = tool.get("parameters") if strict or tool.get("strict") else None
    return schema or {"type": "object"}
