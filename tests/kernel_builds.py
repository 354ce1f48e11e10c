"""What tests of kernel builds share: a toolchain that only notes its commands, compilers and devices that are none."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from pippin.kernels import checks, paged
from pippin.kernels.build import metal, prebuilt, store, toolchain
from pippin.kernels.build.shapes import ModelShape
from pippin.kernels.build.toolchain import Machine, Result
from pippin.kernels.launch import Launch

SMALL = ModelShape(8, 2, 64, 64)
MATRIX = paged.Tuning(matrix=True)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.platform", "linux")
    return tmp_path / "cache" / "pippin"


def said_by(logger: str, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Its lines, and nothing of what servers of other tests say."""
    return [record.getMessage() for record in caplog.records if record.name.startswith(logger)]


class Toolchain:
    """Notes each command; one with ``-o`` leaves a file there. ``failing`` maps a word of a command to a status."""

    def __init__(self, failing: dict[str, int] | None = None, output: str = "") -> None:
        self.commands: list[list[str]] = []
        self._failing = failing or {}
        self._output = output

    def __call__(self, command: Sequence[str]) -> Result:
        self.commands.append(list(command))
        for word, status in self._failing.items():
            if word in command:
                return Result(status, f"{word} went wrong")
        if "-o" in command:
            Path(command[command.index("-o") + 1]).write_bytes(b"built by " + command[0].encode())
        return Result(0, self._output)

    def having(self, *words: str) -> list[list[str]]:
        return [c for c in self.commands if set(words) <= set(c)]


def mac(run: toolchain.Run, programs: Sequence[str] = (), nanobind: bool = True) -> Machine:
    found = {name: f"/opt/bin/{name}" for name in programs}
    return Machine("Darwin", "arm64", run, found.get, lambda name: nanobind)


def one_launch(dtype: mx.Dtype = mx.bfloat16) -> prebuilt.Recorded:
    (what, inputs), *_ = checks.recorded(dtype, MATRIX)
    return what, inputs


KEY = store.Key("cuda", "sm_90", "0.32.4", "digest")


class Compiler:
    """Notes what it compiles, and how many at once: with ``together``, nothing is done before so many have begun."""

    def __init__(self, together: int = 1) -> None:
        self.names: list[str] = []
        self.most_at_once = 0
        self._together = together
        self._now = 0
        self._changed = threading.Condition()

    def __call__(self, name: str, text: str, architecture: str) -> bytes:
        with self._changed:
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
            self.names.append(name)
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self.most_at_once >= self._together, 30)
            self._now -= 1
        return f"{architecture} {name}".encode()


class Precompiled:
    """``mx.fast.precompiled_cuda_kernel`` as seen from here."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, **given: Any) -> list[mx.array]:
        self.calls.append(given)
        return [
            mx.zeros(shape, dtype=d) for shape, d in zip(given["output_shapes"], given["output_dtypes"], strict=True)
        ]


def jit(what: Launch, inputs: Sequence[mx.array]) -> list[mx.array]:
    return [mx.ones(shape, dtype=dtype) for shape, dtype in what.outputs]


SPOKEN = "".join(
    f"Generated source code for `custom_kernel_{name}`:\n```\nkernel of {name}\n```\n"
    for name in ("one", "two", "three")
)


def with_nanobind(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "nanobind").mkdir()
    real: Callable[[str], Path] = metal.package_folder
    monkeypatch.setattr(metal, "package_folder", lambda n: folder / n if n == "nanobind" else real(n))
