"""Clients that go away, an engine that dies, and a server that starts, loads and stops."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from pippin.client import EngineClient
from pippin.config import EngineConfig, ServerConfig
from pippin.errors import ConfigError
from pippin.restarts import Supervision
from pippin.server.launch import listen
from pippin.supervisor import Supervisor
from tests.fake_core import KILL, PYTHONPATH, Gate
from tests.server.conftest import Running, Serve, byte_tokenizer
from tests.server.test_openai import told
from tests.waiting import SECONDS, until

LONG: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a", "max_tokens": 1000},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "n": 2},
    "/generate": {"text": ["a", "b"], "sampling_params": {"max_new_tokens": 1000}},
}


def ask(address: tuple[str, int], path: str, body: dict[str, Any]) -> socket.socket:
    """A request sent by hand, the answer unread."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(content)}\r\n\r\n"
    connection = socket.create_connection(address)
    connection.sendall(head.encode() + content)
    return connection


@pytest.mark.parametrize("path", sorted(LONG))
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_goes_away_frees_the_engine_within_a_step(
    serve: Serve, tmp_path: Path, path: str, stream: bool, reset: bool
) -> None:
    with serve(seconds=0.02) as running:
        gate = running.core.gate = Gate(tmp_path / "gate")
        connection = ask(running.address, path, LONG[path] | {"stream": stream})
        until(lambda: running.core.steps >= 2)
        if stream:
            assert b"200 OK" in connection.recv(4096)
        if reset:  # no polite goodbye
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        with gate.held() as steps:
            connection.close()
            until(lambda: running.client.live == ())
        until(lambda: running.core.running == {})
        assert running.core.steps <= steps + 2  # the step that waited at the gate, and the next
        with running.http() as http:
            assert 'outcome="disconnect"' in http.get("/metrics").text
            assert http.post("/v1/completions", json={"prompt": "b", "max_tokens": 2}).status_code == 200


def test_a_client_may_go_away_before_it_has_said_all(server: Running) -> None:
    connection = socket.create_connection(server.address)
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 99\r\n\r\n{"
    )
    connection.close()
    with server.http() as http:
        assert http.post("/v1/completions", json={"prompt": "b", "max_tokens": 2}).status_code == 200


def test_a_client_that_reads_slowly_loses_nothing(server: Running) -> None:
    body = {"prompt": "a", "max_tokens": 900, "stream": True, "temperature": 0}
    with ask(server.address, "/v1/completions", body) as connection:
        time.sleep(0.5)
        found = b""
        while b"[DONE]" not in found:
            found += connection.recv(100)
    texts = [json.loads(e[6:])["choices"][0]["text"] for e in re.findall(rb"data: \{.*\}", found)]
    assert "".join(texts) == told("a", 900)


def test_a_storm_of_clients_that_come_and_go_leaves_nothing_behind(server: Running) -> None:
    chance = random.Random(1)
    answered: list[int] = []

    async def one(client: httpx.AsyncClient, i: int) -> None:
        path = chance.choice(sorted(LONG))
        body = LONG[path] | {"stream": chance.random() < 0.5, "rid": f"storm{i}"}
        stay = chance.random() < 0.3
        if stay:
            body |= {"max_tokens": 5} if path.startswith("/v1") else {"sampling_params": {"max_new_tokens": 5}}
        if path == "/v1/chat/completions" and not stay:
            body |= {"max_tokens": 1000}
        try:
            async with asyncio.timeout(None if stay else chance.random() / 4):
                response = await client.post(path, json=body)
                answered.append(response.status_code)
        except TimeoutError:
            assert not stay

    async def main() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=SECONDS, limits=limits, verify=False) as client:
            await asyncio.gather(*(one(client, i) for i in range(80)))

    asyncio.run(main())
    assert len(answered) > 10
    assert set(answered) == {200}
    until(lambda: server.client.live == () and server.core.running == {})
    with server.http() as http:
        assert http.post("/flush_cache").status_code == 200
        for i in range(80):  # every id is free again
            assert http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1, "rid": f"storm{i}"}).is_success


# --- the engine dies ---


def child_pid(running: Running) -> int | None:
    assert isinstance(running.client.transport, Supervisor)
    return running.client.transport.pid


Mortal = Callable[..., AbstractContextManager[Running]]


