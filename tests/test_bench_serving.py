"""``pippin bench serving`` against servers: a fake one that fails in many ways, and Pippin with the shipped model."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pippin.bench.results import BenchResult, read
from pippin.bench.serving_api import BACKENDS, Answer, BadEvent, read_chat, read_completions, read_generate
from pippin.bench.serving_data import Conversation, Turn
from pippin.bench.serving_load import EventSplitter, Run, Target, Watch, merged, run_load, session
from pippin.bench.serving_show import shown
from pippin.cli import run_command
from tests.fake_server import FakeServer, Script, fake_server
from tests.test_promises import serving
from tests.waiting import SECONDS, until

SMALL = ("--num-prompts", "6", "--random-input-len", "40", "--random-output-len", "8", "--random-range-ratio", "1")


def bench(server: FakeServer, path: Path, *arguments: str) -> tuple[int, list[BenchResult]]:
    """Exit status and results of one command against a fake."""
    file = path / "results.jsonl"
    status = run_command(["bench", "serving", "--base-url", server.url, "--output-file", str(file), *SMALL, *arguments])
    return status, read([file]) if file.stat().st_size else []


def load(server: FakeServer, conversations: list[Conversation], due: list[float], **options: Any) -> Run:
    """A load without the command round it."""
    bound = options.pop("max_concurrency", None)

    async def go() -> Run:
        async with session() as http:
            target = Target(server.url, BACKENDS[options.pop("backend", "vllm")], "m", **options)
            return await run_load(http, target, conversations, due, bound)

    return asyncio.run(go())


def single(text: str = "a b c ", output_len: int = 4) -> Conversation:
    return Conversation((Turn(text, output_len),))


# --- what is sent and counted ---


@pytest.mark.parametrize("backend", BACKENDS)
def test_counts_are_the_servers(backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fake_server(Script(cached=5)) as server:
        status, (result,) = bench(server, tmp_path, "--backend", backend, "--goodput", "e2el:60000")
    path = BACKENDS[backend].api.path
    body = server.bodies(path)[-1]
    figures = result.figures
    assert status == 0
    assert (result.kind, result.side, result.model) == ("serving", "fake", "fake-model")
    assert (figures["completed"], figures["errors"]) == (6, 0)
    assert figures["total_output_tokens"] == 48
    # A word is a token, which two prompts of a warm-up showed; a chat's template comes on top.
    assert figures["total_input_tokens"] == 6 * (45 if "chat" in backend else 40)
    assert figures["cached_tokens"] == 30
    assert figures["good_share"] == 1.0
    assert figures["output_counted_by"] == "server"
    assert (body.get("sampling_params") or body).get("ignore_eos", False) is ("openai" not in backend)
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "results.jsonl").read_text())


@pytest.mark.parametrize("backend", ["sglang", "vllm", "vllm-chat"])
def test_without_streams(backend: str, tmp_path: Path) -> None:
    with fake_server() as server:
        status, (result,) = bench(server, tmp_path, "--backend", backend, "--disable-stream")
    assert status == 0
    assert result.figures["total_output_tokens"] == 48
    assert result.figures["median_itl_ms"] is None
    assert not any(body["stream"] for _, body in server.asked)


@pytest.mark.parametrize("backend", ["sglang", "openai"])
def test_a_server_that_counts_nothing(backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fake_server(Script(usage=False, cached=None)) as server:
        status, (result,) = bench(server, tmp_path, "--backend", backend)
    assert status == 0
    assert result.figures["output_counted_by"] == "events"
    assert result.figures["total_output_tokens"] == 48
    assert result.figures["total_input_tokens"] is None
    assert result.settings["prompt_lengths_by"] == "guess"
    assert "1.3 a word" in capsys.readouterr().err


def test_the_clock_agrees_with_the_server(tmp_path: Path) -> None:
    """Times can only be longer than the server's own."""
    with fake_server(Script(first=0.1, between=0.05)) as server:
        found = load(server, [single(output_len=5)] * 3, [0.0] * 3).answers
    for answer in found:
        assert answer.arrivals[0] - answer.sent >= 0.1
        assert answer.arrivals[-1] - answer.arrivals[0] >= 4 * 0.05 - 0.02
        assert answer.end - answer.sent >= 0.3 - 0.02
    assert min(a.arrivals[0] - a.sent for a in found) < 2


def test_no_more_at_once_than_allowed() -> None:
    with fake_server(Script(first=0.2)) as server:
        done = load(server, [single()] * 9, [0.0] * 9, max_concurrency=3)
    assert len(done.answers) == 9
    assert server.most_running == 3


