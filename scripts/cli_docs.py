"""Writes the option tables of docs/cli.md from pippin.config; ``--check`` only says whether they are current.

A table stands between ``<!-- options: NAME -->`` and ``<!-- end -->``, where NAME is a class of pippin.config.
"""

from __future__ import annotations

import re
import sys
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from pippin import config
from pippin.bench.options import KernelOptions, OfflineOptions, OneBatchOptions
from pippin.bench.serving_options import DatasetOptions, LoadOptions, TargetOptions
from pippin.config import ConvertOptions, EngineConfig, SamplingOptions, ServerConfig, flag_of

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
BENCH = (OneBatchOptions, OfflineOptions, KernelOptions, TargetOptions, LoadOptions, DatasetOptions)
CLASSES: dict[str, type[Any]] = {
    c.__name__: c for c in (EngineConfig, ServerConfig, SamplingOptions, ConvertOptions, *BENCH)
}
TABLE = re.compile(r"(<!-- options: (\w+) -->\n).*?(<!-- end -->)", re.S)


def render(page: str) -> str:
    """The page with its tables made anew."""
    return TABLE.sub(lambda m: m[1] + table(CLASSES[m[2]]) + m[3], page)


def table(options: type[Any]) -> str:
    rows = [row(field) for field in fields(options)]
    return "\n".join(["| option | default | |", "|---|---|---|", *rows, ""])


def row(field: Field[Any]) -> str:
    names = [flag_of(field.name), *filter(None, [field.metadata["flag"]])]
    spelled = ", ".join(f"`{name}`" for name in names)
    choices = field.metadata["choices"]
    text = field.metadata["help"].replace("|", "\\|")
    if choices:
        text += " One of " + ", ".join(f"`{choice}`" for choice in choices) + "."
    return f"| {spelled} | {default(field)} | {text} |"


def default(field: Field[Any]) -> str:
    if field.default is None:
        return ""
    return "off" if field.default is False else f"`{field.default}`"


def main() -> int:
    page = PAGE.read_text()
    made = render(page)
    if made == page:
        return 0
    if "--check" in sys.argv[1:]:
        print(f"{PAGE.name} does not say what {config.__name__} says: run `make docs`", file=sys.stderr)
        return 1
    PAGE.write_text(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
