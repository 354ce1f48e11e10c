"""The asking side: streams, aborts, journal, and what happens when the worker fails; over both transports."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pippin.client import EngineClient, failure_of
from pippin.completion import complete
from pippin.config import EngineConfig
from pippin.errors import ConfigError, EngineError, ModelError, PippinError, RequestError
from pippin.messages import Stats, UnloadAdapter
from pippin.restarts import Supervision
from pippin.supervisor import Supervisor
from pippin.transport import ProcessTransport, describe_exit
from pippin.types import SamplingParams
from tests.fake_core import KILL, PYTHONPATH, FakeCore, expected, load
from tests.tokenizers_for_tests import byte_level
from tests.waiting import SECONDS, comes_true

GREEDY = SamplingParams(max_new_tokens=5, temperature=0)
LONG = SamplingParams(max_new_tokens=100_000, temperature=0)

Make = Callable[[str], EngineClient]


def in_thread(model: str) -> EngineClient:
    return EngineClient.in_thread(lambda progress: load(EngineConfig(model_path=model), progress), seed=0)


def spawned(model: str, supervision: Supervision | None = None) -> EngineClient:
    config = EngineConfig(model_path=model, random_seed=0)
    return EngineClient.spawn(config, "tests.fake_core:load", "critical", supervision)


def child_of(client: EngineClient) -> ProcessTransport | None:
    """What reaches the child process that lives now, if there is one."""
    child = client.transport._child if isinstance(client.transport, Supervisor) else None
    return child if isinstance(child, ProcessTransport) else None


@pytest.fixture(params=[in_thread, spawned])
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
    made: Make = request.param
    return made


@asynccontextmanager
async def started(client: EngineClient) -> AsyncIterator[EngineClient]:
    try:
        await client.start()
        yield client
    finally:
        await client.close()


async def answer(client: EngineClient, prompt: list[int], params: SamplingParams = GREEDY) -> list[int]:
    return [token async for output in client.submit(prompt, params) for token in output.tokens]


def finish(test: Coroutine[Any, Any, None]) -> None:
    """Run a test; one that waits for what never comes fails soon."""
    asyncio.run(asyncio.wait_for(test, 2 * SECONDS))


def test_streams_are_answered_side_by_side(make: Make) -> None:
    async def main() -> None:
        async with started(make("fast")) as client:
            assert client.info.vocab_size == 300
            prompts = [[i, i + 1] for i in range(16)]
            answers = await asyncio.gather(*(answer(client, p) for p in prompts))
            assert answers == [expected(p, 5) for p in prompts]
            assert client.live == ()
            assert client.stats.prompt_tokens == 32

    finish(main())


@pytest.mark.parametrize("leave", ["close", "cancel"])
def test_whoever_goes_away_frees_the_engine_within_a_step(make: Make, leave: str) -> None:
    async def main() -> None:
        async with started(make("0.05")) as client, aclosing(client.submit([2], LONG)) as other:
            stream = client.submit([1], LONG)
            await anext(stream)
            if leave == "close":
                await stream.aclose()
            else:
                reader = asyncio.create_task(anext(stream))
                await asyncio.sleep(0)
                reader.cancel()
                await asyncio.gather(reader, return_exceptions=True)
            assert client.live == ()
            await anext(other)  # commands are obeyed in order, and all that have come before the next step
            assert client.stats.num_running == 1

    finish(main())


def test_a_transport_that_could_not_be_opened_reads_no_file_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number is soon another file's."""

    async def main() -> None:
        transport = ProcessTransport(EngineConfig(model_path="fast"), "tests.fake_core:load")
        files = []

        def refuse(*_: object, **__: object) -> Any:
            assert transport._sockets is not None
            files.append(transport._sockets.events.fileno())
            raise BlockingIOError

        monkeypatch.setattr(asyncio, "create_subprocess_exec", refuse)
        with pytest.raises(BlockingIOError):
            await transport.open(lambda event: None, lambda how: None)
        assert [asyncio.get_running_loop().remove_reader(file) for file in files] == [False]

    finish(main())


@pytest.mark.parametrize("n", [1, 2])
def test_a_request_with_an_id_in_use_is_refused_and_the_other_goes_on(make: Make, n: int) -> None:
    """Whoever asks with the id of somebody's request must not end that one on his way out."""

    async def main() -> None:
        tokenizer = byte_level()
        params = msgspec.structs.replace(LONG, n=n)
        async with (
            started(make("fast")) as client,
            aclosing(complete(client, tokenizer, [1], params, rid="x")) as first,
        ):
            await anext(first)
            with pytest.raises(RequestError, match="in use"):
                [_ async for _ in complete(client, tokenizer, [2], params, rid="x")]
            await client.change_adapters(UnloadAdapter("sync", "none"))  # answered behind all that was sent before
            deltas = [await anext(first) for _ in range(20)]
            assert {d.finish for d in deltas} == {None}

    finish(main())


