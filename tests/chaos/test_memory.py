"""No more memory for the engine's process: what can be done in smaller steps is, and else another process goes on."""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path

import pytest

from pippin.client import EngineClient
from pippin.config import EngineConfig
from pippin.restarts import Supervision
from tests.chaos import short_of_memory
from tests.chaos.test_kills import Answer, answers, asked, different
from tests.fake_core import PYTHONPATH

WATCHED = Supervision(watchdog_timeout=60.0, max_restarts=100, back_off=(0.0,))
STREAMS = 12
REFUSED = "out of memory"
CONFIG = EngineConfig(device="cpu", max_total_tokens=4000, random_seed=1)


def allowed(found: list[Answer], undisturbed: list[Answer]) -> int:
    """How many had their answer; any other was told that there is no memory."""
    wrong = [i for i in different(found, undisturbed) if found[i].reason != REFUSED]
    assert wrong == []
    return sum(answer.reason != REFUSED for answer in found)


async def answered(core: str) -> tuple[list[Answer], int]:
    """By an engine that ``core`` makes, and how often it was started again."""
    client = EngineClient.spawn(CONFIG, f"tests.chaos.short_of_memory:{core}", "critical", WATCHED)
    try:
        await client.start()
        found = await answers(client, asked(random.Random(7))[:STREAMS], REFUSED)
        return found, client.stats.restarts
    finally:
        await client.close()


@pytest.fixture(scope="module")
def undisturbed() -> list[Answer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", PYTHONPATH)
        found, restarts = asyncio.run(answered("load_core"))
    assert restarts == 0
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="a process' address space is limited on Linux")
def test_streams_go_on_in_another_process_when_real_allocations_fail(
    undisturbed: list[Answer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
    monkeypatch.setenv(short_of_memory.FOLDER, str(tmp_path))
    found, restarts = asyncio.run(answered("starved"))
    assert allowed(found, undisturbed) > len(found) // 2
    assert restarts >= 1, "no allocation failed"


def test_streams_go_on_in_smaller_steps_when_the_allocator_refuses(
    undisturbed: list[Answer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
    monkeypatch.setenv(short_of_memory.FOLDER, str(tmp_path))
    found, restarts = asyncio.run(answered("refusing"))
    assert (tmp_path / "refused").exists()
    assert different(found, undisturbed) == []
    assert restarts == 0
