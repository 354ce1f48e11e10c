"""What stands for ``mx.compile`` in tests: it runs a function each time, and counts traces as MLX makes them.

On a CPU MLX's own takes a compiler, and would capture the pool's arrays, which are replaced there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from pippin import runner
from pippin.graph import Compiler


class Counting(Compiler):
    """Compiles nothing; ``traces`` grows by one for each function and each shapes and dtypes of its arrays."""

    def compile(self, run: Callable[..., Any]) -> Callable[..., Any]:
        known: set[tuple[object, ...]] = set()

        def call(*arguments: Any) -> Any:
            key = tuple(_form(a) for a in arguments)
            self.traces += key not in known
            known.add(key)
            return run(*arguments)

        return call


def _form(argument: Any) -> object:
    if argument is None or isinstance(argument, mx.array):
        return argument if argument is None else (argument.shape, argument.dtype)
    return type(argument), tuple(_form(a) for a in argument)


def play_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes engines run as on a GPU, with the kernels' definitions in their place: pages, order by tables, graphs, no
    waiting."""
    monkeypatch.setattr("pippin.kernels.writes_in_place", lambda *_: True)
    monkeypatch.setattr(runner, "Compiler", Counting)


def traces_of(engine: object) -> int:
    """How many functions an engine's runner has traced, at its start too; 0 if it compiles none."""
    assert isinstance(engine, runner.MlxModelRunner)
    return engine._compiler.traces
