"""Steps that fail under the engine's core: who is to blame ends, alone, and all others get what they would have."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from pippin.flight import InFlight, Masks
from pippin.garbage import loaded_left_alone
from pippin.messages import Output, Submit
from pippin.runner import MlxModelRunner
from pippin.types import Batch, Work
from pippin.worker import add
from tests.checkpoints import make_checkpoint
from tests.compiling import play_gpu
from tests.cores import GREEDY, collect, drain, greedy_by_mlx_lm, make_core, prompts, run, submits


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("model")
    make_checkpoint(path, "qwen3", head_dim=32)
    return path


class FlakyRunner:
    """A runner whose launches or reads fail when told to."""

    def __init__(self, runner: MlxModelRunner, poison: tuple[str, str] = ("", "")) -> None:
        self.runner = runner
        self.fail: set[str] = set()
        self.poison = poison  # where steps with this request fail, always
        self.resets = 0
        self.lost = False

    def launch(self, batch: Batch) -> FlakyFlight:
        where, who = self.poison
        poisoned = any(work.request.id == who for work in batch.works)
        if "launch" in self.fail or (poisoned and where == "launch"):
            self.fail.clear()
            raise ArithmeticError("planted")
        return FlakyFlight(self.runner.launch(batch), {where} if poisoned else self.fail)

    def reset(self) -> None:
        self.resets += 1
        if self.lost:
            raise RuntimeError("the device is lost")
        self.runner.reset()


class FlakyFlight:
    def __init__(self, flight: InFlight, fail: set[str]) -> None:
        self._flight = flight
        self._fail = fail
        self.batch = flight.batch

    def draw(self, masks: Masks) -> None:
        self._flight.draw(masks)

    def drawn(self) -> list[tuple[Work, int]]:
        return self._flight.drawn()

    def read(self) -> list[Any]:
        if "read" in self._fail:
            self._fail.clear()
            raise RuntimeError("planted")
        return self._flight.read()


def test_after_a_step_that_failed_midway_there_is_one_pool_not_two(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        logging.getLogger("pippin.core"), "disabled", True
    )  # pytest keeps what is logged, traceback too
    core = make_core(checkpoint, max_total_tokens=60_000)
    runner = core._runner
    assert isinstance(runner, MlxModelRunner)
    size, last = runner.pool.nbytes, runner.model.model.layers[-1]
    planted, last.mlp = last.mlp, None  # the last layer raises, and its caches are in the traceback
    core.add(submits(prompts(1))[0])
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    steps = [core.step() for _ in range(2)]  # it is tried again
    assert steps[0] is not None
    assert steps[0].outputs == []
    assert steps[1] is not None
    assert steps[1].outputs[0].finish is not None
    assert steps[1].outputs[0].finish.reason == "error"
    assert mx.get_peak_memory() - before < size / 4
    last.mlp = planted
    assert run(core, submits(prompts(1)))["r0"] == greedy_by_mlx_lm(checkpoint, prompts(1)[0], 12)


def test_steps_that_are_compiled_keep_no_pool_alive(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody collects cycles in time: what was loaded is out of the collector's sight, and memory is short now."""
    play_gpu(monkeypatch)
    core = make_core(checkpoint, max_total_tokens=60_000)
    runner = core._runner
    assert isinstance(runner, MlxModelRunner)
    assert runner.graphs is not None
    expected = run(core, submits(prompts(1)))
    size, before = runner.pool.nbytes, mx.get_active_memory()
    with loaded_left_alone():
        for _ in range(2):
            runner.reset()
            assert mx.get_active_memory() - before < size / 4
    core.flush()
    assert run(core, submits(prompts(1))) == expected


