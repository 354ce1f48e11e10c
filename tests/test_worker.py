"""The loop round the core: what is obeyed, what is answered, and that it sleeps when there is nothing to do."""

from __future__ import annotations

import logging
import os
import queue
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pippin.errors import ModelError
from pippin.messages import (
    Abort,
    Command,
    Event,
    Fatal,
    Flush,
    Flushed,
    Output,
    Progress,
    Ready,
    Shutdown,
    StepOutput,
    Submit,
)
from pippin.types import SamplingParams
from pippin.worker import Core, run, serve
from tests.fake_core import PYTHONPATH, RAISE, FakeCore, expected
from tests.waiting import SECONDS, until


def submit(id: str, prompt: list[int], count: int = 3) -> Submit:
    return Submit(id, prompt, len(prompt), SamplingParams(max_new_tokens=count, temperature=0))


def drive(core: FakeCore, commands: Iterable[Command]) -> list[Event]:
    """Serve a script of commands, handed over one per question, then shut down once the work is done."""
    script, sent = iter(commands), list[Event]()

    def receive(wait: float) -> Command | None:
        if wait:
            return next(script, Shutdown())
        return next(script, None)

    serve(core, receive, sent.append)
    return sent


def outputs(events: Iterable[Event], id: str) -> list[Output]:
    return [o for e in events if isinstance(e, StepOutput) for o in e.outputs if o.id == id]


@given(st.lists(st.tuples(st.lists(st.integers(0, 255), min_size=1, max_size=5), st.integers(1, 6)), max_size=6))
def test_every_request_is_answered_in_full_with_one_message_a_step(requests: list[tuple[list[int], int]]) -> None:
    core = FakeCore(seconds=0)
    events = drive(core, [submit(str(i), prompt, count) for i, (prompt, count) in enumerate(requests)])
    for i, (prompt, count) in enumerate(requests):
        mine = outputs(events, str(i))
        assert [t for o in mine for t in o.tokens] == expected(prompt, count)
        assert [o.finish is not None for o in mine] == [False] * (count - 1) + [True]
    assert len(events) == core.steps
    assert not core.has_work


def test_a_request_that_cannot_be_served_is_its_own_trouble(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.CRITICAL, "pippin.worker"):
        events = drive(
            FakeCore(0), [submit("good", [1]), submit("empty", []), submit("odd", [RAISE]), submit("b", [2])]
        )
    empty, odd = outputs(events, "empty")[-1].finish, outputs(events, "odd")[-1].finish
    assert empty is not None
    assert (empty.reason, empty.field, empty.status) == ("error", "prompt", 400)
    assert odd is not None
    assert (odd.reason, odd.field, odd.status) == ("error", None, 500)
    assert "ZeroDivisionError" in odd.message
    for id in ("good", "b"):
        assert len([t for o in outputs(events, id) for t in o.tokens]) == 3


def test_abort_ends_a_request_in_the_next_step() -> None:
    core = FakeCore(0)
    asked = 0

    def receive(wait: float) -> Command | None:
        nonlocal asked
        asked += 1
        if asked == 1:
            return submit("a", [1], 1000)
        if asked == 5:
            return Abort("a")
        return Shutdown() if wait else None

    events: list[Event] = []
    serve(core, receive, events.append)
    mine = outputs(events, "a")
    assert mine[-1].finish is not None
    assert mine[-1].finish.reason == "abort"
    assert len(mine) < 6


def test_flush_is_answered_and_refused_while_requests_run() -> None:
    core = FakeCore(0)
    core.seen.add((1, 2, 3))
    events = drive(core, [submit("a", [1]), Flush("early")])
    assert Flushed("early", False, "the cache can't be flushed while requests run") in events
    events = drive(core, [Flush("late")])
    assert events[-1] == Flushed("late", True)
    assert core.seen == set()
    assert [e.stats.slots_cached for e in events if isinstance(e, StepOutput)] == [0]


def test_start_up_is_reported() -> None:
    events: list[Event] = []

    def load(progress: Callable[[Progress], None]) -> Core:
        progress(Progress("load", 1, 2))
        return FakeCore()

    assert run(load, lambda wait: Shutdown(), events.append)
    assert [type(e) for e in events] == [Progress, StepOutput, Ready], "the pool's size is known when it is ready"


@pytest.mark.parametrize("ends", ["told to", "of itself"])
def test_however_it_ends_the_engine_is_closed(ends: str) -> None:
    core = FakeCore(0) if ends == "told to" else Broken(0)
    script = iter([submit("a", [1]), *[None] * 4, Shutdown()])
    logging.disable(logging.CRITICAL)
    try:
        assert run(lambda progress: core, lambda wait: next(script), lambda event: None) == (ends == "told to")
    finally:
        logging.disable(logging.NOTSET)
    assert core.closed == 1


@pytest.mark.parametrize(("error", "kind"), [(ModelError("no"), "ModelError"), (MemoryError(), "MemoryError")])
def test_a_failed_start_is_fatal_and_says_why(error: Exception, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    events: list[Event] = []

    def load(progress: Callable[[Progress], None]) -> Core:
        raise error

    assert not run(load, lambda wait: Shutdown(), events.append)
    assert events == [Fatal(kind, str(error) or kind)]


class Broken(FakeCore):
    def step(self) -> StepOutput | None:
        raise RuntimeError("lost the device")


def test_a_step_that_raises_is_fatal(caplog: pytest.LogCaptureFixture) -> None:
    events: list[Event] = []
    assert not run(lambda progress: Broken(), lambda wait: submit("a", [1]) if wait else None, events.append)
    assert events[-1] == Fatal("RuntimeError", "lost the device")


def test_the_loop_sleeps_when_idle_and_wakes_at_once() -> None:
    core, commands, waits = FakeCore(0), queue.SimpleQueue[Command](), list[float]()

    def receive(wait: float) -> Command | None:
        waits.append(wait)
        try:
            return commands.get(wait > 0)
        except queue.Empty:
            return None

    for command in (submit("a", [1], 4), Shutdown()):
        commands.put(command)
        if isinstance(command, Shutdown):
            break
    serve(core, receive, lambda event: None)
    assert waits[0] > 0  # nothing to do yet: wait for the first command
    assert waits[1:] == [0]  # there is work: look, and don't wait

    waits.clear()
    drive_twice = iter([submit("b", [1], 2), None, None, Shutdown()])

    def scripted(wait: float) -> Command | None:
        waits.append(wait)
        return next(drive_twice)

    serve(FakeCore(0), scripted, lambda event: None)
    assert [wait > 0 for wait in waits] == [True, False, False, True]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="looks in /proc")
@pytest.mark.parametrize("how", ["os._exit(0)", "os.kill(os.getpid(), 9)"])
def test_the_child_dies_with_its_parent(how: str) -> None:
    code = f"""
        import asyncio, os
        from pippin.client import EngineClient
        from pippin.config import EngineConfig
        async def main():
            client = EngineClient.spawn(EngineConfig(), "tests.fake_core:load")
            await client.start()
            print(client.transport.pid, flush=True)
            {how}
        asyncio.run(main())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
    )
    until(lambda: not alive(int(done.stdout)))
