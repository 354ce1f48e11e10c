"""The command line: options, errors in one line, chat, and a server that starts and stops."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

import pippin
from pippin.catalogue import UNTRIED
from pippin.cli import run_command, serve_from_args
from pippin.client import EngineClient
from pippin.config import EngineConfig, SamplingOptions, ServerConfig, flag_of
from pippin.engine import Engine
from pippin.messages import Progress
from pippin.terminal import Conversation, LoadingBar, ready, summary
from pippin.types import SamplingParams
from tests.checkpoints import make_checkpoint
from tests.fake_core import FakeCore, fake_info
from tests.tokenizers_for_tests import byte_ids, chat_tokenizer
from tests.waiting import SECONDS, until

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model that knows how to chat, if not what about."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = chat_tokenizer()
    make_checkpoint(path, "qwen3", vocab_size=len(tokenizer), eos_token_id=2)
    tokenizer.save_pretrained(path)
    return path


Lines = pytest.CaptureFixture[str]


def last_error(capsys: Lines) -> str:
    """What was said on stderr, which must be one line, and no traceback."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    return captured.err.strip()


# --- options ---


def test_help_lists_every_option_of_serve(capsys: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run_command(["serve", "--help"]) == 0
    text = capsys.readouterr().out
    for cls in (EngineConfig, ServerConfig):
        for field in dataclasses.fields(cls):
            assert flag_of(field.name) in text
            assert not field.metadata["flag"] or field.metadata["flag"] in text
            assert field.metadata["help"].split()[0] in text


def test_options_reach_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    import pippin.server.launch

    seen: list[object] = []
    monkeypatch.setattr(pippin.server.launch, "run", lambda engine, server, *_: seen.extend([engine, server]))
    arguments = "--model some/path --page-size 4 --mem-fraction-static 0.5 --trust-remote-code --dtype float16 --port 1"
    assert serve_from_args(arguments.split()) == 0
    assert seen == [
        EngineConfig(
            model_path="some/path", page_size=4, mem_fraction_static=0.5, trust_remote_code=True, dtype="float16"
        ),
        ServerConfig(port=1),
    ]
    assert run_command(["serve"]) == 0
    assert seen[2:] == [EngineConfig(), ServerConfig()]
    assert run_command(["serve", "some/path", "--port", "1"]) == 0
    assert seen[4:] == [EngineConfig(model_path="some/path"), ServerConfig(port=1)]


def test_sampling_options_are_sampling_params() -> None:
    names = {f.name for f in dataclasses.fields(SamplingOptions)}
    assert names <= set(SamplingParams.__struct_fields__)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("serve --page-siz 3", "--page-size"),
        ("serve --page-size -1", "--page-size: must be at least 0, not -1"),
        ("serve --page-size x", "--page-size"),
        ("serve --page-size", "--page-size"),
        ("serve --dtype int3", "float32"),
        ("serve --port 99999", "--port: must be between 0 and 65535"),
        ("serve --chat-template nowhere.jinja", "--chat-template: nowhere.jinja"),
        ("serve --tensor-parallel 2", "--tensor-parallel"),
        ("serve some/path stray", "stray"),
        ("serve some/path --model-path other/path", "--model-path: there is MODEL some/path too"),
        ("generate x --mem-fraction-static 2", "--mem-fraction-static"),
        ("chat --chat-template nowhere.jinja", "--chat-template: nowhere.jinja"),
        ("serv", "serve"),
        ("--colour", "--colour"),
        ("serve --device cuda", "'--device': 'cuda' is not one of 'auto', 'cpu'"),
        ("chat --temperature -1", "--temperature: temperature must be between 0"),
        ("generate x --top-p 0", "--top-p: top_p must be above 0"),
    ],
)
def test_wrong_options_are_one_line_and_status_2(arguments: str, said: str, capsys: Lines) -> None:
    assert run_command(arguments.split()) == 2
    assert said in last_error(capsys)


@pytest.mark.parametrize("command", [["generate", "x"], ["chat"]])
def test_a_missing_model_is_one_line_and_status_1(command: list[str], tmp_path: Path, capsys: Lines) -> None:
    path = tmp_path / "nothing-here"
    path.mkdir()
    assert run_command([*command, "--model", str(path)]) == 1
    assert str(path) in last_error(capsys)


@pytest.mark.parametrize("command", ["chat", "check"])
def test_a_model_needs_no_flag(command: str, tmp_path: Path, capsys: Lines) -> None:
    path = tmp_path / "nothing-here"
    path.mkdir()
    assert run_command([command, str(path)]) == 1
    assert str(path) in last_error(capsys)


def test_no_arguments_show_help(capsys: Lines) -> None:
    run_command([])
    captured = capsys.readouterr()
    assert "serve" in captured.out + captured.err


def test_version_and_env(capsys: Lines) -> None:
    for asked in ("version", "--version"):
        assert run_command([asked]) == 0
        assert capsys.readouterr().out.strip() == pippin.__version__
    assert run_command(["env"]) == 0
    text = capsys.readouterr().out
    for name in ("pippin", "python", "mlx ", "device", "memory", "attention backends"):
        assert re.search(rf"^{name}", text, re.M), name


