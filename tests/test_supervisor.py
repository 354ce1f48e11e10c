"""Engines that die, hang or fail under streams: whoever asks sees nothing of it."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import signal
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq

from pippin.client import EngineClient
from pippin.config import EngineConfig
from pippin.errors import EngineError, RequestError
from pippin.journal import Job
from pippin.messages import LoadAdapter, Output, Submit, UnloadAdapter
from pippin.restarts import Supervision
from pippin.supervisor import Supervisor
from pippin.types import CacheMiss, SamplingParams, TokenLogprob
from tests.fake_core import HANG, KILL, PYTHONPATH, expected
from tests.waiting import SECONDS, comes_true

GREEDY = SamplingParams(max_new_tokens=60, temperature=0)
PATIENT = Supervision(max_restarts=100, back_off=(0.0,))


@pytest.fixture(autouse=True)
def _children_find_the_fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)


@asynccontextmanager
async def served(model: str = "0.005", supervision: Supervision = PATIENT) -> AsyncIterator[EngineClient]:
    client = EngineClient.spawn(EngineConfig(model_path=model), "tests.fake_core:load", "critical", supervision)
    try:
        await client.start()
        yield client
    finally:
        await client.close()


def supervisor_of(client: EngineClient) -> Supervisor:
    assert isinstance(client.transport, Supervisor)
    return client.transport


def open_files() -> int:
    return len([*Path("/dev/fd").iterdir()])


def strike(client: EngineClient, number: signal.Signals = signal.SIGKILL) -> int:
    pid = supervisor_of(client).pid
    assert pid is not None
    os.kill(pid, number)
    return pid


async def collect(client: EngineClient, prompt: list[int], params: SamplingParams, id: str | None = None) -> Output:
    """All of an answer as one Output."""
    found = [output async for output in client.submit(prompt, params, id=id)]
    return Output(
        "",
        [token for output in found for token in output.tokens],
        [logprob for output in found for logprob in output.logprobs],
        [logprob for output in found for logprob in output.prompt_logprobs],
        finish=found[-1].finish,
    )


def finish(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 2 * SECONDS))


def test_streams_go_on_where_they_stopped_whenever_the_child_is_killed() -> None:
    source = random.Random(5)

    def params(i: int) -> SamplingParams:
        return SamplingParams(
            max_new_tokens=source.randrange(20, 120),
            temperature=i % 2,
            seed=i,
            logprobs=i % 3 == 0,
            prompt_logprobs=i % 5 == 0,
        )

    async def main() -> None:
        async with served() as client:
            asked = [([i, 2 * i + 1], params(i)) for i in range(24)]
            undisturbed = [await collect(client, *one) for one in asked[:3]]
            answers = [asyncio.create_task(collect(client, *one)) for one in asked]
            pid = None
            for _ in range(4):
                await comes_true(lambda: supervisor_of(client)._ready and supervisor_of(client).pid != pid)  # noqa: B023
                await asyncio.sleep(source.random() / 10)
                # Two deaths under one that has had no token yet are what makes it guilty, whoever kills.
                await comes_true(lambda: not supervisor_of(client).journal.docket.trying)
                pid = strike(client)
            found = await asyncio.gather(*answers)
            assert found[:3] == undisturbed
            for (prompt, one), answer in zip(asked, found, strict=True):
                assert answer.tokens == expected(prompt, one.max_new_tokens, one.seed or 0 if one.temperature else 0)
                assert len(answer.logprobs) == (one.max_new_tokens if one.logprobs else 0)
                assert len(answer.prompt_logprobs) == (2 if one.prompt_logprobs else 0)
            assert client.stats.restarts == 4
            assert client.stats.resumed >= 24
            assert client.live == ()
            assert len(supervisor_of(client).journal) == 0

    finish(main())


@pytest.mark.parametrize("what", ["process", "sockets"])
def test_a_child_that_cannot_be_started_is_tried_again(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the machine has no more processes, or this one no more files."""

    async def main() -> None:
        async with served() as client:
            answer = asyncio.create_task(collect(client, [1], GREEDY))
            await comes_true(lambda: client.stats.steps > 5)
            files = open_files()
            tried = 0

            def refuse(*_: object, **__: object) -> Any:
                nonlocal tried
                tried += 1
                if what == "process":
                    raise BlockingIOError(errno.EAGAIN, "no more processes")
                raise zmq.ZMQError(errno.EMFILE, "too many open files")

            with monkeypatch.context() as patch:
                if what == "process":
                    patch.setattr(asyncio, "create_subprocess_exec", refuse)
                else:
                    patch.setattr(zmq.Context, "socket", refuse)
                strike(client)
                await comes_true(lambda: tried > 2)
            assert (await answer).tokens == expected([1], 60)
            assert open_files() <= files

    finish(main())


