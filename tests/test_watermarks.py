"""Short memory: what is looked at, what is given up, and that somebody always moves on."""

from __future__ import annotations

import mmap
import os
import platform
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pippin import footprint
from pippin.cache.radix import RadixCache
from pippin.cache.slots import SlotAllocator
from pippin.config import EngineConfig
from pippin.errors import ConfigError
from pippin.loading import load_core
from pippin.memory import give_back, set_wired_limit
from pippin.messages import Submit
from pippin.scheduler import Scheduler
from pippin.types import Request, RowResult, SamplingParams
from pippin.watermarks import LOOK_SECONDS, MemoryWatch, Reading, Watermarks

GB = 10**9
MARKS = Watermarks.of(8 * GB, 16 * GB, 32 * GB)


@pytest.mark.parametrize(
    ("held", "free", "level"),
    [
        (8 * GB, None, "ok"),
        (8 * GB, 20 * GB, "ok"),
        (9 * GB, 20 * GB, "soft"),  # more than the budget, and what a process takes beside it
        (13 * GB, 20 * GB, "hard"),
        (GB, int(1.5 * GB), "soft"),  # others have taken it
        (GB, int(0.5 * GB), "hard"),
    ],
)
def test_levels(held: int, free: int | None, level: str) -> None:
    assert MARKS.level(Reading(held, free)) == level


@given(st.integers(0, 2**40), st.integers(0, 2**40), st.integers(0, 2**40), st.floats(0.01, 0.99))
def test_more_held_or_less_free_is_never_a_lower_level(held: int, free: int, more: int, share: float) -> None:
    order = ("ok", "soft", "hard")
    marks = Watermarks.of(int(2**35 * share), 2**35, 2**36)
    assert marks.soft_held <= marks.hard_held
    now = order.index(marks.level(Reading(held, free)))
    assert now <= order.index(marks.level(Reading(held + more, free)))
    assert now <= order.index(marks.level(Reading(held, max(0, free - more))))


def test_memory_is_looked_at_now_and_then_and_free_buffers_go_when_it_is_short() -> None:
    time, reading, shrunk = [0.0], [Reading(0, None)], list[float]()
    watch = MemoryWatch(MARKS, lambda: reading[0], lambda: shrunk.append(time[0]), lambda: time[0])
    assert watch.look()
    assert watch.level == "ok"
    reading[0] = Reading(9 * GB, None)
    assert not watch.look(), "too soon"
    time[0] += LOOK_SECONDS
    assert watch.look()
    assert (watch.level, shrunk) == ("soft", [LOOK_SECONDS])
    reading[0] = Reading(GB, None)
    time[0] += LOOK_SECONDS
    assert watch.look()
    assert (watch.level, len(shrunk)) == ("ok", 1)


def scheduler(rows: int = 8, slots: int = 512) -> Scheduler:
    allocator = SlotAllocator(slots + 1, 1)
    radix = RadixCache(allocator)
    return Scheduler(allocator, radix, max_running=rows, chunk=256, policy="fcfs", context_length=128)


def drive(owner: Scheduler, most: int = 2000) -> int:
    """Steps until all have ended; the most that ran in one."""
    running = 0
    while owner.has_work:
        batch = owner.schedule()
        assert batch is not None
        running = max(running, len(batch.works))
        owner.finish(batch, [RowResult(token=7) for _ in batch.works])
        most -= 1
        assert most, "nobody moves on"
    return running


def requests(count: int) -> list[Request]:
    params = SamplingParams(max_new_tokens=6, ignore_eos=True)
    return [Request(str(i), [i + 1] * 9, 9, params) for i in range(count)]


def test_while_memory_is_short_requests_go_one_at_a_time_and_all_end() -> None:
    owner = scheduler()
    asked = requests(6)
    for request in asked:
        owner.add(request)
    owner.planner.held = True
    assert drive(owner) == 1
    assert [len(r.tokens) for r in asked] == [15] * 6
    owner.planner.held = False
    for request in (again := requests(6)):
        owner.add(request)
    assert drive(owner) == 6
    assert all(r.finish is not None for r in again)


@given(st.integers(1, 8), st.integers(0, 5))
def test_shedding_halves_what_runs_and_loses_nobody(count: int, after: int) -> None:
    owner = scheduler()
    asked = requests(count)
    for request in asked:
        owner.add(request)
    for _ in range(after):
        if (batch := owner.schedule()) is not None:
            owner.finish(batch, [RowResult(token=7) for _ in batch.works])
    before = owner.stats().num_running
    assert owner.shed() == before // 2
    assert owner.stats().num_running == before - before // 2
    owner.planner.held = True
    drive(owner)
    assert [len(r.tokens) for r in asked] == [15] * count
    stats = owner.stats()
    assert stats.slots_free + stats.slots_cached == stats.slots_total


def test_an_engine_short_of_memory_answers_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if others took the machine's memory in the middle of it: same tokens, one after the other, then all again."""
    core = load_core(EngineConfig(device="cpu", max_total_tokens=2000))
    assert 0 < core.info.activation_bytes < core.info.budget_bytes < core.info.device_bytes
    free = [2**40]
    monkeypatch.setattr("pippin.memory.free_bytes", lambda: free[0])
    monkeypatch.setattr("pippin.watermarks.LOOK_SECONDS", 0.0)

    def answers(levels: list[int]) -> tuple[dict[str, list[int]], set[str], int]:
        params = SamplingParams(max_new_tokens=12, temperature=0.0, ignore_eos=True)
        found: dict[str, list[int]] = {f"{len(levels)}-{i}": [] for i in range(4)}
        for i, id in enumerate(found):
            core.add(Submit(id, [20 + i] * 8, 8, params))
        seen, step = set[str](), 0
        while core.has_work:
            free[0] = levels[min(step, len(levels) - 1)]
            output = core.step()
            step += 1
            seen.add(core.stats.memory_level)
            for one in output.outputs if output else ():
                found[one.id] += one.tokens
        return {id[-1]: tokens for id, tokens in found.items()}, seen, core.stats.retractions

    calm, levels, none = answers([2**40])
    assert (levels, none) == ({"ok"}, 0)
    short, levels, some = answers([2**40, 2**40, 2**40, 0, 0, 0, 2**40])
    assert short == calm
    assert levels == {"ok", "hard"}
    assert some >= 2


