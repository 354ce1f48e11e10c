"""The web page's files and headers, who gets them, and the numbers of its dashboard."""

from __future__ import annotations

import asyncio
import itertools
import re
from contextlib import nullcontext
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pippin.client import EngineClient
from pippin.completion import Delta
from pippin.config import ServerConfig
from pippin.server.gate import Gate
from pippin.server.history import KEPT, Entry, History, quantiles
from pippin.server.ui import HEADERS, PAGES, TYPES, between
from pippin.types import Finish, FinishReason
from tests.fake_core import FakeCore
from tests.server.conftest import Running, Serve

FOLDER = Path(str(files("pippin") / "ui"))
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}


def test_every_file_is_there_and_typed(http: httpx.Client) -> None:
    assert {"/", "/ui/main.js", "/ui/style.css", "/ui/vendor/purify.min.js"} <= set(PAGES)
    for path in PAGES:
        response = http.get(path)
        assert response.status_code == 200
        assert response.headers["content-type"] == TYPES[path.rpartition(".")[2] if path != "/" else "html"]
        assert {name: response.headers[name] for name in HEADERS} == HEADERS
        assert http.get(path, headers={"if-none-match": response.headers["etag"]}).status_code == 304
    assert http.head("/").status_code == 200


def test_nothing_but_the_files(http: httpx.Client) -> None:
    for path in ("/ui/", "/ui/nothing.js", "/ui/../config.py", "/ui/%2e%2e/config.py", "/ui/vendor/README.md"):
        assert http.get(path).status_code == 404


def test_the_policy_lets_nothing_in() -> None:
    policy = dict(part.split(" ", 1) for part in HEADERS["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert {policy[name] for name in ("script-src", "style-src", "img-src", "connect-src")} == {"'self'"}
    assert policy["require-trusted-types-for"] == "'script'"


def test_the_page_keeps_its_policy() -> None:
    """No inline script, style or handler; nothing from elsewhere; everything that it names is there."""
    page = (FOLDER / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\son\w+=|\sstyle=", page)
    named = re.findall(r'(?:src|href)="([^"#]+)"', page)
    assert set(named) <= set(PAGES)
    ids = set(re.findall(r'\bid="([\w-]+)"', page))
    for file in FOLDER.glob("*.js"):
        text = file.read_text()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text)
        assert {f"/ui/{name}" for name in re.findall(r'(?:from|import) "\./([^"]+)"', text)} <= set(PAGES)
        assert set(re.findall(r'\$\("([\w-]+)"\)', text)) <= ids
    assert not re.search(r"url\(|@import", (FOLDER / "style.css").read_text())


def test_vendored_libraries_have_licences_and_are_the_versions_named() -> None:
    readme = (FOLDER / "vendor" / "README.md").read_text()
    rows = re.findall(r"^\| `(\S+)` \| `\S+` \| ([\d.]+) \|", readme, re.M)
    scripts = {file.name for file in (FOLDER / "vendor").glob("*.js")}
    assert {name for name, _ in rows} == scripts
    for name, version in rows:
        assert version in (FOLDER / "vendor" / name).read_text()[:400]
        assert (FOLDER / "vendor" / f"{name.removesuffix('.min.js')}.LICENSE.txt").stat().st_size > 500
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) < 400_000


def test_no_ui(serve: Serve) -> None:
    with serve(ServerConfig(no_ui=True, api_key="sesame")) as running, running.http() as http:
        http.headers["authorization"] = "Bearer sesame"
        assert {http.get(path).status_code for path in PAGES} == {404}
        assert http.get("/pippin/stats").status_code == 200


def test_the_page_needs_no_key_and_its_numbers_do(serve: Serve) -> None:
    with serve(ServerConfig(api_key="sesame")) as running, running.http() as http:
        assert {http.get(path).status_code for path in PAGES} == {200}
        assert http.get("/pippin/stats").status_code == 401
        assert http.get("/pippin/stats", headers={"authorization": "Bearer sesame"}).status_code == 200


def test_the_page_is_there_while_the_model_loads() -> None:
    async def got(gate: Gate, path: str) -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(gate), base_url="http://pippin") as http:
            return (await http.get(path)).status_code

    client = EngineClient.in_thread(lambda progress: FakeCore())
    assert asyncio.run(got(Gate(client, ui=True), "/")) == 200
    assert asyncio.run(got(Gate(client, ui=True), "/pippin/stats")) == 503
    assert asyncio.run(got(Gate(client, ui=False), "/")) == 503


