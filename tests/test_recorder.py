"""What a process worked on can be read when it is dead."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pippin.recorder import ENTRY, Record, Recorder


def test_the_last_two_steps_are_told_and_what_is_being_taken_in_comes_first(tmp_path: Path) -> None:
    record = Record(tmp_path / "record")
    assert record.read() is None
    recorder = Recorder(tmp_path / "record")
    recorder.step(["a"])
    assert record.read() == frozenset({"a"})
    recorder.step(["b", "ü\n"])
    assert record.read() == frozenset({"a", "b", "ü\n"})
    recorder.step(["c"])
    assert record.read() == frozenset({"b", "c", "ü\n"})
    recorder.take_in("d")
    assert record.read() == frozenset({"d"})
    recorder.take_in()
    assert record.read() == frozenset({"b", "c", "ü\n"})
    record.close()


def test_a_step_that_does_not_fit_makes_the_record_say_nothing(tmp_path: Path) -> None:
    record = Record(tmp_path / "record")
    recorder = Recorder(tmp_path / "record")
    recorder.step(["a"])
    recorder.step(["b" * ENTRY])
    assert record.read() is None
    recorder.step(["c"])
    recorder.step(["d"])
    assert record.read() == frozenset({"c", "d"})


def test_it_outlives_the_process_and_its_name(tmp_path: Path) -> None:
    record = Record(tmp_path / "record")
    code = (
        "import os, sys; from pathlib import Path; from pippin.recorder import Recorder;"
        "recorder = Recorder(Path(sys.argv[1])); os.remove(sys.argv[1]); recorder.step(['x']); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "record")], check=False, timeout=30)
    assert not (tmp_path / "record").exists()
    assert record.read() == frozenset({"x"})