@pytest.mark.parametrize("where", ["launch", "read"])
@pytest.mark.parametrize("overlap", [True, False])
def test_a_step_that_fails_once_is_done_again_and_nobody_sees_it(checkpoint: Path, where: str, overlap: bool) -> None:
    rows = prompts(4)
    core = make_core(checkpoint, max_running_requests=2, disable_overlap_schedule=not overlap)
    flaky = FlakyRunner(core._runner)  # type: ignore[arg-type]
    core._runner = flaky
    asked = submits(rows)
    tokens = {submit.id: list[int]() for submit in asked}
    for submit in asked:
        core.add(submit)
    for turn in range(2000):
        if not core.has_work:
            break
        if turn in (4, 9, 20):
            flaky.fail.add(where)
        step = core.step()
        for output in step.outputs if step else ():
            assert output.finish is None or output.finish.reason != "error"
            tokens[output.id] += output.tokens
    assert flaky.resets == 3, "nothing in the pool is trusted after that"
    for i in range(4):
        assert tokens[f"r{i}"] == greedy_by_mlx_lm(checkpoint, rows[i], 12)
    assert core.stats.slots_cached > 0
    core.flush()
    assert core.stats.slots_free == core.stats.slots_total


@pytest.mark.parametrize("where", ["launch", "read"])
def test_the_request_that_makes_steps_fail_ends_alone(checkpoint: Path, where: str) -> None:
    rows = prompts(4)
    core = make_core(checkpoint)
    core._runner = FlakyRunner(core._runner, poison=(where, "r2"))  # type: ignore[arg-type]
    for submit in submits(rows[:2]):
        core.add(submit)
    for _ in range(3):
        core.step()
    told: dict[str, list[Output]] = {f"r{i}": [] for i in range(4)}
    for submit in submits(rows)[2:]:
        core.add(submit)
    ends = {}
    for output in drain(core):
        told[output.id].append(output)
        if output.finish is not None:
            ends[output.id] = output.finish
    assert {id: end.reason for id, end in ends.items()} == {
        "r0": "length",
        "r1": "length",
        "r2": "error",
        "r3": "length",
    }
    assert "the engine failed on this request" in ends["r2"].message
    assert [t for o in told["r3"] for t in o.tokens] == greedy_by_mlx_lm(checkpoint, rows[3], 12)


def test_a_lost_device_is_told_and_takes_no_request_with_it(checkpoint: Path) -> None:
    """The process ends then, and another one goes on."""
    core = make_core(checkpoint)
    flaky = FlakyRunner(core._runner)  # type: ignore[arg-type]
    core._runner = flaky
    for submit in submits(prompts(2)):
        core.add(submit)
    flaky.fail.add("launch")
    flaky.lost = True
    with pytest.raises(RuntimeError, match="lost"):
        core.step()


def test_numbers_that_are_not_finite_in_a_shared_prefix_harm_nobody(checkpoint: Path) -> None:
    """Who reads them starts over from nothing; who comes later never sees them."""
    core = make_core(checkpoint)
    runner = core._runner
    assert isinstance(runner, MlxModelRunner)
    prefix = [(i * 7) % 90 + 5 for i in range(40)]
    asked = [Submit(f"s{i}", [*prefix, i + 3], len(prefix) + 1, GREEDY) for i in range(4)]
    expected = [greedy_by_mlx_lm(checkpoint, submit.tokens, 12) for submit in asked]
    tokens = {submit.id: list[int]() for submit in asked}
    for submit in asked[:3]:
        core.add(submit)
    for turn in range(500):
        if turn == 4:
            request = core._scheduler.runs.get("s0")
            assert request is not None
            slot = request.slots[3]
            for array in runner.pool.arrays:
                array[slot] = mx.nan
            core.add(asked[3])  # finds the prefix in the tree
        step = core.step()
        for output in step.outputs if step else ():
            assert output.finish is None or output.finish.reason == "length"
            tokens[output.id] += output.tokens
        if not core.has_work:
            break
    assert [tokens[f"s{i}"] for i in range(4)] == expected


