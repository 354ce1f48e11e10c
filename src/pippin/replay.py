"""Steps that are recorded once and then launched by one call, where MLX queues them through CUDA graphs.

A compiled step is the same operations over the same memory whenever its shape comes up again, but for what it reads
and returns. So it is recorded (``mlx_cuda``) over arrays of its own; to run it again, what it reads is copied into
these, and the driver launches its graph. MLX is not asked: queuing 265 operations takes it 2 to 4 ms.

What a recorded step computes on its way lies in buffers that MLX holds for free. They are taken out of its hands:
right after a recording they are all that MLX keeps for its next allocations, so arrays of just these sizes get them.
All recorded steps may use the same ones, for what they return too, since one runs after the other, and what a step
returns is read by operations that are queued before the next. The host looks at none of what a recorded step reads or
writes, weights included: MLX moves an array to where the host sees it, and the graph would not know.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Protocol

import mlx.core as mx

from pippin import kernels
from pippin.kernels.launch import Launcher, gpu_launcher, ready
from pippin.kernels.staging import stage
from pippin.mlx_cuda import CudaError, Graph, MlxCuda, UnknownMlxError

log = logging.getLogger(__name__)

Made = tuple[mx.array, mx.array, mx.array]
StepFunction = Callable[[mx.array, mx.array], Made]
"""From the device table [lines] and a step's inputs in one array, both int32."""

# Of the memory that the plan leaves to others, a fifth of a GPU's by default, what recorded steps may hold.
_SHARE = 1 / 3
_NO_LIMIT = 1 << 60


class LostMemoryError(CudaError):
    """Others may have got what recorded steps need: none may be launched any more."""


class Recorder(Protocol):
    """Takes the graph of what is evaluated, and holds the memory that it needs."""

    @property
    def held(self) -> int:
        """The bytes of that, of all graphs so far."""
        ...

    def record(self, run: Callable[[], Sequence[mx.array]]) -> tuple[Graph, Sequence[mx.array]]:
        """Evaluates what ``run`` makes of arrays that exist. Its graph, and the arrays that this computes anew.

        It must have been run before: nothing but these arrays may be made now, and stay. Raises CudaError if it can't
        be recorded, and LostMemoryError if the graphs so far can't be launched any more either.
        """
        ...


class CudaRecorder:
    """The recorder of this thread's stream. Raises UnknownMlxError where MLX can't be read."""

    def __init__(self) -> None:
        self._cuda = MlxCuda()
        self._zero = mx.zeros(1, mx.uint8)
        mx.eval(self._zero)
        self._kept: list[mx.array] = []

    @property
    def held(self) -> int:
        return sum(array.nbytes for array in self._kept)

    def record(self, run: Callable[[], Sequence[mx.array]]) -> tuple[Graph, Sequence[mx.array]]:
        made: list[mx.array] = []

        def evaluate() -> None:
            made.extend(run())
            mx.async_eval(made)  # type: ignore[no-untyped-call]

        mx.synchronize()
        mx.clear_cache()
        with _all_kept(), ExitStack() as undone:
            self._kept = []  # the next graph takes what the others have
            try:
                graph = self._cuda.record(evaluate)
                undone.callback(graph.close)
            finally:
                self._hold()
            undone.pop_all()
        return graph, made

    def _hold(self) -> None:
        """Takes all that MLX keeps for its next allocations. Raises LostMemoryError if it doesn't get it."""
        try:
            mx.synchronize()
            # Copies of a number that is there already: nothing else is allocated for them, and freed again.
            self._kept = [mx.contiguous(mx.broadcast_to(self._zero, (size,))) for size in self._cuda.freed()]
            mx.eval(self._kept)
            mx.synchronize()
        except RuntimeError as error:
            raise LostMemoryError(f"MLX does not lend steps' memory: {error}") from error
        if left := mx.get_cache_memory():
            raise LostMemoryError(f"MLX does not lend steps' memory: {left} bytes are left")


@contextmanager
def _all_kept() -> Iterator[None]:
    """While it lasts, MLX gives no freed memory back."""
    cached, all_together = mx.set_cache_limit(_NO_LIMIT), mx.set_memory_limit(_NO_LIMIT)
    try:
        yield
    finally:
        mx.set_memory_limit(all_together)
        mx.set_cache_limit(cached)


class Replay:
    """A recorded step, to be called in place of its function.

    What it returns is computed when all queued by then has run, and overwritten by the next recorded step.
    """

    def __init__(
        self, graph: Graph, places: tuple[mx.array, mx.array], made: Sequence[mx.array], launch: Launcher
    ) -> None:
        self._graph = graph
        self._launch = launch
        self._places = places
        self._sizes = ready(mx.array([place.size for place in places], mx.int32))
        self._made = made

    def __call__(self, table: mx.array, packed: mx.array) -> Made:
        """Queues the step. Raises CudaError."""
        mx.async_eval(stage(self._launch, (table, packed), self._places, self._sizes))  # type: ignore[no-untyped-call]
        self._graph.launch()
        logits, tokens, drawn = self._made
        return logits, tokens, drawn

    def close(self) -> None:
        self._graph.close()


