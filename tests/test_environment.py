"""What ``pippin env`` prints, with MLX and without; what is missing comes with how to get it."""

from __future__ import annotations

import json
import subprocess
import sys

import mlx.core as mx
import pytest

from pippin import __version__, environment
from pippin.backend import NoBackendError
from pippin.cli import run_command

DEPENDENCIES = {"mlx", "mlx-lm", "transformers", "fastapi", "torch", "pytest"}


def feature(name: str) -> environment.Feature:
    (found,) = [f for f in environment.features() if name in f.name]
    return found


def test_says_what_is_installed_and_where_it_runs() -> None:
    facts = environment.describe()
    assert facts.system["pippin"] == __version__
    assert facts.packages["mlx"][0].isdigit()
    assert facts.packages.keys() >= DEPENDENCIES
    assert float(facts.device["usable memory"].removesuffix(" GiB")) > 0
    assert float(facts.system["memory"].removesuffix(" GiB")) >= float(facts.device["usable memory"].split()[0])
    assert "rows" in facts.device["attention backends"]


def test_without_a_backend_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare() -> None:
        raise NoBackendError("install pippin[cpu]")

    monkeypatch.setattr(environment, "prepare", prepare)
    facts = environment.describe()
    assert facts.device == {"device": "none: install pippin[cpu]"}
    (gpu, *_) = facts.features
    assert (gpu.ready, gpu.mend) == (False, "install pippin[cpu]")


def test_a_package_that_is_not_there_says_how_to_get_it() -> None:
    assert environment.package_version("no-such-package-anywhere") == "not installed"
    assert "pip install 'pippin[torch]'" in environment.package_version("no-such-package-anywhere", "torch")


@pytest.mark.skipif(mx.default_device() == mx.Device(mx.gpu), reason="this machine has a GPU that MLX uses")
def test_a_gpu_that_mlx_cannot_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: "/bin/nvidia-smi" if name == "nvidia-smi" else None)
    assert "pippin[cuda13]" in feature("models on a GPU").mend
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert feature("models on a GPU").mend == ""
    assert "g++" in feature("GPU kernels run").mend


def test_captures_need_a_mac_and_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    assert "Mac" in feature("Metal captures").detail
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.delenv("MTL_CAPTURE_ENABLED", raising=False)
    assert "MTL_CAPTURE_ENABLED=1" in feature("Metal captures").mend
    monkeypatch.setenv("MTL_CAPTURE_ENABLED", "1")
    assert feature("Metal captures").ready


def test_every_missing_feature_is_explained() -> None:
    for found in environment.features():
        assert found.detail
        assert not (found.ready and found.mend)


def test_a_tool_that_hangs_fails_or_is_not_there_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment._said(["pippin-has-no-such-program"]) is None
    assert environment._said(["sh", "-c", "echo no; exit 1"]) is None
    assert environment._said(["sh", "-c", "echo yes"]) == "yes"


def test_the_command_prints_text_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["env"]) == 0
    text = capsys.readouterr().out
    assert run_command(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"system", "device", "packages", "features"}
    for section in ("system", "packages"):
        assert all(value in text for value in found[section].values())
    assert all(f["name"] in text and f["mend"] in text for f in found["features"])


def test_it_runs_under_sglangs_name() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pippin.check_env", "--json"], capture_output=True, text=True, check=True, timeout=60
    )
    assert json.loads(done.stdout)["system"]["pippin"] == __version__
