"""Metal kernels ahead of time: the right commands run, what was built is shown to MLX, or not used."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from pippin.kernels import checks, paged
from pippin.kernels.build import metal, metal_sources, prebuilt, store
from pippin.kernels.build.build import build
from pippin.kernels.build.nvrtc import CompileError
from pippin.kernels.build.toolchain import Machine
from pippin.kernels.build.variants import variants
from tests.kernel_builds import (
    SMALL,
    SPOKEN,
    Toolchain,
    cache,
    jit,
    mac,
    said_by,
    with_nanobind,
)

__all__ = ["cache"]


def test_a_metal_build_runs_these_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with_nanobind(monkeypatch, tmp_path)
    run = Toolchain(output=SPOKEN)
    done = build("metal", [SMALL], mac(run, ["ccache"]))
    assert done.compiled == 3
    airs = run.having("-sdk", "metal", "-c")
    assert len(airs) == 3
    for command in airs:
        assert command[:4] == ["xcrun", "-sdk", "macosx", "metal"]
        assert "-fno-fast-math" in command
        assert any(part.startswith("-I") and part.endswith("mlx/include") for part in command)
    (link,) = run.having("metallib")
    assert sum(part.endswith(".air") for part in link) == 3
    objects = [c for c in run.commands if c[0] == "/opt/bin/ccache"]
    assert [Path(c[c.index("-c") + 1]).name for c in objects] == ["metal_host.cpp", "nb_combined.cpp"]
    assert {p.name for p in done.folder.iterdir()} >= {"pippin.metallib", "names.json", "manifest.json"}
    assert json.loads((done.folder / "names.json").read_text()) == sorted(
        f"custom_kernel_{n}" for n in ("one", "two", "three")
    )
    assert list(done.folder.glob("pippin_metal_host*.so"))


@pytest.mark.parametrize("word", ["metallib", "clang++"])
def test_a_failed_step_says_which_and_leaves_no_build(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, word: str
) -> None:
    with_nanobind(monkeypatch, tmp_path)
    with pytest.raises(CompileError, match=re.escape(f"{word} went wrong")):
        build("metal", [SMALL], mac(Toolchain({word: 1}, SPOKEN)))
    assert store.read_manifest(store.Key.here("metal").folder) is None


def test_an_mlx_that_says_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with_nanobind(monkeypatch, tmp_path)
    with pytest.raises(CompileError, match="no kernel source"):
        build("metal", [SMALL], mac(Toolchain(output="[metal_kernel] something else")))


def test_launches_survive_the_way_to_the_other_process() -> None:
    launches = variants(SMALL, [paged.Tuning(heads=4, unroll=2)])
    again = metal_sources.load(metal_sources.dump(launches))
    assert [what for what, _ in again] == [what for what, _ in launches]
    for (_, mine), (_, theirs) in zip(again, launches, strict=True):
        assert [(a.shape, a.dtype) for a in mine] == [(a.shape, a.dtype) for a in theirs]


@pytest.mark.skipif(mx.metal.is_available(), reason="MLX has Metal here")
def test_without_metal_the_speaker_fails_with_mlxs_words(tmp_path: Path) -> None:
    file = tmp_path / "launches.json"
    file.write_text(metal_sources.dump(variants(SMALL, [paged.Tuning()])[:1]))
    with pytest.raises(CompileError, match="metal_kernel"):
        metal.spoken(Machine.here(), variants(SMALL, [paged.Tuning()])[:1], tmp_path)


class Host:
    def __init__(self) -> None:
        self.loaded: list[tuple[str, list[str]]] = []

    def preload(self, path: str, names: list[str]) -> None:
        self.loaded.append((path, names))


def built(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    with_nanobind(monkeypatch, folder)
    return build("metal", [SMALL], mac(Toolchain(output=SPOKEN))).folder


def test_a_metal_build_is_shown_to_mlx(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder, host = built(monkeypatch, tmp_path), Host()
    assert prebuilt.load_metallib(store.Key.here("metal"), lambda _: host) == 3
    assert host.loaded == [
        (str(folder / "pippin.metallib"), ["custom_kernel_one", "custom_kernel_three", "custom_kernel_two"])
    ]


def test_a_verdict_does_not_outlive_the_build_that_it_was_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Kernels that MLX compiled say nothing of a .metallib, nor one of the next."""
    prints = [checks.fingerprint("metal"), checks.fingerprint("cuda")]
    folder = built(monkeypatch, tmp_path)
    prints.append(checks.fingerprint("metal"))
    assert checks.fingerprint("cuda") == prints[1]
    store.refuse(store.Key.here("metal"), "wrong")
    assert checks.fingerprint("metal") == prints[0]
    build("metal", [SMALL], mac(Toolchain(output=SPOKEN)))
    prints.append(checks.fingerprint("metal"))
    assert len(set(prints)) == 4
    assert not (folder / "refused").exists()


def test_a_wrong_metallib_is_not_loaded_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path) -> None:
    built(monkeypatch, tmp_path)
    found = checks.verdicts("metal", jit, mx.float32, paged.Tuning())
    assert not found["kv_write"]
    assert not list(cache.glob("kernels-*.json")), "the verdict is of this process alone"
    host = Host()
    monkeypatch.setattr(prebuilt, "_load_module", lambda path: host)
    assert prebuilt.prefer_built("metal", jit) is jit
    assert host.loaded == []


def test_without_a_build_one_line_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "pippin.kernels"):
        assert prebuilt.prefer_built("metal", jit) is jit
    (line,) = said_by("pippin.kernels", caplog)
    assert "pippin kernels build" in line


def test_a_build_for_another_mlx_is_named_and_not_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    built(monkeypatch, tmp_path)
    host = Host()
    with caplog.at_level(logging.INFO, "pippin.kernels"):
        newer = replace(store.Key.here("metal"), mlx="99.0")
        assert prebuilt.load_metallib(newer, lambda _: host) == 0
    assert host.loaded == []
    (line,) = said_by("pippin.kernels", caplog)
    assert f"MLX {store.Key.here('metal').mlx}" in line


def test_a_build_that_cannot_be_loaded_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The recorded toolchain's module is no module."""
    built(monkeypatch, tmp_path)
    with caplog.at_level(logging.INFO, "pippin.kernels"):
        assert prebuilt.load_metallib(store.Key.here("metal")) == 0
    (line,) = said_by("pippin.kernels", caplog)
    assert "can't be loaded" in line


def test_the_nanobind_module_names_what_the_loader_calls() -> None:
    source = Path(metal.__file__).with_name("metal_host.cpp").read_text()
    assert f"NB_MODULE({prebuilt.HOST_MODULE}, m)" in source
    assert '"preload"' in source
