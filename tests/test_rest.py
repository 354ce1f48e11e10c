"""Memory goes back once in each pause that lasts, and never while there is work."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pippin import footprint, rest
from pippin.client import EngineClient
from pippin.config import EngineConfig
from pippin.messages import Abort, Command, Ping, Progress, Shutdown, Submit
from pippin.rest import AFTER, Rest
from pippin.types import SamplingParams
from pippin.worker import serve
from tests.fake_core import PYTHONPATH, FakeCore, expected
from tests.waiting import comes_true


class Day:
    """Commands come as ``arrivals`` say, of (seconds after the one before, command); time passes only in waits."""

    def __init__(self, core: FakeCore, arrivals: Sequence[tuple[float, Command]]) -> None:
        self.now, self.core, self.given = 0.0, core, list[float]()
        self._left = [*arrivals]
        self._next = self._left[0][0] if arrivals else 0.0
        self.worked: list[float] = []

    def receive(self, seconds: float) -> Command | None:
        if self.core.has_work:
            assert seconds == 0
            self.worked.append(self.now)
        if not self._left:
            return None if self.core.has_work else Shutdown()
        if self._next > self.now + seconds:
            self.now += seconds
            return None
        self.now = max(self.now, self._next)
        command = self._left.pop(0)[1]
        self._next = self.now + (self._left[0][0] if self._left else 0.0)
        return command

    def give_back(self) -> None:
        assert not self.core.has_work
        self.given.append(self.now)


def lived(core: FakeCore, arrivals: Sequence[tuple[float, Command]]) -> Day:
    day = Day(core, arrivals)
    serve(core, day.receive, lambda event: None, rest=Rest(day.give_back, lambda: day.now))
    return day


def submit(id: str, count: int = 2) -> Submit:
    return Submit(id, [1, 2], 2, SamplingParams(max_new_tokens=count, temperature=0))


GAPS = st.sampled_from([0.0, 0.1, AFTER - 0.5, AFTER + 0.5, 4 * AFTER])
KINDS = st.sampled_from(["submit", "ping", "abort"])


@given(st.lists(st.tuples(GAPS, KINDS), max_size=12))
def test_once_in_each_pause_that_lasts(plan: list[tuple[float, str]]) -> None:
    made: dict[str, Command] = {"ping": Ping(), "abort": Abort("nobody")}
    arrivals = [(gap, submit(str(i)) if kind == "submit" else made[kind]) for i, (gap, kind) in enumerate(plan)]
    day = lived(FakeCore(0), arrivals)
    # A pause begins with the start or with a request, which takes no time here, and lasts until the next request.
    begins, now = [0.0], 0.0
    for gap, kind in plan:
        now += gap
        if kind == "submit":
            begins.append(now)
    ends = [*begins[1:], now]
    assert day.given == [begin + AFTER for begin, end in zip(begins, ends, strict=True) if end - begin >= AFTER]


def test_whoever_has_rested_waits_for_ever() -> None:
    given: list[bool] = []
    now = 5.0
    one = Rest(lambda: given.append(True), lambda: now)
    assert one.patience(False) == AFTER
    now += AFTER
    assert one.patience(False) == math.inf
    assert one.patience(False) == math.inf
    assert given == [True]


def test_a_step_s_own_pause_is_not_a_rest() -> None:
    """Work that takes longer than a rest is work."""
    now = 0.0
    given: list[float] = []
    one = Rest(lambda: given.append(now), lambda: now)
    for _ in range(5):
        now += 3 * AFTER
        assert one.patience(True) == 0
    assert one.patience(False) == AFTER
    assert given == []


# --- an engine ---


def noting(config: EngineConfig, progress: Callable[[Progress], None]) -> FakeCore:
    """An engine that rests soon, and lets the file that ``model_path`` names grow where it gives memory back."""
    core = FakeCore(0)

    def note() -> None:
        with Path(config.model_path or "").open("a") as file:
            file.write("busy\n" if core.has_work else "idle\n")

    rest.AFTER, footprint.trim = 0.05, note
    return core


def in_thread(config: EngineConfig) -> EngineClient:
    return EngineClient.in_thread(lambda progress: noting(config, progress))


def in_a_process(config: EngineConfig) -> EngineClient:
    return EngineClient.spawn(config, "tests.test_rest:noting")


@pytest.mark.parametrize("make", [in_thread, in_a_process])
def test_an_engine_rests_after_loading_and_after_work(
    make: Callable[[EngineConfig], EngineClient], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
    monkeypatch.setattr(rest, "AFTER", rest.AFTER)  # put back what the thread sets
    monkeypatch.setattr(footprint, "trim", footprint.trim)
    file = tmp_path / "given back"
    file.touch()

    def grown(before: str) -> bool:
        return file.read_text() != before

    async def main() -> None:
        client = make(EngineConfig(model_path=str(file)))
        try:
            await client.start()
            for before in ("", "idle\n", "idle\nidle\n"):
                await comes_true(partial(grown, before))
                params = SamplingParams(max_new_tokens=3, temperature=0)
                found = [t async for output in client.submit([1, 2], params) for t in output.tokens]
                assert found == expected([1, 2], 3)
        finally:
            await client.close()

    asyncio.run(main())
    assert file.read_text().splitlines() in (3 * ["idle"], 4 * ["idle"])
