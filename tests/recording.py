"""What stands for a GPU's recorder in tests: it runs functions again, and writes over what they returned in place."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
import pytest

from pippin import loading
from pippin.kernels.host import host_launcher
from pippin.mlx_cuda import CudaError, Graph
from pippin.replay import Replays

Run = Callable[[], Sequence[mx.array]]


@dataclass
class AgainGraph:
    """Runs a function again. What every other graph has returned is nonsense afterwards, as where memory is shared."""

    recorder: AgainRecorder
    run: Run
    made: Sequence[mx.array]
    closed: bool = False

    def launch(self) -> None:
        assert not self.closed
        self.recorder.launches += 1
        for other in self.recorder.graphs:
            for array in other.made:
                spoil(array)
        found = self.run()
        mx.eval(found)
        for array, new in zip(self.made, found, strict=True):
            overwrite(array, np.array(new))

    def close(self) -> None:
        assert not self.closed
        self.closed = True


@dataclass
class AgainRecorder:
    """``fault`` changes what runs, in a graph's later runs; from record ``refuse`` on ``refusal`` is raised.

    Steps of as many rows share ``each`` bytes a row.
    """

    fault: Callable[[Run], Run] = lambda run: run
    refuse: int = 1 << 30
    refusal: CudaError = field(default_factory=lambda: CudaError("the driver refused (CUDA error 2)"))
    each: int = 1000
    graphs: list[AgainGraph] = field(default_factory=list)
    launches: int = 0

    @property
    def held(self) -> int:
        return self.each * sum({len(graph.made[0]) for graph in self.graphs})

    def record(self, run: Run) -> tuple[Graph, Sequence[mx.array]]:
        if len(self.graphs) >= self.refuse:
            raise self.refusal
        made = [mx.array(np.array(array)) for array in run()]
        mx.eval(made)
        graph = AgainGraph(self, self.fault(run), made)
        self.graphs.append(graph)
        return graph, made


def spoil(array: mx.array) -> None:
    overwrite(array, np.full(array.shape, 7, np.array(array).dtype))


def overwrite(array: mx.array, values: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> None:
    """Changes an evaluated array's own memory, as only a device does."""
    mx.eval(array)
    view = memoryview(array)  # type: ignore[arg-type]
    assert view.contiguous
    assert view.nbytes == values.nbytes
    place = np.frombuffer(view, np.uint8) if view.nbytes else np.zeros(0, np.uint8)
    ctypes.memmove(place.ctypes.data, np.ascontiguousarray(values).ctypes.data, values.nbytes)


def play_recorder(monkeypatch: pytest.MonkeyPatch, recorder: AgainRecorder, most_bytes: int = 1 << 40) -> None:
    """Makes engines record their compiled steps by ``recorder``."""
    monkeypatch.setattr(loading, "cuda_replays", lambda _: Replays(lambda: recorder, host_launcher(), most_bytes))
