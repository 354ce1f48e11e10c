"""Models: load a checkpoint, quantize it while loading, and the seam through which layers reach the KV store."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def _open_files_kept(least: int = 2048) -> Iterator[None]:
    """Importing mlx-lm lowers the process's limits of open files, the hard one too, which can't be undone.

    A server needs a file for each socket, so the limits stay as they are; only a soft limit under
    ``least`` (macOS starts with 256) is raised, since checkpoints of many shards need the files as well.
    """
    change = resource.setrlimit
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit = lambda *_: None
    try:
        yield
    finally:
        resource.setrlimit = change
        wanted = least if hard == resource.RLIM_INFINITY else min(least, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            change(resource.RLIMIT_NOFILE, (wanted, hard))


with _open_files_kept():
    import mlx_lm.utils  # noqa: F401
