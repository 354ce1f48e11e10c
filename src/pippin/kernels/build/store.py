"""Where compiled kernels lie: one folder for each chip, MLX version and set of kernel sources, in the user's cache."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from pippin.folders import cache_folder
from pippin.kernels.launch import dialect_digest


def chip() -> str:
    """Name of the GPU that MLX uses, and its architecture: ``NVIDIA H200 (sm_90)``."""
    info = mx.device_info()
    return f"{info.get('device_name', 'unknown')} ({architecture()})"


def architecture() -> str:
    """What a compiler calls the GPU: ``sm_90``, ``applegpu_g15s``."""
    return str(mx.device_info().get("architecture", "unknown"))


@dataclass(frozen=True, slots=True)
class Key:
    """What a build must match to be used; all of it is in the folder's name.

    ``chip`` is the GPU's architecture: what was compiled for one is right for all that have it.
    """

    platform: str
    chip: str
    mlx: str
    sources: str

    @staticmethod
    def here(platform: str) -> Key:
        """Of this machine and these sources."""
        return Key(platform, architecture(), version("mlx"), dialect_digest(platform))

    @property
    def folder(self) -> Path:
        facts = "\n".join((self.platform, self.chip, self.mlx, self.sources))
        return cache_folder() / "kernels" / f"{self.platform}-{hashlib.sha256(facts.encode()).hexdigest()[:16]}"

    def facts(self) -> dict[str, str]:
        return {"platform": self.platform, "chip": self.chip, "mlx": self.mlx, "sources": self.sources}


def write(path: Path, content: bytes) -> None:
    """Puts a file where readers never see half of it. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    partial.replace(path)


def write_manifest(key: Key, facts: dict[str, Any]) -> None:
    """Says beside the files what they are for, for whoever looks into the folder, and for ``other_builds``."""
    write(key.folder / "manifest.json", (json.dumps({**key.facts(), **facts}, indent=2) + "\n").encode())


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """None where there is none, or it can't be read."""
    try:
        found = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def refusal(key: Key) -> str | None:
    """Why what was built for ``key`` is not to be used; None where nothing speaks against it."""
    try:
        return (key.folder / "refused").read_text(encoding="utf-8")
    except OSError:
        return None


def refuse(key: Key, why: str) -> None:
    """Remembers for later processes that what is built for ``key`` is wrong. Never fails."""
    with suppress(OSError):
        write(key.folder / "refused", why.encode())


def forgive(key: Key) -> None:
    """Lets a new build be tried where an old one was refused. Raises OSError."""
    (key.folder / "refused").unlink(missing_ok=True)


def in_use(key: Key) -> str:
    """Which build for ``key`` a process takes, by its manifest; empty where there is none, or it was refused."""
    manifest = read_manifest(key.folder)
    return "" if manifest is None or refusal(key) is not None else json.dumps(manifest, sort_keys=True)


def other_builds(key: Key) -> list[dict[str, Any]]:
    """Manifests of builds for this platform that do not match ``key``."""
    folders = sorted((cache_folder() / "kernels").glob(f"{key.platform}-*"))
    found = [read_manifest(folder) for folder in folders if folder != key.folder]
    return [manifest for manifest in found if manifest is not None]
