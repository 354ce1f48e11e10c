"""The cycle collector: what has been loaded is not searched for garbage again while steps run.

A step builds a graph of a thousand objects, so the collector looks through all that there is every few steps.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


def leave_loaded_alone() -> None:
    """From here to the end of the process; for processes that are ours alone."""
    gc.collect()
    gc.freeze()


@contextmanager
def loaded_left_alone() -> Iterator[None]:
    """For the length of a block."""
    leave_loaded_alone()
    try:
        yield
    finally:
        gc.unfreeze()