@pytest.mark.parametrize("how", ["stopped", "in a step"])
def test_a_child_that_hangs_is_replaced(how: str) -> None:
    async def main() -> None:
        async with served(supervision=Supervision(watchdog_timeout=0.5)) as client:
            answer = asyncio.create_task(collect(client, [1], GREEDY))
            await comes_true(lambda: client.stats.steps > 5)
            if how == "stopped":
                strike(client, signal.SIGSTOP)
            else:
                with pytest.raises(EngineError, match=r"twice.*no step for 0\.5 seconds"):
                    await collect(client, [HANG], GREEDY)
            assert (await answer).tokens == expected([1], 60)
            assert client.trouble is None

    finish(main())


def test_an_idle_child_that_is_stopped_is_replaced_before_anyone_asks() -> None:
    async def main() -> None:
        async with served(supervision=Supervision(watchdog_timeout=0.4)) as client:
            pid = strike(client, signal.SIGSTOP)
            await comes_true(lambda: supervisor_of(client).pid not in (None, pid))
            assert (await collect(client, [1], GREEDY)).tokens == expected([1], 60)

    finish(main())


def test_a_slow_step_is_no_hang() -> None:
    async def main() -> None:
        async with served("0.3", Supervision(watchdog_timeout=0.6)) as client:
            params = SamplingParams(max_new_tokens=4, temperature=0)
            assert (await collect(client, [1], params)).tokens == expected([1], 4)
            await asyncio.sleep(1.5)  # idle: it answers when it is asked
            assert client.stats.restarts == 0

    finish(main())


def test_what_is_asked_during_a_restart_waits_for_it() -> None:
    async def main() -> None:
        async with served("slow") as client:
            supervisor = supervisor_of(client)
            first = asyncio.create_task(collect(client, [1], GREEDY))
            aborted = asyncio.create_task(collect(client, [2], SamplingParams(max_new_tokens=100_000), id="a"))
            await comes_true(lambda: client.stats.steps > 3)
            strike(client)
            await comes_true(lambda: not supervisor._ready)
            later = asyncio.create_task(collect(client, [3], GREEDY))
            unwanted = asyncio.create_task(collect(client, [4], GREEDY, id="b"))
            flushed = asyncio.create_task(client.flush())
            await asyncio.sleep(0.01)
            for id in "ab":
                client.abort(id)
            async with aclosing(client.submit([5], GREEDY)) as stream:
                left = asyncio.create_task(anext(stream))
                await asyncio.sleep(0.01)
                left.cancel()
                await asyncio.gather(left, return_exceptions=True)
            for ended in await asyncio.gather(aborted, unwanted):
                assert ended.finish is not None
                assert ended.finish.reason == "abort"
            assert not supervisor._ready
            assert (await first).tokens == expected([1], 60)
            assert (await later).tokens == expected([3], 60)
            assert (await flushed).id
            assert len(supervisor.journal) == 0

    finish(main())


def test_a_poisoned_step_is_a_death_like_any_other() -> None:
    """The engine says Fatal and ends by itself."""

    async def main() -> None:
        async with served("poisoned") as client:
            assert (await collect(client, [1], GREEDY)).tokens == expected([1], 60)
            assert client.stats.restarts >= 1

    finish(main())


