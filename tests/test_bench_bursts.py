"""The benchmark of bursts, over a model of a few numbers."""

from __future__ import annotations

import random
from argparse import Namespace

import pytest

from benchmarks import bursts, gpu
from pippin.core import EngineCore


@pytest.fixture(scope="module")
def core() -> EngineCore:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(gpu.SHAPES, "tiny", {**gpu.SHAPES["tiny"], "num_hidden_layers": 1, "intermediate_size": 64})
        return gpu.make_core(gpu.make_model("tiny"), max_total_tokens=2048, chunked_prefill_size=64, page_size=1)


def test_every_request_of_a_burst_has_a_first_token_behind_its_time(core: EngineCore) -> None:
    found = bursts.burst(core, [20, 31, 40], 0.002, random.Random(0))
    assert len(found.firsts) == 3
    assert all(seconds > 0 for seconds in found.firsts.values())
    assert sum(found.steps) == 20 + 31 + 40
    assert max(found.steps) <= 64
    assert not core.has_work


def test_both_ways_are_measured_for_each_spread_and_pace(core: EngineCore) -> None:
    options = Namespace(requests=2, tokens=12, spread=[0, 3], apart=[0.0], rounds=2)
    found = list(bursts.rows(core, options))
    assert [(row["way"], row["spread"]) for row in found] == [("whole", 0), ("cut", 0), ("whole", 3), ("cut", 3)]
    assert all(len(row["middle_ms"]) == 2 and row["latest_ms"] >= row["middle_ms"] for row in found)
