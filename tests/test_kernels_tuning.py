"""Which cut a launch gets: a measured one where the table has it, the formula's elsewhere; bad tables are ignored."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pippin import kernels
from pippin.kernels import paged, tuning
from pippin.kernels.tuning import Cell, Cut, Table

SHIPPED = sorted((Path(tuning.__file__).parent / "tables").glob("*.json"))
H200 = "NVIDIA H200"

cells = st.builds(
    Cell, st.sampled_from(["decode", "extend"]), st.booleans(), *[st.integers(0, 17).map((2).__pow__)] * 2
)
splits = st.integers(0, 6).map((2).__pow__)
tables = st.dictionaries(cells, splits).map(
    lambda found: Table(
        "a chip",
        "never",
        24,
        paged.Tuning(matrix=True),
        {cell: Cut(8 if cell.matrix else 4, splits) for cell, splits in found.items()},
    )
)


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    tuning.forget()
    yield tmp_path
    tuning.forget()


def on_chip(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": name})


@given(table=tables)
def test_a_table_survives_its_file(table: Table) -> None:
    assert tuning.parse(json.loads(tuning.render(table))) == table


@given(table=tables, blocks=st.integers(1, 1 << 18), longest=st.integers(1, 1 << 18), matrix=st.booleans())
def test_a_measured_cut_goes_before_the_formula(table: Table, blocks: int, longest: int, matrix: bool) -> None:
    dtype = mx.bfloat16 if matrix else mx.float32
    got = table.cut("decode", dtype, blocks, longest)
    measured = table.cells.get(Cell.of("decode", matrix, blocks, longest))
    if measured is None:
        assert got == paged.choose_cut(table.base, blocks, longest, table.cores)
    else:
        assert got == replace(table.base, warps=measured.warps, splits=measured.splits)


@given(blocks=st.integers(1, 1 << 18), longest=st.integers(1, 1 << 18))
def test_a_launch_falls_into_the_cell_just_above_it(blocks: int, longest: int) -> None:
    cell = Cell.of("extend", True, blocks, longest)
    assert blocks <= cell.blocks < 2 * blocks
    assert longest <= cell.longest < 2 * longest
    assert Cell.of("extend", True, cell.blocks, cell.longest) == cell


@given(table=tables, dtype=st.sampled_from([mx.float32, mx.bfloat16]))
def test_every_cut_has_all_kinds_of_cuts(table: Table, dtype: mx.Dtype) -> None:
    kinds = set(table.every_cut(dtype))
    for blocks in (1, 5, 64, 4096):
        for longest in (1, 513, 70_000):
            cut = table.cut("decode", dtype, blocks, longest)
            assert replace(cut, splits=min(2, cut.splits)) in kinds


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_tables_are_tables(path: Path) -> None:
    table = tuning.read(path)
    assert table
    assert table.cores > 0
    assert table.measured


def test_platforms_and_the_h200_have_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    on_chip(monkeypatch, "Apple M4 Max")
    assert not tuning.table("metal").base.matrix
    on_chip(monkeypatch, H200)
    tuning.forget()
    assert tuning.table("cuda").chip == H200


def test_the_users_table_for_this_chip_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    on_chip(monkeypatch, H200)
    mine = tuning.table("cuda").with_cells({Cell("decode", True, 8, 1024): Cut(8, 16)}, H200, "here")
    path = tuning.user_file(H200)
    path.parent.mkdir(parents=True)
    path.write_text(tuning.render(mine))
    q, pool = mx.zeros((1, 32, 128), dtype=mx.bfloat16), mx.zeros((4, 8, 128), dtype=mx.bfloat16)
    before = kernels.tuning_for(1, q, pool, 1000, None)
    tuning.forget()
    assert kernels.tuning_for(1, q, pool, 1000, None).splits == 16 != before.splits
    assert kernels.tuning_for(1, q, pool, 9000, 1000).splits == 16, "a window bounds what is read"
    unmeasured = kernels.tuning_for(1, q, pool, 100_000, None)
    assert unmeasured == paged.choose_cut(mine.base, 8, 100_000, 132)
    on_chip(monkeypatch, "NVIDIA H100")
    tuning.forget()
    assert tuning.table("cuda").cells == {}


GOOD: dict[str, Any] = {"kernel": "decode", "matrix": False, "blocks": 8, "longest": 512, "warps": 4, "splits": 2}


@pytest.mark.parametrize(
    "damage",
    [
        {"splits": 3},
        {"splits": 128},
        {"splits": 0},
        {"warps": 8},
        {"warps": 16, "matrix": True},
        {"kernel": "prefill"},
        {"longest": None},
    ],
)
def test_a_table_with_a_cut_that_no_launch_can_have_is_ignored(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, damage: dict[str, Any]
) -> None:
    on_chip(monkeypatch, H200)
    shipped = tuning.table("cuda")
    found = json.loads(tuning.render(shipped))
    path = tuning.user_file(H200)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(found | {"cells": [GOOD]}))
    tuning.forget()
    assert len(tuning.table("cuda").cells) == 1
    path.write_text(json.dumps(found | {"cells": [GOOD | damage]}))
    tuning.forget()
    with caplog.at_level(logging.WARNING, "pippin.kernels"):
        assert tuning.table("cuda") == shipped
    assert path.name in caplog.text


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"cores": 0}'])
def test_what_is_no_table_is_ignored(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    on_chip(monkeypatch, "Apple M4")
    path = tuning.user_file("Apple M4")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert tuning.table("metal").chip == "metal"
