"""Waiting for what must come to pass. The bound is for a test that fails; how busy the machine is must not matter."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

SECONDS = 100.0
"""Far more than anything takes here, and less than the time limit of a test."""


def until(condition: Callable[[], bool], seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.002)


async def comes_true(condition: Callable[[], bool], seconds: float = SECONDS) -> None:
    """``until``, while the loop goes on."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        await asyncio.sleep(0.002)
