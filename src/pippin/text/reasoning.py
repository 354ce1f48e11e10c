"""Reasoning, told apart from the answer: the families that think between tags. Harmony's is in ``tools.harmony``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from pippin.text.parts import Reasoning, Text
from pippin.text.scan import Parser, Scan, Source, literal, plain, space


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """Where a model's reasoning begins and ends.

    ``always``: an answer begins with reasoning even where neither it nor the prompt says so. ``closes`` is what ends
    reasoning that has gone on for long enough, if not ``end`` and an empty line.
    """

    name: str
    begin: str
    end: str
    always: bool = False
    closes: str | None = None

    @property
    def closing(self) -> str:
        return self.closes or f"\n{self.end}\n\n"

    @property
    def markers(self) -> tuple[str, ...]:
        return (self.begin, self.end)

    def parser(self, prompt: str, also_end: Sequence[str] = ()) -> Parser:
        """``prompt`` is the text before the answer; ``also_end`` are markers that end reasoning and stay unread."""
        return Parser(partial(split, format=self, thinking=self.thinks(prompt), also_end=tuple(also_end)))

    def thinks(self, prompt: str) -> bool:
        """Whether an answer to this prompt begins with reasoning: the template wrote the tag already.

        Of an answer that is to be continued, the prompt is what there is of it.
        """
        text = prompt.rstrip()
        if text.lstrip().startswith(self.begin) and self.end not in text:
            return True
        return text.endswith(self.begin.rstrip()) or (self.always and not text.endswith(self.end.rstrip()))


def split(source: Source, format: ReasoningFormat, thinking: bool, also_end: tuple[str, ...]) -> Scan[None]:
    """Reasoning parts up to the end tag, then text. White space at the border belongs to neither."""
    if not thinking:
        source.mark()
        yield from space(source)
        if (yield from literal(source, format.begin)) is None:
            if blank := source.since_mark():
                yield Text(blank)
            yield from plain(source, ())
            return
        source.since_mark()
    elif (yield from space(source)):
        yield from literal(source, format.begin)  # some models repeat what the prompt had
    yield from space(source)
    found = yield from plain(source, (format.end, *also_end), Reasoning)
    if found in also_end:
        yield Text(found)
    else:
        yield from space(source)
    yield from plain(source, ())


FINAL = "<|end|><|start|>assistant<|channel|>final<|message|>"
THINK = ("<think>", "</think>")

FORMATS: Mapping[str, ReasoningFormat] = {
    format.name: format
    for format in (
        ReasoningFormat("qwen3", *THINK),
        ReasoningFormat("deepseek-r1", *THINK, always=True),
        ReasoningFormat("kimi", "◁think▷", "◁/think▷"),
        ReasoningFormat("mistral", "[THINK]", "[/THINK]"),
        ReasoningFormat("gemma4", "<|channel>thought", "<channel|>"),
        ReasoningFormat("longcat", "<longcat_think>", "</longcat_think>"),
        ReasoningFormat("seed-oss", "<seed:think>", "</seed:think>"),
        ReasoningFormat("kimi_k3", "<|open|>think<|sep|>", "<|close|>think<|sep|>"),
        ReasoningFormat("gpt-oss", "<|channel|>analysis<|message|>", "<|end|>", closes=FINAL),
    )
}

# What SGLang calls the same formats.
ALIASES: Mapping[str, str] = {
    "deepseek-v3": "qwen3", "deepseek-v31": "qwen3", "deepseek-v32": "qwen3", "glm45": "qwen3", "kimi_k2": "qwen3",
    "nemotron_3": "qwen3", "interns1": "qwen3", "hunyuan": "qwen3", "mimo": "qwen3", "harmony": "gpt-oss",
    "qwen3-thinking": "deepseek-r1", "minimax": "deepseek-r1", "step3": "deepseek-r1",
}  # fmt: skip


def format_named(name: str) -> ReasoningFormat | None:
    """The format of that name, or of that name in SGLang."""
    return FORMATS.get(ALIASES.get(name, name))


def format_of(template: str) -> ReasoningFormat | None:
    """The format that a chat template has the tags of; None if it has none."""
    if "<|channel|>" in template and "<|message|>" in template:
        return FORMATS["gpt-oss"]
    return next((f for f in FORMATS.values() if f.end in template and not f.always), None)
