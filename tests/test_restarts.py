"""When an engine counts as hung, when it may start again, and who is found guilty: driven with times of our own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pippin.restarts import BACK_OFF, PROOF, Docket, Restarts, Watchdog


@given(st.lists(st.floats(0, 100), max_size=40), st.integers(1, 5), st.floats(1, 50))
def test_no_window_has_more_restarts_than_the_limit(gaps: list[float], limit: int, window: float) -> None:
    restarts, now, granted = Restarts(limit, window), 0.0, list[float]()
    for gap in gaps:
        now += gap
        wait = restarts.wait(now)
        delay = restarts.next(now)
        assert (delay is None) == (wait > 0)
        if delay is not None:
            granted.append(now)
        else:
            assert wait <= window
        assert len([t for t in granted if now - t < window]) <= limit


def test_the_first_restart_is_at_once_and_later_ones_wait_longer() -> None:
    restarts = Restarts(10, 1e6)
    delays = [restarts.next(float(i)) for i in range(10)]
    assert delays[: len(BACK_OFF)] == list(BACK_OFF)
    assert set(delays[len(BACK_OFF) :]) == {BACK_OFF[-1]}
    assert restarts.next(10.0) is None
    assert restarts.wait(11.0) == pytest.approx(1e6 - 11)
    assert restarts.next(1e6 + 0.5) is not None  # the first has left the window


def look(watchdog: Watchdog, seconds: float, waiting: bool, start: float = 0.0, step: float = 1.0) -> float | None:
    """When it barks, looked at each ``step``."""
    now = start
    while now <= start + seconds:
        if watchdog.look(now, waiting) is not None:
            return now - start
        now += step
    return None


@pytest.mark.parametrize("waiting", [True, False])
def test_silence_is_noticed_whether_anyone_waits_or_not(waiting: bool) -> None:
    assert look(Watchdog(60.0), 100, waiting) == pytest.approx(61, abs=2)


def test_a_loop_that_turns_but_makes_no_step_is_noticed_if_someone_waits() -> None:
    for waiting in (True, False):
        watchdog, barked = Watchdog(60.0), None
        for now in range(100):
            watchdog.heard(step=False)
            if (why := watchdog.look(float(now), waiting)) is not None:
                barked = now, why
                break
        assert (barked is not None) == waiting
        if barked is not None:
            assert 60 <= barked[0] <= 62
            assert "no step" in barked[1]


def test_steps_keep_it_quiet() -> None:
    watchdog = Watchdog(60.0)
    for now in range(0, 1000, 5):
        if now % 50 == 0:
            watchdog.heard(step=True)
        assert watchdog.look(float(now), True) is None


def test_time_in_which_the_watcher_slept_counts_little() -> None:
    """Ctrl-Z stops both processes, a closed lid too: neither hangs."""
    watchdog = Watchdog(60.0)
    assert watchdog.look(0.0, True) is None
    assert watchdog.look(10_000.0, True) is None
    watchdog.heard(step=True)
    assert look(watchdog, 59, True, start=10_001.0) is None


class Engine:
    """Runs what a docket gives out, in batches of ``rows``, and dies of any killer in the step; it tells the step."""

    def __init__(self, killers: set[str], rows: int, tells: bool, dies_at: int = 0) -> None:
        self.docket = Docket()
        self.killers, self.rows, self.tells, self.dies_at = killers, rows, tells, dies_at
        self.given: list[str] = []
        self.had: dict[str, int] = {}
        self.left: dict[str, int] = {}
        self.guilty: list[str] = []
        self.deaths = 0

    def add(self, id: str, tokens: int) -> None:
        self.docket.add(id)
        self.left[id] = tokens
        self.had[id] = 0

    def step(self) -> None:
        self.given += self.docket.next()
        assert len(set(self.given)) == len(self.given)
        step = self.given[: self.rows]
        if any(id in self.killers and self.had[id] >= self.dies_at for id in step):
            self.deaths += 1
            guilty = self.docket.crashed(frozenset(step) if self.tells else None)
            self.given.clear()
            if guilty is not None:
                self.guilty.append(guilty)
                self.end(guilty)
            return
        for id in step:
            self.left[id] -= 1
            self.had[id] += 1
            self.docket.heard(id, 1)
            if not self.left[id]:
                self.end(id)
                self.given.remove(id)

    def end(self, id: str) -> None:
        self.docket.ended(id)
        del self.left[id]


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=20),
    st.sets(st.integers(0, 19), max_size=3),
    st.integers(1, 30),
    st.booleans(),
    st.sampled_from([0, 1, 7]),
    st.randoms(use_true_random=False),
)
def test_killers_are_found_and_all_others_end_as_they_should(
    lengths: list[int], killers: set[int], rows: int, tells: bool, dies_at: int, random: st.DataObject
) -> None:
    """Whoever comes when, however many run together: the guilty are exactly those that kill."""
    doomed = {str(i) for i in killers if i < len(lengths) and lengths[i] > dies_at}
    engine, coming = Engine(doomed, rows, tells, dies_at), [*enumerate(lengths)]
    for _ in range(5000):
        if coming and random.random() < 0.3:  # type: ignore[attr-defined]
            i, length = coming.pop(0)
            engine.add(str(i), length)
        engine.step()
        if not coming and not engine.left:
            break
    assert not engine.left, "some never ended"
    assert set(engine.guilty) == doomed


def test_a_killer_among_many_streams_costs_two_deaths() -> None:
    engine = Engine({"killer"}, 1000, tells=True)
    for i in range(200):
        engine.add(str(i), 50)
    for _ in range(PROOF):
        engine.step()
    engine.add("killer", 50)
    for _ in range(100):
        engine.step()
    assert (engine.guilty, engine.deaths, engine.left) == (["killer"], 2, {})


def test_deaths_that_are_nobodys_fault_convict_nobody_that_goes_on() -> None:
    docket = Docket()
    for i in range(8):
        docket.add(str(i))
    for _ in range(50):
        given: list[str] = docket.next()
        while len(given) < 8:
            for id in given:
                docket.heard(id, PROOF)
            given += docket.next()
        for id in given:
            docket.heard(id, PROOF)
        assert docket.crashed(frozenset(given[:1])) is None


def test_a_killer_among_64_newcomers_is_found_within_five_deaths() -> None:
    for killer in (0, 17, 63):
        engine = Engine({str(killer)}, 1000, tells=True)
        for i in range(64):
            engine.add(str(i), 20)
        for _ in range(500):
            engine.step()
        assert (engine.guilty, engine.deaths, engine.left) == ([str(killer)], 5, {})


def test_one_of_many_suspects_is_not_guilty_when_it_is_first_tried_alone() -> None:
    """Somebody outside may have killed the engine both times; alone twice, and nobody else is left."""
    docket = Docket()
    for id in "ab":
        docket.add(id)
    docket.next()
    assert docket.crashed({"a", "b"}) is None
    assert docket.next() == ["a"]
    assert docket.trying
    assert docket.crashed({"a"}) is None
    assert docket.next() == ["a"]
    assert docket.crashed({"a"}) == "a"
    docket.ended("a")
    assert docket.next() == ["b"]
    docket.heard("b", PROOF)
    assert docket.next() == []
    assert not docket.trying


def test_newcomers_wait_while_suspects_are_tried() -> None:
    docket = Docket()
    docket.add("a")
    assert docket.next() == ["a"]
    docket.crashed(frozenset(["a"]))
    docket.add("b")
    assert docket.next() == ["a"]
    assert docket.next() == []
    docket.heard("a", PROOF)
    assert docket.next() == ["b"]


def test_who_gets_on_between_two_deaths_is_not_guilty_of_them() -> None:
    """Somebody may be killing the engine from outside; a content that kills does so at the same token again."""
    docket = Docket()
    docket.add("a")
    for _ in range(3):
        assert docket.next() == ["a"]
        docket.heard("a", PROOF - 1)
        assert docket.crashed({"a"}) is None
    assert docket.next() == ["a"]
    assert docket.crashed({"a"}) == "a", "no further than the last time"
