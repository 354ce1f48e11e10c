"""torch is installed where these tests run, and the engine gets along without it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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


def test_no_module_of_ours_names_torch_at_import() -> None:
    source = Path(__file__).parents[2] / "src" / "pippin"
    named = [
        file.name
        for file in source.rglob("*.py")
        if "torch" not in file.relative_to(source).parts
        and any(line.startswith(("import torch", "from torch")) for line in file.read_text().splitlines())
    ]
    assert named == []
