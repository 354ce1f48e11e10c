"""From a model's name to a directory on this machine."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import tqdm

from pippin.errors import ModelError
from pippin.gguf_files import describe, gguf_of
from pippin.messages import Progress

POLL_SECONDS = 0.2


def find_checkpoint(
    name: str, revision: str | None, patterns: list[str], progress: Callable[[Progress], None] | None = None
) -> Path:
    """The directory of a local path or of a hub id; what is missing of the latter is downloaded.

    Of a GGUF file it is one that describes it (``gguf_files.describe``).

    ``patterns`` are the globs of the files wanted from the hub. ``progress`` is called in the caller's
    thread with bytes (stage ``download``).

    Raises ModelError if there is no such directory or repository, or it can't be read, and what would help.
    """
    path = Path(name).expanduser()
    if (file := gguf_of(path)) is not None:
        return describe(file)
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise ModelError(f"{name} is a file; give the directory that holds config.json and *.safetensors, or a .gguf.")
    if _looks_like_path(name):
        raise ModelError(f"There is no directory {name}; a hub id looks like `Qwen/Qwen3-0.6B`.")
    try:
        return _download(name, revision, patterns, progress)
    except Exception as error:
        raise ModelError(_explain(name, revision, error)) from error


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1 or "\\" in name


def _download(
    name: str, revision: str | None, patterns: list[str], progress: Callable[[Progress], None] | None
) -> Path:
    """The hub's client reports from threads of its own; here its counts are polled, so ours is one thread."""
    bars: list[_CountingBar] = []

    class Bar(_CountingBar):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            bars.append(self)

    with ThreadPoolExecutor(1) as executor:
        snapshot = executor.submit(
            huggingface_hub.snapshot_download,
            name,
            revision=revision,
            allow_patterns=patterns,
            tqdm_class=Bar,
        )
        last = None
        finished = False
        while not finished:
            finished = bool(wait([snapshot], POLL_SECONDS).done)
            now = _bytes_of(bars)
            if progress and now.total and now != last:
                progress(now)
                last = now
    return Path(snapshot.result()).resolve()


class _CountingBar(tqdm):
    """A progress bar that draws nothing and counts."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.counted = int(options.get("initial") or 0)
        self.unit_name = options.get("unit", "it")
        super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]

    def update(self, n: float | None = 1) -> None:
        self.counted += int(n or 0)


def _bytes_of(bars: list[_CountingBar]) -> Progress:
    """The hub's client has one bar for bytes from the network and one for bytes written: the latter leads."""
    counts = [(b.counted, int(b.total or 0)) for b in bars if b.unit_name == "B"]
    done, total = max(counts, default=(0, 0))
    return Progress("download", min(done, total), total)


def _explain(name: str, revision: str | None, error: Exception) -> str:
    match error:
        case HFValidationError():
            return f"{name!r} is neither a directory nor a hub id such as `Qwen/Qwen3-0.6B`."
        case GatedRepoError():
            return (
                f"{name} is gated: accept its terms on its page on the hub, then log in with"
                " `hf auth login` or set HF_TOKEN."
            )
        case RepositoryNotFoundError():
            return (
                f"There is no directory {name}, and the hub has no such model, or it is private:"
                " check the spelling; for a private one log in with `hf auth login` or set HF_TOKEN."
            )
        case RevisionNotFoundError():
            return f"{name} has no revision {revision!r} on the hub (--revision): give a branch, tag or commit."
        case LocalEntryNotFoundError():
            return (
                f"There is no directory {name}, its files are not all in the local cache, and the hub can't be"
                " reached: check the network (and that HF_HUB_OFFLINE is not set), or give a local directory."
            )
        case OSError() if error.errno is not None:
            return f"Could not store {name}: {error.strerror or error}; HF_HOME says where downloads go."
    return f"Could not download {name}: {type(error).__name__}: {one_line(error)}"


def one_line(error: BaseException) -> str:
    """What an error says, as one line of bearable length."""
    text = " ".join(str(error).split())
    return (text[:400] + " …" if len(text) > 400 else text) or type(error).__name__
