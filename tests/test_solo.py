"""Models with recurrent state: the same tokens alone, batched, chunked, from snapshots, retracted and overlapped."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from pippin.cache.layout import StateShape
from pippin.cache.state import StateStore
from pippin.core import EngineCore
from pippin.messages import Submit
from pippin.runner import MlxModelRunner
from pippin.types import CacheMiss, Request, SamplingParams, Work
from tests.architectures import small_config
from tests.checkpoints import make_checkpoint, write_checkpoint
from tests.cores import GREEDY, collect, greedy_by_mlx_lm, make_core, prompts, replace_params, run, submits

FAMILIES = ["qwen3_next", "mamba2", "falcon_h1", "recurrent_gemma", "kimi_linear", "longcat_flash_ngram"]
"""Attention and states; states only; both in a layer; a window, and a first token that differs; masks; odd shapes."""

SHAPES = [StateShape((((3,), mx.float32),))]

OPTIONS: list[dict[str, Any]] = [
    {},
    {"chunked_prefill_size": 7},
    {"disable_overlap_schedule": True, "chunked_prefill_size": 16},
    {"disable_radix_cache": True},
    {"page_size": 4, "max_running_requests": 3},
    {"max_mamba_cache_size": 3, "schedule_policy": "lpm", "chunked_prefill_size": 20},
    {"max_total_tokens": 104, "chunked_prefill_size": 9},
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: make_checkpoint(root / family, family) for family in FAMILIES}


def states_of(core: EngineCore) -> StateStore:
    runner = core._runner
    assert isinstance(runner, MlxModelRunner)
    assert runner.pool.states is not None
    return runner.pool.states


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_mlx_lms_whatever_the_schedule(checkpoints: dict[str, Path], family: str) -> None:
    path, rows = checkpoints[family], prompts(5)
    expected = {n: [greedy_by_mlx_lm(path, row, n) for row in rows] for n in (12, 40)}
    for options in OPTIONS if family in ("qwen3_next", "longcat_flash_ngram") else OPTIONS[-4:]:
        small = "max_total_tokens" in options
        params = replace_params(GREEDY, max_new_tokens=40 if small else 12)
        core = make_core(path, **options)
        for turn in ("cold", "once more", "from snapshots"):
            found = list(run(core, submits(rows, params)).values())
            assert found == expected[params.max_new_tokens], (options, turn)
        stats = core.stats
        rarely = {"disable_radix_cache", "max_mamba_cache_size", "max_total_tokens"}
        assert stats.cached_tokens or options.keys() & rarely, options
        assert stats.retractions > 0 or not small or stats.window_slots_total  # few of which admit few at a time
        assert stats.snapshots == states_of(core).num_kept
        core.flush()
        assert core.stats.slots_free == core.stats.slots_total
        assert states_of(core).num_kept == 0


@pytest.mark.parametrize("page_size", [1, 8])
@pytest.mark.parametrize("family", ["qwen3_next", "kimi_linear"])
def test_tokens_are_the_same_where_kernels_write_the_pool_in_place(
    checkpoints: dict[str, Path], family: str, page_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pippin.kernels.writes_in_place", lambda *_: True)
    path, rows = checkpoints[family], prompts(6)
    core = make_core(path, chunked_prefill_size=16, page_size=page_size)
    expected = {f"r{i}": greedy_by_mlx_lm(path, row, 12) for i, row in enumerate(rows)}
    assert run(core, submits(rows)) == run(core, submits(rows)) == expected
    assert core.stats.cached_tokens > 0


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("family", ["qwen3_next", "mamba2"])
def test_a_chat_hits_the_cache_every_turn(checkpoints: dict[str, Path], family: str, overlap: bool) -> None:
    core = make_core(checkpoints[family], disable_overlap_schedule=not overlap, chunked_prefill_size=16)
    history: list[int] = []
    for turn in range(5):
        known, history = len(history), history + prompts(1, seed=turn)[0]
        outputs = collect(core, [Submit(f"t{turn}", history, len(history), GREEDY)])[f"t{turn}"]
        if turn:
            assert outputs[-1].num_cached == known - 1, "all but the answer's last token, which nothing was drawn from"
            assert outputs[-1].miss is None
        history = history + [t for o in outputs for t in o.tokens]
        assert history[-12:] == greedy_by_mlx_lm(checkpoints[family], history[:-12], 12)


def test_where_prompts_part_a_state_is_kept_for_the_third(checkpoints: dict[str, Path]) -> None:
    core = make_core(checkpoints["qwen3_next"])
    trunk = prompts(1, 200, seed=1)[0]
    found = []
    for i in range(3):
        row = [*trunk, 10 + i, 20 + i]
        found += collect(core, [Submit(f"r{i}", row, len(row), GREEDY)])[f"r{i}"][-1:]
    assert [o.num_cached for o in found] == [0, 0, len(trunk)]
    assert [o.miss for o in found] == [
        CacheMiss("cold"),
        CacheMiss("no_snapshot", len(trunk)),
        CacheMiss("diverged", len(trunk)),
    ]
    assert core.stats.misses == {"cold": 1, "no_snapshot": 1, "diverged": 1}


def test_a_shared_prefix_is_computed_twice_at_most_by_those_who_come_together(checkpoints: dict[str, Path]) -> None:
    core = make_core(checkpoints["qwen3_next"], max_running_requests=16)
    trunk = prompts(1, 300, seed=1)[0]
    rows = [[*trunk, 10 + i, 20 + i] for i in range(16)]
    found = run(core, submits(rows))
    assert core.stats.prefill_tokens <= 2 * len(trunk) + 2 * 16
    assert found["r7"] == greedy_by_mlx_lm(checkpoints["qwen3_next"], rows[7], 12)


def test_sampled_tokens_do_not_depend_on_company_or_schedule(checkpoints: dict[str, Path]) -> None:
    path, rows = checkpoints["qwen3_next"], prompts(5)
    params = SamplingParams(temperature=0.9, top_p=0.9, top_k=40, max_new_tokens=10, ignore_eos=True, seed=7)
    alone: dict[str, list[int]] = {}
    for submit in submits(rows, params):
        alone |= run(make_core(path), [submit])
    assert run(make_core(path, chunked_prefill_size=5), submits(rows, params)) == alone
    assert run(make_core(path, max_total_tokens=80), submits(rows, params)) == alone


def test_memory_stays_flat_over_many_requests(checkpoints: dict[str, Path]) -> None:
    core = make_core(checkpoints["mamba2"], max_mamba_cache_size=5, max_running_requests=4)
    source, active = random.Random(3), []
    for turn in range(6):
        rows = [[source.randrange(3, 280) for _ in range(30)] for _ in range(12)]
        run(core, submits(rows, name=f"{turn}-"))
        mx.synchronize()
        active.append(mx.get_active_memory())
        assert core.stats.snapshots == 5
    assert max(active[2:]) - min(active[2:]) <= 100_000, active
    assert core.stats.snapshots_evicted > 50


def test_a_failed_step_forgets_every_state(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path, rows = checkpoints["qwen3_next"], prompts(4)
    core = make_core(path, max_running_requests=2)
    run(core, submits(rows[:1], name="before"))
    runner = core._runner
    assert isinstance(runner, MlxModelRunner)
    launch, calls = runner.launch, []

    def fails(batch: Any) -> Any:
        calls.append(batch)
        flight = launch(batch)
        if len(calls) == 3:
            raise RuntimeError("the device gave up")
        return flight

    reset, left = runner.reset, []

    def resets() -> None:
        reset()
        left.append((states_of(core).num_kept, dict(states_of(core)._rows), states_of(core).take_new()))

    monkeypatch.setattr(runner, "reset", resets)
    monkeypatch.setattr(runner, "launch", fails)
    found = collect(core, submits(rows))
    assert left == [(0, {}, [])]
    ends = {id: outputs[-1].finish for id, outputs in found.items()}
    assert {e.reason for e in ends.values() if e} == {"length"}
    for i, row in enumerate(rows):
        end = ends[f"r{i}"]
        if end is not None and end.reason == "length":
            tokens = [t for o in found[f"r{i}"] for t in o.tokens]
            assert tokens == greedy_by_mlx_lm(path, row, 12)
    assert core.stats.snapshots == states_of(core).num_kept


@pytest.mark.parametrize("architecture", ["gpt_bigcode", "afm7"])
def test_models_that_want_their_position_as_a_number_run_alone(tmp_path: Path, architecture: str) -> None:
    path, rows = write_checkpoint(tmp_path, small_config(architecture)), prompts(3)
    core = make_core(path, chunked_prefill_size=16)
    assert core.info.attention_backend == "alone"
    found = run(core, submits(rows))
    assert found == {f"r{i}": greedy_by_mlx_lm(path, row, 12) for i, row in enumerate(rows)}
    assert run(core, submits(rows)) == found
    assert core.stats.cached_tokens > 0


# --- the store ---


def work(row: int, start: int, end: int, **more: int) -> Work:
    return Work(Request(f"r{row}", [0] * end, 1, GREEDY, row=row), start, end, True, **more)


def advance(store: StateStore, *works: Work) -> list[float]:
    """Adds 1 to each work's state for each of its tokens; returns the states that they began with."""
    opened = store.open(works)
    (cache,) = opened.caches
    before = mx.zeros((len(works), 3)) if cache[0] is None else cache[0]
    cache[0] = before + mx.array([[w.end - w.start] for w in works])
    store.close(opened)
    return [float(x) for x in np.array(before)[:, 0]]


