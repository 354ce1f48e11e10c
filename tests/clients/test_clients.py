"""``make clients``: libraries that need an environment of their own, each as a program against the shipped model."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pippin.client import EngineClient
from pippin.config import EngineConfig
from pippin.text.tokenizer import load_tokenizer
from tests.server.conftest import Running, serving

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PYTHON = Path(os.environ.get("CLIENTS_PYTHON", ROOT / ".venv-clients" / "bin" / "python"))
OFFLINE = {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    config = EngineConfig(device="cpu", max_total_tokens=6000, random_seed=1)
    with serving(make_client=lambda core: EngineClient.spawn(config), tokenizer=load_tokenizer(None)) as running:
        yield running


@pytest.mark.parametrize("program", sorted(path.stem for path in HERE.glob("with_*.py")))
def test_a_client_works(server: Running, program: str) -> None:
    done = subprocess.run(
        [str(PYTHON), "-m", f"tests.clients.{program}", server.url],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | OFFLINE,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
