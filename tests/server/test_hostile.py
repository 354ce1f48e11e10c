"""The attacks of scripts/hostile.py, small: memory stays bounded, and others are answered."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import hostile
import pytest

ROOT = Path(__file__).resolve().parents[2]
GROWTH_MIB = 400
"""Eight bodies of 16 MiB held, twice while they are put together, and what one takes while it is read."""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")


@pytest.fixture(scope="module")
def target() -> Iterator[tuple[hostile.Address, int]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT / "src"), str(ROOT))))
        with hostile.served("--device", "cpu", "--max-connections", "200") as (address, pid):
            asyncio.run(hostile.warmed(address))
            yield address, pid


@pytest.mark.parametrize("attack", hostile.ATTACKS, ids=lambda attack: attack.__name__)
def test_memory_is_bounded_and_others_are_served(target: tuple[hostile.Address, int], attack: hostile.Attack) -> None:
    address, pid = target
    found = asyncio.run(hostile.measure(attack, address, pid, 0.05))
    before, peak = found["memory_before_mib"], found["memory_peak_mib"]
    assert isinstance(before, int)
    assert isinstance(peak, int)
    assert peak - before < GROWTH_MIB
    statuses = found["others"]
    assert isinstance(statuses, dict)
    # A flood of whole requests fills the queue and the connections: others are told to come again.
    assert set(statuses) <= ({200, 503} if attack is hostile.flood else {200}), found
    assert asyncio.run(hostile.ask(address, hostile.PROBE)) in ((200, 503) if attack is hostile.flood else (200,))