def test_the_system_says_what_a_process_holds_and_what_is_free() -> None:
    held, free = footprint.process_bytes(), footprint.free_bytes()
    assert 2**24 < held < 2**38
    assert free is None or 0 < free < 2**45
    with mmap.mmap(-1, 64 << 20) as ballast:  # not the allocator's: that may have as much at hand
        for at in range(0, len(ballast), mmap.PAGESIZE):
            ballast[at] = 1
        assert footprint.process_bytes() - held > 32 << 20


@pytest.mark.parametrize(("most", "free"), [("1000000\n", 700_000), ("max\n", None)])
def test_a_container_has_less_than_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: str, free: int | None
) -> None:
    for name, text in (("max", most), ("current", "400000\n"), ("stat", "anon 1\ninactive_file 100000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    files = (tmp_path / "memory.max", tmp_path / "memory.current", "inactive_file")
    monkeypatch.setattr(footprint, "_CGROUPS", (files,))
    monkeypatch.setattr("pippin.footprint.sys.platform", "linux")
    found = footprint.free_bytes()
    assert found == free if free else found is None or found > 1_000_000


def test_the_wired_limit_is_left_alone_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[int] = []
    monkeypatch.setattr(mx, "set_wired_limit", said.append)
    set_wired_limit(EngineConfig())
    assert said == []
    set_wired_limit(EngineConfig(wired_limit_gb=1.5))
    assert said == [1_500_000_000]

    def refuse(limit: int) -> None:
        raise ValueError("larger than the system's")

    monkeypatch.setattr(mx, "set_wired_limit", refuse)
    with pytest.raises(ConfigError, match="--wired-limit-gb: 2 GB can't be wired"):
        set_wired_limit(EngineConfig(wired_limit_gb=2))


def test_no_source_sets_the_wired_limit_but_the_option() -> None:
    sources = Path(footprint.__file__).parent.rglob("*.py")
    assert [p.name for p in sources if "mx.set_wired_limit(" in p.read_text()] == ["memory.py"]


CLAIM = """
import sys
from pathlib import Path
from pippin.claims import share
class Owner: pass
owner = Owner()
with share(Path(sys.argv[1])) as shared:
    shared.claim(int(sys.argv[2]), owner)
    print(shared.others, flush=True)
sys.stdin.read()
"""


def test_engines_share_by_claims_that_die_with_them(tmp_path: Path) -> None:
    from pippin.claims import share

    class Owner:
        pass

    folder = tmp_path / "host"

    def start(size: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", CLAIM, str(folder), str(size)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    with start(100) as first, start(20) as second:
        assert first.stdout is not None
        assert second.stdout is not None
        assert sorted([int(first.stdout.readline()), int(second.stdout.readline())])[0] == 0
        with share(folder) as shared:
            assert shared.others == 120
        first.kill()
        first.wait()
        owner = Owner()
        with share(folder) as shared:
            assert shared.others == 20, "a killed engine's claim counts no more"
            shared.claim(7, owner)
        with share(folder) as shared:
            assert shared.others == 27
        del owner
        with share(folder) as shared:
            assert shared.others == 20
        second.kill()
    assert sorted(p.name for p in folder.glob("*.claim")) != [] or folder.exists()
    with share(folder) as shared:
        assert shared.others == 0
    assert list(folder.glob("*.claim")) == []


def test_where_nothing_can_be_written_nothing_is_shared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from pippin.claims import share

    (tmp_path / "file").write_text("")
    with share(tmp_path / "file" / "host") as shared:
        assert shared.others == 0
        assert shared.claim(1, test_levels) is None
    assert "nothing can be written" in caplog.text


def test_an_engine_leaves_what_another_has_claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pippin.loading.claims_folder", lambda key: tmp_path / key)
    config = EngineConfig(device="cpu", max_total_tokens=500)
    first = load_core(config)
    second = load_core(config)
    alone = load_core(EngineConfig(device="cpu", max_total_tokens=500, disable_memory_sharing=True))
    claimed = first.info.weight_bytes + first.info.pool_bytes + first.info.activation_bytes
    assert first.info.device_bytes - second.info.device_bytes == claimed
    assert alone.info.device_bytes == first.info.device_bytes


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="glibc keeps freed pages")
def test_freed_memory_is_given_back() -> None:
    """What lies above it is in use: left to itself, glibc gives back nothing of what is below."""
    before = footprint.process_bytes()
    held = [bytes(4096) for _ in range(30_000)]
    last = held.pop()
    full = footprint.process_bytes()
    del held
    kept = footprint.process_bytes()
    give_back()
    assert full - before > 100 * 2**20
    assert full - kept < 20 * 2**20, "nothing to give back: the test says nothing"
    assert kept - footprint.process_bytes() > 80 * 2**20
    assert len(last) == 4096


def test_a_flush_gives_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[bool] = []
    monkeypatch.setattr("pippin.memory.trim", lambda: given.append(True))
    core = load_core(EngineConfig(max_total_tokens=200, disable_memory_sharing=True))
    before = len(given)
    core.flush()
    assert len(given) == before + 1
