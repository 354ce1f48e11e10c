"""What a model's files contain, in a line: K and V on disk are for exactly these weights. Plain Python."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import blake2b, file_digest
from pathlib import Path

import msgspec

_SUFFIXES = frozenset(
    (".safetensors", ".bin", ".pt", ".gguf", ".npz", ".json", ".jinja", ".model", ".txt", ".tiktoken", ".py")
)
_THREADS = 4


def digest_of(directories: Iterator[Path] | list[Path], memo: Path) -> str:
    """A digest of all files of models and tokenizers in ``directories``: weights, configuration and templates.

    Files are read in full, once: ``memo`` keeps the digest of each by its path, size, time and inode. Raises OSError if
    one can't be read; a memo that can't be is ignored.
    """
    files = sorted(f for d in dict.fromkeys(directories) for f in d.iterdir() if f.suffix in _SUFFIXES and f.is_file())
    kept = _read(memo)
    names = [_identity(f) for f in files]
    new = {name: file for name, file in zip(names, files, strict=True) if name not in kept}
    with ThreadPoolExecutor(_THREADS) as pool:
        kept |= dict(zip(new, pool.map(_digest, new.values()), strict=True))
    if new:
        _write(memo, kept)
    whole = blake2b(digest_size=32)
    for name, file in zip(names, files, strict=True):
        whole.update(f"{file.name}\0{kept[name]}\0".encode())
    return whole.hexdigest()


def _identity(file: Path) -> str:
    facts = file.stat()
    return f"{file.resolve()}|{facts.st_size}|{facts.st_mtime_ns}|{facts.st_ino}"


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return file_digest(stream, lambda: blake2b(digest_size=32)).hexdigest()


def _read(memo: Path) -> dict[str, str]:
    try:
        return msgspec.json.decode(memo.read_bytes(), type=dict[str, str])
    except (OSError, msgspec.MsgspecError):
        return {}


def _write(memo: Path, digests: dict[str, str]) -> None:
    temporary = memo.with_suffix(f".{os.getpid()}.new")
    with suppress(OSError):
        try:
            temporary.write_bytes(msgspec.json.encode(digests))
            temporary.replace(memo)
        finally:
            temporary.unlink(missing_ok=True)
