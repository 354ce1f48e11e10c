"""Writes docs/compatibility.md: every field of every endpoint, and what becomes of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
from msgspec import inspect

from pippin.server.app import ROUTES
from pippin.server.native import NOT_HERE
from pippin.server.ollama import Options
from pippin.server.protocol import Body, ChatRequest
from pippin.server.response_tools import HOSTED
from pippin.server.responses import ITEM_FIELDS, PromptRequest, ResponsesRequest
from pippin.server.stored import ItemsQuery, RetrieveQuery
from pippin.text import chat

PAGE = Path(__file__).resolve().parent.parent / "docs" / "compatibility.md"

HEAD = """# Compatibility

Every field of every endpoint: supported, refused with a 400 that names it, accepted without effect for the reason
given, or left out with a word about it in the response. Nothing else is taken, and nothing is ignored in silence: a
field that is not in these tables is an unknown field, and refused. What a supported field does is in
[api.md](api.md), [tools.md](tools.md) and [structured-output.md](structured-output.md). `make docs` writes this page
from the code that reads requests; tests compare it with that code, and the code with every field that the official
clients can send.
"""

TAIL = """
## What a server of text does not do

Answered with a 400 that says why:

"""


QUERIES: dict[str, type[Body]] = {
    "GET /v1/responses/{id}": RetrieveQuery,
    "GET /v1/responses/{id}/input_items": ItemsQuery,
}
"""What may stand behind a path."""

ITEMS: dict[str, Iterable[str]] = {f"input[] ({kind})": names for kind, names in ITEM_FIELDS.items()}
BY_HAND: dict[type[Body], dict[str, Iterable[str]]] = {
    ChatRequest: {
        "messages[]": chat.FIELDS | chat.SENT_BACK,
        "messages[].content[]": chat.PART_FIELDS,
        "messages[].tool_calls[]": chat.CALL_FIELDS | chat.SENT_BACK,
        "messages[].tool_calls[].function": chat.FUNCTION_FIELDS,
    },
    ResponsesRequest: ITEMS,
    PromptRequest: ITEMS,
}
"""Objects without types of their own."""

NO_EFFECT = {
    "cache_control": "every prompt is cached",
    "include_obfuscation": "nothing is padded",
    "eager_input_streaming": "arguments are streamed as they come",
    "caller": "told by us, sent back",
    "signature": "told by us, sent back",
    "phase": "told by OpenAI's models, sent back",
    "status": "told by us, sent back",
    "provider_specific_fields": "litellm's notes on an answer, sent back",
    "annotations": "quotations by OpenAI's models, sent back",
    "refusal": "told by OpenAI's models, sent back",
    "reasoning.summary": "reasoning is given whole",
    "reasoning.generate_summary": "reasoning is given whole",
}
"""Fields of objects inside, wherever they are."""


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
    for path, query in QUERIES.items():
        parts += [f"\n## Behind {path}?\n\n", table(query)]
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
    rows += sorted({*inside(inspect.type_info(body), ""), *by_hand(body)})
    rows += [(name, f"no effect: {reason}") for name, reason in body.ignored.items() if name not in names]
    return "| field | |\n|---|---|\n" + "".join(f"| `{name}` | {told} |\n" for name, told in sorted(rows))


def inside(found: inspect.Type, path: str) -> Iterator[tuple[str, str]]:
    """The fields of the objects in a body, each with its place."""
    match found:
        case inspect.StructType() if found.cls in HOSTED:
            yield f"{path} ({found.tag})", f"left out, which `warnings` of the response says: {found.cls.left_out}"
        case inspect.StructType():
            if found.tag_field:
                yield f"{path}.{found.tag_field}", "supported, required"
            for field in found.fields:
                place = f"{path}.{field.encode_name}" if path else field.encode_name
                if path:
                    known = not isinstance(field.type, inspect.NoneType)
                    yield place, what(place, field.required) if known else refused(())
                yield from inside(field.type, place)
        case inspect.UnionType():
            for part in found.types:
                yield from inside(part, path)
        case inspect.ListType() | inspect.VarTupleType():
            yield from inside(found.item_type, f"{path}[]")


def by_hand(body: type[Body]) -> Iterator[tuple[str, str]]:
    for path, names in BY_HAND.get(body, {}).items():
        yield from ((f"{path}.{name}", what(f"{path}.{name}", False)) for name in names)


def what(place: str, required: bool) -> str:
    for name, reason in NO_EFFECT.items():
        if place.endswith(f".{name}") or place == name:
            return f"no effect: {reason}"
    return "supported, required" if required else "supported"


def refused(values: tuple[object, ...]) -> str:
    if not values:
        return "refused"
    return "refused, but for " + ", ".join(f"`{msgspec.json.encode(value).decode()}`" for value in values)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
