"""The tools of OpenAI's /v1/responses: functions, functions in namespaces, and what OpenAI's own service would run.

A chat template knows functions only. One of a namespace is shown to the model as ``namespace__name``, and a call of it
has both names again. Searching the web and drawing pictures are tools that agents send along without being asked
(Codex does). No model has to use a tool, so they are left out, and the response says so in ``warnings`` and in
``tools``, where they are missing. Tools that somebody has set up (``file_search``, ``mcp``, …) are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import msgspec
from msgspec import Struct

from pippin.errors import RequestError
from pippin.server.protocol import Json

SEPARATOR = "__"


class FunctionTool(Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="function"):
    name: str
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None


class NamespaceTool(Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="namespace"):
    name: str
    description: str = ""
    tools: tuple[FunctionTool, ...]


class WebSearch(Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="web_search"):
    external_web_access: bool | None = None
    indexed_web_access: bool | None = None
    filters: Json | None = None
    search_context_size: str | None = None
    search_content_types: tuple[str, ...] | None = None
    user_location: Json | None = None

    left_out: ClassVar = "this server can't search the web"


class WebSearch2025(WebSearch, tag="web_search_2025_08_26"):
    pass


class WebSearchPreview(WebSearch, tag="web_search_preview"):
    pass


class WebSearchPreview2025(WebSearch, tag="web_search_preview_2025_03_11"):
    pass


class ImageGeneration(Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="image_generation"):
    action: str | None = None
    background: str | None = None
    input_fidelity: str | None = None
    input_image_mask: Json | None = None
    model: str | None = None
    moderation: str | None = None
    output_compression: int | None = None
    output_format: str | None = None
    partial_images: int | None = None
    quality: str | None = None
    size: str | None = None

    left_out: ClassVar = "this server makes no pictures"


HOSTED = (WebSearch, WebSearch2025, WebSearchPreview, WebSearchPreview2025, ImageGeneration)
Hosted = WebSearch | WebSearch2025 | WebSearchPreview | WebSearchPreview2025 | ImageGeneration
ResponseTool = FunctionTool | NamespaceTool | Hosted


class NamedFunction(Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="function"):
    name: str


class AllowedTools(Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="allowed_tools"):
    mode: Literal["auto", "required"]
    tools: tuple[NamedFunction, ...]


ToolChoice = Literal["none", "auto", "required"] | NamedFunction | AllowedTools


def flat(namespace: str | None, name: str) -> str:
    """What a function is called where there are no namespaces. Some end in the separator already."""
    return name if not namespace else f"{namespace.removesuffix(SEPARATOR)}{SEPARATOR}{name}"


@dataclass(frozen=True, slots=True)
class Named:
    """A function with its namespace, which a client wants back."""

    namespace: str | None
    name: str

    def as_json(self) -> Json:
        return {"name": self.name} | ({"namespace": self.namespace} if self.namespace is not None else {})


class ResponseTools:
    """A request's tools. ``functions`` are for templates; ``told`` and ``warnings`` for the response.

    Raises RequestError if two functions have one name.
    """

    def __init__(self, tools: Sequence[ResponseTool]) -> None:
        self._named: dict[str, Named] = {}
        self.functions: list[Json] = []
        self.warnings: list[Json] = []
        for i, tool in enumerate(tools):
            if isinstance(tool, HOSTED):
                kind = str(msgspec.to_builtins(tool)["type"])
                message = f"{kind} is not offered to the model: {tool.left_out}"
                self.warnings.append({"param": f"tools[{i}]", "message": message})
            else:
                self._take(tool, f"tools[{i}]")
        self.told: list[Any] = [msgspec.to_builtins(tool) for tool in tools if not isinstance(tool, HOSTED)]

    def called(self, name: str) -> Named:
        """What a client calls the function that the model knows by this name."""
        return self._named.get(name) or Named(None, name)

    def names(self, given: str) -> list[str]:
        """The functions, as the model knows them, that a name stands for: its own, or that in its namespace."""
        return [flat for flat, named in self._named.items() if given in (flat, named.name)]

    def chosen(self, choice: ToolChoice) -> tuple[list[Json], str | tuple[str]]:
        """The functions that may be called, and OpenAI's ``tool_choice`` as an Ask has it."""
        if isinstance(choice, str):
            return self.functions, choice
        if isinstance(choice, NamedFunction):
            return self.functions, (self._one(choice.name, "tool_choice"),)
        allowed = {self._one(tool.name, f"tool_choice.tools[{i}]") for i, tool in enumerate(choice.tools)}
        return [f for f in self.functions if f["function"]["name"] in allowed], choice.mode

    def _one(self, given: str, field: str) -> str:
        found = self.names(given)
        if len(found) != 1:
            several = f"{given!r} may be any of {', '.join(found)}" if found else f"there is no tool {given!r}"
            raise RequestError(f"{several} among the tools", field)
        return found[0]

    def _take(self, tool: FunctionTool | NamespaceTool, field: str) -> None:
        for named, function in functions_in(tool):
            known = flat(named.namespace, named.name)
            if known in self._named:
                raise RequestError(f"there is a tool {known!r} already", f"{field}.name")
            self._named[known] = named
            self.functions.append({"type": "function", "function": {"name": known, **function}})


def functions_in(tool: FunctionTool | NamespaceTool) -> Iterator[tuple[Named, Json]]:
    """A tool's functions, and what templates are told of each. The first of a namespace tells what that is for."""
    if isinstance(tool, FunctionTool):
        yield Named(None, tool.name), told_of(tool, "")
        return
    for i, function in enumerate(tool.tools):
        yield Named(tool.name, function.name), told_of(function, "" if i else tool.description)


def told_of(tool: FunctionTool, before: str) -> Json:
    description = "\n\n".join(filter(None, (before, tool.description))) or None
    told = {"description": description, "parameters": tool.parameters, "strict": tool.strict or None}
    return {name: value for name, value in told.items() if value is not None}
