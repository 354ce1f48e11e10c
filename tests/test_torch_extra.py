"""What is to be had without PyTorch: no import of it, errors that name the extra, streams for MPS."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from pippin.cli import run_command
from pippin.config import EngineConfig
from pippin.errors import ConfigError
from pippin.loading import load_core
from pippin.torch import require_torch
from pippin.torch.mps import Stream, add_streams

COLD = """
import sys
sys.modules["torch"] = None  # importing it raises
import pippin.torch, pippin.worker, pippin.cli
from pippin.loading import load_core
from pippin.config import EngineConfig
from pippin.messages import Submit
from pippin.types import SamplingParams
core = load_core(EngineConfig(max_total_tokens=64))
core.add(Submit("a", [5, 6, 7], 3, SamplingParams(max_new_tokens=2)))
while core.has_work:
    core.step()
print(*[m for m in sys.modules if m.startswith("pippin.torch.")])
"""


def test_the_engine_loads_and_runs_where_torch_cannot_be_imported() -> None:
    done = subprocess.run([sys.executable, "-c", COLD], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pippin.torch.find_spec", lambda name: None)


@pytest.mark.usefixtures("no_torch")
@pytest.mark.parametrize("device", ["torch", "torch:cpu", "torch:cuda", "torch:mps"])
def test_a_torch_device_without_torch_names_the_extra(device: str) -> None:
    with pytest.raises(ConfigError, match=r"--device: .*pip install 'pippin\[torch\]'"):
        load_core(EngineConfig(device=device))


@pytest.mark.usefixtures("no_torch")
def test_the_command_line_says_so_and_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["generate", "--device", "torch", "Hello"]) == 2
    assert "pip install 'pippin[torch]'" in capsys.readouterr().err


def test_what_is_installed_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pippin.torch.find_spec", lambda name: object())
    require_torch("--device")


# --- streams for MPS, on a fake of torch.mps ---


class Event:
    def __init__(self) -> None:
        self.recorded = 0

    def record(self) -> None:
        self.recorded += 1


class Mps(SimpleNamespace):
    """The part of torch.mps that is there: one queue to wait for, and events."""

    def __init__(self, **more: object) -> None:
        super().__init__(waits=0, event=SimpleNamespace(Event=Event), **more)

    def synchronize(self) -> None:
        self.waits += 1


def test_streams_are_added_where_there_are_none() -> None:
    mps = Mps()
    assert set(add_streams(mps)) == {
        "Stream", "StreamContext", "stream", "current_stream", "default_stream", "set_stream",
    }  # fmt: skip
    assert add_streams(mps) == ()


def test_what_torch_has_of_its_own_stays() -> None:
    own = object()
    mps = Mps(Stream=own)
    assert "Stream" not in add_streams(mps)
    assert mps.Stream is own


def test_code_written_for_cuda_streams_runs_and_waits_for_the_one_queue() -> None:
    mps = Mps()
    add_streams(mps)
    side = mps.Stream("mps", priority=-1)
    side.wait_stream(mps.current_stream())
    with mps.stream(side) as inside, mps.StreamContext(None) as nothing:
        assert inside is side
        assert nothing is None
        event = side.record_event()
        assert event.recorded == 1
        assert side.record_event(event) is event
        assert event.recorded == 2
    mps.current_stream("mps").wait_event(event)
    assert mps.waits == 0, "nothing so far needs the host to wait"
    side.synchronize()
    assert side.query()
    assert mps.waits == 2
    assert side == mps.current_stream() == mps.default_stream()
    assert len({side, mps.current_stream()}) == 1
    assert isinstance(side, Stream)
    assert mps.set_stream(side) is None