@pytest.fixture
def mortal(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> Mortal:
    """A server whose engine is a child process that is replaced at most so many times."""
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
    config = EngineConfig(model_path="0.005")

    def make(max_restarts: int = 5) -> AbstractContextManager[Running]:
        watched = Supervision(max_restarts=max_restarts, restart_window=1000.0)
        return serve(make_client=lambda core: EngineClient.spawn(config, "tests.fake_core:load", "critical", watched))

    return make


def test_a_stream_outlives_its_engine_and_the_request_that_kills_it_is_failed_alone(mortal: Mortal) -> None:
    body = {"prompt": "a", "max_tokens": 400, "temperature": 0}
    with mortal() as running, running.http() as http, running.http() as other:
        with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as stream:
            lines = (line for line in stream.iter_lines() if line)
            texts = [json.loads(next(lines).removeprefix("data: "))["choices"][0]["text"]]
            killer = other.post("/v1/completions", json={"prompt": [KILL]})
            assert killer.status_code == 500
            assert "died on this request" in killer.json()["error"]["message"]
            assert other.get("/health").status_code == 200
            for line in lines:
                if line != "data: [DONE]":
                    texts.append(json.loads(line.removeprefix("data: "))["choices"][0]["text"])
        assert "".join(texts) == told("a", 400)
        page = other.get("/metrics").text
        assert re.search(r"pippin:engine_restarts_total{[^}]*} 2.0", page)
        assert re.search(r"pippin:num_resumed_reqs_total{[^}]*} [23].0", page)


def test_after_too_many_deaths_it_says_so_and_when_to_come_back(mortal: Mortal) -> None:
    body = {"prompt": "a", "max_tokens": 1000, "stream": True}
    with mortal(1) as running, running.http() as http, http.stream("POST", "/v1/completions", json=body) as stream:
        lines = (line for line in stream.iter_lines() if line)
        for _ in range(2):
            for _ in range(10):  # it proves that it is not what kills
                assert "choices" in next(lines)
            pid = child_pid(running)
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
        *_, last = lines
        error = json.loads(last.removeprefix("data: "))["error"]
        assert (error["type"], error["code"]) == ("server_error", None)
        assert "restarted 1 times within 1000 s" in error["message"]
        with running.http() as other:
            for path in ("/health", "/health_generate", "/flush_cache"):
                response = other.get(path)
                assert response.status_code == 503
                assert "SIGKILL" in response.json()["error"]["message"]
                assert 900 < int(response.headers["retry-after"]) <= 1000
            assert other.get("/v1/models").status_code == 200
            assert other.get("/metrics").status_code == 200


def test_the_official_client_sees_nothing_of_an_engines_death(mortal: Mortal) -> None:
    with mortal() as running, running.openai() as ai:
        stream = ai.completions.create(model="m", prompt="a", max_tokens=300, stream=True, temperature=0)
        texts = [next(iter(stream)).choices[0].text]
        pid = child_pid(running)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        texts += [event.choices[0].text for event in stream]
        assert "".join(texts) == told("a", 300)


# --- the whole program ---

PROGRAM = """
import sys
from pippin.config import EngineConfig, ServerConfig
from pippin.errors import PippinError
from pippin.server.launch import run
try:
    server = ServerConfig(port=int(sys.argv[2]), drain_timeout=float(sys.argv[3]))
    run(EngineConfig(model_path=sys.argv[1]), server, core="tests.fake_core:load",
        on_ready=lambda info, url: print("ready", url, flush=True))
except PippinError as error:
    print(type(error).__name__, error, flush=True)
    sys.exit(3)
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def program(model: str, port: int, drain: float = 0.5) -> Iterator[subprocess.Popen[str]]:
    """The server as `pippin serve` runs it, with a demo model's tokenizer and a FakeCore."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, model, str(port), str(drain)],
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def get(port: int, path: str) -> httpx.Response | None:
    try:
        return httpx.get(f"http://127.0.0.1:{port}{path}", timeout=SECONDS)
    except httpx.TransportError:
        return None


def wait_for(port: int, path: str, status: int) -> httpx.Response:
    found: list[httpx.Response] = []

    def there() -> bool:
        response = get(port, path)
        if response is not None and response.status_code == status:
            found.append(response)
        return bool(found)

    until(there)
    return found[0]


def test_it_says_that_it_loads_and_ends_at_once_if_told_to() -> None:
    port = free_port()
    with program("slow", port) as process:
        for path in ("/health", "/v1/models", "/metrics"):
            response = wait_for(port, path, 503)
            assert "loading" in response.json()["error"]["message"]
            assert response.headers["retry-after"] == "1"
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_a_signal_and_leaves_nothing_behind(number: signal.Signals, tmp_path: Path) -> None:
    port = free_port()
    model = demo_like(tmp_path / "fast")
    with program(model, port) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"ready http://127.0.0.1:{port}\n"
        response = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json={"prompt": "a", "max_tokens": 3})
        assert response.status_code == 200
        (child,) = children(process.pid) if sys.platform == "linux" else (0,)
        process.send_signal(number)
        assert process.wait(SECONDS) == 0
        if child:
            assert not Path(f"/proc/{child}").exists()


