"""What the engine's process works on, in a file that both processes map: it can still be read when that one is dead.

Three entries: the last two steps, of which one may be queued while the other runs, and a request being taken in.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Sequence
from pathlib import Path

import msgspec

ENTRY = 2**16
"""Bytes of an entry: some thousand ids."""

_HEAD = struct.Struct("<I")
_TOO_MANY = 2**32 - 1
_TAKEN_IN = 2


class Recorder:
    """The writing end, in the engine's process. A write costs microseconds, and no system call."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 3 * ENTRY)
        self._next = 0
        self._encoder = msgspec.msgpack.Encoder()

    def step(self, ids: Sequence[str]) -> None:
        """A step of these requests is about to be queued."""
        self._write(self._next, ids)
        self._next = 1 - self._next

    def take_in(self, *ids: str) -> None:
        """This request is about to be taken in; none when that is done."""
        self._write(_TAKEN_IN, ids)

    def _write(self, entry: int, ids: Sequence[str]) -> None:
        data = self._encoder.encode(ids)
        start = entry * ENTRY
        _HEAD.pack_into(self._map, start, 0)  # nothing, if we die before all is there
        if len(data) > ENTRY - _HEAD.size:
            return _HEAD.pack_into(self._map, start, _TOO_MANY)
        self._map[start + _HEAD.size : start + _HEAD.size + len(data)] = data
        return _HEAD.pack_into(self._map, start, len(data))


class Record:
    """The reading end, made first: ``path`` is a new file."""

    def __init__(self, path: Path) -> None:
        with path.open("x+b") as file:
            file.truncate(3 * ENTRY)
            self._map = mmap.mmap(file.fileno(), 3 * ENTRY)

    def read(self) -> frozenset[str] | None:
        """Ids of what the process worked on; None if it doesn't say."""
        taken_in = self._entry(_TAKEN_IN)
        if taken_in:
            return frozenset(taken_in)
        steps = [self._entry(entry) for entry in (0, 1)]
        return None if None in steps else frozenset(id for step in steps for id in step or ()) or None

    def close(self) -> None:
        self._map.close()

    def _entry(self, entry: int) -> list[str] | None:
        start = entry * ENTRY
        (size,) = _HEAD.unpack_from(self._map, start)
        if size == _TOO_MANY:
            return None
        data = self._map[start + _HEAD.size : start + _HEAD.size + size]
        return msgspec.msgpack.decode(data, type=list[str]) if size else []