def test_rows_keep_their_states_whoever_runs_beside_them() -> None:
    store = StateStore(SHAPES)
    for row in range(1, 6):
        assert advance(store, work(row, 0, 10 * row)) == [0]
    assert advance(store, *(work(row, 10, 11) for row in (1, 2, 3, 4, 5))) == [10, 20, 30, 40, 50]
    assert advance(store, *(work(row, 11, 12) for row in (2, 4, 5))) == [21, 41, 51]
    assert advance(store, *(work(row, 12, 13) for row in (5, 1, 3, 2))) == [52, 11, 31, 22]


def test_snapshots_outlive_their_rows_and_cost_a_line_each() -> None:
    store = StateStore(SHAPES)
    for row in range(1, 5):
        advance(store, work(row, 0, row, save=10 * row))
    advance(store, *(work(row, 9, 10) for row in range(1, 5)))
    store.keep(3, 99)
    for row in range(1, 5):
        store.release(row)
    assert all(a is not None and a.shape == (1, 3) for s in store._kept.values() for c in s.arrays for a in c)
    assert advance(store, work(7, 5, 6, restore=99)) == [4]
    assert advance(store, work(7, 6, 7), work(8, 5, 6, restore=99), work(9, 5, 6, restore=20)) == [5, 4, 2]
    for id in (10, 20, 30, 40, 99, 1234):
        store.drop(id)
    assert store.num_kept == 0


def test_a_row_without_a_state_is_not_gone_on_with() -> None:
    store = StateStore(SHAPES)
    advance(store, work(1, 0, 5))
    store.release(1)
    with pytest.raises(AssertionError, match="r1 goes on from token 5"):
        store.open([work(1, 5, 6)])