# --- numbers ---


def test_stats_count_what_was_served(serve: Serve) -> None:
    with serve() as running, running.http() as http:
        empty = http.get("/pippin/stats").json()
        assert empty["requests"] == []
        assert empty["latency"]["first_token"] == {"p50": None, "p95": None}
        answer = http.post("/v1/chat/completions", json=CHAT | {"n": 2, "rid": "mine"}).json()
        found = http.get("/pippin/stats").json()
    (request,) = found["requests"]
    assert found["generated_tokens"] == request["generated"] == answer["usage"]["completion_tokens"] == 10
    assert (request["id"], request["answers"], request["outcome"]) == ("mine", 2, "length")
    assert request["prompt"] == answer["usage"]["prompt_tokens"]
    assert 0 <= request["queue"] <= request["first"] <= request["end"]
    assert found["latency"]["first_token"]["p50"] == request["first"]
    assert found["stats"]["prompt_tokens"] == 2 * request["prompt"]
    assert not found["reasons"]


def test_stats_hold_no_text(serve: Serve) -> None:
    with serve() as running, running.http() as http:
        http.post("/v1/chat/completions", json=CHAT | {"messages": [{"role": "user", "content": "mellon-friend"}]})
        assert "mellon" not in http.get("/pippin/stats").text


def test_the_engine_says_how_long_a_request_waited(demo: Running) -> None:
    with demo.http() as http:
        http.post("/v1/chat/completions", json=CHAT | {"rid": "waited"}).raise_for_status()
        found = http.get("/pippin/stats").json()
    request = next(r for r in found["requests"] if r["id"] == "waited")
    assert 0 < request["queue"] < request["first"]
    assert found["stats"]["memory_peak_bytes"] >= found["stats"]["memory_bytes"] > found["info"]["weight_bytes"]


def told(history: History, deltas: list[Delta | Exception], n: int, leave: int | None = None) -> None:
    with history.track("r", 7, n) as note:
        for delta in deltas[:leave]:
            if isinstance(delta, Exception):
                raise delta
            note(delta)
            assert len(history.running) == 1


def delta(tokens: int, finish: FinishReason | None = None, **others: Any) -> Delta:
    return Delta(0, "x", [1] * tokens, finish=Finish(finish) if finish else None, **others)


def clocked() -> History:
    ticks = itertools.count()
    return History(clock=lambda: float(next(ticks)), wall=lambda: 1000.0)


def test_phases_of_a_request() -> None:
    history = clocked()
    told(history, [delta(0), delta(1, num_cached=4, waited=0.5), delta(2), delta(1, "stop")], 1)
    (entry,) = history.ended
    assert entry == Entry(
        id="r", at=1000.0, prompt=7, cached=4, generated=4, queue=0.5, first=2.0, end=5.0, outcome="stop"
    )
    assert between(entry) == 1.0
    assert not history.running


@pytest.mark.parametrize(
    ("deltas", "leave", "outcome"),
    [
        ([delta(1), delta(1), delta(1, "stop")], 2, "disconnect"),
        ([delta(1), RuntimeError("broken")], None, "error"),
        ([delta(1), delta(0, "abort")], None, "abort"),
    ],
)
def test_how_a_request_ended(deltas: list[Delta | Exception], leave: int | None, outcome: str) -> None:
    history = clocked()
    with pytest.raises(RuntimeError) if outcome == "error" else nullcontext():
        told(history, deltas, 1, leave)
    assert [e.outcome for e in history.ended] == [outcome]
    assert not history.running


def test_only_so_many_are_kept() -> None:
    history = clocked()
    for _ in range(KEPT + 5):
        told(history, [delta(1, "stop")], 1)
    assert len(history.latest()) == KEPT
    assert history.generated == KEPT + 5


@given(st.lists(st.floats(0, 1e6), min_size=1))
def test_quantiles_are_among_the_values(values: list[float]) -> None:
    found = quantiles([*values, None])
    median, high = found["p50"] or 0.0, found["p95"] or 0.0
    assert {median, high} <= set(values)
    assert median <= high
    assert sum(v <= median for v in values) * 2 >= len(values)
