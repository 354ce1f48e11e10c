"""The churn and the shortage of memory that run on a GPU: here on a CPU, small; and that they see what they are for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from benchmarks import churn, shortage
from benchmarks.grammar import shaped_core
from pippin.core import EngineCore
from pippin.messages import Output, Submit
from pippin.types import Finish, SamplingParams

FEW = churn.Scale(clients=12, longest=40, slots=64, chunk=32)


@pytest.fixture
def core(tmp_path: Path) -> Iterator[EngineCore]:
    with closing(shaped_core("tiny", churn.config_of(FEW), tmp_path)) as found:
        yield found


@pytest.fixture(scope="module")
def idle_core(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineCore]:
    with closing(shaped_core("tiny", churn.config_of(FEW), tmp_path_factory.mktemp("model"))) as found:
        yield found


def report_of(core: EngineCore) -> dict[str, Any]:
    return churn.churned(core, FEW, seconds=1.2)


def test_nothing_is_lost_and_the_report_says_what_was_done(core: EngineCore) -> None:
    report = report_of(core)
    assert report["failures"] == []
    assert report["samples"] == churn.LEAST_SAMPLES
    assert report["requests"] >= churn.LEAST_SAMPLES * FEW.clients
    assert report["needed"] > 10 * report["pool"]
    assert report["drift_percent"]["active"] < 3
    counts = report["counts"]
    assert {"whole", "leaves", "aborts", "flushes", "ended: length", "ended: abort"} <= counts.keys()
    assert counts["again, the same"] >= 12


def test_a_slot_that_does_not_come_back_is_told(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where somebody waits for it for ever."""
    monkeypatch.setattr(churn, "STUCK", 1.0)
    free, given = core._scheduler._allocator.free, 0

    def loses_one(pages: Any) -> None:
        nonlocal given
        given += 1
        free(pages[1:] if given == 40 else pages)

    core._scheduler._allocator.free = loses_one  # type: ignore[method-assign]
    assert "1 slots lost" in report_of(core)["failures"]


@pytest.mark.parametrize(
    ("asked", "finish", "wrong"),
    [
        ({}, Finish("error", None, "planted"), "500: planted"),
        ({}, Finish("abort"), "aborted, and nobody asked for it"),
        ({"left": True}, Finish("abort"), None),
        ({}, Finish("length"), "ended by length with another number of tokens"),
        ({"tokens": [7] * 4}, Finish("length"), None),
        ({"tokens": [7] * 4, "fixed": 0}, Finish("length"), "a fixed request had another answer"),
        ({"tokens": [7]}, Finish("stop"), None),
        ({"refused": True}, Finish("error", None, "a regex", "regex", 400), None),
        ({"refused": True}, Finish("length"), "should have been refused"),
    ],
)
def test_what_should_not_be_told_is_counted(
    idle_core: EngineCore, asked: dict[str, Any], finish: Finish, wrong: str | None
) -> None:
    clients = churn.Churn(idle_core, FEW)
    clients._known[0] = [8] * 4
    submit = Submit("c1", [5, 6], 2, SamplingParams(max_new_tokens=4))
    clients._open["c1"] = churn.Asked(submit, **asked)
    clients._hear(Output("c1", finish=finish))
    assert [*clients.errors] == ([wrong] if wrong else [])
    clients._hear(Output("c1", finish=finish))
    assert clients.errors["told of a request that had ended"] == 1


def test_growth_is_of_the_last_sixth_against_the_third() -> None:
    assert churn.growth([9, 9, 5, 7, 7, 6], int) == pytest.approx(0.2)
    assert churn.growth([9] * 4 + [5] * 2 + [7] * 4 + [6] * 2, int) == pytest.approx(0.2)


def test_a_shortage_is_served_in_smaller_steps_and_told_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results.jsonl"
    assert shortage.main(["--shape", "tiny", "--json", str(file)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads(file.read_text())
    assert report["simulated"]
    for row in report["rows"]:
        assert row["failed_steps"]
        assert row["ends"] == {"length": report["requests"]}
        assert row["same_answers"] == report["requests"]
        assert row["least_tokens"] < report["chunk"]
        assert row["largest_step"] > report["chunk"] * row["left"]
    assert len(report["rows"]) == shortage.ENOUGH


def test_where_no_step_fails_nothing_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortage, "SHARES", (10.0,))
    assert shortage.shortage("tiny")["failures"] == [
        "no request was served in spite of steps that failed, so nothing is shown"
    ]


class Device:
    """So many bytes of memory, which blocks take and give back."""

    def __init__(self, size: int) -> None:
        self.free = size

    def take(self, size: int) -> Block | None:
        return Block(self, size) if self.free >= size else None


class Block:
    def __init__(self, device: Device, size: int) -> None:
        self.device, self.nbytes = device, size
        device.free -= size

    def __del__(self) -> None:
        self.device.free += self.nbytes


@pytest.mark.parametrize("room", [0, 35 << 20, 175 << 20, 700 << 20])
@pytest.mark.parametrize("size", [10 << 30, (10 << 30) + (300 << 20), (139 << 30) + (777 << 20)])
def test_ballast_leaves_the_room_that_is_asked_for(monkeypatch: pytest.MonkeyPatch, size: int, room: int) -> None:
    device = Device(size)
    monkeypatch.setattr(shortage, "_block", device.take)
    monkeypatch.setattr(shortage, "device_bytes", lambda: size + (500 << 20))  # a process takes some
    held = shortage.ballast(room)
    assert room <= device.free < room + 2 * shortage.BLOCKS[-1]
    held.clear()
    assert device.free == size


def test_where_memory_has_no_end_there_is_no_shortage(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no more is taken than the device has: of managed memory that could hang it."""
    device = Device(1 << 50)
    least = device.free

    def take(size: int) -> Block | None:
        nonlocal least
        block = device.take(size)
        least = min(least, device.free)
        return block

    monkeypatch.setattr(shortage, "_block", take)
    monkeypatch.setattr(shortage, "device_bytes", lambda: 10 << 30)
    with pytest.raises(RuntimeError, match="do not fail here"):
        shortage.ballast(0)
    assert least >= (1 << 50) - (10 << 30)


def test_ballast_counts_as_another_programs(idle_core: EngineCore) -> None:
    """Neither the engine's watch nor MLX's limit sees it: both would make steps smaller before any of them fails."""
    watch, limit, taken = idle_core._memory, mx.get_active_memory() + (8 << 30), 1 << 30
    assert watch is not None
    before = mx.set_memory_limit(limit)
    try:
        held, read = watch._read().held, watch._read
        with shortage.others_memory(idle_core, taken):
            assert watch._read().held < held - taken // 2
            assert shortage.memory_now()["limit"] == limit + taken
        assert watch._read is read
        assert shortage.memory_now()["limit"] == limit
    finally:
        mx.set_memory_limit(before)