def test_abort_ends_the_stream_with_its_reason(make: Make) -> None:
    async def main() -> None:
        async with started(make("fast")) as client:
            async with aclosing(client.submit([1], LONG, id="x")) as stream:
                await anext(stream)
                client.abort("unknown")
                client.abort("x")
                last = [output async for output in stream][-1]
            assert last.finish is not None
            assert last.finish.reason == "abort"

    finish(main())


def test_an_id_can_be_used_once_at_a_time(make: Make) -> None:
    async def main() -> None:
        async with started(make("fast")) as client:
            async with aclosing(client.submit([1], LONG, id="x")) as stream:
                await anext(stream)
                with pytest.raises(RequestError, match="in use") as caught:
                    await anext(client.submit([1], GREEDY, id="x"))
                assert caught.value.field == "rid"
            assert len([t async for o in client.submit([1], GREEDY, id="x") for t in o.tokens]) == 5

    finish(main())


def test_a_refused_request_raises_and_names_the_field(make: Make) -> None:
    async def main() -> None:
        async with started(make("fast")) as client:
            with pytest.raises(RequestError) as caught:
                await answer(client, [])
            assert (caught.value.field, caught.value.status) == ("prompt", 400)
            assert await answer(client, [7]) == expected([7], 5)

    finish(main())


def test_a_slow_reader_gets_more_at_a_time_and_loses_nothing() -> None:
    async def main() -> None:
        async with started(in_thread("fast")) as client:
            params = SamplingParams(max_new_tokens=50, temperature=0, logprobs=True)
            stream = client.submit([1], params)
            found = [await anext(stream)]
            await comes_true(lambda: client.live == ())
            found += [output async for output in stream]
            assert len(found) <= 3
            assert [t for o in found for t in o.tokens] == expected([1], 50)
            assert [x.token for o in found for x in o.logprobs] == expected([1], 50)
            assert [o.finish is not None for o in found] == [False] * (len(found) - 1) + [True]

    finish(main())


def test_what_came_before_a_failure_is_read_first() -> None:
    async def main() -> None:
        async with started(in_thread("fast")) as client:
            stream = client.submit([1], LONG)
            first = await anext(stream)
            live = client._journal[next(iter(client.live))]
            await comes_true(lambda: len(live.unread) > 3)
            live.fail(EngineError("lost"))
            second = await anext(stream)
            assert first.tokens + second.tokens == expected([1], len(first.tokens + second.tokens))
            with pytest.raises(EngineError, match="lost"):
                await anext(stream)

    finish(main())


def test_flush_answers(make: Make) -> None:
    async def main() -> None:
        async with started(make("fast")) as client:
            await answer(client, [1, 2, 3])
            assert client.stats.slots_cached == 3
            assert (await client.flush()).ok
            assert client.stats.slots_cached == 0
            async with aclosing(client.submit([1], LONG)) as stream:
                await anext(stream)
                refused = await client.flush()
                assert not refused.ok
                assert "while requests run" in refused.message

    finish(main())


def test_sampled_requests_get_seeds() -> None:
    async def main() -> None:
        async with started(in_thread("fast")) as client:
            params = SamplingParams(max_new_tokens=50)
            streams = [client.submit([1], params, id=id) for id in "ab"]
            firsts = [await anext(stream) for stream in streams]
            seeds = [client._journal[id].submit.params.seed for id in "ab"]
            assert len({None, *seeds}) == 3
            for first, stream, seed in zip(firsts, streams, seeds, strict=True):
                tokens = first.tokens + [token async for output in stream for token in output.tokens]
                assert tokens == expected([1], 50, seed or 0)
            async with aclosing(client.submit([1], GREEDY, id="c")) as stream:
                await anext(stream)
                assert client._journal["c"].submit.params.seed is None

    finish(main())


def test_the_same_engine_seed_draws_the_same_seeds() -> None:
    first, second, other = (EngineClient(ProcessTransport(EngineConfig()), seed) for seed in (1, 1, 2))
    draws = [[client.draw_seed() for _ in range(3)] for client in (first, second, other)]
    assert draws[0] == draws[1] != draws[2]
    for client in (first, second, other):
        asyncio.run(client.close())