def test_logits_without_a_finite_number_end_that_request_alone(checkpoint: Path) -> None:
    core = make_core(checkpoint)
    runner = core._runner
    assert isinstance(runner, MlxModelRunner)
    embedding = runner.model.model.embed_tokens
    embedding.weight = mx.where(mx.arange(embedding.weight.shape[0])[:, None] == 77, mx.nan, embedding.weight)
    mx.eval(embedding.weight)
    found = collect(core, [Submit("bad", [5, 77, 6], 3, GREEDY), Submit("good", [6, 5, 7], 3, GREEDY)])
    finish = found["bad"][-1].finish
    assert finish is not None
    assert finish.reason == "error"
    assert "finite" in finish.message
    good = found["good"][-1].finish
    assert good is not None
    assert good.reason == "length"


class SmallRunner:
    """A runner whose device has memory for so many tokens a step, and none for steps with a request called ``huge``."""

    def __init__(self, runner: MlxModelRunner, tokens: int, rows: int) -> None:
        self.runner, self.tokens, self.rows = runner, tokens, rows
        self.failures = 0
        self.widest = 0

    def launch(self, batch: Batch) -> InFlight:
        huge = any(work.request.id == "huge" for work in batch.works)
        if batch.num_tokens > self.tokens or len(batch.works) > self.rows or huge:
            self.failures += 1
            raise RuntimeError("[malloc] Unable to allocate 34359738368 bytes.")
        self.widest = max(self.widest, len(batch.works))
        return self.runner.launch(batch)

    def reset(self) -> None:
        self.runner.reset()


@pytest.mark.parametrize("overlap", [True, False])
def test_a_step_that_finds_no_memory_is_done_in_smaller_ones(checkpoint: Path, overlap: bool) -> None:
    core = make_core(checkpoint, disable_overlap_schedule=not overlap)
    small = SmallRunner(core._runner, tokens=50, rows=3)  # type: ignore[arg-type]
    core._runner = small
    rows = prompts(10, longest=120)
    found = run(core, submits(rows))
    assert found == {f"r{i}": greedy_by_mlx_lm(checkpoint, row, 12) for i, row in enumerate(rows)}
    assert 2 <= small.failures <= 30, "smaller at once, and larger only now and then"
    small.tokens = small.rows = 10**6
    small.widest, before = 0, small.failures
    many = GREEDY.__class__(temperature=0.0, max_new_tokens=100, ignore_eos=True)
    run(core, submits(rows, many))
    run(core, submits(rows, many))
    assert (small.failures, small.widest) == (before, 10), "as many as ever run once there is memory again"
    core.flush()
    assert core.stats.slots_free == core.stats.slots_total


def test_who_finds_no_memory_alone_is_told_so_and_others_go_on(checkpoint: Path) -> None:
    core = make_core(checkpoint)
    core._runner = SmallRunner(core._runner, tokens=10**6, rows=10**6)  # type: ignore[arg-type]
    rows = prompts(4)
    found = collect(core, [*submits(rows[:3]), Submit("huge", rows[3], len(rows[3]), GREEDY)])
    finish = found["huge"][-1].finish
    assert finish is not None
    assert (finish.reason, finish.status) == ("error", 503)
    assert "out of memory" in finish.message
    for i in range(3):
        assert [t for o in found[f"r{i}"] for t in o.tokens] == greedy_by_mlx_lm(checkpoint, rows[i], 12)


def test_who_can_not_be_taken_in_for_want_of_memory_may_come_again(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("pippin.worker"), "disabled", True)
    core = make_core(checkpoint)
    for error, status in ((RuntimeError("can't start new thread"), 503), (MemoryError(), 503), (KeyError("x"), 500)):

        def fails(request: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(core, "_begin", fails)
        finish = add(core, submits(prompts(1))[0])
        assert finish is not None
        assert (finish.reason, finish.status) == ("error", status)
        assert ("out of memory" in finish.message) == (status == 503)