class Replays:
    """The recorded steps of one model and pool, made as they come up.

    ``open_recorder`` is called when the first is recorded, by the thread that evaluates. ``launch`` copies what they
    read; ``most_bytes`` is what they may hold. ``launches`` counts the steps that ``run`` launched.
    """

    def __init__(self, open_recorder: Callable[[], Recorder], launch: Launcher, most_bytes: int) -> None:
        self._open = open_recorder
        self._launch = launch
        self._most_bytes = most_bytes
        self._recorder: Recorder | None = None
        self._refused = False
        self.launches = 0
        self._steps: dict[Hashable, Replay | None] = {}
        self._by_row: dict[int, float] = {}
        self._returned = 0

    def __len__(self) -> int:
        return sum(step is not None for step in self._steps.values())

    @property
    def held(self) -> int:
        """Bytes that they hold, beside what the driver makes of them."""
        return self._returned + (self._recorder.held if self._recorder else 0)

    def record(
        self,
        key: Hashable,
        rows: int,
        run: StepFunction,
        examples: Callable[[], Sequence[mx.array]],
        table: mx.array,
    ) -> None:
        """Records the steps that are ``key``, of ``rows`` rows, unless that was tried.

        It is done over the first of ``examples`` of their inputs, int32, and compared with ``run`` over the others:
        these write to the pool where they say, and all that is queued is waited for.
        """
        if key not in self._steps:
            recorder = self._recorder_for(rows)
            self._steps[key] = self._recorded(recorder, rows, run, examples, table) if recorder is not None else None

    def run(self, key: Hashable, table: mx.array, packed: mx.array) -> Made | None:
        """Queues the step if there is a recorded one; see ``Replay``. Raises CudaError."""
        step = self._steps.get(key)
        if step is None:
            return None
        self.launches += 1
        return step(table, packed)

    def close(self) -> None:
        """Waits for what is queued, and gives all memory back; nothing is recorded from then on."""
        mx.synchronize()
        for step in self._steps.values():
            if step is not None:
                step.close()
        self._steps = dict.fromkeys(self._steps)
        self._recorder, self._returned = None, 0
        self._refused = True

    def _recorder_for(self, rows: int) -> Recorder | None:
        """The recorder, if steps of so many rows have room: by what a row of the others took."""
        if self._recorder is None and not self._refused:
            try:
                self._recorder = self._open()
            except UnknownMlxError as error:
                self._refused = True
                log.info("steps are queued by MLX each time, which is slower: %s", error)
        more = 0 if rows in self._by_row else rows * max(self._by_row.values(), default=0)
        return self._recorder if self.held + more <= self._most_bytes else None

    def _recorded(
        self,
        recorder: Recorder,
        rows: int,
        run: StepFunction,
        examples: Callable[[], Sequence[mx.array]],
        table: mx.array,
    ) -> Replay | None:
        first, *others = examples()
        places, before = (table + 0, first + 0), recorder.held
        mx.eval(places, others, run(table, first))  # what compiles does so now
        try:
            graph, made = recorder.record(lambda: run(*places))
        except LostMemoryError as error:
            log.warning("all steps are queued by MLX each time from now on, which is slower: %s", error)
            self.close()
            return None
        except RuntimeError as error:  # the driver's or MLX's, out of memory too
            log.warning("steps of %d rows are queued by MLX each time, which is slower: %s", rows, error)
            return None
        self._by_row.setdefault(rows, (recorder.held - before) / rows)
        replay = Replay(graph, places, made, self._launch)
        if all(_same(replay, run, table, packed) for packed in others):
            self._returned += sum(array.nbytes for array in made)
            return replay
        log.warning("steps of %d rows are queued by MLX each time, which is slower: recorded, they are not right", rows)
        replay.close()
        return None


def _same(replay: Replay, run: StepFunction, table: mx.array, packed: mx.array) -> bool:
    """Whether a recorded step computes what ``run`` does, to the last bit."""
    want = run(table, packed)
    mx.eval(want)
    try:
        got = replay(table, packed)
    except CudaError as error:
        log.info("%s", error)
        return False
    return all(bool(mx.array_equal(a, b, equal_nan=True).item()) for a, b in zip(got, want, strict=True))


def cuda_replays(left_bytes: int) -> Replays | None:
    """Where steps are recorded, in a part of ``left_bytes``; None where MLX doesn't queue through CUDA."""
    if kernels.backend() != "cuda":
        return None
    return Replays(CudaRecorder, gpu_launcher("cuda"), int(left_bytes * _SHARE))
