"""Recorded steps: the tokens of steps that MLX queues, what is recorded and when, and what can go wrong."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from pippin.core import EngineCore
from pippin.mlx_cuda import CudaError, UnknownMlxError
from pippin.replay import CudaRecorder, LostMemoryError, Replays, cuda_replays
from tests.recording import AgainGraph, AgainRecorder, Run, play_recorder
from tests.test_graph import GREEDY, KINDS, as_on_a_gpu, checkpoint, load, make_core, runner_of, serve, tokens_of

__all__ = ["as_on_a_gpu", "checkpoint"]


def replays_of(core: EngineCore) -> Replays:
    graphs = runner_of(core).graphs
    assert graphs is not None
    assert graphs.replays is not None
    return graphs.replays


def served(path: Path, recorder: AgainRecorder | None, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    """Tokens of a load of every kind of request, cut, cached, batched and overlapped as they come."""
    with monkeypatch.context() as patch:
        if recorder is not None:
            play_recorder(patch, recorder)
        core = make_core(path, max_running_requests=6, chunked_prefill_size=16, page_size=4, **options)
        return core, tokens_of(serve(core, load(5, 26, list(KINDS.values()))))


@pytest.mark.parametrize("overlap", [True, False])
def test_recorded_steps_draw_the_same_tokens(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, overlap: bool) -> None:
    recorder = AgainRecorder()
    _, want = served(checkpoint, None, monkeypatch)
    core, found = served(checkpoint, recorder, monkeypatch, disable_overlap_schedule=not overlap)
    assert found == want
    assert recorder.launches > core.stats.graph_replays > core.stats.steps / 2
    assert core.stats.overlapped_steps > 50 or not overlap


def test_all_compiled_shapes_are_recorded_at_the_start_and_none_later(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = AgainRecorder()
    play_recorder(monkeypatch, recorder)
    core = make_core(checkpoint, max_running_requests=6, chunked_prefill_size=16)
    graphs = runner_of(core).graphs
    assert graphs is not None
    shapes = {*graphs.decodes(250), *graphs.extends(250)}
    assert len(replays_of(core)) == len(recorder.graphs) == len(shapes) > 6
    serve(core, load(7, 20, [GREEDY]))
    assert len(recorder.graphs) == len(shapes)


def test_without_a_warm_up_they_are_recorded_as_they_come(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = AgainRecorder()
    core, found = served(checkpoint, recorder, monkeypatch, skip_server_warmup=True)
    _, want = served(checkpoint, None, monkeypatch)
    assert found == want
    assert 0 < len(recorder.graphs) <= len(replays_of(core))


def test_a_step_that_is_not_the_same_again_is_left_to_mlx(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A graph that runs over what it was recorded with, as if its inputs had not been copied."""

    def stale(run: Run) -> Run:
        kept = [mx.array(array) for array in run()]
        mx.eval(kept)
        return lambda: kept

    recorder = AgainRecorder(fault=stale)
    with caplog.at_level(logging.WARNING, "pippin.replay"):
        core, found = served(checkpoint, recorder, monkeypatch)
    _, want = served(checkpoint, None, monkeypatch)
    assert found == want
    assert len(replays_of(core)) == 0
    assert all(graph.closed for graph in recorder.graphs)
    assert replays_of(core).held == recorder.held, "what was dropped holds nothing"
    assert "recorded, they are not right" in caplog.text


