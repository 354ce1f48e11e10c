"""Where files of ours go that no one asked for by name."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """Where the system keeps a user's caches, with a folder of ours."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "pippin"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pippin"
