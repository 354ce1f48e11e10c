"""Formats that mlx-lm knows: a call is read whole, by mlx-lm's own parser, then sent.

Its parsers are files without dependencies on MLX, and are loaded as such: importing ``mlx_lm`` itself would load MLX
into the HTTP process.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pippin.text.parts import CallBroken, Part
from pippin.text.scan import Scan, Source, capture, plain, space
from pippin.text.tools.calls import whole
from pippin.text.tools.offered import Offered

# Where a format's calls begin and end: mlx-lm has them too, but the table of formats must not load its files.
MARKERS: Mapping[str, tuple[str, str]] = {
    "function_gemma": ("<start_function_call>", "<end_function_call>"),
    "gemma4": ("<|tool_call>", "<tool_call|>"),
    "kimi_k3": ("<|open|>tools<|sep|>", "<|close|>tools<|sep|>"),
    "longcat": ("<longcat_tool_call>", "</longcat_tool_call>"),
    "minimax_m2": ("<minimax:tool_call>", "</minimax:tool_call>"),
    "muse_spark": ("<atem:function_calls>", "</atem:function_calls>"),
}

Read = Callable[[str, list[dict[str, Any]]], Any]


@cache
def reader(name: str) -> Read:
    """mlx-lm's ``parse_tool_call`` of a format: a call's text and the tools to one dict or several."""
    package = importlib.util.find_spec("mlx_lm")
    assert package is not None
    assert package.submodule_search_locations is not None
    path = Path(package.submodule_search_locations[0]) / "tool_parsers" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"pippin_mlx_lm_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    read: Read = module.parse_tool_call
    return read


def from_mlx_lm(name: str) -> Callable[[Source, Offered], Scan[None]]:
    """The scan of one of ``MARKERS``."""
    begin, end = MARKERS[name]

    def scan(source: Source, tools: Offered) -> Scan[None]:
        while (yield from plain(source, (begin,))) is not None:
            text, found = yield from capture(source, (end,))
            parts = calls(name, text, tools) if found else None
            yield from parts or [CallBroken(begin + text + (found or ""))]
            if parts:
                yield from space(source)

    return scan


def calls(name: str, text: str, tools: Offered) -> list[Part] | None:
    """A text's calls; None if it holds none, or one of a tool that isn't offered."""
    try:
        found = reader(name)(text, tools.list)
        entries = found if isinstance(found, list) else [found]
        if not all(e["name"] in tools and isinstance(e["arguments"], dict) for e in entries):
            return None
        return [part for e in entries for part in whole(e["name"], e.get("id"), e["arguments"])]
    except Exception:  # mlx-lm's parsers raise whatever comes up on a text that they don't foresee
        return None
