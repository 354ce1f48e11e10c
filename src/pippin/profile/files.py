"""Names of a profile's files: ``X.trace.json.gz`` for the timeline, ``X.gputrace`` beside it for a Metal capture.

With stages apart, ``X-EXTEND`` and ``X-DECODE`` (SGLang's words for prefill and decode).
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Literal

from pippin.errors import RequestError

Stage = Literal["EXTEND", "DECODE"]
STAGES: tuple[Stage, ...] = ("EXTEND", "DECODE")

TRACE_SUFFIX = ".trace.json.gz"
CAPTURE_SUFFIX = ".gputrace"
DIRECTORY_VARIABLE = "SGLANG_TORCH_PROFILER_DIR"


def trace_path(stem: str | Path, stage: Stage | None = None) -> Path:
    """Where the timeline goes, of all steps or of one stage's."""
    return Path(f"{stem}-{stage}{TRACE_SUFFIX}" if stage else f"{stem}{TRACE_SUFFIX}")


def capture_path(trace: Path) -> Path:
    """The Metal capture's name beside a timeline's."""
    return trace.with_name(trace.name.removesuffix(TRACE_SUFFIX) + CAPTURE_SUFFIX)


def default_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """Where profiles go that name no directory: SGLang's variable, else the system's temporary directory."""
    return Path(environ.get(DIRECTORY_VARIABLE) or tempfile.gettempdir())


def reserve(directory: Path, name: str | None, by_stage: bool) -> tuple[str, list[Path]]:
    """Creates a profile's empty trace files; returns their common stem, an absolute path, and the files.

    ``name`` None is made of the time. Where the files, or captures of their names, are there already, the stem gets
    a number: two profiles never share a file, whoever writes them. Raises RequestError if nothing can be written there.
    """
    name = name or time.strftime("pippin-%Y%m%d-%H%M%S")
    if not re.fullmatch(r"[\w.@+=-][\w .@+=-]{0,199}", name):
        raise RequestError(
            f"{name!r} must be a file's name: letters, digits, dots, dashes and underscores", "profile_id"
        )
    stages: Sequence[Stage | None] = STAGES if by_stage else (None,)
    try:
        directory = directory.expanduser().resolve()
        directory.mkdir(parents=True, exist_ok=True)
        for number in count():
            stem = str(directory / (f"{name}-{number}" if number else name))
            paths = [trace_path(stem, stage) for stage in stages]
            if _create(paths):
                return stem, paths
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise RequestError(
            f"nothing can be written to {directory} ({reason}): name another directory", "output_dir"
        ) from error
    raise AssertionError("count() never ends")


def _create(paths: Sequence[Path]) -> bool:
    """Creates all of the files, or none."""
    made: list[Path] = []
    try:
        for path in paths:
            if capture_path(path).exists():
                raise FileExistsError(path)
            path.open("xb").close()
            made.append(path)
    except FileExistsError:
        discard(made)
        return False
    return True


def discard(paths: Sequence[Path]) -> None:
    """Removes files that came to nothing."""
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()