def test_a_step_that_is_not_launched_again_is_left_to_mlx(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(run: Run) -> Run:
        def launch() -> Sequence[mx.array]:
            raise CudaError("the driver refused to launch a recorded step (CUDA error 1)")

        return launch

    recorder = AgainRecorder(fault=refused)
    core, found = served(checkpoint, recorder, monkeypatch)
    _, want = served(checkpoint, None, monkeypatch)
    assert found == want
    assert all(graph.closed for graph in recorder.graphs)
    assert core.stats.retractions == len(replays_of(core)) == 0


def test_one_wrong_number_is_found(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def off(run: Run) -> Run:
        def wrong() -> Sequence[mx.array]:
            logits, *rest = run()
            return [logits + mx.zeros_like(logits).at[-1, -1].add(1e-3), *rest]

        return wrong

    core, _ = served(checkpoint, AgainRecorder(fault=off), monkeypatch)
    assert len(replays_of(core)) == 0


def test_what_the_driver_refuses_is_left_to_mlx(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = AgainRecorder(refuse=3)
    with caplog.at_level(logging.WARNING, "pippin.replay"):
        core, found = served(checkpoint, recorder, monkeypatch)
    _, want = served(checkpoint, None, monkeypatch)
    assert found == want
    assert len(replays_of(core)) == 3
    assert "CUDA error 2" in caplog.text


def test_once_memory_is_lost_no_recorded_step_is_launched(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Others may have got it, so those recorded before are closed too: the fifth is tried while the engine serves."""
    recorder = AgainRecorder(refuse=4, refusal=LostMemoryError("MLX does not lend steps' memory: 8 bytes are left"))
    with caplog.at_level(logging.WARNING, "pippin.replay"):
        core, found = served(checkpoint, recorder, monkeypatch, skip_server_warmup=True)
    _, want = served(checkpoint, None, monkeypatch)
    assert found == want
    assert len(recorder.graphs) == 4
    assert all(graph.closed for graph in recorder.graphs)
    assert len(replays_of(core)) == 0
    assert caplog.text.count("all steps are queued by MLX") == 1


@pytest.mark.parametrize("room", [0, 4])
def test_they_hold_no_more_than_they_may(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """Room for steps of up to so many rows; how much a row takes is known once the smallest is recorded."""
    each = 1 << 20
    recorder, most = AgainRecorder(each=each), each * sum(range(room + 1))
    play_recorder(monkeypatch, recorder, most_bytes=most)
    core = make_core(checkpoint, max_running_requests=6)
    replays = replays_of(core)
    assert replays.held <= max(most, 2 * each)
    assert {len(graph.made[0]) for graph in recorder.graphs} == ({1, 2, 4} if room else {1})
    assert tokens_of(serve(core, load(3, 4, [GREEDY])))


def test_an_unknown_mlx_is_told_once(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unknown() -> AgainRecorder:
        raise UnknownMlxError("MLX 9.9 on riscv is not known")

    monkeypatch.setattr("pippin.loading.cuda_replays", lambda _: Replays(unknown, lambda *_: [], 1 << 40))
    with caplog.at_level(logging.INFO, "pippin.replay"):
        core = make_core(checkpoint, max_running_requests=6)
    assert len(replays_of(core)) == 0
    assert caplog.text.count("MLX 9.9 on riscv") == 1


def test_a_launch_that_fails_ends_one_step(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All are served; what was recorded over the pool that is gone is closed, and recorded anew over the next."""
    recorder = AgainRecorder()
    play_recorder(monkeypatch, recorder)
    core = make_core(checkpoint, max_running_requests=6)
    before, launch = [*recorder.graphs], AgainGraph.launch
    left = [3]

    def failing(self: AgainGraph) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise CudaError("the driver refused to launch a recorded step (CUDA error 719)")
        launch(self)

    monkeypatch.setattr(AgainGraph, "launch", failing)
    found = serve(core, load(9, 8, [GREEDY]))
    assert all(len(tokens) == GREEDY.max_new_tokens for tokens in tokens_of(found).values())
    assert all(graph.closed for graph in before)
    assert len(recorder.graphs) > len(before)
    assert any(not graph.closed for graph in recorder.graphs)


class FakeCuda:
    """A queue of MLX's that keeps ``freed`` bytes, and gives a graph or raises."""

    def __init__(self, freed: list[int], error: Exception | None = None) -> None:
        self.sizes, self.error, self.graph = freed, error, AgainGraph(AgainRecorder(), list, [])

    def record(self, run: Callable[[], None]) -> AgainGraph:
        run()
        if self.error is not None:
            raise self.error
        return self.graph

    def freed(self) -> list[int]:
        return self.sizes


@pytest.mark.parametrize("error", [None, CudaError("refused")])
@pytest.mark.parametrize("left", [0, 8])
def test_memory_is_held_whatever_comes_of_a_recording(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None, left: int
) -> None:
    """Graphs so far need it too; the limits of MLX's memory are what they were."""
    cuda, limits = FakeCuda([8, 16384, 40960, 16384], error), [mx.set_cache_limit(5000), mx.set_memory_limit(1 << 40)]
    monkeypatch.setattr("pippin.replay.MlxCuda", lambda: cuda)
    monkeypatch.setattr(mx, "get_cache_memory", lambda: left)
    try:
        recorder = CudaRecorder()
        if left or error is not None:
            with pytest.raises(LostMemoryError if left else CudaError, match="8 bytes" if left else "refused"):
                recorder.record(lambda: [mx.ones(3) + 1])
        else:
            graph, made = recorder.record(lambda: [mx.ones(3) + 1])
            assert (graph, [m.tolist() for m in made]) == (cuda.graph, [[2, 2, 2]])
        assert sorted(array.nbytes for array in recorder._kept) == sorted(cuda.sizes)
        assert recorder.held == sum(cuda.sizes)
        assert cuda.graph.closed == (left > 0 and error is None)
    finally:
        assert (mx.set_cache_limit(limits[0]), mx.set_memory_limit(limits[1])) == (5000, 1 << 40)


def test_asked_for_nothing_is_recorded(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = AgainRecorder()
    play_recorder(monkeypatch, recorder)
    core = make_core(checkpoint, disable_graph_replay=True)
    graphs = runner_of(core).graphs
    assert graphs is not None
    assert graphs.replays is None
    assert not recorder.graphs


def test_nothing_is_recorded_where_mlx_has_no_cuda() -> None:
    assert cuda_replays(1 << 30) is None