def test_after_too_many_deaths_all_fails_until_the_window_has_passed() -> None:
    async def main() -> None:
        async with served(supervision=Supervision(max_restarts=1, restart_window=2.0)) as client:
            answer = asyncio.create_task(collect(client, [1], SamplingParams(max_new_tokens=100_000)))
            await comes_true(lambda: client.stats.steps > 5)
            strike(client)
            await comes_true(lambda: client.stats.restarts == 1 and client.stats.steps > 5)
            strike(client)
            with pytest.raises(EngineError, match="restarted 1 times"):
                await answer
            trouble = client.trouble
            assert isinstance(trouble, EngineError)
            assert trouble.status == 503
            assert trouble.retry_after is not None
            with pytest.raises(EngineError, match="SIGKILL"):
                await collect(client, [1], GREEDY)
            with pytest.raises(EngineError, match="SIGKILL"):
                await client.flush()
            await comes_true(lambda: client.trouble is None)
            assert (await collect(client, [1], GREEDY)).tokens == expected([1], 60)

    finish(main())


def test_a_reload_that_fails_is_tried_again_and_then_given_up(tmp_path: Any) -> None:
    async def main() -> None:
        marker = tmp_path / "fragile"
        marker.touch()
        async with served(str(marker), Supervision(max_restarts=2, restart_window=1000, back_off=(0.0,))) as client:
            marker.unlink()
            strike(client)
            await comes_true(lambda: client.trouble is not None)
            assert "the model is gone" in str(client.trouble)

    finish(main())


def test_killers_are_failed_alone() -> None:
    async def main() -> None:
        async with served() as client:
            good = [asyncio.create_task(collect(client, [i], GREEDY)) for i in range(8)]
            await comes_true(lambda: client.stats.steps > 10)
            bad = await asyncio.gather(*(collect(client, [KILL, i], GREEDY) for i in range(2)), return_exceptions=True)
            for error in bad:
                assert isinstance(error, EngineError)
                assert "died on this request twice" in str(error)
            assert [answer.tokens for answer in await asyncio.gather(*good)] == [expected([i], 60) for i in range(8)]

    finish(main())


def test_closing_in_the_middle_of_a_restart_leaves_nothing_behind() -> None:
    async def main() -> None:
        async with served("slow") as client:
            stream = client.submit([1], GREEDY)
            await anext(stream)
            pid = strike(client)
            await comes_true(lambda: supervisor_of(client).pid not in (None, pid))
            pid = supervisor_of(client).pid or 0
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        with pytest.raises(EngineError, match="shutting down"):
            async for _ in stream:
                pass

    finish(main())


def test_a_prompts_logprobs_and_what_the_cache_gave_are_told_once() -> None:
    def scores(first: int, last: int) -> list[TokenLogprob]:
        return [TokenLogprob(token, -1.0) for token in range(first, last)]

    job = Job(Submit("a", [*range(9)], 9, GREEDY))
    job.take(Output("a", prompt_logprobs=scores(0, 4)))  # a first chunk
    job.resumed = True
    assert job.again().tokens == [*range(9)]
    assert job.take(Output("a", prompt_logprobs=scores(0, 3))).prompt_logprobs == []
    assert job.take(Output("a", prompt_logprobs=scores(3, 7))).prompt_logprobs == scores(4, 7)
    last = job.take(Output("a", [50], prompt_logprobs=scores(7, 9), num_cached=3, miss=CacheMiss("cold")))
    assert (last.prompt_logprobs, last.num_cached) == (scores(7, 9), 3)
    assert job.again().tokens == [*range(9), 50]
    again = job.take(Output("a", [51], num_cached=0))
    assert (again.num_cached, again.miss) == (3, CacheMiss("cold"))


def test_adapters_that_were_loaded_while_serving_are_there_again_after_a_restart() -> None:
    async def main() -> None:
        async with served() as client:
            for name in ("one", "two"):
                changed = await client.change_adapters(LoadAdapter(name, name, f"/{name}"))
                assert not changed.error
            await client.change_adapters(UnloadAdapter("three", "one"))
            params = SamplingParams(max_new_tokens=60, temperature=0, lora_path="two")
            answer = asyncio.create_task(collect(client, [3], params))
            await asyncio.sleep(0.05)
            strike(client)
            await comes_true(lambda: not supervisor_of(client)._ready)
            refused = await client.change_adapters(LoadAdapter("four", "four", "/four"))
            assert (refused.status, refused.adapters) == (503, {"two": "/two"})
            assert (await answer).tokens == expected([3], 60)
            assert client.adapters == {"two": "/two"}
            with pytest.raises(RequestError, match="no LoRA adapter"):
                await collect(client, [3], SamplingParams(lora_path="one"))

    finish(main())