def test_nothing_is_sent_before_it_is_due() -> None:
    with fake_server() as server:
        done = load(server, [single()] * 3, [0.0, 0.1, 0.25])
    begin = min(a.due for a in done.answers)
    assert sorted(round(a.due - begin, 2) for a in done.answers) == [0.0, 0.1, 0.25]
    assert all(a.sent >= a.due for a in done.answers)


@pytest.mark.parametrize(("backend", "incremental"), [("vllm-chat", False), ("sglang", False), ("sglang", True)])
def test_a_chat_repeats_what_was_said(backend: str, incremental: bool) -> None:
    chat = Conversation((Turn("one ", 2), Turn("two ", 1, pause=0.1), Turn("three ", 1)))
    with fake_server(Script(incremental=incremental)) as server:
        answers = load(server, [chat], [0.0], backend=backend).answers
    last = server.asked[-1][1]
    if backend == "sglang":
        assert last["text"] == "one w0 w1 two w0 three "
    else:
        assert [m["content"] for m in last["messages"]] == ["one ", "w0 w1 ", "two ", "w0 ", "three "]
        assert [m["role"] for m in last["messages"]] == ["user", "assistant", "user", "assistant", "user"]
    assert answers[1].sent - answers[0].end >= 0.1
    assert len(answers) == 3


def test_several_loads_never_ask_the_same(tmp_path: Path) -> None:
    with fake_server() as server:
        status, results = bench(
            server, tmp_path, "--backend", "vllm", "--max-concurrency", "1", "2", "--request-rate", "500", "inf"
        )
    assert status == 0
    loads = [(r.settings["request_rate"], r.settings["max_concurrency"]) for r in results]
    assert loads == [(500.0, 1), (500.0, 2), ("inf", 1), ("inf", 2)]
    sent = [body["prompt"] for body in server.bodies("/v1/completions")]
    assert len(sent) == len(set(sent)) == 4 * (6 + 1) + 2  # a warm-up each, and two to measure words


@pytest.mark.parametrize("more", [["--tokenize-prompt"], ["--dataset-name", "random-ids"]])
def test_token_ids_have_their_exact_length(more: list[str], tmp_path: Path) -> None:
    from pippin.text.tokenizer import demo_path

    with fake_server() as server:
        status, (result,) = bench(server, tmp_path, "--tokenizer", demo_path(), "--warmup-requests", "0", *more)
    assert status == 0
    assert [len(body["input_ids"]) for body in server.bodies("/generate")] == [40] * 6
    assert result.figures["total_input_tokens"] == 240


def test_what_is_asked_besides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    extra = '{"sampling_params": {"temperature": 0.5}, "priority": 3}'
    with fake_server() as server:
        status, _ = bench(server, tmp_path, "--extra-request-body", extra, "--flush-cache", "--profile")
    assert status == 0
    assert set(server.keys) == {"Bearer sesame"}
    last = server.bodies("/generate")[-1]
    assert last["priority"] == 3
    assert last["sampling_params"] == {"temperature": 0.5, "max_new_tokens": 8, "ignore_eos": True}
    paths = [path for path, _ in server.asked if path != "/generate"]
    assert paths == ["/flush_cache", "/start_profile", "/stop_profile"]


@given(st.dictionaries(st.text(), st.integers() | st.dictionaries(st.text(), st.integers())))
def test_merging_keeps_what_is_not_named(extra: dict[str, Any]) -> None:
    body = {"a": 1, "b": {"c": 2}}
    assert merged(body, extra) == {**body, **extra} | (
        {"b": {"c": 2, **extra["b"]}} if isinstance(extra.get("b"), dict) else {}
    )


# --- what goes wrong ---

FAILURES = {
    "500": "HTTP 500", "429": "HTTP 429", "garbage": "malformed answer", "strange": "malformed answer",
    "cut": "stream cut short", "abort": "connection lost", "drop": "connection lost", "error": "error event",
    "empty": "empty answer",
}  # fmt: skip


