"""Responses that were sent, for ``previous_response_id``: in memory, and no more than so many."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import msgspec

from pippin.server.protocol import Json


@dataclass(frozen=True, slots=True)
class Stored:
    """A response as it was sent, its input's items, and the whole conversation as messages."""

    response: Json
    items: list[Json]
    messages: list[Json]


class Store:
    """Responses by id: the ``most`` that were used last, and no more than ``most_bytes`` of JSON."""

    def __init__(self, most: int = 1000, most_bytes: int = 64 * 2**20) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._kept: OrderedDict[str, tuple[Stored, int]] = OrderedDict()
        self._size = 0

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, stored: Stored) -> None:
        size = len(msgspec.json.encode([stored.response, stored.items, stored.messages]))
        self._kept[stored.response["id"]] = (stored, size)
        self._size += size
        while self._kept and (len(self._kept) > self._most or self._size > self._most_bytes):
            _, (_, freed) = self._kept.popitem(last=False)
            self._size -= freed

    def get(self, id: str) -> Stored | None:
        if id not in self._kept:
            return None
        self._kept.move_to_end(id)
        return self._kept[id][0]

    def delete(self, id: str) -> bool:
        found = self._kept.pop(id, None)
        self._size -= found[1] if found else 0
        return found is not None
