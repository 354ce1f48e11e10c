"""Profiles of a real engine: labels are what ran, failures leave a file, and without one nothing is paid."""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
import tracemalloc
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import pippin.profile
from pippin.config import EngineConfig
from pippin.core import EngineCore
from pippin.errors import RequestError
from pippin.loading import load_core
from pippin.messages import Marks, ProfileStarted, StartProfile, StopProfile, Submit
from pippin.profile.engine import open_profile
from pippin.profile.replay import replay
from pippin.profile.stage import profiled
from pippin.profile.steps import TimedRunner
from pippin.profile.timeline import BUILDING, DEVICE, QUEUEING, SAMPLING, SCHEDULER, WAITING, Span
from pippin.runner import MlxModelRunner
from pippin.types import Batch, SamplingParams
from tests import cores
from tests.checkpoints import make_checkpoint
from tests.test_core_faults import FlakyRunner
from tests.test_profile_captures import RecordedMetal
from tests.trace_checks import check_events, read_events

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=8, ignore_eos=True)
HOME = str(Path(pippin.profile.__file__).parent)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3", head_dim=32)


def make_core(path: Path, **options: Any) -> EngineCore:
    return load_core(EngineConfig(model_path=str(path), **{"max_total_tokens": 2000, "device": "cpu", **options}))


class Told:
    """What an engine tells of its profiles."""

    def __init__(self) -> None:
        self.started: list[ProfileStarted] = []
        self.marks: list[int] = []
        self.ended: list[Marks] = []

    def __call__(self, event: ProfileStarted | Marks) -> None:
        if isinstance(event, ProfileStarted):
            self.started.append(event)
        else:
            self.marks += event.marks
            self.ended += [event] if event.ended else []

    def steps(self, lane: str = DEVICE) -> list[Span]:
        return [s for s in replay(self.marks) if s.lane == lane]


def start(core: EngineCore, told: Told, **options: Any) -> None:
    core.profile(StartProfile(**{"id": "p", "stem": "/nowhere/p", **options}), told)


def add(core: EngineCore, rows: list[list[int]], name: str = "r") -> None:
    for i, row in enumerate(rows):
        core.add(Submit(f"{name}{i}", row, len(row), GREEDY))


def drain(core: EngineCore) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    for output in cores.drain(core):
        tokens.setdefault(output.id, []).extend(output.tokens)
    return tokens


def rows_for_tests() -> list[list[int]]:
    shared = list(range(10, 40))
    return [[*shared, 50 + i, 60] for i in range(3)] + [[70, 71], list(range(80, 130))]


class Seen:
    """A runner that notes what it is given."""

    def __init__(self, core: EngineCore) -> None:
        self.behind = core._runner
        self.batches: list[list[tuple[str, int, int, bool]]] = []
        core._runner = self

    def launch(self, batch: Batch) -> Any:
        self.batches.append([(w.request.id, w.start, w.end, w.decodes) for w in batch.works])
        return self.behind.launch(batch)

    def reset(self) -> None:
        self.behind.reset()


@pytest.mark.parametrize(
    "options",
    [{}, {"chunked_prefill_size": 16}, {"disable_overlap_schedule": True}, {"attention_backend": "padded"}],
    ids=str,
)
def test_labels_are_what_ran_and_tokens_stay_what_they_are(checkpoint: Path, options: dict[str, Any]) -> None:
    core, told = make_core(checkpoint, **options), Told()
    add(core, rows_for_tests())
    plain = drain(core)
    core.flush()
    before = core.stats
    seen = Seen(core)
    start(core, told)
    add(core, rows_for_tests())
    assert drain(core) == plain
    core.profile(StopProfile("p"), told)
    assert told.ended
    steps = told.steps()
    assert [s.step for s in steps] == list(range(before.steps + 1, core.stats.steps + 1))
    for span, works in zip(steps, seen.batches, strict=True):
        args = span.args
        assert args is not None
        decode = sum(d for *_, d in works)
        assert args["rows"] == len(works)
        assert args["decode_tokens"] == decode
        assert args["prefill_tokens"] == sum(e - s for _, s, e, _ in works) - decode
        assert args["stage"] == ("DECODE" if decode == len(works) else "EXTEND")
        assert span.name == args["batch"]
    after = core.stats
    cached = sum(int(s.args["cached_tokens"]) for s in steps if s.args)
    assert cached == after.cached_tokens - before.cached_tokens > 0
    prefill = sum(int(s.args["prefill_tokens"]) for s in steps if s.args)
    assert prefill == after.prefill_tokens - before.prefill_tokens


