"""Writes docs/compatibility.md: every field of every endpoint, and what becomes of it."""

from __future__ import annotations

from pathlib import Path

import msgspec

from pippin.server.app import ROUTES
from pippin.server.native import NOT_HERE
from pippin.server.ollama import Options
from pippin.server.protocol import Body

PAGE = Path(__file__).resolve().parent.parent / "docs" / "compatibility.md"

HEAD = """# Compatibility

Every field of every endpoint: supported, refused with a 400 that names it, or accepted without effect for the reason
given. Nothing else is taken, and nothing is ignored in silence: a field that is not in these tables is an unknown
field, and refused. What a supported field does is in [api.md](api.md), [tools.md](tools.md) and
[structured-output.md](structured-output.md). `make docs` writes this page from the code that reads requests; tests
compare it with that code, and the code with every field that the official clients can send.
"""

TAIL = """
## What a server of text does not do

Answered with a 400 that says why:

"""


def bodies() -> dict[type[Body], list[str]]:
    """Each kind of request with the paths that take it."""
    found: dict[type[Body], list[str]] = {}
    for method, path, _, body in ROUTES:
        if body is not None:
            found.setdefault(body, []).append(f"{method} {path}")
    return found


def render() -> str:
    parts = [HEAD]
    for body, paths in bodies().items():
        parts += [f"\n## {paths[0]}\n\n", *also(paths[1:]), table(body)]
    parts += ["\n## options of Ollama's requests\n\n", table(Options), TAIL]
    parts += [f"- {reason}: {', '.join(f'`{path}`' for path in paths)}\n" for reason, paths in NOT_HERE.items()]
    return "".join(parts)


def also(paths: list[str]) -> list[str]:
    return [f"Also {', '.join(f'`{path}`' for path in paths)}.\n\n"] if paths else []


def table(body: type[Body]) -> str:
    fields = msgspec.structs.fields(body)
    names = {field.encode_name for field in fields}
    rows = [(f.encode_name, "supported, required" if f.required else "supported") for f in fields]
    rows += [(name, refused(values)) for name, values in body.neutral.items() if name not in names]
    rows += [(name, f"no effect: {reason}") for name, reason in body.ignored.items() if name not in names]
    return "| field | |\n|---|---|\n" + "".join(f"| `{name}` | {what} |\n" for name, what in sorted(rows))


def refused(values: tuple[object, ...]) -> str:
    if not values:
        return "refused"
    return "refused, but for " + ", ".join(f"`{msgspec.json.encode(value).decode()}`" for value in values)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
