"""The models that ship with Pippin; README.md beside this says what they can do and how they were made."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent


def demo_model_path() -> Path:
    """Directory of the demo model: what is served when no model is named."""
    return _HERE / "pippin-demo"


def draft_model_path() -> Path:
    """Directory of its draft: the same tokens at an eighth of the size, for speculative decoding."""
    return _HERE / "pippin-demo-draft"
