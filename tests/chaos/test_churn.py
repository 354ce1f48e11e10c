"""Whatever clients do: no slot is lost, memory stays flat, and nobody is told an error that is not theirs.

A few seconds in CI, half an hour in ``make soak``.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from pathlib import Path

import aiohttp
import hostile
import pytest

from benchmarks.churn import growth
from tests.chaos.churn import Churn, Sample
from tests.fake_core import PYTHONPATH

SOAK = bool(os.environ.get("PIPPIN_SOAK"))
SECONDS, EACH, CLIENTS = (1800.0, 30.0, 64) if SOAK else (9.0, 3.0, 32)
POOL, GRAMMARS = (1000, 300) if SOAK else (600, 20)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")


@pytest.mark.timeout(3600 if SOAK else 300)
def test_no_slot_is_lost_and_memory_is_flat(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The pool has a tenth of what the requests of a moment may come to need."""
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
    options = (
        "--device",
        "cpu",
        "--max-total-tokens",
        str(POOL),
        "--kv-canary",
        "raise",
        "--chunked-prefill-size",
        "96",
    )

    async def main(address: hostile.Address, pid: int) -> tuple[Churn, list[Sample]]:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
            churn = Churn(f"http://127.0.0.1:{address[1]}", http, random.Random(1))
            return churn, await churn.run(pid, SECONDS, EACH, CLIENTS, GRAMMARS)

    log = tmp_path / "log"
    with log.open("wb") as said, hostile.served(*options, log=said) as (address, pid):
        churn, samples = asyncio.run(main(address, pid))
    assert churn.errors == []
    assert log.read_text() == ""
    assert churn.most_asked > 10 * POOL, "the pool is not short"
    assert len(churn.counts) == 7
    first, last = samples[0], samples[-1]
    print(f"{sum(churn.counts.values())} requests; from {first} to {last}")
    assert last.arrays <= 1.03 * first.arrays
    if SOAK:
        grown = {
            "server": growth(samples, lambda sample: sample.server),
            "engine": growth(samples, lambda sample: sample.engine),
            "arrays": growth(samples, lambda sample: sample.arrays),
        }
        print(grown)
        assert max(grown.values()) < 0.03
