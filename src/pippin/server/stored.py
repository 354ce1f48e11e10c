"""Responses that are kept: looked at, listed, deleted. What a query may hold is as strict as a body.

Source: OpenAI's Responses API.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from pippin.errors import RequestError
from pippin.server.http import JsonResponse, read_query
from pippin.server.protocol import Body, Json
from pippin.server.service import Service
from pippin.server.store import Stored


class RetrieveQuery(Body, kw_only=True):
    """GET /v1/responses/{id}: a response is whole when it is kept, with all that it was asked to include."""

    ignored: ClassVar = {}
    neutral: ClassVar = {"stream": ("false",), "starting_after": (), "include": (), "include_obfuscation": ("false",)}


class ItemsQuery(Body, kw_only=True):
    """GET /v1/responses/{id}/input_items. ``after`` is the id of the last item that is known already."""

    limit: Annotated[int, msgspec.Meta(ge=1, le=100)] = 20
    order: Literal["asc", "desc"] = "desc"
    after: str | None = None

    ignored: ClassVar = {}
    neutral: ClassVar = {"include": ()}


async def retrieve(service: Service, http: Request) -> Response:
    """GET /v1/responses/{id}."""
    read_query(http, RetrieveQuery)
    return JsonResponse(stored(service, http.path_params["id"]).response)


async def delete(service: Service, http: Request) -> Response:
    """DELETE /v1/responses/{id}."""
    id = http.path_params["id"]
    if not service.responses.delete(id):
        raise missing(id)
    return JsonResponse({"id": id, "object": "response", "deleted": True})


async def cancel(service: Service, http: Request) -> Response:
    """POST /v1/responses/{id}/cancel: refused, since only responses in the background can be."""
    stored(service, http.path_params["id"])
    raise RequestError("only a response in the background can be cancelled, and this one is complete", "response_id")


async def input_items(service: Service, http: Request) -> Response:
    """GET /v1/responses/{id}/input_items: what the response was asked with, newest first unless ``order`` is asc."""
    query = read_query(http, ItemsQuery)
    items = stored(service, http.path_params["id"]).items
    left = items_after(items[::-1] if query.order == "desc" else items, query.after)
    page = left[: query.limit]
    ids = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
    return JsonResponse({"object": "list", "data": page, "has_more": len(left) > len(page), **ids})


def items_after(items: list[Json], id: str | None) -> list[Json]:
    if id is None:
        return items
    for i, item in enumerate(items):
        if item["id"] == id:
            return items[i + 1 :]
    raise RequestError(f"there is no item {id!r} in this response's input", "after")


def stored(service: Service, id: str) -> Stored:
    found = service.responses.get(id)
    if found is None:
        raise missing(id)
    return found


def missing(id: str, field: str = "response_id", status: int = 404) -> RequestError:
    return RequestError(f"there is no response {id!r}: it was never stored, or is forgotten", field, status)
