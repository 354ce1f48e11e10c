"""Another model behind the same socket: with streams open, with models that can't be loaded, and with real ones."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.test_lifecycle import ask, demo_like, free_port, program, wait_for
from tests.server.test_openai import told
from tests.waiting import SECONDS, until

PATH = "/update_weights_from_disk"


class Server:
    """A server of its own process, with a FakeCore behind it."""

    def __init__(self, port: int, folder: Path) -> None:
        self.address, self.folder = ("127.0.0.1", port), folder
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, verify=False)
        self._threads = ThreadPoolExecutor(8)

    def close(self) -> None:
        self.http.close()
        self._threads.shutdown()

    def model(self, name: str) -> str:
        """A directory whose name says what the FakeCore does."""
        path = self.folder / name
        return str(path) if path.exists() else demo_like(path)

    def update(self, name: str, **fields: Any) -> httpx.Response:
        return self.http.post(PATH, json={"model_path": self.model(name), **fields})

    def aside(self, function: Callable[..., httpx.Response], *args: Any, **options: Any) -> Future[httpx.Response]:
        return self._threads.submit(function, *args, **options)

    def complete(self, prompt: str, count: int) -> httpx.Response:
        return self.http.post("/v1/completions", json={"prompt": prompt, "max_tokens": count, "temperature": 0})

    def info(self) -> dict[str, Any]:
        found: dict[str, Any] = self.http.get("/get_model_info").json()
        return found


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder, port = tmp_path_factory.mktemp("models"), free_port()
    with program(demo_like(folder / "0.02"), port) as process:
        assert process.stdout is not None
        process.stdout.readline()
        server = Server(port, folder)
        yield server
        server.close()


def stream(server: Server, count: int) -> tuple[Any, bytes]:
    """A stream that is under way, and what has come of it."""
    body = {"prompt": "a", "max_tokens": count, "stream": True, "temperature": 0}
    connection = ask(server.address, "/v1/completions", body)
    return connection, connection.recv(4096)


def rest(connection: Any, found: bytes) -> list[dict[str, Any]]:
    """All events of a stream."""
    with connection:
        while b"[DONE]" not in found:
            part = connection.recv(65536)
            assert part, found
            found += part
    return [json.loads(e[6:]) for e in re.findall(rb"data: \{.*\}", found)]


def test_what_runs_is_finished_and_what_comes_waits_for_the_other_model(live: Server) -> None:
    connection, found = stream(live, 100)
    update = live.aside(live.update, "0.001", weight_version="7")
    wait_for(live.address[1], "/ready", 503)
    assert live.http.get("/health").status_code == 200
    assert live.info()["model_path"].endswith("/0.02")
    later = [live.aside(live.complete, "b", n) for n in (3, 4)]
    again = live.update("0.02")
    assert (again.status_code, again.json()["success"]) == (409, False)
    events = rest(connection, found)
    assert "".join(e["choices"][0]["text"] for e in events) == told("a", 100)
    assert all(e["model"].endswith("/0.02") for e in events)
    answer = update.result()
    assert answer.status_code == 200, answer.text
    assert (answer.json()["success"], answer.json()["num_paused_requests"]) == (True, 2)
    for n, waited in zip((3, 4), later, strict=True):
        assert waited.result().json()["model"].endswith("/0.001")
        assert waited.result().json()["choices"][0]["text"] == told("b", n)
    info = live.info()
    assert (info["model_path"], info["weight_version"]) == (live.model("0.001"), "7")
    assert live.http.get("/ready").status_code == 200
    generated = live.http.post("/generate", json={"text": "a", "sampling_params": {"max_new_tokens": 2}}).json()
    assert generated["meta_info"]["weight_version"] == "7"
    page = live.http.get("/metrics").text
    assert re.search(r'pippin:num_requests_total{model_name="[^"]*/0\.001",outcome="length"} 3\.0', page)
    assert re.search(r'pippin:num_requests_total{model_name="[^"]*/0\.02",outcome="length"} 1\.0', page)
    assert live.update("0.02").json()["num_paused_requests"] == 0
    assert live.info()["weight_version"] == "7", "an update that brings none leaves it"


def test_what_runs_can_be_ended_instead(live: Server) -> None:
    assert live.update("0.05").status_code == 200
    connection, found = stream(live, 1000)
    began = time.monotonic()
    assert live.update("0.02", abort_all_requests=True).status_code == 200
    assert time.monotonic() - began < 45, "it would have run for 50 s"
    assert rest(connection, found)[-1]["choices"][0]["finish_reason"] == "abort"


@pytest.mark.parametrize(
    ("name", "status", "said"),
    [
        ("broken-model", 400, "no such model"),
        ("broken-option", 400, "--page-size: must be even"),
        ("broken-code", 500, "unforeseen"),
        ("killed", 500, "killed by SIGKILL"),
    ],
)
def test_one_that_cannot_be_loaded_leaves_the_other(live: Server, name: str, status: int, said: str) -> None:
    before = live.info()
    connection, found = stream(live, 30)
    answer = live.update(name)
    assert "".join(e["choices"][0]["text"] for e in rest(connection, found)) == told("a", 30)
    assert answer.status_code == status
    body = answer.json()
    assert body["success"] is False
    assert body["message"] == body["error"]["message"]
    assert said in body["message"]
    assert f"{before['model_path']} is served on" in body["message"]
    assert live.info() == before
    assert live.complete("b", 5).json()["choices"][0]["text"] == told("b", 5)
    assert live.http.get("/ready").status_code == 200


def test_adapters_go_along(live: Server) -> None:
    body = {"lora_name": "sql", "lora_path": "/adapters/sql"}
    assert live.http.post("/load_lora_adapter", json=body).status_code == 200
    assert live.update("0.001").status_code == 200
    assert live.info()["model_path"].endswith("0.001")
    asked = {"prompt": "a", "max_tokens": 2, "model": "sql", "temperature": 0}
    assert live.http.post("/v1/completions", json=asked).status_code == 200
    assert live.http.post("/unload_lora_adapter", json={"lora_name": "sql"}).json()["loaded_adapters"] == {}
    assert live.update("0.02").status_code == 200


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "model_path"),
        ({"model_path": ""}, "model_path"),
        ({"model_path": "x", "load_format": "dummy"}, "load_format"),
        ({"model_path": "x", "flush_cache": False}, "flush_cache"),
        ({"model_path": "x", "keep_pause": True}, "keep_pause"),
        ({"model_path": "x", "unknown": 1}, "unknown"),
    ],
)
def test_what_is_not_meant_so_is_refused(live: Server, body: dict[str, Any], field: str) -> None:
    answer = live.http.post(PATH, json=body)
    assert answer.status_code == 400
    assert (answer.json()["success"], answer.json()["error"]["param"]) == (False, field)


def test_who_asked_may_go_away_while_others_are_waited_for(live: Server) -> None:
    before = live.info()
    connection, found = stream(live, 150)
    with ask(live.address, PATH, {"model_path": live.model("0.001")}):
        wait_for(live.address[1], "/ready", 503)
    wait_for(live.address[1], "/ready", 200)
    assert live.complete("b", 3).json()["choices"][0]["text"] == told("b", 3), "the door is open again"
    rest(connection, found)
    assert live.info() == before


def test_a_signal_ends_a_server_that_waits_to_change(tmp_path: Path) -> None:
    port = free_port()
    with program(demo_like(tmp_path / "0.05"), port, drain=1) as process:
        assert process.stdout is not None
        process.stdout.readline()
        server = Server(port, tmp_path)
        connection, _ = stream(server, 1000)
        update = server.aside(server.update, "0.001")
        wait_for(port, "/ready", 503)
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 0
        assert update.result().status_code == 503
        connection.close()
        server.close()


def test_a_server_whose_engine_is_no_process_says_so(http: httpx.Client) -> None:
    answer = http.post(PATH, json={"model_path": "x"})
    assert (answer.status_code, answer.json()["success"]) == (400, False)
    assert "process of its own" in answer.json()["message"]
    until(lambda: http.get("/ready").status_code == 200)