@pytest.mark.parametrize("backend", ["sglang", "vllm", "vllm-chat"])
@pytest.mark.parametrize("mode", FAILURES)
def test_failures_are_counted_by_kind(
    mode: str, backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    healthy = 3 + 2  # two prompts to measure words, a warm-up, and two of the run
    with fake_server(Script(mode, healthy)) as server:
        status, (result,) = bench(server, tmp_path, "--backend", backend, "--max-concurrency", "1")
    assert status == 0
    if (mode, backend) == ("empty", "sglang"):  # it counts its tokens, so they are there without text too
        assert (result.figures["completed"], result.figures["total_output_tokens"]) == (6, 48)
        return
    assert (result.figures["completed"], result.figures["errors"]) == (2, 4)
    assert result.figures["total_output_tokens"] == 16
    expected = FAILURES[mode]
    assert result.figures["error_kinds"] == [f"{expected}: 4"]
    shown = capsys.readouterr().err
    assert f"{expected}: 4" in shown
    assert "Traceback" not in shown


def test_too_late_is_an_error() -> None:
    with fake_server(Script("slow")) as server:
        done = load(server, [single()] * 2, [0.0] * 2, timeout=0.3)
    assert [a.error for a in done.answers] == ["timeout"] * 2
    assert done.seconds < 20


def test_when_all_fail_the_status_says_so(tmp_path: Path) -> None:
    with fake_server(Script("503", healthy=3)) as server:
        status, (result,) = bench(server, tmp_path)
    assert status == 1
    assert result.figures["completed"] == 0
    assert result.figures["mean_ttft_ms"] is None


def test_a_chat_ends_at_its_first_error() -> None:
    chat = Conversation((Turn("one ", 2), Turn("two ", 2), Turn("three ", 2)))
    with fake_server(Script("500", healthy=1)) as server:
        done = load(server, [chat], [0.0])
    assert [a.error for a in done.answers] == [None, "HTTP 500"]


@pytest.mark.parametrize(("script", "why"), [(Script("401"), "HTTP 401"), (Script("drop"), "connection lost")])
def test_a_server_that_fails_at_once(
    script: Script, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with fake_server(script) as server:
        assert bench(server, tmp_path) == (1, [])
    assert f"fails a first request ({why})" in capsys.readouterr().err


def test_nobody_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["bench", "serving", "--port", "1"]) == 1
    assert "nobody answers at http://127.0.0.1:1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--num-prompts", "0"], ["--request-rate", "0"], ["--burstiness", "-1"], ["--max-concurrency", "0"],
        ["--goodput", "ttft"], ["--goodput", "speed:3"], ["--goodput", "ttft:-1"], ["--extra-request-body", "[1]"],
        ["--base-url", "localhost:3"], ["--base-url", "http://:::"], ["--random-range-ratio", "2"],
        ["--random-input-len", "0"], ["--dataset-name", "sharegpt"], ["--think-time", "-1"],
        ["--request-timeout", "0"], ["--warmup-requests", "-1"], ["--tokenizer", "no-such-directory/at-all"],
        ["--tokenize-prompt", "--backend", "vllm-chat"], ["--tokenize-prompt"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_options_that_cannot_be(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fake_server() as server:
        address = [] if "--base-url" in arguments else ["--base-url", server.url]
        status = run_command(["bench", "serving", *address, *arguments])
    message = capsys.readouterr().err.strip()
    assert status == (1 if "--tokenizer" in arguments else 2)
    assert message.startswith("pippin: ")
    assert arguments[0] in message or "--dataset-path" in message or "no-such-directory" in message


def test_a_model_that_nobody_names(capsys: pytest.CaptureFixture[str]) -> None:
    with fake_server(Script(models=False)) as server:
        assert run_command(["bench", "serving", "--base-url", server.url, "--backend", "openai"]) == 2
    assert "--model" in capsys.readouterr().err


def test_a_key_that_is_missing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with fake_server(Script(key="sesame")) as server:
        assert run_command(["bench", "serving", "--base-url", server.url, "--backend", "openai"]) == 1
    assert "OPENAI_API_KEY" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_refused_before_the_run(tmp_path: Path) -> None:
    with fake_server() as server:
        status = run_command(["bench", "serving", "--base-url", server.url, "--output-file", str(tmp_path)])
    assert status == 2
    assert server.asked == []


def test_ctrl_c_gives_the_figures_so_far(tmp_path: Path) -> None:
    """Under SGLang's name for it."""
    file = tmp_path / "out.jsonl"
    with fake_server(Script("slow", healthy=3 + 2)) as server:
        command = [sys.executable, "-m", "pippin.bench_serving", "--base-url", server.url, "--backend", "vllm", *SMALL]
        command += ["--output-file", str(file), "--max-concurrency", "1"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        until(lambda: len(server.asked) == 6)  # the sixth comes when two of the run have ended
        process.send_signal(signal.SIGINT)
        _, shown = process.communicate(timeout=SECONDS)
    (result,) = read([file])
    assert process.returncode == 130
    assert (result.figures["completed"], result.figures["unfinished"]) == (2, 1)
    assert result.figures["stopped"] is True
    assert "stopped" in shown
    assert "Traceback" not in shown


def test_progress_says_what_goes_on() -> None:
    shown_on = io.StringIO()

    async def go() -> None:
        watch = Watch(total=5, done=2, failed=1, running=3, tokens=70)
        console = Console(file=shown_on, force_terminal=True, width=120)
        async with shown(watch, "at once 3", console, False):
            await asyncio.sleep(0.3)
        async with shown(watch, "unseen", console, True):
            pass

    asyncio.run(go())
    for text in ("at once 3", "2/5", "3 running", "tok/s", "1 failed"):
        assert text in shown_on.getvalue()
    assert "unseen" not in shown_on.getvalue()


# --- streams ---


@given(st.lists(st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]))), st.data())
def test_events_do_not_depend_on_how_bytes_arrive(texts: list[str], data: st.DataObject) -> None:
    lines = [json.dumps(text) for text in texts]
    ends = data.draw(st.sampled_from(["\n\n", "\r\n\r\n"]))
    stream = "".join(f": keep-alive{ends}id: 1\ndata: {line}{ends}" for line in lines).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=9)))
    parts = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    splitter = EventSplitter()
    found = [event.decode() for part in parts for event in splitter.feed(part)]
    assert found == lines