def test_an_architecture_that_nobody_tried_is_not_called_refused(capsys: Lines) -> None:
    assert run_command(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("refused: " in line for line in lines)
    assert any(UNTRIED in line for line in lines)
    assert not any("refused: " in line and UNTRIED in line for line in lines)


# --- generate and chat ---


def test_generate_prints_the_answer(checkpoint: Path, capsys: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--model", str(checkpoint), "--max-new-tokens", "8", "--temperature", "0"]
    assert run_command(["generate", "Hello world", *options]) == 0
    printed = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello world"))
    assert run_command(["generate", *options]) == 0
    assert capsys.readouterr().out == printed
    with Engine(str(checkpoint)) as engine:
        answer = engine.generate("Hello world", {"max_new_tokens": 8, "temperature": 0})
    assert printed == answer["text"] + "\n"


def test_chat_without_a_terminal(checkpoint: Path, capsys: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n\n/exit\nnever read\n"))
    assert run_command(["chat", "--model", str(checkpoint), "--max-new-tokens", "5", "--temperature", "0"]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("prompt tokens cached") == 1
    assert captured.out.endswith("\n")


def test_a_chat_without_a_terminal_ends_with_2_where_a_line_was_refused(
    checkpoint: Path, capsys: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("x" * 5000 + "\nHello\n"))
    assert run_command(["chat", "--model", str(checkpoint), "--max-new-tokens", "5"]) == 2
    captured = capsys.readouterr()
    assert "/reset starts over" in captured.err
    assert captured.err.count("prompt tokens cached") == 1


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_tokenizer_is_one_line_and_status_1(
    file: str, checkpoint: Path, tmp_path: Path, capsys: Lines
) -> None:
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    (broken / file).write_text("{]")
    assert run_command(["generate", "x", "--model", str(broken)]) == 1
    assert f"{broken}: tokenizer.json or tokenizer_config.json can't be read" in last_error(capsys)


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine.over(EngineClient.in_thread(lambda progress: FakeCore(0.002)), byte_ids()) as made:
        yield made


def talk(engine: Engine, said: str, monkeypatch: pytest.MonkeyPatch, tokens: int = 4) -> tuple[Conversation, str]:
    """A conversation after these lines, and what it printed."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(said))
    conversation, out = Conversation(engine, {"temperature": 0, "max_new_tokens": tokens}), io.StringIO()
    conversation.run(out)
    return conversation, out.getvalue()


def test_turns_are_remembered_until_reset(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation, out = talk(engine, "one\ntwo\n", monkeypatch)
    assert [m["role"] for m in conversation.messages] == ["user", "assistant"] * 2
    assert [m["content"] for m in conversation.messages if m["role"] == "assistant"] == out.split()
    assert talk(engine, "one\n/reset\n", monkeypatch)[0].messages == []
    told, _ = talk(engine, "one\n/system Be brief.\ntwo\n/reset\n", monkeypatch)
    assert told.messages == [{"role": "system", "content": "Be brief."}]


def test_commands_that_answer(engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: Lines) -> None:
    talk(engine, "/help\n/dance\n/exit\nnever\n", monkeypatch)
    text = capsys.readouterr().err
    assert "/system TEXT" in text
    assert "/dance is no command" in text


def test_ctrl_c_stops_the_answer_and_not_the_chat(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    monkeypatch.setattr(sys, "stdin", io.StringIO("tell me\n/exit\n"))
    out = io.StringIO()
    conversation = Conversation(engine, {"temperature": 0, "max_new_tokens": 3000})
    conversation.run(out)
    assert [m["role"] for m in conversation.messages] == ["user", "assistant"]
    assert 0 < len(conversation.messages[1]["content"]) < 3000
    assert out.getvalue() == conversation.messages[1]["content"] + "\n"


def test_a_prompt_too_long_does_not_end_the_chat(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: Lines
) -> None:
    conversation, _ = talk(engine, "x" * 5000 + "\nshort\n", monkeypatch)
    assert "/reset starts over" in capsys.readouterr().err
    assert [m["content"] for m in conversation.messages if m["role"] == "user"] == ["short"]


def test_summary_of_an_answer_stopped_at_once() -> None:
    assert summary({}, 0.0) == "stopped"


def test_chat_in_a_terminal(checkpoint: Path) -> None:
    """Line editing, Ctrl-C at the prompt, Ctrl-D to leave."""
    parent, child = pty.openpty()
    command = [sys.executable, "-m", "pippin", "chat", "--model", str(checkpoint), "--max-new-tokens", "5"]
    process = subprocess.Popen(command, stdin=child, stdout=child, stderr=child, start_new_session=True, cwd=ROOT)
    os.close(child)
    seen = ""

    def until(text: str, again: Callable[[], None] = lambda: None) -> None:
        """Reads until the text is seen, doing something again and again meanwhile."""
        nonlocal seen
        deadline = time.monotonic() + SECONDS
        while text not in seen:
            assert time.monotonic() < deadline, seen
            if select.select([parent], [], [], 0.3)[0]:
                seen += os.read(parent, 4096).decode(errors="replace")
            else:
                again()
        seen = seen[seen.index(text) + len(text) :]

    try:
        until("> ")
        os.write(parent, b"hello\n")
        until("prompt tokens cached")
        until("> ")
        # Readline misses a signal that comes between its prompt and its waiting for a key.
        until("leaves", lambda: process.send_signal(signal.SIGINT))
        until("> ")
        os.write(parent, b"\x04")
        assert process.wait(SECONDS) == 0
    finally:
        process.kill()
        process.wait()
        os.close(parent)


def test_loading_bar_takes_events_without_a_terminal(capsys: Lines) -> None:
    with LoadingBar() as bar:
        bar(Progress("load", 1, 2))
    assert capsys.readouterr().err == ""


# --- serve ---


def test_ready_says_where_what_and_how_to_try() -> None:
    text = ready(fake_info("it's/mine"), "http://127.0.0.1:1", None, True, False)
    assert "Chat and dashboard" not in text
    assert "http://127.0.0.1:1" in text.splitlines()[0]
    assert "Authorization: Bearer $API_KEY" in text
    info = msgspec.structs.replace(fake_info(), pool_bytes=2**30, budget_bytes=2**32, device_bytes=2**33)
    assert "KV cache, 100000 slots" in (text := ready(info, "http://127.0.0.1:1", None, False, True))
    assert re.search(r"the budget +4096 MiB of 8192 MiB", text)


@pytest.mark.parametrize(
    ("url", "page"),
    [
        ("http://127.0.0.1:1", "http://127.0.0.1:1/"),
        ("http://10.0.0.7:1", "http://10.0.0.7:1/"),
        ("http://0.0.0.0:1", "http://127.0.0.1:1/"),
        ("http://[::]:1", "http://[::1]:1/"),
    ],
)
def test_ready_says_where_the_page_is(url: str, page: str) -> None:
    assert ready(fake_info(), url, None, False, True).splitlines()[-1] == f"Chat and dashboard: {page}"


def processor_seconds() -> float:
    """Of all that this process has started and seen end."""
    times = os.times()
    return times.children_user + times.children_system


def test_serve_starts_answers_its_own_curl_line_and_stops(checkpoint: Path) -> None:
    command = [sys.executable, "-m", "pippin.launch_server", "--model-path", str(checkpoint), "--port", "0"]
    environment = os.environ | {"SGLANG_USE_MLX": "1"}
    before = processor_seconds()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline()]
        while not lines[-1].startswith("Try: "):
            lines.append(process.stdout.readline())
            assert lines[-1]
        page = process.stdout.readline().removeprefix("Chat and dashboard: ").strip()
        assert re.match(r"Pippin serves .* at http://127\.0\.0\.1:\d+$", lines[0]), lines
        curl = lines[-1].removeprefix("Try: ")
        if shutil.which("curl"):
            done = subprocess.run(
                ["sh", "-c", curl.replace("curl", "curl -s", 1)], capture_output=True, timeout=SECONDS
            )
            assert json.loads(done.stdout)["choices"][0]["message"]["role"] == "assistant"
        with urllib.request.urlopen(page, timeout=SECONDS) as response:
            assert b"<title>" in response.read()
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == 0
        assert processor_seconds() - before < 30  # it takes 2 s on an idle machine
    finally:
        process.kill()
        _, err = process.communicate()
    assert "Traceback" not in err


def test_a_dry_run_prints_the_budget_and_exits(checkpoint: Path) -> None:
    command = [sys.executable, "-m", "pippin", "serve", "--model-path", str(checkpoint), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert (done.returncode, done.stderr) == (0, "")
    for part in ("weights", "KV cache, ", "activations of the largest step, measured", "together", "the budget"):
        assert re.search(rf"^  {part}.* +\d+ MiB", done.stdout, re.M), part
    refused = subprocess.run(
        [*command, "--max-total-tokens", "99999999999"], capture_output=True, text=True, timeout=SECONDS
    )
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "--max-total-tokens: 99999999999 slots take" in refused.stderr


def has_worked(pid: int, seconds: float) -> bool:
    """Whether a process has had so much of a processor's time: how far it is, however busy the machine."""
    if sys.platform != "linux":
        time.sleep(seconds)
        return True
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") >= seconds


def test_ctrl_c_during_imports_is_no_traceback() -> None:
    """At any moment from the first import to the first line of the server."""
    command = [sys.executable, "-m", "pippin.launch_server", "--port", "0", "--log-level", "error"]
    for delay in (0.15, 0.4, 0.8, 1.5):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        until(lambda: has_worked(process.pid, delay))  # noqa: B023
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=SECONDS)
        assert "Traceback" not in err, err
        assert process.returncode in (0, 130, -signal.SIGINT)


def test_serve_fails_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pippin", "serve", "--model-path", str(tmp_path), "--port", "0"]
    done = subprocess.run([*command, "--log-level", "error"], capture_output=True, text=True, timeout=SECONDS)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("pippin: ")
    assert done.stderr.count("\n") == 1
    assert str(tmp_path) in done.stderr
