"""Who may ask, how much at once, and how slowly; what the logs say of it."""

from __future__ import annotations

import io
import json
import logging
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from pippin.config import ServerConfig
from pippin.errors import ConfigError, EngineError, RequestError
from pippin.logs import JsonFormatter, request_id
from pippin.server import connection, guard
from pippin.server.admission import Admission
from pippin.server.guard import Bodies, Origins, is_loopback, name_of, warning_of
from pippin.text.chat import ChatTemplate
from tests.server.conftest import Running, Serve, byte_tokenizer
from tests.waiting import SECONDS, until

TEXT = "/v1/completions"
BODY: dict[str, Any] = {"prompt": "a", "max_tokens": 2}

# --- hosts and origins ---


@pytest.mark.parametrize(
    ("config", "headers", "may"),
    [
        ({}, {"host": "127.0.0.1:30000"}, True),
        ({}, {"host": "localhost"}, True),
        ({}, {"host": "LOCALHOST.:1"}, True),
        ({}, {"host": "[::1]:30000"}, True),
        ({}, {"host": "pippin.localhost:30000"}, True),
        ({}, {"host": "host.docker.internal:30000"}, True),
        ({}, {}, True),  # HTTP/1.0, which no browser speaks
        ({}, {"host": "evil.example:30000"}, False),
        ({}, {"host": "127.0.0.1.evil.example"}, False),
        ({}, {"host": "localhost@evil.example"}, False),
        ({}, {"host": ""}, False),
        ({"allowed_hosts": ["mac.local"]}, {"host": "mac.local:30000"}, True),
        ({"allowed_hosts": ["*"]}, {"host": "evil.example"}, True),
        ({"host": "0.0.0.0"}, {"host": "192.168.1.5:30000"}, True),
        ({"host": "0.0.0.0", "allowed_hosts": ["mac.local"]}, {"host": "evil.example"}, False),
        ({}, {"host": "localhost:1", "origin": "http://localhost:1"}, True),  # our own page
        ({}, {"host": "localhost:1", "origin": "http://localhost:2"}, False),
        ({}, {"host": "localhost:1", "origin": "https://evil.example"}, False),
        ({}, {"host": "localhost:1", "origin": "null"}, False),
        ({}, {"host": "localhost:1", "origin": "vscode-webview://abc"}, True),
        ({"allowed_origins": ["https://app.example"]}, {"host": "localhost", "origin": "https://app.example"}, True),
        ({"allowed_origins": ["https://app.example"]}, {"host": "localhost", "origin": "https://x.example"}, False),
        ({}, {"host": "localhost", "sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, False),
        ({}, {"host": "localhost", "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, True),
        ({}, {"host": "localhost", "sec-fetch-site": "none", "sec-fetch-mode": "navigate"}, True),
    ],
)
def test_who_may_ask(config: dict[str, Any], headers: dict[str, str], may: bool) -> None:
    origins = Origins(ServerConfig(**config))
    if may:
        origins.check(Headers(headers))
    else:
        with pytest.raises(RequestError, match="--allowed-") as refused:
            origins.check(Headers(headers))
        assert refused.value.status == 403


@given(st.text(max_size=30))
def test_no_other_name_is_taken_for_this_machines(host: str) -> None:
    name = name_of(host)
    assert name in host.lower()
    try:
        Origins(ServerConfig()).check(Headers(raw=[(b"host", host.encode("utf-8", "replace"))]))
    except RequestError:
        return
    seen = name_of(host.encode("utf-8", "replace").decode("latin-1"))
    assert is_loopback(seen) or seen in guard.LOCAL_NAMES


def test_a_web_page_elsewhere_can_neither_ask_nor_flush(http: httpx.Client) -> None:
    for headers in ({"origin": "https://evil.example"}, {"host": "evil.example"}, {"sec-fetch-site": "cross-site"}):
        for method, path in (("POST", TEXT), ("GET", "/flush_cache"), ("POST", "/flush_cache"), ("GET", "/v1/models")):
            response = http.request(method, path, headers=headers, json=BODY if path == TEXT else None)
            assert response.status_code == 403
            assert "access-control-allow-origin" not in response.headers
    assert http.post("/v1/messages", headers={"host": "x.example"}).json()["type"] == "error"
    preflight = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    assert http.options(TEXT, headers=preflight).status_code == 403
    assert http.get("/health").status_code == 200


def test_an_allowed_origin_gets_its_cors_headers_and_needs_its_key(serve: Serve) -> None:
    config = ServerConfig(allowed_origins=["https://app.example"], api_key="k")
    with serve(config) as running, running.http() as http:
        asked = {"origin": "https://app.example", "access-control-request-method": "POST"}
        preflight = http.options(TEXT, headers=asked | {"access-control-request-headers": "authorization"})
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://app.example"
        assert http.post(TEXT, json=BODY, headers={"origin": "https://app.example"}).status_code == 401
        headers = {"origin": "https://app.example", "authorization": "Bearer k"}
        assert http.post(TEXT, json=BODY, headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("config", "warns"),
    [
        ({}, False),
        ({"host": "::1"}, False),
        ({"host": "localhost"}, False),
        ({"host": "0.0.0.0"}, True),
        ({"host": "192.168.0.2"}, True),
        ({"host": "0.0.0.0", "api_key": "k"}, False),
    ],
)
def test_an_open_door_is_warned_of_with_the_mend(config: dict[str, Any], warns: bool) -> None:
    warning = warning_of(ServerConfig(**config))
    assert ("--api-key" in warning) if warning else not warns


# --- bodies, heads, connections ---


def said(connection: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    connection.settimeout(SECONDS)
    found = b""
    try:
        while part := connection.recv(65536):
            found += part
    except ConnectionResetError:
        pass
    return found


def test_a_head_that_is_too_long_is_refused(server: Running) -> None:
    with socket.create_connection(server.address) as one:
        one.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X: " + b"a" * 300_000)
        assert said(one).startswith(b"HTTP/1.1 400 ")
    with server.http() as http:
        many = http.get("/health", headers={f"x-{i}": "a" * 3000 for i in range(12)})
        assert many.status_code in (400, 431)
        assert many.json()["error"]["type"] == "invalid_request_error"
        assert http.get("/health", headers={"x": "a" * 8000}).status_code == 200


def test_what_is_no_http_is_refused_in_json(server: Running) -> None:
    for rubbish in (
        b"\x16\x03\x01\x02\x00\x01\xff\xfe\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n",
        b"HELO\r\n\r\n",
    ):
        with socket.create_connection(server.address) as one:
            one.sendall(rubbish)
            answer = said(one)
            assert answer.startswith(b"HTTP/1.1 400 ")
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"


def test_a_slow_body_ends(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.3)
    with socket.create_connection(server.address) as slow:
        slow.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 50\r\n\r\n{"
        )
        slow.settimeout(SECONDS)
        assert slow.recv(4096).startswith(b"HTTP/1.1 408 ")


def test_a_slow_head_ends(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.3)
    with socket.create_connection(server.address) as silent:
        silent.sendall(b"GET /hea")
        assert said(silent) == b""


def test_who_never_reads_is_dropped_and_the_engine_freed(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "STALL_SECONDS", 0.3)
    with serve(seconds=0) as running:
        content = json.dumps({"prompt": "a" * 900, "max_tokens": 100, "n": 100, "echo": True, "stream": True}).encode()
        deaf = socket.socket()
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        deaf.connect(running.address)
        deaf.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(content) + content
        )
        until(lambda: running.client.live != ())
        until(lambda: running.client.live == ())
        deaf.close()


def test_silent_connections_make_room_for_those_that_speak(serve: Serve) -> None:
    with serve(ServerConfig(max_connections=8)) as running:
        silent = [socket.create_connection(running.address) for _ in range(60)]
        for one in silent[40:]:
            one.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: 9\r\n\r\n{"
            )
        with running.http() as http:
            for _ in range(5):
                assert http.post(TEXT, json=BODY).status_code == 200
        dropped = [was_closed(one) for one in silent]
        for one in silent:
            one.close()
        assert sum(dropped) >= 60 - 8
        assert not dropped[-1], "the oldest go first"


def was_closed(one: socket.socket) -> bool:
    """Whether the server ended the connection, whatever it said before."""
    one.settimeout(0.05)
    try:
        while one.recv(4096):
            pass
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), max_size=30))
def test_bodies_together_take_no_more_than_they_may(parts: list[tuple[int, int]]) -> None:
    bodies, sizes = Bodies(most=100, each=60), dict.fromkeys(range(4), 0)
    for which, size in parts:
        if sizes[which] + size > 60:
            refusal: type[Exception] | None = RequestError
        else:
            full = sum(sizes.values()) + size > 100 and sum(sizes.values()) > sizes[which]
            refusal = EngineError if full else None
        if refusal is None:
            bodies.take(size, sizes[which])
            sizes[which] += size
        else:
            with pytest.raises(refusal):
                bodies.take(size, sizes[which])
    assert bodies.held == sum(sizes.values()) <= 100


def test_bodies_that_were_read_take_no_room_any_more(serve: Serve) -> None:
    with serve(ServerConfig(max_body_mb=1)) as running, running.http() as http:
        for _ in range(3 * guard.BODIES):
            body = {"prompt": "a" * 1_000_000}
            assert http.post(TEXT, json=body).status_code == 400


# --- how much is taken in ---


def test_a_full_queue_refuses_and_says_when_to_try_again(serve: Serve) -> None:
    with serve(ServerConfig(max_queued_requests=0), seconds=0.05) as running, running.http() as http:
        assert http.get("/ready").status_code == 200
        rows = running.client.info.max_running_requests
        body = BODY | {"max_tokens": 500, "n": rows, "stream": True}
        with http.stream("POST", TEXT, json=body) as stream, running.http() as other:
            lines = stream.iter_lines()  # kept: the stream is closed with it
            assert next(lines)
            refused = other.post(TEXT, json=BODY)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert "--max-queued-requests" in refused.json()["error"]["message"]
            unready = other.get("/ready")
            assert unready.status_code == 503
            assert other.get("/health").status_code == 200
        never = http.post(TEXT, json=BODY | {"n": rows + 1})
        assert never.status_code == 400
        until(lambda: http.get("/ready").status_code == 200)
        assert http.post(TEXT, json=BODY).status_code == 200


def test_prompts_together_take_no_more_than_they_may(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pippin.server.admission.MOST_TOKENS", 100)
    admission = Admission(server.client, ServerConfig())
    with admission.admit(1, [1000]):  # alone it may
        with pytest.raises(EngineError, match="1000 tokens wait"), admission.admit(1, [1]):
            pass
        assert (admission.answers, admission.tokens) == (1, 1000)
    assert (admission.answers, admission.tokens) == (0, 0)


def test_an_answer_that_takes_too_long_is_a_504(serve: Serve) -> None:
    with serve(ServerConfig(request_timeout=SECONDS)) as running, running.http() as http:
        assert http.post(TEXT, json=BODY).status_code == 200
    with serve(ServerConfig(request_timeout=0.3), seconds=0.02) as running, running.http() as http:
        late = http.post(TEXT, json=BODY | {"max_tokens": 500})
        assert late.status_code == 504
        assert "--request-timeout" in late.json()["error"]["message"]
        with http.stream("POST", TEXT, json=BODY | {"max_tokens": 500, "stream": True}) as stream:
            *_, last = (line for line in stream.iter_lines() if line)
        assert "--request-timeout" in last
        until(lambda: running.client.live == ())


def test_a_prompt_that_is_far_too_long_is_refused_at_a_look(http: httpx.Client) -> None:
    for path, body in ((TEXT, {"prompt": "a b " * 300_000}), ("/generate", {"text": "a b " * 300_000})):
        began = time.process_time()  # of the server's threads too, and of nothing that runs beside
        response = http.post(path, json=body)
        assert response.status_code == 400
        assert "of which the first" in response.json()["error"]["message"]
        assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("option", "value"),
    [("max_connections", 0), ("max_body_mb", 0), ("request_timeout", 0.0), ("drain_timeout", -1.0),
     ("max_queued_requests", -1), ("log_format", "xml"), ("log_requests_level", 4)],
)  # fmt: skip
def test_a_wrong_limit_is_refused_by_its_flag(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match="--" + option.replace("_", "-")):
        ServerConfig(**{option: value})


# --- what requests name, and templates do ---


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "file:" + "//etc/passwd"}},
        {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}},
        {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
        {"type": "file", "file": {"file_id": "../../secret"}},
    ],
)
def test_files_and_urls_are_refused(http: httpx.Client, part: dict[str, Any]) -> None:
    response = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": [part]}]})
    assert response.status_code == 400
    assert "messages[0].content[0]" in response.json()["error"]["param"]


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% set _ = messages.append(1) %}",
        "{% for i in range(10000000) %}{% endfor %}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_templates_run_in_a_sandbox(template: str) -> None:
    with pytest.raises(RequestError, match="the chat template refused"):
        ChatTemplate(byte_tokenizer(), template).render([{"role": "user", "content": "a"}])


