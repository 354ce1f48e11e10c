"""``pippin bench kernels``, ``pippin kernels tune`` and ``check``: they time what they say, and find what is wrong."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pippin import kernels
from pippin.bench import kernel_checks, kernel_times, results, tune
from pippin.bench import kernels as bench_kernels
from pippin.bench.kernel_batches import BatchShape, make_batch
from pippin.bench.kernel_times import Case
from pippin.bench.kernels import KernelTime, times
from pippin.bench.options import KernelOptions
from pippin.bench.tune import Point
from pippin.cli import run_command
from pippin.errors import ConfigError
from pippin.kernels import paged, tuning
from pippin.kernels.host import compiler, host_launcher
from pippin.kernels.tuning import Cell

needs_compiler = pytest.mark.skipif(compiler() is None, reason="kernels run on the host only where g++ is installed")

SMALL = BatchShape("small", 3, 20, kv_heads=2, group=2, dim=16, value_dim=16, dtype="float32", page_size=4)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    tuning.forget()
    yield
    tuning.forget()


# --- what is timed ---


def comparable() -> list[Case]:
    found = [
        *kernel_times.decode_cases(SMALL),
        *kernel_times.packed_cases(SMALL),
        kernel_times.extend_case(replace(SMALL, rows=1, page_size=1), 4),
        *kernel_times.row_cases(4, mx.float32, 64, 32),
        *kernel_times.limit_cases(2, 64),
        *kernel_times.draw_cases(2, 300),
        *kernel_times.elementwise_cases(8, 32),
        kernel_times.plain_decode_case(SMALL),
        kernel_times.prompt_case(24),
    ]
    return [case for case in found if case.mlx is not None and case.kernel != "rope_kv_write"]


CASES = comparable()


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.kernel)
def test_ours_and_mlxs_compute_the_same(case: Case) -> None:
    assert case.mlx
    mine, theirs = case.ours(0, case.start), case.mlx(0, case.start)
    assert mine.size == theirs.size
    assert mine.shape == theirs.shape or case.kernel == "plain attention, prompt"
    if mine.shape != theirs.shape:  # heads first, which costs nothing
        theirs = theirs[0].transpose(1, 0, 2)[:, :, None]
    assert mx.allclose(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.kernel)
def test_what_is_chained_depends_on_what_was_before(case: Case) -> None:
    """Else all but the last would not run at all."""
    if case.order == "chained":
        other = case.start + (1 if case.start.dtype == mx.int32 else 0.5)
        assert not mx.array_equal(case.ours(0, case.start), case.ours(0, other))


def test_moved_bytes_are_at_least_what_goes_in() -> None:
    assert all(case.moved > 0 for case in CASES)
    assert SMALL.kv_bytes == 3 * 20 * 2 * 32 * 4
    assert replace(SMALL, longest=50).kv_bytes == (50 + 40) * 2 * 32 * 4


def test_a_batch_has_each_token_somewhere_else() -> None:
    batch = make_batch(replace(SMALL, longest=50))
    lengths = [int(n) for n in np.array(batch.lengths)]
    table = np.array(batch.table)
    pages = [int(p) for line, n in zip(table, lengths, strict=True) for p in line[: -(-n // 4)]]
    assert lengths == [50, 20, 20]
    assert len(set(pages)) == len(pages)
    assert 0 not in pages
    assert (max(pages) + 1) * 4 == batch.k.shape[0]


# --- how ---


@pytest.mark.parametrize("order", ["chained", "apart", "settled"])
def test_times_are_of_one_step(order: str) -> None:
    """Each round runs all its steps; what it took is shared among them."""
    a, made = mx.random.normal((300, 300)), []

    def work(i: int, x: mx.array) -> mx.array:
        made.append(i)
        return (x @ a) * 1e-2

    mx.eval(work(0, a))
    made.clear()
    begin = time.perf_counter()
    one = kernel_times.seconds(work, a, order, 4, 3)
    assert made == [0, 1, 2, 3] * 4
    assert 0 < one * 4 * 2 <= time.perf_counter() - begin


def test_only_what_was_asked_for_runs() -> None:
    def fails(_: int, x: mx.array) -> mx.array:
        raise AssertionError("not asked for")

    x = mx.zeros(4)
    cases = [Case("one", "", 16, x, lambda _, x: x + 1), Case("two", "", 16, x, fails)]
    (found,) = times(cases, KernelOptions(kernel=["on"], rounds=1))
    assert (found.kernel, found.mlx_seconds, found.vs_mlx) == ("one", None, None)


def test_shares_and_ratios() -> None:
    found = KernelTime("k", "s", 2e-6, 4000, 6e-6)
    assert found.vs_mlx == pytest.approx(3.0)
    assert found.copy_share(4e9) == pytest.approx(0.5)


def test_the_command_prints_a_table_and_lines_of_json(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_kernels, "copy_bandwidth", lambda: 1e9)
    monkeypatch.setattr(bench_kernels, "cpu_cases", lambda quick: iter(CASES[:2]))
    monkeypatch.setattr(kernels, "backend", lambda: None)
    file = tmp_path / "found.jsonl"
    assert run_command(["bench", "kernels", "--rounds", "1", "--result-filename", str(file)]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert [json.loads(line) for line in lines] == [json.loads(line) for line in file.read_text().splitlines()]
    for result, case in zip(results.read([file]), CASES, strict=False):
        figures = result.figures
        assert (result.kind, result.settings["kernel"], figures["bytes"]) == ("kernels", case.kernel, case.moved)
        seconds, theirs = figures["seconds"], figures["mlx_seconds"]
        assert isinstance(seconds, float)
        assert isinstance(theirs, float)
        assert figures["vs_mlx"] == pytest.approx(theirs / seconds)
        assert figures["copy_share"] == pytest.approx(case.moved / seconds / 1e9)
    assert "MLX's own" in captured.err


@pytest.mark.parametrize(
    ("options", "named"), [(["--kernel", "nonsense"], "--kernel"), (["--rounds", "0"], "--rounds")]
)
def test_wrong_options_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], named: str
) -> None:
    monkeypatch.setattr(bench_kernels, "copy_bandwidth", lambda: 1e9)
    monkeypatch.setattr(bench_kernels, "cpu_cases", lambda quick: iter(()))
    assert run_command(["bench", "kernels", *options]) == 2
    assert named in capsys.readouterr().err


# --- tuning ---

TABLE = tuning.parse(
    {"chip": "x", "measured": "no", "cores": 10, "warps": 4, "unroll": 4, "heads": 8, "matrix": True, "cells": []}
)


def modelled(point: Point, cut: paged.Tuning) -> float:
    """A chip that runs 20 blocks at once, and takes a microsecond for a second launch."""
    blocks = point.units * 8 * cut.splits
    waves = -(-blocks // 20)
    return 1e-6 * (cut.splits > 1) + waves * (point.longest / cut.splits) * 1e-9 / cut.warps


@pytest.mark.parametrize("kernel", ["decode", "extend"])
def test_tuning_finds_the_models_best_cut(kernel: tuning.Kernel) -> None:
    where = [Point(kernel, units, longest, "bfloat16") for units in (1, 64) for longest in (256, 16384)]
    table = TABLE
    for point, cut, taken, found in tune.tune(TABLE, where, modelled, "chip"):
        table = found
        least = min(modelled(point, c) for c in tune.cuts(TABLE, point))
        assert least <= taken <= least / tune._MARGIN
        shape = point.shape
        got = table.cut(kernel, mx.bfloat16, point.units * shape.kv_heads, point.longest)
        assert (got.warps, got.splits) == (cut.warps, cut.splits)
    assert len(table.cells) == 4
    assert table.cells[Cell(kernel, True, 8, 16384)].splits > table.cells[Cell(kernel, True, 512, 16384)].splits == 1
    assert tuning.parse(json.loads(tuning.render(table))) == table


@given(st.lists(st.integers(90, 110).map(float), min_size=1, max_size=14))
def test_a_later_cut_must_win_by_the_margin(taken: list[float]) -> None:
    cuts = [paged.Tuning(splits=1 << i) for i in range(len(taken))]
    best = tune.best_cut(list(zip(cuts, taken, strict=True)))
    chosen = taken[cuts.index(best)]
    assert all(chosen < t * tune._MARGIN for t in taken[: cuts.index(best)][:1])
    assert all(chosen < t for t in taken[: cuts.index(best)])
    assert min(taken) >= chosen * tune._MARGIN


@pytest.mark.parametrize("quick", [True, False])
def test_points_are_cells_of_their_own_and_fit_into_memory(quick: bool) -> None:
    points = tune.points(quick)
    assert len({(p.cell(TABLE)) for p in points}) == len(points)
    assert all(p.shape.kv_bytes <= 4 << 30 for p in points)
    for point in points:
        cuts = tune.cuts(TABLE, point)
        assert cuts[0].splits == 1
        assert all((a.splits, a.warps) < (b.splits, b.warps) for a, b in pairwise(cuts))
        assert all(point.longest // cut.splits >= 128 for cut in cuts)
        assert all(cut.warps == 4 for cut in cuts if point.dtype == "float32")


def test_a_tuned_table_is_what_later_launches_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "Some GPU"})
    q, pool = mx.zeros((1, 32, 128), dtype=mx.bfloat16), mx.zeros((4, 8, 128), dtype=mx.bfloat16)
    assert kernels.tuning_for(1, q, pool, 1024, None).splits == 2
    *_, (_, cut, _, table) = tune.tune(
        TABLE, [Point("decode", 1, 1024, "bfloat16")], lambda p, c: 1 / c.splits, "Some GPU"
    )
    assert cut.splits == 8
    path = tune.save(table)
    assert Path(path).name == "some_gpu.json"
    assert kernels.tuning_for(1, q, pool, 1024, None).splits == 8


def test_a_table_that_cannot_be_written_names_the_option(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--output"):
        tune.save(TABLE, str(tmp_path / "file" / "table.json"))


@pytest.mark.skipif(mx.default_device() == mx.Device(mx.gpu), reason="this machine has a GPU")
def test_without_a_gpu_there_is_nothing_to_tune(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["kernels", "tune"]) == 2
    assert "no GPU" in capsys.readouterr().err


# --- checks ---


@needs_compiler
def test_the_command_checks_every_kernel_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["kernels", "check", "--quick"]) == 0
    out = capsys.readouterr().out
    assert "0 failed" in out
    assert all(name in out for name in ("rope_kv_write", "decode with the write", "extend", "bfloat16"))


@needs_compiler
@pytest.mark.parametrize(
    ("line", "planted", "check"),
    [
        ("sub >= old) s[u]", "sub > old) s[u]", "decode with the write"),
        ("lengths[first_row + r] : 0", "stop : 0", "extend"),
    ],
)
def test_a_planted_fault_fails_its_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str, planted: str, check: str
) -> None:
    fault = host_launcher(edit=lambda text: text.replace(line, planted))
    monkeypatch.setattr(kernel_checks, "launcher", lambda: (fault, "host"))
    assert run_command(["kernels", "check", "--quick"]) == 1
    assert any(row.startswith(f"FAIL {check}") for row in capsys.readouterr().out.splitlines())


def test_where_nothing_can_run_kernels_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernel_checks, "launcher", lambda: (None, "nothing"))
    assert run_command(["kernels", "check"]) == 1
    assert "nothing ran" in capsys.readouterr().out


def test_queued_steps_keep_their_order_without_a_gpu_too() -> None:
    assert kernel_checks.check_order(3).ok


def test_a_number_that_is_none_is_infinitely_wrong() -> None:
    assert kernel_checks.largest_difference(mx.array([1.0, float("nan")]), mx.array([1.0, 2.0])) == float("inf")
    assert kernel_checks.largest_difference(mx.array([1.0, 2.5]), mx.array([1.0, 2.0])) == 0.5