@pytest.mark.parametrize("overlap", [True, False])
def test_every_step_is_in_every_lane_in_order(checkpoint: Path, overlap: bool) -> None:
    core, told = make_core(checkpoint, disable_overlap_schedule=not overlap), Told()
    start(core, told)
    add(core, rows_for_tests())
    drain(core)
    core.profile(StopProfile("p"), told)
    count = core.stats.steps
    for lane in (BUILDING, DEVICE, WAITING, SAMPLING):
        assert [s.step for s in told.steps(lane)] == list(range(1, count + 1)), lane
    for a, b in zip(told.steps(), told.steps()[1:], strict=False):
        assert a.end <= b.start, "a device runs one step at a time"
    built = {s.step: s for s in told.steps(BUILDING)}
    for step in told.steps():
        assert built[step.step].end <= step.start <= step.end
    queued = {s.step for s in told.steps(QUEUEING)}
    assert len(queued) == (count - 1 if overlap else 0) or len(queued) >= count - 1
    names = [s.name for s in told.steps(SCHEDULER)]
    assert names.count("schedule") == names.count("finish") == count


@pytest.mark.parametrize("by_stage", [False, True])
def test_it_ends_by_itself_after_its_steps(checkpoint: Path, by_stage: bool) -> None:
    core, told = make_core(checkpoint, chunked_prefill_size=16), Told()
    add(core, rows_for_tests())
    core.step()
    start(core, told, num_steps=2, by_stage=by_stage, start_step=4)
    drain(core)
    assert [len(e.marks) > 0 for e in told.ended] == [True]
    numbers = [s.step for s in told.steps()]
    assert numbers[0] == 4
    stages = [s.args["stage"] for s in told.steps() if s.args]
    assert sorted(stages) == (["DECODE"] * 2 + ["EXTEND"] * 2 if by_stage else ["EXTEND"] * 2)
    assert isinstance(core._runner, MlxModelRunner), "nothing is left in the way"
    core.profile(StopProfile("p"), told)
    assert len(told.ended) == 1


def test_a_second_profile_is_refused_and_the_first_goes_on(checkpoint: Path) -> None:
    core, told, other = make_core(checkpoint), Told(), Told()
    start(core, told)
    start(core, other)
    assert "is running" in other.started[0].error
    add(core, [[1, 2, 3]])
    drain(core)
    core.profile(StopProfile("p"), told)
    assert (len(told.ended), len(other.marks)) == (1, 0)
    start(core, other)
    assert other.started[1].error == ""


@pytest.mark.parametrize("where", ["launch", "read"])
def test_steps_that_fail_are_in_it_and_it_still_ends(
    checkpoint: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("pippin.core"), "disabled", True)
    core, told = make_core(checkpoint), Told()
    flaky = FlakyRunner(core._runner)  # type: ignore[arg-type]
    core._runner = flaky
    start(core, told, num_steps=80)
    add(core, rows_for_tests())
    for _ in range(3):
        core.step()
    flaky.fail.add(where)
    drain(core)
    assert not told.ended, "a step that fails ends nothing; its requests are run again, each alone"
    for i in range(80):
        if not told.ended:
            add(core, [[1, 2, 3]], f"later{i}")
            drain(core)
    assert len(told.ended) == 1
    assert {s.step for s in told.steps(BUILDING)} == set(range(1, 81))
    assert core._runner is flaky


