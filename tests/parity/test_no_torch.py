"""torch is installed where these tests run, and the engine gets along without it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from pippin.client import EngineClient
from pippin.config import EngineConfig
from pippin.transport import ProcessTransport
from tests.checkpoints import make_checkpoint

RUN = """
import sys
sys.modules["torch"] = None  # importing it raises
from pathlib import Path
from tests.parity.engine import Engine
engine = Engine(Path(sys.argv[1]))
(request,) = engine.requests([5, 6, 7])
print(engine.logits((request, 0, 3)).shape)
"""


def test_engine_runs_where_torch_cannot_be_imported(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "qwen3")
    done = subprocess.run([sys.executable, "-c", RUN, path], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "(1, 288)\n", done.stderr


LEFT_OUT = """
import sys
from pippin.backend import leave_torch_out
leave_torch_out()
from pippin.loading import load_core
from pippin.config import EngineConfig
from pippin.demo import demo_model_path
from pippin.text.tokenizer import load_tokenizer
load_core(EngineConfig(max_total_tokens=64))
load_tokenizer(str(demo_model_path()))
print("torch" in sys.modules)
import torch
print(torch.ones(2).sum().item())
"""


def test_torch_is_left_out_by_transformers_too_and_still_there_for_who_asks() -> None:
    done = subprocess.run([sys.executable, "-c", LEFT_OUT], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "False\n2.0\n", done.stderr


def test_the_command_line_does_not_import_it_for_mlx() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "pippin", "generate", "--max-tokens", "2", "a"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    names = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "transformers" in names
    assert "torch" not in names


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize(("device", "imported"), [("auto", False), ("torch:cpu", True)])
def test_the_engines_process_imports_torch_only_for_its_devices(device: str, imported: bool) -> None:
    async def mapped() -> bool:
        transport = ProcessTransport(EngineConfig(device=device, max_total_tokens=64))
        client = EngineClient(transport)
        try:
            assert (await client.start()).device.startswith("torch") == imported
            return "libtorch" in Path(f"/proc/{transport.pid}/maps").read_text()
        finally:
            await client.close()

    assert asyncio.run(mapped()) == imported


def test_no_module_of_ours_names_torch_at_import() -> None:
    source = Path(__file__).parents[2] / "src" / "pippin"
    named = [
        file.name
        for file in source.rglob("*.py")
        if "torch" not in file.relative_to(source).parts
        and any(line.startswith(("import torch", "from torch")) for line in file.read_text().splitlines())
    ]
    assert named == []