# --- logs ---


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """What ``--log-format json`` writes."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("pippin")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield stream
    logger.removeHandler(handler)
    logger.setLevel(before)


def test_a_log_has_ids_and_no_prompts(serve: Serve, lines: io.StringIO) -> None:
    with serve() as running, running.http() as http:
        named = http.post(TEXT, json=BODY | {"prompt": "secretword"}, headers={"x-request-id": "mine-1"})
        assert named.headers["x-request-id"] == "mine-1"
        strange = http.post(TEXT, json={"prompt": ["secretword", 1]}, headers={"x-request-id": "a b"})
        assert strange.headers["x-request-id"] not in ("a b", "")
        http.get("/health")
    found = [json.loads(line) for line in lines.getvalue().splitlines()]
    lines_of_all = [line for line in found if line["logger"] == "pippin.access"]
    assert "/health" not in [line["path"] for line in lines_of_all]
    # The server that all tests share may still have been writing of the test before.
    asked = [line for line in lines_of_all if line["request_id"] in ("mine-1", strange.headers["x-request-id"])]
    assert [(line["request_id"], line["status"], line["path"]) for line in asked] == [
        ("mine-1", 200, TEXT),
        (strange.headers["x-request-id"], 400, TEXT),
    ]
    assert "secretword" not in lines.getvalue()


@pytest.mark.parametrize(("level", "shows"), [(0, False), (1, False), (2, True), (3, True)])
def test_prompts_are_logged_as_far_as_asked(serve: Serve, lines: io.StringIO, level: int, shows: bool) -> None:
    config = ServerConfig(log_requests=True, log_requests_level=level)
    with serve(config) as running, running.http() as http:
        assert http.post(TEXT, json=BODY | {"prompt": "secretword", "rid": "r1", "n": 2}).status_code == 200
    found = [json.loads(line) for line in lines.getvalue().splitlines()]
    begin, end = (line for line in found if line["logger"] == "pippin.requests")
    assert (begin["rid"], begin["prompt_tokens"], end["completion_tokens"]) == ("r1", 10, 4)
    assert end["finish_reasons"] == ["length", "length"]
    assert ("secretword" in lines.getvalue()) == shows
    assert ("sampling_params" in begin) == (level > 0)
    assert (len(end.get("answers", [])) == 2) == shows


def test_a_line_of_json_is_one_line_whatever_it_says() -> None:
    record = logging.LogRecord("x", logging.INFO, "", 0, "a\nb %s", ("c\r\n{}",), None)
    token = request_id.set("id")
    try:
        line = JsonFormatter().format(record)
    finally:
        request_id.reset(token)
    assert "\n" not in line
    assert json.loads(line)["message"] == "a\nb c\r\n{}"
    assert json.loads(line)["request_id"] == "id"
