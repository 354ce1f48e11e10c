"""Blocks that threads read from files into memory that the device takes them from. Plain Python and numpy."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt

from pippin.cache.disk import BlockFiles, Rows
from pippin.types import Token

PLACES = 24
"""For blocks that are read and not in the pool yet, of all requests."""

_READERS = 4


class Place:
    """Room for a block, free again when nobody refers to this."""

    __slots__ = ("_free", "index")

    def __init__(self, free: list[int]) -> None:
        self._free, self.index = free, free.pop()

    def __del__(self) -> None:
        self._free.append(self.index)


@dataclass(frozen=True, slots=True)
class Block:
    """What was read: where layers that see everything are, and the arrays of windowed ones where they are needed."""

    place: Place
    windowed: list[Rows] | None = None


class BlockReads:
    """Reads ``files`` into ``memory`` uint8 [places, bytes]; whoever asks for what is being read gets the same."""

    def __init__(self, files: BlockFiles, memory: npt.NDArray[np.uint8]) -> None:
        self.memory = memory
        self.free = [*range(len(memory))]
        self._files = files
        self._reads: WeakValueDictionary[tuple[bytes, ...], Future[Block | None]] = WeakValueDictionary()
        self._readers = ThreadPoolExecutor(_READERS, "kv-disk-read")

    def ask(self, keys: tuple[bytes, ...], tokens: list[Token]) -> Future[Block | None] | None:
        """The block of ``tokens`` from its one file or two, or from neither; None while there is no place for it."""
        read = self._reads.get(keys)
        if read is None and self.free:
            self._reads[keys] = read = self._readers.submit(self._read, keys, tokens, Place(self.free))
        return read

    def close(self) -> None:
        """Waits for what is being read."""
        self._readers.shutdown(cancel_futures=True)

    def _read(self, keys: tuple[bytes, ...], tokens: list[Token], place: Place) -> Block | None:
        """Runs in a reader's thread."""
        if self._files.read(keys[0], tokens, self.memory[place.index]) is None:
            return None
        windowed = self._files.read(keys[1], tokens) if len(keys) > 1 else None
        return None if len(keys) > 1 and windowed is None else Block(place, windowed)
