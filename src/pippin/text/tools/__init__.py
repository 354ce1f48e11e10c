"""Formats of tool calls, by SGLang's names, and which one a chat template speaks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pippin.text.scan import Parser, Scan, Source
from pippin.text.tools.harmony import TOKENS, harmony
from pippin.text.tools.json_formats import hermes, json_only, llama3, mistral, phi4
from pippin.text.tools.mlx_formats import MARKERS, from_mlx_lm
from pippin.text.tools.named_formats import CALL_BEGIN, DEEPSEEK, KIMI, KIMI_BEGIN, deepseek, kimi_k2
from pippin.text.tools.offered import Offered
from pippin.text.tools.pythonic import MARKERS as PYTHONIC
from pippin.text.tools.pythonic import pythonic
from pippin.text.tools.xml_formats import deepseek_v32, glm, qwen3_coder


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a model writes calls. ``markers``: where a tokenizer makes one a special token, the parser must see it.

    ``id_length``: calls need ids of so many letters and digits, by the templates.
    """

    name: str
    scan: Callable[[Source, Offered], Scan[None]]
    markers: tuple[str, ...] = ()
    id_length: int | None = None

    def parser(self, tools: Offered) -> Parser:
        return Parser(lambda source: self.scan(source, tools))


TAGS = ("<tool_call>", "</tool_call>")

FORMATS: Mapping[str, ToolFormat] = {
    format.name: format
    for format in (
        ToolFormat("qwen", hermes, TAGS),
        ToolFormat("qwen3_coder", qwen3_coder, TAGS),
        ToolFormat("llama3", llama3, ("<|python_tag|>",)),
        ToolFormat("mistral", mistral, ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"), 9),
        ToolFormat("deepseekv3", deepseek, DEEPSEEK),
        ToolFormat("deepseekv32", deepseek_v32, ("｜DSML｜",)),
        ToolFormat("glm", glm, (*TAGS, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")),
        ToolFormat("kimi_k2", kimi_k2, KIMI),
        ToolFormat("gpt-oss", harmony, TOKENS),
        ToolFormat("pythonic", pythonic, PYTHONIC),
        ToolFormat("phi4", phi4, ("<|tool_call|>", "<|/tool_call|>")),
        ToolFormat("json", json_only),
        *(ToolFormat(name, from_mlx_lm(name), MARKERS[name]) for name in MARKERS),
    )
}

# What SGLang (and mlx-lm) call the same formats.
ALIASES: Mapping[str, str] = {
    "qwen25": "qwen", "hermes": "qwen", "json_tools": "qwen", "interns1": "qwen",
    "deepseekv31": "deepseekv3", "deepseek_v3": "deepseekv3", "deepseek_v31": "deepseekv3",
    "deepseek_v32": "deepseekv32", "glm45": "glm", "glm47": "glm", "laguna": "glm", "lfm2": "pythonic",
    "llama": "llama3", "phi": "phi4", "gemma": "gemma4", "minimax-m2": "minimax_m2", "harmony": "gpt-oss",
    "mimo": "qwen3_coder",
}  # fmt: skip

# Words of a chat template that tell its format; the first line that fits counts.
SPOKEN: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("minimax_m2", ("<minimax:tool_call>",)),
    ("gemma4", ("<|tool_call>", "<tool_call|>")),
    ("function_gemma", ("<start_function_call>",)),
    ("longcat", ("<longcat_tool_call>",)),
    ("muse_spark", ("<atem:function_calls>",)),
    ("kimi_k3", ("<|open|>", "<|sep|>")),
    ("kimi_k2", (KIMI_BEGIN,)),
    ("deepseekv32", ("｜DSML｜",)),
    ("deepseekv3", (CALL_BEGIN,)),
    ("glm", ("<arg_key>",)),
    ("qwen3_coder", ("<function=",)),
    ("gpt-oss", ("<|channel|>", "<|message|>")),
    ("mistral", ("[TOOL_CALLS]",)),
    ("pythonic", ("<|tool_call_start|>",)),
    ("pythonic", ("<|tool_list_start|>",)),
    ("pythonic", ("<|python_start|>",)),
    ("phi4", ("<|/tool_call|>",)),
    ("phi4", ("functools",)),
    ("llama3", ("<|python_tag|>",)),
    ("llama3", ("Environment: ipython",)),
    ("qwen", ("<tool_call>",)),
)


def format_named(name: str) -> ToolFormat | None:
    """The format of that name, or of that name in SGLang."""
    return FORMATS.get(ALIASES.get(name, name))


def format_of(template: str) -> ToolFormat | None:
    """The format that a chat template teaches; None if it has no tools. One with tools in no known format has JSON."""
    for name, words in SPOKEN:
        if all(word in template for word in words):
            return FORMATS[name]
    return FORMATS["json"] if "tools" in template else None
