"""The examples run as they are, against the shipped model."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name: str, *arguments: str, **environment: str) -> str:
    """What an example prints; it must succeed, and say nothing on stderr."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_every_example_is_here() -> None:
    named = set(re.findall(r'"(\w+\.py)"', Path(__file__).read_text()))
    assert {path.name for path in EXAMPLES.glob("*.py")} == named


def test_generate() -> None:
    lines = run("generate.py").splitlines()
    assert "42" in lines[lines.index("What is 12 + 30?") + 1]


def test_stream() -> None:
    text = run("stream.py", "What is 12 + 30?")
    assert re.search(r"\S.*\(\d+ tokens\)\n$", text, re.S)


def test_chat_with_cache() -> None:
    """Later turns read only what is new: the prompt before, and the answer to it, are cached."""
    found = re.findall(r"\((\d+) of (\d+) prompt tokens", run("chat_with_cache.py"))
    counts = [(int(cached), int(prompt)) for cached, prompt in found]
    assert len(counts) == 3
    assert counts[0][0] == 0
    for (_, before), (cached, prompt) in pairwise(counts):
        assert before < cached < prompt


def test_openai_client() -> None:
    command = [sys.executable, "-m", "pippin", "serve", "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().split()[-1]
        text = run("openai_client.py", OPENAI_BASE_URL=f"{url}/v1")
        assert re.search(r"42.*\n\d+ tokens in, \d+ out\n$", text, re.S)
        server.send_signal(signal.SIGINT)
        assert server.wait(100) == 0
    finally:
        server.kill()
        server.communicate()
