"""``make agents``: coding agents with the settings of docs/clients.md, and clients of npm against the shipped model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from pippin.client import EngineClient
from pippin.config import EngineConfig
from pippin.text.tokenizer import load_tokenizer
from tests.agents.acting import Part, acting
from tests.server.conftest import Running, serving
from tests.server.test_clients import PAGE, blocks

HERE = Path(__file__).resolve().parent
TOOLS = Path(os.environ.get("AGENTS", HERE.parents[1] / ".venv-agents"))
ADDRESS = "http://127.0.0.1:30000"
SECONDS = 240
ASK = "What does note.txt say?"
NOTE, WORD, ENDING = "A pippin is raised-from-seed.\n", "raised-from-seed", "It says that a pippin is raised from seed."
NEW = "A pippin is an apple.\n"
SILENT = {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}


def call(name: str, **arguments: str) -> Part:
    """A command by the agent's own tool, and an answer from its output."""
    line = f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"
    return Part(line, WORD, ENDING)


def settings(language: str) -> str:
    (text,) = (block for block in blocks(language) if ADDRESS in block)
    return text


def recipe(start: str) -> dict[str, str]:
    """The variables before a command of docs/clients.md."""
    (line,) = (line for line in PAGE.splitlines() if line.startswith(start))
    return dict(word.split("=", 1) for word in line.split() if "=" in word)


@dataclass(frozen=True)
class Agent:
    """``files`` of its settings by their place in the home directory; ``command`` asks one question and ends."""

    part: Part
    command: Sequence[str]
    files: Callable[[], Mapping[str, str]] = dict
    variables: Callable[[], Mapping[str, str]] = dict


AGENTS = {
    "claude": Agent(
        call("Bash", command="cat note.txt", description="Read the note"),
        ("node_modules/.bin/claude", "--model", "any", "-p", ASK, "--allowedTools", "Bash"),
        variables=lambda: recipe("ANTHROPIC_BASE_URL"),
    ),
    "codex": Agent(
        call("exec_command", cmd="cat note.txt"),
        ("node_modules/.bin/codex", "exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", ASK),
        files=lambda: {".codex/config.toml": settings("toml")},
    ),
    "opencode": Agent(
        call("bash", command="cat note.txt", description="Read the note"),
        ("node_modules/.bin/opencode", "run", "--model", "pippin/any", ASK),
        files=lambda: {"work/opencode.json": settings("json")},
    ),
    "aider": Agent(
        Part(f"note.txt\n```\n{NEW}```\n", found="nothing of the kind", ending="", anywhere=True),
        ("bin/aider", "--model", "openai/any", "--yes-always", "--no-git", "--no-check-update", "--analytics-disable",
         "--no-show-model-warnings", "--message", "Say it in other words.", "note.txt"),
        variables=lambda: recipe("OPENAI_API_BASE"),
    ),
}  # fmt: skip


def program(name: str) -> str:
    path = TOOLS / name
    if not path.exists():
        pytest.skip(f"{path} is not there: scripts/setup.sh agents (what comes from npm needs Node.js)")
    return str(path)


@pytest.mark.parametrize("name", AGENTS)
def test_an_agent_works_with_its_settings(name: str, tmp_path: Path) -> None:
    agent = AGENTS[name]
    command = [program(agent.command[0]), *agent.command[1:]]
    work = tmp_path / "work"
    with acting(agent.part) as server:
        for place, text in ({"work/note.txt": NOTE} | dict(agent.files())).items():
            (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / place).write_text(text.replace(ADDRESS, server.url))
        given = {n: value.replace(ADDRESS, server.url) for n, value in agent.variables().items()}
        env = {n: value for n, value in os.environ.items() if n in ("PATH", "LANG", "TERM")} | SILENT | given
        done = subprocess.run(
            command, cwd=work, env=env | {"HOME": str(tmp_path), "PWD": str(work)}, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, check=False, timeout=SECONDS,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    if agent.part.ending:
        assert ENDING in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]
        assert (work / "note.txt").read_text() == NOTE
    else:
        assert (work / "note.txt").read_text() == NEW


@pytest.fixture(scope="module")
def shipped() -> Iterator[Running]:
    config = EngineConfig(device="cpu", max_total_tokens=6000, random_seed=1)
    with serving(make_client=lambda core: EngineClient.spawn(config), tokenizer=load_tokenizer(None)) as running:
        yield running


@pytest.mark.parametrize("script", sorted(path.stem for path in HERE.glob("with_*.mjs")))
def test_a_client_of_npm_works(shipped: Running, script: str) -> None:
    program("node_modules/openai")
    node = shutil.which("node")
    assert node is not None
    for path in HERE.glob("*.mjs"):  # Node looks for packages beside the file, not where it is called
        shutil.copy(path, TOOLS)
    done = subprocess.run(
        [node, str(TOOLS / f"{script}.mjs"), shipped.url], capture_output=True, text=True, check=False, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr[-4000:]
