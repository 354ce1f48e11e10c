"""K and V of prefixes in files: what they are called, what is in them, and how long they stay. Plain Python and numpy.

A file holds BLOCK tokens in all layers. Its name is a hash of all that they depend on: the model's weights, how the
engine stores K and V, and every token up to the last of the block. So a file never changes, two servers that write one
write the same, and what is found under a name is right or broken; a checksum over everything says which. Files appear
by renaming, complete or not at all; the time of last use is the file's own time of modification.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from pippin.errors import ConfigError
from pippin.types import Token

log = logging.getLogger(__name__)

FORMAT = 2
"""2: the checksum is XXH3's, of 128 bits; it was BLAKE2b's, which took longer than all else."""

BLOCK = 64
"""Tokens of a file; a multiple of every page size that divides it."""

LEAST_BLOCKS = 64
"""Fewest files that there must be room for: what is left free for other servers is counted in parts of the whole."""

MAGIC = b"pippinkv"
_SUFFIX, _OUTDATED = ".kv2", (".kv",)  # by format
_DIGEST = 16
_SLACK = 32  # a server looks at the directory again after writing 1/32 of the bound; 2/32 are left free
_PAUSE = 30.0  # seconds without writing after the disk refused

Rows = npt.NDArray[np.generic]
Open = Callable[[Path], BinaryIO]


class Header(msgspec.Struct, frozen=True):
    """What a file says of itself: tokens of the block, and shape and numpy dtype of each array [tokens, …]."""

    format: int
    key: str
    tokens: list[int]
    arrays: list[tuple[str, tuple[int, ...]]]


def root_key(facts: Iterable[str]) -> bytes:
    """The key of the empty prefix, for a model and an engine of which ``facts`` say everything that K and V hang on."""
    return blake2b("\0".join([f"format {FORMAT}", f"block {BLOCK}", *facts]).encode(), digest_size=32).digest()


def block_keys(root: bytes, tokens: Sequence[Token], count: int) -> list[bytes]:
    """The keys of the first ``count`` blocks of a sequence; each hangs on all tokens before."""
    data = np.array(tokens[: count * BLOCK], np.int32).reshape(count, BLOCK)
    keys, last = [], root
    for block in data:
        last = blake2b(last + block.tobytes(), digest_size=32).digest()
        keys.append(last)
    return keys


def encode(key: bytes, tokens: Sequence[Token], arrays: Sequence[Rows]) -> list[bytes | memoryview]:
    """A file's parts, in order; they share the arrays' memory where that is contiguous."""
    shapes = [(str(a.dtype), a.shape) for a in arrays]
    header = msgspec.json.encode(Header(FORMAT, key.hex(), [*tokens], shapes))
    head = MAGIC + len(header).to_bytes(4, "little") + header
    parts: list[bytes | memoryview] = [head, *(np.ascontiguousarray(a).reshape(-1).view(np.uint8).data for a in arrays)]
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part)
    return [*parts, digest.digest()]


def decode(file: BinaryIO, key: bytes, tokens: Sequence[Token], into: Rows | None = None) -> list[Rows]:
    """The arrays of a file, in memory of their own or ``into`` uint8 [bytes].

    Raises ValueError if it isn't the whole file of these tokens, or of another size; ``into`` is spoilt then.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(len(MAGIC) + 4)
    length = int.from_bytes(head[len(MAGIC) :], "little")
    left = size - len(head) - length - _DIGEST
    if not head.startswith(MAGIC) or left < 0:
        raise ValueError("it is not a file of ours, or cut off")
    header = file.read(length)
    if into is not None and into.nbytes != left:
        raise ValueError(f"it is of another size, {left} bytes in place of {into.nbytes}")
    data = np.empty(left, np.uint8) if into is None else into
    _fill(file, data.data)
    digest = xxhash.xxh3_128(head + header)
    digest.update(data.data)
    if digest.digest() != file.read(_DIGEST):
        raise ValueError("its checksum is wrong")
    said = msgspec.json.decode(header, type=Header)
    if (said.format, said.key, said.tokens) != (FORMAT, key.hex(), [*tokens]):
        raise ValueError("it is of another prefix")
    arrays, at = [], 0
    for dtype, shape in said.arrays:
        count = int(np.prod(shape))
        arrays.append(np.frombuffer(data, dtype, count, at).reshape(shape))
        at += count * np.dtype(dtype).itemsize
    return arrays


def _fill(file: BinaryIO, memory: memoryview) -> None:
    """Reads so many bytes: one call may give less."""
    while memory:
        count = file.readinto(memory)  # type: ignore[attr-defined]
        if not count:
            raise ValueError("it is cut off: not a file of ours any more")
        memory = memory[count:]


@dataclass(slots=True)
class DiskCounts:
    """Since the start, but for ``bytes``, which is what lies there now. ``drops`` counts blocks, by why."""

    bytes: int = 0
    read_blocks: int = 0
    read_bytes: int = 0
    written_blocks: int = 0
    written_bytes: int = 0
    drops: Counter[str] = field(default_factory=Counter)