def demo_like(path: Path) -> str:
    """A model directory that holds a tokenizer; FakeCore needs no more."""
    byte_tokenizer().hf.save_pretrained(path)
    return str(path)


def test_streams_that_outlast_the_server_are_told(tmp_path: Path) -> None:
    port = free_port()
    with program(demo_like(tmp_path / "0.05"), port) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with ask(("127.0.0.1", port), "/v1/completions", {"prompt": "a", "max_tokens": 1000, "stream": True}) as stream:
            found = stream.recv(4096)
            process.send_signal(signal.SIGTERM)
            while part := stream.recv(65536):
                found += part
        assert process.wait(SECONDS) == 0
    *_, last = re.findall(rb"data: (\{.*\})", found)
    assert "shutting down" in json.loads(last)["error"]["message"]
    assert found.endswith(b"0\r\n\r\n")  # and the answer is whole, as HTTP goes


def test_a_second_signal_waits_for_nobody(tmp_path: Path) -> None:
    port = free_port()
    with program(demo_like(tmp_path / "0.05"), port, drain=60) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with ask(("127.0.0.1", port), "/v1/completions", {"prompt": "a", "max_tokens": 1000, "stream": True}) as stream:
            stream.recv(4096)
            process.send_signal(signal.SIGINT)
            wait_for(port, "/ready", 503)
            process.send_signal(signal.SIGINT)
            assert process.wait(SECONDS) == 0


def test_what_runs_is_finished_and_nothing_new_is_taken_after_a_signal(tmp_path: Path) -> None:
    port, model = free_port(), tmp_path / "fast"
    demo_like(model)
    gate = Gate(model / "gate")
    with program(str(model), port, drain=SECONDS) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert wait_for(port, "/ready", 200)
        body = {"prompt": "a", "max_tokens": 100, "stream": True, "temperature": 0}
        with ask(("127.0.0.1", port), "/v1/completions", body) as stream:
            found = stream.recv(4096)
            with gate.held():
                process.send_signal(signal.SIGTERM)
                refused = wait_for(port, "/ready", 503)
                assert "shutting down" in refused.json()["error"]["message"]
                assert refused.headers["retry-after"] == "1"
                assert wait_for(port, "/health", 200)
            while b"[DONE]" not in found:
                found += stream.recv(65536)
        assert process.wait(SECONDS) == 0
    texts = [json.loads(e[6:])["choices"][0]["text"] for e in re.findall(rb"data: \{.*\}", found)]
    assert "".join(texts) == told("a", 100)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("broken-model", "ModelError no such model"),
        ("broken-option", "ConfigError --page-size: must be even"),
        ("killed", "EngineError the engine process was killed by SIGKILL"),
    ],
)
def test_a_start_that_fails_says_why(model: str, said: str) -> None:
    with program(model, free_port()) as process:
        output, _ = process.communicate(timeout=SECONDS)
        assert process.returncode == 3
        assert output.startswith(said)


def test_a_port_in_use_is_refused_before_anything_loads() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match=r"--port.*another port"):
        listen(ServerConfig(port=taken.getsockname()[1]))
    with pytest.raises(ConfigError, match=r"--host: no\.such\.host\.invalid:30000 can't be listened on"):
        listen(ServerConfig(host="no.such.host.invalid"))


def test_small_pieces_are_sent_at_once() -> None:
    """Else a stream's events wait for the client to acknowledge the one before: 40 ms each."""
    found = list[int]()

    async def look() -> None:
        with listen(ServerConfig(host="127.0.0.1", port=0)) as listener:
            done = asyncio.Event()

            async def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                connection: socket.socket = writer.get_extra_info("socket")
                found.append(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
                writer.close()
                done.set()

            async with await asyncio.start_server(connected, sock=listener):
                _, writer = await asyncio.open_connection(*listener.getsockname()[:2])
                await done.wait()
                writer.close()

    asyncio.run(look())
    assert found != [0]
    assert len(found) == 1
