"""/start_profile and /stop_profile on a running server: both processes in one file, and every way to get it wrong."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from pippin.cli import run_command
from pippin.client import EngineClient
from pippin.config import EngineConfig
from pippin.engine import Engine
from pippin.errors import RequestError
from pippin.profile.timeline import BUILDING, DETOKENIZING, DEVICE, HTTP, SAMPLING, SCHEDULER
from pippin.profile.trace import ENGINE, HTTP_SIDE
from tests.fake_core import KILL, PYTHONPATH
from tests.server.conftest import Running, Serve, byte_tokenizer, serving
from tests.server.test_lifecycle import ask
from tests.tokenizers_for_tests import byte_ids
from tests.trace_checks import Json, check_events, read_events
from tests.waiting import SECONDS, until


@pytest.fixture(scope="module")
def demo() -> Iterator[Running]:
    """The shipped model in a child process."""
    from pippin.text.tokenizer import load_tokenizer

    config = EngineConfig(max_total_tokens=2000, device="cpu")
    with serving(make_client=lambda core: EngineClient.spawn(config), tokenizer=load_tokenizer(None)) as running:
        yield running


def start(http: httpx.Client, directory: Path, **fields: Any) -> list[Path]:
    answer = http.post("/start_profile", json={"output_dir": str(directory), **fields})
    assert answer.status_code == 200, answer.text
    assert answer.json()["success"] is True
    return [Path(file) for file in answer.json()["files"]]


def stop(http: httpx.Client) -> list[Path]:
    answer = http.post("/stop_profile")
    assert answer.status_code == 200, answer.text
    return [Path(file) for file in answer.json()["files"]]


def lanes_of(events: list[Json]) -> dict[str, list[Json]]:
    found: dict[str, list[Json]] = {}
    for event in events:
        if event["ph"] == "X":
            found.setdefault(event["cat"], []).append(event)
    return found


async def mixed(url: str, count: int) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:

        async def one(i: int) -> None:
            prompt = "Once upon a time " * (1 + i % 4)
            answer: Any = await client.completions.create(
                model="m", prompt=prompt, max_tokens=3 + i % 5, temperature=0, stream=bool(i % 2)
            )
            if i % 2:
                async for _ in answer:
                    pass

        await asyncio.gather(*(one(i) for i in range(count)))


def test_both_processes_are_in_one_file_on_one_clock(demo: Running, tmp_path: Path) -> None:
    with demo.http() as http:
        before = http.get("/get_server_info").json()["internal_states"][0]
        (expected,) = start(http, tmp_path, profile_id="run")
        asyncio.run(mixed(demo.url, 12))
        assert stop(http) == [expected] == [tmp_path / "run.trace.json.gz"]
        after = http.get("/get_server_info").json()["internal_states"][0]
    events = read_events(expected)
    check_events(events)
    lanes = lanes_of(events)
    assert set(lanes) >= {HTTP, DETOKENIZING, SCHEDULER, BUILDING, SAMPLING, DEVICE}
    assert {e["pid"] for e in lanes[HTTP] + lanes[DETOKENIZING]} == {HTTP_SIDE}
    assert {e["pid"] for e in lanes[SCHEDULER] + lanes[DEVICE]} == {ENGINE}
    names = [e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "process_name"]
    engine_pid = demo.client.transport.pid  # type: ignore[attr-defined]
    assert names == [f"engine process ({engine_pid})", f"HTTP process ({os.getpid()})"]
    asked = [e for e in lanes[HTTP] if e["name"] == "POST /v1/completions"]
    assert len(asked) == 12
    assert {e["args"]["status"] for e in asked} == {200}
    assert min(e["args"]["bytes"] for e in asked) > 50  # streamed or whole
    assert sum(e["name"] == "to first byte" for e in lanes[HTTP]) == 12
    steps = lanes[DEVICE]
    for kind in ("prefill", "decode", "cached"):
        assert sum(e["args"][f"{kind}_tokens"] for e in steps) == after[f"{kind}_tokens"] - before[f"{kind}_tokens"]
    # One clock: all that the engine began for these requests lies between their first beginning and last end. A step
    # that was queued before a stop was seen may end later: nobody waits for it.
    assert min(e["ts"] for e in asked) <= min(e["ts"] for e in steps)
    last = max(e["ts"] + e["dur"] for e in asked)
    assert max(e["ts"] for e in steps) <= last
    assert min(e["ts"] for e in lanes[DETOKENIZING]) >= min(e["ts"] + e["dur"] for e in steps)
    assert demo.client.timeline is None


def test_stages_apart_and_by_itself(demo: Running, tmp_path: Path) -> None:
    with demo.http() as http:
        files = start(http, tmp_path, profile_id="s", num_steps=2, profile_by_stage=True)
        asyncio.run(mixed(demo.url, 3))
        asyncio.run(mixed(demo.url, 3))
        until(lambda: demo.client.timeline is None)
        until(lambda: all(file.stat().st_size for file in files))
        answer = http.post("/stop_profile")
        assert answer.status_code == 400
        assert str(files[0]) in answer.json()["error"]["message"]
    assert [f.name for f in files] == ["s-EXTEND.trace.json.gz", "s-DECODE.trace.json.gz"]
    for file, stage in zip(files, ("EXTEND", "DECODE"), strict=True):
        events = read_events(file)
        check_events(events)
        assert [e["args"]["stage"] for e in lanes_of(events)[DEVICE]] == [stage] * 2


def test_it_is_summarised_in_the_terminal(demo: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with demo.http() as http:
        (file,) = start(http, tmp_path, profile_prefix="pre", profile_id="x", merge_profiles=True, activities=["CPU"])
        assert file.name == "pre-x.trace.json.gz"
        asyncio.run(mixed(demo.url, 2))
        stop(http)
    assert run_command(["profile", str(file), "--top", "2"]) == 0
    shown = capsys.readouterr().out
    assert "device steps" in shown
    assert "Slowest of" in shown
    assert "pippin-demo" in shown
    assert run_command(["profile", str(file), "--json"]) == 0
    assert '"lanes":[{"process":"engine process' in capsys.readouterr().out
    assert run_command(["profile", str(tmp_path / "nothing")]) == 2
    assert "can't be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"num_steps": 0}, "num_steps"),
        ({"num_steps": "many"}, "num_steps"),
        ({"start_step": -1}, "start_step"),
        ({"output_dir": "/dev/null/x"}, "output_dir"),
        ({"profile_id": "../../x"}, "profile_id"),
        ({"activities": ["GPU"]}, "activities"),
        ({"activities": ["CUDA_PROFILER"]}, "activities"),
        ({"with_stack": True}, "with_stack"),
        ({"record_shapes": True}, "record_shapes"),
        ({"profile_stages": ["decode"]}, "profile_stages"),
        ({"num_step": 1}, "num_step"),
    ],
)
def test_what_cannot_be_recorded_is_a_400_that_names_it(
    demo: Running, tmp_path: Path, body: dict[str, Any], field: str
) -> None:
    with demo.http() as http:
        answer = http.post("/start_profile", json={"output_dir": str(tmp_path), **body})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
        assert list(tmp_path.iterdir()) == []
        assert http.post("/stop_profile").status_code == 400


def test_one_at_a_time_and_without_a_body(server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_TORCH_PROFILER_DIR", str(tmp_path))
    with server.http() as http:
        for method in ("POST", "GET"):
            assert http.post("/stop_profile").status_code == 400
            assert http.request(method, "/start_profile").status_code == 200
            again = http.post("/start_profile")
            assert again.status_code == 409
            assert "/stop_profile" in again.json()["error"]["message"]
            assert http.request(method, "/stop_profile").status_code == 200
        assert http.post("/start_profile", content=b"x").status_code == 415
    assert len(list(tmp_path.iterdir())) == 2


def test_requests_that_have_not_ended_are_cut(server: Running, tmp_path: Path) -> None:
    with server.http() as http:
        start(http, tmp_path)
        connection = ask(server.address, "/v1/completions", {"prompt": "a", "max_tokens": 900, "stream": True})
        until(lambda: server.client.live != ())
        (file,) = stop(http)
        connection.close()
        until(lambda: server.client.live == ())
        cut = [e for e in lanes_of(read_events(file))[HTTP] if e["args"].get("unfinished")]
        assert {e["name"] for e in cut} == {"POST /v1/completions", "POST /stop_profile"}


def test_an_engine_that_dies_leaves_what_was_told(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
    spawn = lambda core: EngineClient.spawn(EngineConfig(), "tests.fake_core:load")  # noqa: E731
    with serve(make_client=spawn, tokenizer=byte_tokenizer()) as running, running.http() as http:
        (file,) = start(http, tmp_path)
        assert http.post("/generate", json={"input_ids": [KILL]}).status_code == 500
        until(lambda: file.stat().st_size > 0)
        events = read_events(file)
        check_events(events)
        assert "POST /generate" in {e["name"] for e in events}
        response = http.post("/start_profile", json={"output_dir": str(tmp_path)})
        assert response.status_code == 503
        assert "restarting" in response.json()["error"]["message"]


def test_an_engine_that_ends_a_profile_it_never_began_is_no_trouble(serve: Serve, tmp_path: Path) -> None:
    with serve() as running, running.http() as http:
        start(http, tmp_path)
        stop(http)
        start(http, tmp_path)  # and the server ends here
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2
    for file in files:
        check_events(read_events(file))


def test_a_server_that_is_told_to_end_writes_first(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "pippin", "serve", "--port", str(port), "--max-total-tokens", "2000"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=SECONDS, verify=False) as http:
            until(lambda: answers(http))
            (file,) = start(http, tmp_path)
            body = {"prompt": "a", "max_tokens": 200, "ignore_eos": True}
            with ask(("127.0.0.1", port), "/v1/completions", body):
                until(lambda: http.get("/get_server_info").json()["internal_states"][0]["steps"] > 3)
                server.send_signal(signal.SIGTERM)
                assert server.wait(SECONDS) == 0
    finally:
        server.kill()
        server.wait()
    lanes = lanes_of(read_events(file))
    assert len(lanes[DEVICE]) > 1


def answers(http: httpx.Client) -> bool:
    try:
        return http.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def test_engine_in_python(tmp_path: Path) -> None:
    from tests.fake_core import FakeCore

    client = EngineClient.in_thread(lambda progress: FakeCore(0.001), 0)
    with Engine.over(client, byte_ids()) as engine:
        with pytest.raises(RequestError, match="no profile"):
            engine.stop_profile()
        files = engine.start_profile(str(tmp_path), profile_id="e")
        engine.generate("hello", {"max_new_tokens": 4, "temperature": 0})
        assert engine.stop_profile() == files == [str(tmp_path / "e.trace.json.gz")]
        events = read_events(Path(files[0]))
        check_events(events)
        assert len(lanes_of(events)[DETOKENIZING]) == 4