def test_events_of_each_kind() -> None:
    generate, completion, chat = Answer(), Answer(), Answer()
    read_generate({"text": "a", "meta_info": {"completion_tokens": 1, "prompt_tokens": 3}}, generate, 1.0)
    read_generate(
        {"text": "abc", "meta_info": {"completion_tokens": 3, "finish_reason": {"type": "stop"}}}, generate, 2.0
    )
    assert (generate.text, generate.counts, generate.output_tokens, generate.finished) == ("abc", [1, 2], 3, True)
    read_completions({"choices": [{"text": "a", "finish_reason": None}], "usage": None}, completion, 1.0)
    read_completions({"choices": [{"text": "", "finish_reason": "stop"}]}, completion, 2.0)
    usage = {"prompt_tokens": 4, "completion_tokens": 2, "prompt_tokens_details": None}
    read_completions({"choices": [], "usage": usage}, completion, 2.0)
    assert (completion.text, completion.arrivals, completion.output_tokens) == ("a", [1.0], 2)
    read_chat({"choices": [{"delta": {"role": "assistant", "content": ""}}]}, chat, 1.0)
    read_chat({"choices": [{"delta": {"reasoning_content": "hm", "content": None}}]}, chat, 2.0)
    read_chat({"choices": [{"delta": {"reasoning": "hm"}}]}, chat, 3.0)
    read_chat({"choices": [{"delta": {"content": "yes"}, "finish_reason": "stop"}]}, chat, 4.0)
    assert (chat.text, chat.arrivals, chat.finished) == ("hmhmyes", [2.0, 3.0, 4.0], True)
    aborted = {"text": "", "meta_info": {"finish_reason": {"type": "abort", "message": "gone"}}}
    read_generate(aborted, failed := Answer(), 1.0)
    assert (failed.error, failed.detail) == ("aborted", "gone")
    with pytest.raises(BadEvent):
        read_chat({"choices": "none"}, chat, 5.0)


# --- the real thing ---


def test_pippin_with_the_shipped_model(tmp_path: Path) -> None:
    """Over both of its APIs; groups of prompts that begin alike are found in the prefix cache."""
    file = tmp_path / "results.jsonl"
    common = ["--output-file", str(file), "--num-prompts", "4", "--random-input", "24", "--random-output", "8"]
    common += ["--random-range-ratio", "1", "--max-concurrency", "2"]
    groups = ["--dataset-name", "generated-shared-prefix", "--gsp-num-groups", "2", "--gsp-prompts-per-group", "3"]
    groups += ["--gsp-system-prompt-len", "96", "--gsp-question-len", "8", "--gsp-output-len", "4"]
    chats = ["--dataset-name", "multi-turn", "--num-turns", "2", "--think-time", "0.01"]
    with serving() as served:
        for arguments in (["--backend", "openai"], groups, ["--backend", "sglang-oai-chat", *chats]):
            assert run_command(["bench", "serving", "--base-url", served.url, *common, *arguments]) == 0
    plain, shared, chatted = read([file])
    assert {r.side for r in (plain, shared, chatted)} == {"pippin"}
    assert {r.figures["errors"] for r in (plain, shared, chatted)} == {0}
    assert plain.figures["completed"] == 4
    assert (shared.figures["completed"], shared.figures["total_output_tokens"]) == (6, 24)
    assert (chatted.figures["completed"], chatted.figures["total_output_tokens"]) == (8, 64)
    for result, least in ((shared, 0.3), (chatted, 0.2)):
        rate = result.figures["cache_hit_rate"]
        assert isinstance(rate, float)
        assert rate > least
    assert os.environ.get("HF_HUB_OFFLINE") == "1"  # a tokenizer is not looked for
