"""``Engine`` over an engine without a model: shapes, streams, threads, loops, and what can't be asked."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pippin.client import EngineClient
from pippin.config import EngineConfig
from pippin.engine import Engine
from pippin.errors import ConfigError, EngineError, ModelError, RequestError
from pippin.messages import Progress
from pippin.sglang import sampling_params
from pippin.types import SamplingParams
from tests.fake_core import FakeCore, expected
from tests.tokenizers_for_tests import byte_ids
from tests.waiting import SECONDS, until

GREEDY = {"temperature": 0, "max_new_tokens": 6}


def make(seconds: float = 0.0005, **options: Any) -> Engine:
    config = EngineConfig(**options)
    client = EngineClient.in_thread(lambda progress: FakeCore(seconds), config.random_seed)
    return Engine.over(client, byte_ids(), config)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with make() as made:
        yield made


def text_for(prompt: list[int], count: int, seed: int = 0) -> str:
    return byte_ids().decode(expected(prompt, count, seed))


def test_one_prompt_gives_sglangs_dict(engine: Engine) -> None:
    prompt = byte_ids().encode("hello")
    answer = engine.generate("hello", GREEDY)
    assert answer["output_ids"] == expected(prompt, 6)
    assert answer["text"] == text_for(prompt, 6)
    meta = answer["meta_info"]
    assert meta["finish_reason"] == {"type": "length", "length": 6}
    assert (meta["prompt_tokens"], meta["completion_tokens"]) == (len(prompt), 6)
    assert meta["id"]
    assert engine.generate("hello", GREEDY)["meta_info"]["cached_tokens"] == len(prompt) - 1


@given(st.lists(st.lists(st.integers(0, 200), min_size=1, max_size=5), min_size=1, max_size=6))
def test_a_list_gives_a_list_in_order(prompts: list[list[int]]) -> None:
    answers = shared().generate(input_ids=prompts, sampling_params=GREEDY)
    assert [a["output_ids"] for a in answers] == [expected(p, 6) for p in prompts]


def shared() -> Engine:
    """One engine for all examples of a property."""
    if not _shared:
        _shared.append(make())
    return _shared[0]


_shared: list[Engine] = []


@pytest.fixture(scope="module", autouse=True)
def _end_shared() -> Iterator[None]:
    yield
    while _shared:
        _shared.pop().shutdown()


def test_each_prompt_may_have_its_own_parameters(engine: Engine) -> None:
    params = [{"temperature": 0, "max_new_tokens": n} for n in (1, 5)]
    answers = engine.generate(["a", "b"], params, rid=["x", "y"], return_logprob=[False, True])
    assert [a["meta_info"]["completion_tokens"] for a in answers] == [1, 5]
    assert [a["meta_info"]["id"] for a in answers] == ["x", "y"]
    assert ["output_token_logprobs" in a["meta_info"] for a in answers] == [False, True]


def test_n_answers_come_in_a_list(engine: Engine) -> None:
    answers = engine.generate(["a", "b"], {"n": 2, "max_new_tokens": 3, "seed": 5})
    prompts = [byte_ids().encode(t) for t in "aabb"]
    assert [a["output_ids"] for a in answers] == [
        expected(p, 3, seed) for p, seed in zip(prompts, (5, 6, 5, 6), strict=True)
    ]
    assert len(engine.generate("a", {"n": 3, "max_new_tokens": 2})) == 3


def test_streams_hold_all_text_so_far(engine: Engine) -> None:
    answers = list(engine.generate("hello", GREEDY, stream=True))
    whole = text_for(byte_ids().encode("hello"), 6)
    lengths = [len(a["text"]) for a in answers]  # a reader who is late gets several tokens at a time
    assert lengths == sorted(set(lengths))
    assert [a["text"] for a in answers] == [whole[:n] for n in lengths]
    assert answers[-1]["text"] == whole
    assert {a["meta_info"]["finish_reason"] for a in answers[:-1]} <= {None}
    assert "index" not in answers[0]


def test_streams_of_several_tell_which(engine: Engine) -> None:
    last: dict[int, dict[str, Any]] = {}
    for answer in engine.generate(["a", "b"], GREEDY | {"n": 2}, stream=True):
        last[answer["index"]] = answer
    assert sorted(last) == [0, 1, 2, 3]
    prompt_b = byte_ids().encode("b")
    assert last[2]["output_ids"] == last[3]["output_ids"] == expected(prompt_b, 6)


def test_logprobs_in_sglangs_tuples(engine: Engine) -> None:
    prompt = [5, 6, 7]
    meta = engine.generate(
        input_ids=prompt, sampling_params=GREEDY, return_logprob=True, logprob_start_len=1, top_logprobs_num=2
    )["meta_info"]
    assert [t[1] for t in meta["input_token_logprobs"]] == [6, 7]
    assert [t[1] for t in meta["output_token_logprobs"]] == expected(prompt, 6)
    assert all(len(tops) == 2 for tops in meta["output_top_logprobs"])
    plain = engine.generate(input_ids=prompt, sampling_params=GREEDY, return_logprob=True)["meta_info"]
    assert plain["input_token_logprobs"] == []
    assert "output_top_logprobs" not in plain


def test_stop_strings(engine: Engine) -> None:
    prompt = byte_ids().encode("hello")
    whole = text_for(prompt, 6)
    answer = engine.generate("hello", GREEDY | {"stop": whole[2:4]})
    assert answer["text"] == whole[:2]
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": whole[2:4]}
    assert answer["meta_info"]["completion_tokens"] == 4


def test_answers_without_a_seed_differ(engine: Engine) -> None:
    answers = engine.generate(["a"] * 8, {"max_new_tokens": 8})
    assert len({a["text"] for a in answers}) > 1


def test_the_random_seed_makes_runs_equal() -> None:
    def run() -> list[str]:
        with make(random_seed=3) as engine:
            return [engine.generate("a", {"max_new_tokens": 8})["text"] for _ in range(3)]

    first = run()
    assert first == run()
    assert len(set(first)) > 1


def test_chat_renders_the_template(engine: Engine) -> None:
    messages = [{"role": "user", "content": "hi"}]
    prompt = byte_ids().encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert engine.chat(messages, GREEDY)["output_ids"] == expected(prompt, 6)
    assert list(engine.chat(messages, GREEDY, stream=True))[-1]["output_ids"] == expected(prompt, 6)


# --- loops and threads ---


def test_works_inside_a_running_loop(engine: Engine) -> None:
    """As in Jupyter, whose cells run inside one."""

    async def cell() -> Any:
        return engine.generate("hello", GREEDY)

    assert asyncio.run(cell())["output_ids"] == expected(byte_ids().encode("hello"), 6)


def test_async_generate(engine: Engine) -> None:
    async def run() -> tuple[Any, list[Any]]:
        both = await asyncio.gather(engine.async_generate("a", GREEDY), engine.async_generate("b", GREEDY))
        stream = await engine.async_generate("a", GREEDY, stream=True)
        return both, [x async for x in stream]

    both, streamed = asyncio.run(run())
    assert [x["output_ids"] for x in both] == [expected(byte_ids().encode(t), 6) for t in "ab"]
    assert streamed[-1]["output_ids"] == both[0]["output_ids"]


def test_many_threads(engine: Engine) -> None:
    found: dict[int, Any] = {}

    def ask(i: int) -> None:
        found[i] = engine.generate(input_ids=[i], sampling_params=GREEDY)["output_ids"]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: expected([i], 6) for i in range(8)}


ENDLESS = {"max_new_tokens": 4000, "temperature": 0}


@pytest.fixture
def slow() -> Iterator[Engine]:
    """An engine that takes 40 s for ENDLESS."""
    with make(0.01) as made:
        yield made


def until_idle(engine: Engine) -> None:
    """Soon: some answers of a token may come in between, ENDLESS may not."""
    for _ in range(200):
        engine.generate("x", {"max_new_tokens": 1})  # counts arrive with steps
        if not engine.get_server_info()["num_running"]:
            return
    raise AssertionError("it runs on")


@contextmanager
def ctrl_c(when: Callable[[], object]) -> Iterator[None]:
    """Sends this process SIGINT, once ``when`` is true, in the block."""

    def press() -> None:
        until(lambda: bool(when()))
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        yield
    thread.join()


def test_leaving_a_stream_aborts_the_request(slow: Engine) -> None:
    for i, _ in enumerate(slow.generate("a", ENDLESS, stream=True)):
        if i == 3:
            break
    until_idle(slow)


def test_leaving_an_async_stream_aborts_the_request(slow: Engine) -> None:
    async def run() -> None:
        stream = await slow.async_generate("a", ENDLESS, stream=True)
        async for _ in stream:
            break
        await stream.aclose()

    asyncio.run(run())
    until_idle(slow)


@pytest.mark.parametrize("stream", [False, True])
def test_ctrl_c_while_a_request_is_handed_over_aborts_it(
    slow: Engine, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """It runs by then, and the caller has nothing in hand yet."""
    real, asking = slow._loop.call_soon_threadsafe, threading.current_thread()

    def interrupted(*arguments: Any, **more: Any) -> Any:
        handle = real(*arguments, **more)
        if threading.current_thread() is asking:
            patch.undo()
            until(lambda: bool(slow._client.live))
            raise KeyboardInterrupt
        return handle

    def ask() -> None:
        found = slow.generate("a", ENDLESS, stream=stream)
        next(iter(found))

    with monkeypatch.context() as patch:
        patch.setattr(slow._loop, "call_soon_threadsafe", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ask()
    until_idle(slow)


def test_ctrl_c_aborts_the_request(slow: Engine) -> None:
    for ask in (lambda: slow.generate("a", ENDLESS), lambda: list(slow.generate("a", ENDLESS, stream=True))):
        with ctrl_c(lambda: slow._client.live):
            ask()
        until_idle(slow)


def test_cancelling_aborts_the_request(slow: Engine) -> None:
    async def run() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(slow.async_generate(["a", "b"], ENDLESS), 0.1)

    asyncio.run(run())
    until_idle(slow)


# --- the rest of the engine ---


def test_flush_and_info(engine: Engine) -> None:
    engine.generate("flush me", GREEDY)
    assert engine.flush_cache() is True
    assert engine.generate("flush me", GREEDY)["meta_info"]["cached_tokens"] == 0
    info = engine.get_server_info()
    assert info["model_type"] == "fake"
    assert info["steps"] > 0
    assert info["page_size"] == 1


def test_flush_is_refused_while_requests_run() -> None:
    with make(0.01) as engine:
        stream = engine.generate("a", ENDLESS, stream=True)
        next(stream)
        assert engine.flush_cache() is False
        stream.close()


def test_shutdown_twice_and_use_after() -> None:
    before = set(threading.enumerate())
    engine = make(0.01)
    stream = engine.generate("a", ENDLESS, stream=True)
    next(stream)
    assert len(set(threading.enumerate()) - before) == 2
    engine.shutdown()
    engine.shutdown()
    assert not set(threading.enumerate()) - before
    for use in (lambda: engine.generate("a"), lambda: next(stream), engine.flush_cache):
        with pytest.raises(EngineError, match="shut"):
            use()


def test_shutdown_fails_what_runs() -> None:
    engine = make(0.01)
    failed: list[BaseException] = []

    def ask() -> None:
        try:
            engine.generate("a", ENDLESS)
        except EngineError as error:
            failed.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    until(lambda: engine._client.live != ())
    engine.shutdown()
    thread.join(SECONDS)
    assert len(failed) == 1


def test_nobody_waits_for_ever_when_the_engine_shuts_down() -> None:
    engine = make()
    ended: list[str] = []
    served: set[int] = set()

    def ask() -> None:
        try:
            while True:
                engine.generate("a", {"max_new_tokens": 2, "n": 2})
                served.add(threading.get_ident())
        except EngineError as error:
            ended.append(error.message)

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    until(lambda: len(served) == 8)
    engine.shutdown()
    for thread in threads:
        thread.join(SECONDS)
    assert len(ended) == 8


def test_an_engine_that_cannot_start_leaves_no_threads() -> None:
    def broken(progress: object) -> FakeCore:
        raise ModelError("no such model")

    before = set(threading.enumerate())
    with pytest.raises(ModelError, match="no such model"):
        Engine.over(EngineClient.in_thread(broken), byte_ids())
    assert not set(threading.enumerate()) - before


def load_slowly(config: EngineConfig, progress: Callable[[Progress], None]) -> FakeCore:
    """Progress for as long as a test may take."""
    for i in range(6000):
        progress(Progress("load", i, 6000))
        time.sleep(0.05)
    return FakeCore()


def test_ctrl_c_while_loading(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("pippin.engine.CORE", f"{__name__}:load_slowly")
    before = set(threading.enumerate())
    heard: list[Progress] = []
    with ctrl_c(lambda: heard):
        Engine(progress=heard.append)
    assert heard[0] == Progress("load", 0, 6000)
    assert not set(threading.enumerate()) - before
    assert caplog.records == []


def test_a_program_that_forgets_shutdown_ends_cleanly() -> None:
    code = (
        "from tests.test_engine import make\n"
        "engine = make()\n"
        "stream = engine.generate('a', {'max_new_tokens': 4000}, stream=True)\n"
        "print(len(next(stream)['output_ids']))\n"
    )
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=root)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


# --- what can't be asked ---


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "input_ids": [1]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 3]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"input_ids": []}, "input_ids"),
        ({"input_ids": [[1], "ab"]}, "input_ids"),
        ({"input_ids": [1, True]}, "input_ids"),
        ({"input_ids": [1, 999]}, "input_ids"),
        ({"prompt": "a", "sampling_params": 3}, "sampling_params"),
        ({"prompt": ["a", "b"], "sampling_params": [{}]}, "sampling_params"),
        ({"prompt": "a", "sampling_params": {"top_q": 1}}, "sampling_params.top_q"),
        ({"prompt": "a", "sampling_params": {"logprobs": True}}, "sampling_params.logprobs"),
        ({"prompt": "a", "sampling_params": {"top_p": 0}}, "sampling_params.top_p"),
        ({"prompt": "a", "sampling_params": {"top_k": "3"}}, "sampling_params.top_k"),
        ({"prompt": "a", "sampling_params": {"stop": [""]}}, "sampling_params.stop"),
        ({"prompt": "a", "sampling_params": {"stop_token_ids": [700]}}, "stop_token_ids"),
        ({"prompt": "a", "return_logprob": True, "top_logprobs_num": "x"}, "top_logprobs_num"),
    ],
)
def test_bad_arguments_are_named(engine: Engine, arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        engine.generate(**arguments)
    assert caught.value.field == field


def test_names_of_requests_are_unique_before_any_starts(engine: Engine) -> None:
    with pytest.raises(RequestError, match="an rid of its own"):
        engine.generate(["a", "b"], rid=["x", "x"])


def test_a_close_name_is_suggested() -> None:
    with pytest.raises(RequestError, match="did you mean max_new_tokens"):
        sampling_params({"max_tokens_new": 3})
    with pytest.raises(RequestError, match="return_logprob"):
        sampling_params({"top_logprobs": 3})


def test_params_in_sglangs_spelling() -> None:
    params = sampling_params(
        {"stop": "END", "temperature": 1, "stop_token_ids": None, "logit_bias": {"5": -3}, "json_schema": None}
    )
    assert params == SamplingParams(stop=("END",), logit_bias={5: -3.0})
    assert sampling_params({"stop": ["a", "b"]}).stop == ("a", "b")
    assert sampling_params(None) == SamplingParams()


def test_options_are_checked_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match="did you mean page_size"):
        Engine(pagesize=3)
    with pytest.raises(ConfigError, match="page_size"):
        Engine(page_size="big")
    with pytest.raises(ConfigError, match="--page-size"):
        Engine(page_size=-1)
    with pytest.raises(ConfigError, match="--chat-template"):
        Engine(chat_template="nowhere.jinja")
