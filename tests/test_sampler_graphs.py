"""What MLX has to compile for compiled draws: it compiles a kernel for each number that a function has in it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from pippin import sampler_graphs
from pippin.sampler import FEW_TOPS, top_ids

_NODE = re.compile(r'{ (\d+) \[label ="(\w+)"')


def fused_kernels(outputs: list[mx.array], folder: Path) -> set[tuple[str, tuple[str, ...]]]:
    """The fused kernels of traced arrays: their operations, and which numbers or arguments they take as they are.

    Kernels that are compiled separately differ in one or the other; an argument has one name in all of a graph.
    """
    mx.export_to_dot(str(folder / "graph.dot"), *outputs)
    text = (folder / "graph.dot").read_text(encoding="utf-8")
    names = dict(_NODE.findall(text))
    leaves = set(re.findall(r'rank=source; "(\w+)"', text))
    given: dict[str, list[str]] = defaultdict(list)
    for array, node in re.findall(r'"(\w+)" -> (\d+)', text):
        given[node].append(array if array in leaves else "")
    return {(name, tuple(given[node])) for node, name in names.items() if name.startswith("Compiled")}


def traced(run: Callable[..., Any], *arguments: Any) -> list[mx.array]:
    """What the compiled function gives, traced and not run."""
    found = mx.compile(run)(*arguments)
    return list(found) if isinstance(found, tuple | list) else [found]


DRAWS = {
    f"top_k={plan.top_k} top_p={plan.top_p}": (plan, inputs)
    for plan, inputs in sampler_graphs._kinds(300, 4)
    if plan.random
}


def one_launch(bits: mx.array, mass: mx.array | None, *_: object, **__: object) -> tuple[mx.array, mx.array]:
    """Stands for the kernel, which the host can't run while a function is traced: two arrays made of its inputs."""
    return bits[:, :1], (bits if mass is None else mass)[:, :1].view(mx.int32)


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize(("by_kernel", "most"), [(False, 18), (True, 12)])
def test_a_draw_takes_few_kernels(
    kind: str, by_kernel: bool, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rounds of a bisection are the same few, not each a kernel of its own."""
    if by_kernel:
        monkeypatch.setattr("pippin.kernels.boundary", one_launch)
    plan, inputs = DRAWS[kind]
    logits, table, rows = mx.zeros((4, 300)), mx.zeros(9, mx.int32), mx.zeros(4, mx.int32)
    outputs = traced(partial(sampler_graphs._drawn, 300, plan), table, rows, logits, None, inputs)
    assert 3 < len(fused_kernels(outputs, tmp_path)) <= most


def test_likeliest_tokens_take_few_kernels(tmp_path: Path) -> None:
    outputs = traced(lambda values: top_ids(values, FEW_TOPS, partition=False), mx.zeros((4, 300)))
    assert 3 < len(fused_kernels(outputs, tmp_path)) <= 12


def test_kernels_with_different_numbers_are_told_apart(tmp_path: Path) -> None:
    """What the counts above rest on."""

    def sums(x: mx.array) -> mx.array:
        for number in (1.5, 1.5, 2.5):
            x = (x * number + number).cumsum(axis=-1)
        return x

    assert len(fused_kernels(traced(sums, mx.zeros((2, 3))), tmp_path)) == 2