def open_new(path: Path) -> BinaryIO:
    """A file that wasn't there, for its owner alone: it tells what was asked."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")


class BlockFiles:
    """A directory of blocks, of at most ``most`` bytes whoever writes there; the longest unused go first.

    Safe from several threads and several processes. Nothing raises after the constructor: what can't be read or
    written isn't there, and is counted. Raises ConfigError if the directory can't be had, unless the disk is full.
    """

    def __init__(self, directory: Path, most: int, opener: Open = open_new) -> None:
        self.directory = directory
        self.most = most
        self.counts = DiskCounts()
        self._open = opener
        self._mutex = threading.Lock()
        self._present: dict[bytes, int] = {}
        self._unscanned = most  # written since the directory was last looked at
        self._paused = 0.0
        self._temporaries = 0
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            any(directory.iterdir())
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise ConfigError(f"{directory} can't be used ({error.strerror})", "--kv-disk") from error

    def path(self, key: bytes) -> Path:
        name = key.hex()
        return self.directory / name[:2] / f"{name}{_SUFFIX}"

    def known(self, key: bytes) -> bool:
        """Whether it was there when last heard of."""
        return key in self._present

    @property
    def refuses(self) -> bool:
        """Whether nothing is written for now, since the disk took nothing."""
        return time.monotonic() < self._paused

    def has(self, key: bytes) -> bool:
        """Whether it is there."""
        return self.known(key) or self.path(key).exists()

    def read(self, key: bytes, tokens: Sequence[Token], into: Rows | None = None) -> list[Rows] | None:
        """The arrays of a block, ``into`` uint8 [bytes] if that is given; None if there is none.

        One that is broken is removed.
        """
        try:
            with self.path(key).open("rb", buffering=0) as file:
                arrays = decode(file, key, tokens, into)
                size = file.tell()
        except FileNotFoundError:
            self._forget(key)
            return None
        except (OSError, ValueError, TypeError, msgspec.MsgspecError) as error:
            log.warning("kv disk: %s is dropped: %s", self.path(key), error)
            self._remove(key, "corrupt")
            return None
        with self._mutex:
            self.counts.read_blocks += 1
            self.counts.read_bytes += size
        return arrays

    def write(self, key: bytes, tokens: Sequence[Token], arrays: Sequence[Rows]) -> None:
        """Stores a block, if it isn't there."""
        if self.path(key).exists():
            return
        if self.refuses:
            self.drop("full")
            return
        parts = encode(key, tokens, arrays)
        size = sum(map(len, parts))  # of memory views too: they are of bytes
        if self._unscanned + size > self.most // _SLACK:
            self.scan()
        try:
            self._store(self.path(key), parts)
        except OSError as error:
            self._refused(error)
            return
        with self._mutex:
            self._unscanned += size
            self._present[key] = size
            self.counts.bytes += size
            self.counts.written_blocks += 1
            self.counts.written_bytes += size

    def touch(self, keys: Sequence[bytes]) -> None:
        """They are in use, the first of a prefix most of all: without it the others can't be."""
        now = time.time_ns()
        for i, key in enumerate(keys):
            with suppress(OSError):
                os.utime(self.path(key), ns=(now - i, now - i))

    def scan(self) -> None:
        """Looks at the directory: what is there, what was left behind by who died writing, and what is too much."""
        with self._locked():
            files = sorted(self._files())
            total = sum(size for _, size, _ in files)
            keep = self.most - 2 * (self.most // _SLACK)
            gone = 0
            while files[gone:] and total > keep:
                _, size, path = files[gone]
                with suppress(OSError):
                    path.unlink()
                total, gone = total - size, gone + 1
        found = {bytes.fromhex(path.stem): size for _, size, path in files[gone:]}
        with self._mutex:
            self._present, self._unscanned = found, 0
            self.counts.bytes = total
            self.counts.drops["evicted"] += gone

    def remove(self, keys: Sequence[bytes], why: str) -> None:
        """They go, as far as they are there."""
        for key in keys:
            if self.has(key):
                self._remove(key, why)

    def drop(self, why: str) -> None:
        """Counts a block that is not there, or no more."""
        with self._mutex:
            self.counts.drops[why] += 1

    def _store(self, path: Path, parts: Sequence[bytes | memoryview]) -> None:
        """A lock on the new file says that its writer lives."""
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with self._mutex:
            self._temporaries += 1
            temporary = path.with_suffix(f".{os.getpid()}-{id(self):x}-{self._temporaries}.tmp")
        try:
            with self._open(temporary) as file:
                fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                for part in parts:
                    file.write(part)
                file.flush()
                temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise

    def _refused(self, error: OSError) -> None:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        log.warning("kv disk: nothing is written for %.0f s: %s", _PAUSE, error)
        self._paused = time.monotonic() + _PAUSE
        self.drop("full" if full else "unwritable")

    def _remove(self, key: bytes, why: str) -> None:
        with suppress(OSError):
            self.path(key).unlink()
        self._forget(key)
        self.drop(why)

    def _forget(self, key: bytes) -> None:
        with self._mutex:
            self.counts.bytes -= self._present.pop(key, 0)

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """(time of last use, bytes, path) of each block; files that their writers left behind are removed."""
        for folder in _entries(self.directory):
            if len(folder.name) != 2:
                continue
            for entry in _entries(folder):
                with suppress(OSError, ValueError):
                    if entry.suffix == ".tmp":
                        _remove_orphan(entry)
                    elif entry.suffix in _OUTDATED:
                        entry.unlink()
                        self.drop("outdated")
                    elif entry.suffix == _SUFFIX and len(bytes.fromhex(entry.stem)) == 32:
                        facts = entry.stat()
                        yield facts.st_mtime_ns, facts.st_size, entry

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One at a time makes room in the directory; goes on without the lock where there can't be one."""
        try:
            file = (self.directory / "lock").open("ab")
        except OSError:
            yield
            return
        with file:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _entries(folder: Path) -> list[Path]:
    try:
        return [Path(entry.path) for entry in os.scandir(folder)]
    except OSError:
        return []


def _remove_orphan(path: Path) -> None:
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: somebody is writing it
        path.unlink()