@pytest.mark.parametrize(
    ("model", "error", "text"),
    [
        ("broken-model", ModelError, "no such model"),
        ("broken-option", ConfigError, "--page-size: must be even"),
        ("broken-code", EngineError, "unforeseen"),
    ],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failed_start_raises_what_the_worker_raised(
    make: Make, model: str, error: type[PippinError], text: str
) -> None:
    async def main() -> None:
        with pytest.raises(error, match=text):
            async with started(make(model)):
                pass

    finish(main())


def test_why_a_child_ended_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine its last words are read later than its end is seen."""
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
    drain, ended = ProcessTransport.drain, list[float]()

    def late(transport: ProcessTransport) -> None:
        process = transport._process
        if process is not None and process.returncode is not None:
            ended.append(time.monotonic())
        if ended and ended[-1] > ended[0] + 0.4:
            drain(transport)

    monkeypatch.setattr(ProcessTransport, "drain", late)

    async def main() -> None:
        with pytest.raises(ModelError, match="no such model"):
            async with started(spawned("broken-model")):
                pass

    finish(main())


def test_a_child_killed_while_loading_fails_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)

    async def main() -> None:
        with pytest.raises(EngineError, match="SIGKILL"):
            async with started(spawned("killed")):
                pass

    finish(main())


def test_a_dead_child_that_is_not_replaced_fails_every_stream_and_later_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)

    async def main() -> None:
        async with started(spawned("fast", Supervision(max_restarts=0))) as client:
            streams = [client.submit([i], LONG) for i in range(4)]
            for stream in streams:
                await anext(stream)
            with pytest.raises(EngineError, match=r"SIGKILL.*lost"):
                await answer(client, [KILL])
            for stream in streams:
                with pytest.raises(EngineError) as caught:
                    async for _ in stream:
                        pass
                assert caught.value.status == 503
            with pytest.raises(EngineError, match="SIGKILL"):
                await answer(client, [1])
            with pytest.raises(EngineError, match="SIGKILL"):
                await client.flush()

    finish(main())


def test_closing_fails_live_streams_and_leaves_nothing_behind(make: Make) -> None:
    async def main() -> None:
        client = make("fast")
        async with started(client):
            stream = client.submit([1], LONG)
            await anext(stream)
            transport = child_of(client)
        with pytest.raises(EngineError, match="shutting down"):
            async for _ in stream:
                pass
        if transport is not None:
            assert transport.pid is not None
            with pytest.raises(ProcessLookupError):
                os.kill(transport.pid, 0)
            assert transport._directory is not None
            assert not transport._directory.exists()

    finish(main())


def test_the_sockets_are_private_and_gone_once_both_ends_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)

    async def main() -> None:
        client = spawned("slow")
        start = asyncio.create_task(client.start())
        await comes_true(lambda: client.progress is not None)
        child = child_of(client)
        assert child is not None
        directory = child._directory
        assert directory is not None
        assert directory.stat().st_mode & 0o777 == 0o700
        await start
        assert not directory.exists()
        assert await answer(client, [3]) == expected([3], 5)
        await client.close()

    finish(main())


def test_a_long_temporary_directory_is_left_for_a_shorter_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
    deep = tmp_path / ("d" * 90)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))

    async def main() -> None:
        async with started(spawned("fast")) as client:
            assert await answer(client, [3]) == expected([3], 5)

    finish(main())


def test_files_of_the_working_directory_do_not_shadow_the_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
    (tmp_path / "random.py").write_text("raise SystemExit('shadowed')")
    monkeypatch.chdir(tmp_path)

    async def main() -> None:
        async with started(spawned("fast")) as client:
            assert await answer(client, [3]) == expected([3], 5)

    finish(main())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_child_ignores_an_interrupt_and_idles_without_turning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)

    async def main() -> None:
        async with started(spawned("fast")) as client:
            assert isinstance(client.transport, Supervisor)
            pid = client.transport.pid
            assert pid is not None
            os.kill(pid, signal.SIGINT)
            await answer(client, [1])

            def ticks() -> int:
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                return int(fields[11]) + int(fields[12])

            before = ticks()
            await asyncio.sleep(0.5)
            assert ticks() - before <= 5  # of 50: a busy wait would take them all
            assert await answer(client, [2]) == expected([2], 5)

    finish(main())


def test_before_the_start_there_is_no_info() -> None:
    client = EngineClient.in_thread(lambda progress: FakeCore())
    with pytest.raises(EngineError, match="loading") as caught:
        _ = client.info
    assert caught.value.status == 503
    assert client.stats == Stats()


def test_ends_are_told_in_words() -> None:
    assert describe_exit(3) == "the engine process ended with status 3"
    assert describe_exit(-6) == "the engine process was killed by SIGABRT (out of GPU memory?)"
    assert str(failure_of("MemoryError", "no")) == "the engine stopped: no"
