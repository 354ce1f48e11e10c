"""How several engines on one machine share its memory: each claims what it planned with, in a file that it locks.

The system takes the lock from a process that ends, however it ends, so a claim without a lock counts for nothing.
Claims are of one user: another user's engines are seen by what is free only.
"""

from __future__ import annotations

import fcntl
import itertools
import logging
import os
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

_numbers = itertools.count()


def claims_folder(device: str) -> Path:
    """Where the claims on a device's memory are."""
    return Path(tempfile.gettempdir()) / f"pippin-memory-{os.getuid()}" / device


class Claim:
    """So many bytes, until it is released or its ``owner`` is gone."""

    def __init__(self, folder: Path, size: int, owner: object) -> None:
        file = folder / f"{os.getpid()}-{next(_numbers)}.claim"
        descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.write(descriptor, str(size).encode())
        self.release = weakref.finalize(owner, _release, file, descriptor)


def _release(file: Path, descriptor: int) -> None:
    file.unlink(missing_ok=True)
    os.close(descriptor)


class Share:
    """What others have claimed, while nobody else may claim."""

    def __init__(self, folder: Path | None, others: int) -> None:
        self._folder = folder
        self.others = others

    def claim(self, size: int, owner: object) -> Claim | None:
        """Claims ``size`` bytes for as long as ``owner`` lives; None where claims can't be written."""
        return None if self._folder is None else Claim(self._folder, size, owner)


@contextmanager
def share(folder: Path) -> Iterator[Share]:
    """Waits until no other engine plans, and adds up what they have claimed."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR, 0o600)
    except OSError as error:
        log.warning("memory is not shared with other engines: nothing can be written to %s (%s)", folder, error)
        yield Share(None, 0)
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield Share(folder, sum(map(_claimed, folder.glob("*.claim"))))
    finally:
        os.close(lock)


def _claimed(file: Path) -> int:
    """The size of a claim whose owner lives; one that is left behind is taken away."""
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError:
        return 0
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        text = os.read(descriptor, 32)
        return int(text) if text.isdigit() else 0
    else:
        file.unlink(missing_ok=True)
        return 0
    finally:
        os.close(descriptor)
