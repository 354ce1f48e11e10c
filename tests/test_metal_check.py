"""``make metal-check``: one report, whatever becomes of its parts."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import metal_check
import mlx.core as mx
import pytest
from metal_check import Done, Part, examine, report

RESULT = {"side": "pippin", "settings": {}, "figures": {"prompts": 5, "equal": 5}}


class Machine:
    """Answers each command by the first of its words that it knows."""

    def __init__(self, **answers: Done) -> None:
        self.commands: list[list[str]] = []
        self.environments: list[dict[str, str]] = []
        self._answers = answers

    def __call__(self, command: Sequence[str], environment: dict[str, str], seconds: float) -> Done:
        self.commands.append(list(command))
        self.environments.append(environment)
        return next((a for word, a in self._answers.items() if any(word in c for c in command)), Done(0, "{}", ""))


def well() -> dict[str, Done]:
    line = Done(0, json.dumps(RESULT) + "\n", "a table\n")
    return {"one-batch": line, "bench": line, "kernels": Done(0, "ok   kv_write\n1 checks, 0 failed\n", "")}


def checked(machine: Machine, metal: bool = True) -> dict[str, Any]:
    return report(metal_check.parts(None), machine, metal, lambda line: None)


def test_a_mac_where_all_is_well() -> None:
    machine = Machine(**well())
    found = checked(machine)
    assert found["ok"]
    assert {p["status"] for p in found["parts"].values()} == {"ok"}
    assert list(found["parts"]) == [part.name for part in metal_check.parts(None)]
    assert found["parts"]["speed"]["detail"] == [RESULT]
    assert json.loads(json.dumps(found)) == found
    assert {"MTL_CAPTURE_ENABLED": "1"} in machine.environments


def test_elsewhere_metals_parts_do_not_apply_and_are_not_run() -> None:
    machine = Machine(**well())
    found = checked(machine, metal=False)
    assert found["ok"]
    assert {n for n, p in found["parts"].items() if p["status"] == "does not apply"} == {
        "capture",
        "build",
        "kernels, built",
    }
    assert not any("build" in c or "capture" in c for c in machine.commands)


@pytest.mark.parametrize(
    ("word", "answer", "part", "status"),
    [
        ("kernels", Done(1, "FAIL extend\n1 checks, 1 failed\n", ""), "kernels", "failed"),
        ("kernels", Done(-6, "", "Command buffer execution failed\nabort"), "kernels", "failed"),
        ("one-batch", Done(None, "", "still loading"), "speed", "timed out"),
        ("one-batch", Done(0, "nothing\n", ""), "speed", "failed"),
        ("check_env", Done(0, "not json", ""), "environment", "failed"),
        (
            "one-batch",
            Done(0, json.dumps(RESULT | {"figures": {"prompts": 5, "equal": 4}}), ""),
            "parity float32",
            "failed",
        ),
    ],
)
def test_what_goes_wrong_is_in_the_report_and_the_rest_goes_on(word: str, answer: Done, part: str, status: str) -> None:
    found = checked(Machine(**{word: answer, **{k: v for k, v in well().items() if k != word}}))
    assert not found["ok"]
    assert found["parts"][part]["status"] == status
    if answer.errors:
        assert answer.errors in found["parts"][part]["said"]
    assert len(found["parts"]) == len(metal_check.parts(None))


def test_a_mac_without_a_metal_compiler_is_no_failure() -> None:
    lacks = "pippin: kernels can't be built here: no Metal compiler: install Xcode"
    found = checked(Machine(**{"build": Done(1, "", lacks), **well()}))
    assert found["ok"]
    assert (found["parts"]["build"]["status"], found["parts"]["build"]["said"]) == ("does not apply", lacks)
    assert not checked(Machine(**{"build": Done(1, "", "clang++ went wrong"), **well()}))["ok"]


def test_a_model_is_passed_on() -> None:
    for part in metal_check.parts("some/model"):
        assert ("some/model" in part.command) == (part.name in ("parity float32", "overlap", "speed", "build"))


def test_a_part_that_hangs_is_ended() -> None:
    part = Part("hangs", ("-c", "import time; print('begun', flush=True); time.sleep(60)"), metal_check.text, 1.5)
    found = examine(part, metal_check.run_process, False)
    assert found.status == "timed out"
    assert found.seconds < 20
    crash = replace(part, command=("-c", "import os; os.abort()"))
    assert examine(crash, metal_check.run_process, False).status == "failed"


def test_the_report_of_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The short parts for real; those that need Metal where it is."""
    target = tmp_path / "report.json"
    assert metal_check.main(["--output", str(target), "--only", "environment", "overlap", "capture"]) == 0
    found = json.loads(target.read_text())
    assert found["metal"] == mx.metal.is_available()
    assert found["parts"]["environment"]["detail"]["system"]["pippin"]
    assert found["parts"]["overlap"]["detail"]["equal"] is True
    assert found["parts"]["capture"]["status"] == ("ok" if found["metal"] else "does not apply")
    assert str(target) in capsys.readouterr().out


def test_an_unknown_part_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        metal_check.main(["--only", "nonsense"])
    assert stop.value.code == 2
    assert "nonsense" in capsys.readouterr().err


def test_answers_that_differ_with_overlap_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    class Engine:
        def __init__(self, model: str | None, disable_overlap_schedule: bool) -> None:
            self._off = disable_overlap_schedule

        def __enter__(self) -> Engine:
            return self

        def __exit__(self, *exception: object) -> None:
            pass

        def flush_cache(self) -> None:
            pass

        def generate(self, prompts: list[str], options: dict[str, Any]) -> list[dict[str, Any]]:
            return [{"output_ids": [1, int(self._off)]} for _ in prompts]

    monkeypatch.setattr("pippin.Engine", Engine)
    with pytest.raises(ValueError, match="answers differ"):
        metal_check.overlap(None)


def test_every_command_runs_this_interpreter() -> None:
    machine = Machine(**well())
    checked(machine)
    assert all(command[0] == sys.executable for command in machine.commands)