def test_metal_captures_run_alone_and_follow_the_files(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTL_CAPTURE_ENABLED", "1")
    metal, told, core = RecordedMetal(), Told(), make_core(checkpoint)

    def opened(command: StartProfile, tell: Any, **others: Any) -> Any:
        return open_profile(command, tell, **{**others, "device": "gpu", "metal": metal})

    monkeypatch.setattr("pippin.core.open_profile", opened)
    add(core, rows_for_tests())
    core.step()
    core.step()
    start(core, told, gpu=True, stem=str(tmp_path / "x"), by_stage=True, num_steps=2)
    overlapped = core.stats.overlapped_steps
    tokens = drain(core)
    for name in "ab":
        assert not told.ended
        assert core.stats.overlapped_steps == overlapped, "only one step may be in a capture"
        add(core, [[9, 8, 7], [200, 201]], name)
        tokens |= drain(core)
    (ended,) = told.ended
    assert metal.calls == [f"{do} x-{stage}.gputrace" for stage in ("DECODE", "EXTEND") for do in ("start", "stop")]
    assert ended.files == [str(tmp_path / f"x-{stage}.gputrace") for stage in ("DECODE", "EXTEND")]
    assert core.stats.overlapped_steps > overlapped, "after the capture steps overlap again"
    assert tokens["a0"] == tokens["b0"]


def test_captures_need_a_gpu(checkpoint: Path) -> None:
    core, told = make_core(checkpoint), Told()
    start(core, told, gpu=True)
    assert told.started[0].field == "activities"
    assert isinstance(core._runner, MlxModelRunner)


# --- off ---


def calls_into_profile(core: EngineCore) -> list[str]:
    found: list[str] = []

    def on(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(HOME):
            found.append(frame.f_code.co_name)

    sys.setprofile(on)
    try:
        core.step()
    finally:
        sys.setprofile(None)
    return found


def test_without_a_profile_a_step_calls_three_empty_functions_and_allocates_nothing_for_it(checkpoint: Path) -> None:
    core, told = make_core(checkpoint), Told()
    add(core, rows_for_tests())
    for _ in range(3):
        core.step()
    assert calls_into_profile(core) == ["no_lap"] * 3
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.take_snapshot()
        core.step()
        core.step()
        after = tracemalloc.take_snapshot()
    finally:
        tracemalloc.stop()
    only = [tracemalloc.Filter(True, f"{HOME}/*")]
    assert after.filter_traces(only).compare_to(before.filter_traces(only), "filename") == []
    start(core, told)
    assert len(calls_into_profile(core)) > 10, "and with one the same count finds it"
    core.profile(StopProfile("p"), told)
    assert set(calls_into_profile(core)) <= {"no_lap"}, "and it leaves nothing behind"


def test_a_profiled_step_of_decodes_is_a_few_calls_and_integers_however_many_rows(checkpoint: Path) -> None:
    """What a profile costs is what it calls: spans, labels and files are made elsewhere."""
    counts = []
    for rows in (2, 5):
        core, told = make_core(checkpoint), Told()
        add(core, rows_for_tests()[:rows])
        start(core, told)
        while core.stats.decode_tokens < 2 * rows:
            core.step()
        assert core._profile is not None
        before = len(core._profile._marks)
        counts.append((len(calls_into_profile(core)), len(core._profile._marks) - before))
        core.profile(StopProfile("p"), told)
    (calls, integers), more_rows = counts
    assert (calls, integers) == more_rows
    assert calls <= 20
    assert integers <= 24


# --- one-batch's interface ---


def test_stages_without_an_engine(checkpoint: Path, tmp_path: Path) -> None:
    core = make_core(checkpoint)
    add(core, [[1, 2, 3, 4], [5, 6, 7]])
    batch = core._scheduler.schedule()
    assert batch is not None
    runner = core._runner
    for name in ("prefill", "prefill"):
        with profiled(runner, name, tmp_path, about={"run": "here"}) as profile:
            results = profile.runner.launch(batch).read()
        assert len(results) == 2
        (path,) = profile.files
        events = read_events(path)
        check_events(events)
        (step,) = [e for e in events if e["ph"] == "X" and e["cat"] == DEVICE]
        assert step["args"]["prefill_tokens"] == 7
    assert sorted(p.name for p in tmp_path.iterdir()) == ["prefill-1.trace.json.gz", "prefill.trace.json.gz"]
    with contextlib.suppress(ZeroDivisionError), profiled(runner, "failed", tmp_path) as profile:
        profile.runner.launch(batch)
        raise ZeroDivisionError
    check_events(read_events(profile.files[0]))
    with pytest.raises(RequestError, match="on the CPU"), profiled(runner, "no", tmp_path, gpu=True):
        pass
    assert not list(tmp_path.glob("no*"))
    assert not isinstance(runner, TimedRunner)
