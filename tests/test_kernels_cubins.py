"""CUDA kernels ahead of time: compiled once, kept, found, and not used where they are for something else or wrong."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from pippin.errors import ConfigError
from pippin.kernels import checks, paged
from pippin.kernels.build import nvrtc, prebuilt, store, toolchain
from pippin.kernels.build.build import build
from pippin.kernels.build.nvrtc import CompileError
from pippin.kernels.build.prebuilt import BuiltCuda, Cubins
from pippin.kernels.build.shapes import Codes, Experts
from pippin.kernels.build.source import CudaSource, cuda_source
from pippin.kernels.build.toolchain import Machine
from pippin.kernels.host import compiler, host_launcher
from tests.kernel_builds import (
    KEY,
    MATRIX,
    SMALL,
    Compiler,
    Precompiled,
    Toolchain,
    cache,
    jit,
    one_launch,
    said_by,
)

__all__ = ["cache"]


def test_a_source_takes_the_shapes_that_it_names_after_the_arrays() -> None:
    for what, inputs in checks.recorded(mx.bfloat16, MATRIX):
        source = cuda_source(what, inputs)
        given = re.search(rf"void {source.name}\((.*)\) \{{", source.text)
        assert given
        parameters = given[1].split(", ")
        arrays = [*what.source.inputs, *what.source.outputs]
        assert [p.rpartition("* ")[2] for p in parameters[: len(arrays)]] == arrays
        assert all(p.startswith("int ") for p in parameters[len(arrays) :])
        assert len(parameters) - len(arrays) == sum(inputs[i].ndim for i in source.shapes)
        assert 'extern "C"' in source.text
        assert "mlx/" not in source.text


def test_a_name_differs_whenever_the_source_does() -> None:
    names = {cuda_source(*one_launch(dtype)).name for dtype in (mx.float32, mx.float16, mx.bfloat16)}
    what, inputs = one_launch()
    other = replace(what, constants=tuple((n, 7 if n == "HKV" else v) for n, v in what.constants))
    assert len(names | {cuda_source(other, inputs).name}) == 4
    assert cuda_source(replace(what, blocks=(99, 1)), inputs) == cuda_source(what, inputs)


def test_a_cubin_is_compiled_once_and_kept() -> None:
    compiler = Compiler()
    source = cuda_source(*one_launch())
    first = Cubins(KEY, compiler, "sm_90")
    assert first.get(source) == first.get(source) == f"sm_90 {source.name}".encode()
    later = Cubins(KEY, compiler, "sm_90")
    assert later.get(source) == first.get(source)
    assert compiler.names == [source.name]
    assert (first.compiled, later.compiled) == (1, 0)


@pytest.mark.parametrize("changed", ["platform", "chip", "mlx", "sources"])
def test_a_build_for_anything_else_is_not_used(changed: str) -> None:
    source, compiler = cuda_source(*one_launch()), Compiler()
    Cubins(KEY, compiler, "sm_90").get(source)
    other = store.Key(**{**KEY.facts(), changed: "another"})
    Cubins(other, compiler, "sm_90").get(source)
    assert len(compiler.names) == 2


@pytest.mark.parametrize("kind", [None, "products", "latents", "int4"])
def test_a_machine_never_seen_compiles_its_checks_together_and_in_under_two_seconds(kind: checks.Kind | None) -> None:
    """With NVRTC's slowest kernel here, 0.3 s, for each of them."""
    launches = checks.recorded(mx.bfloat16, MATRIX, kind)
    count = len({cuda_source(what, inputs).name for what, inputs in launches})
    compiler = Compiler(together=min(8, count))
    Cubins(KEY, compiler, "sm_90").prepare(launches)
    assert compiler.most_at_once == min(8, count)
    assert len(compiler.names) == len(set(compiler.names)) == count > 4
    assert 0.3 * -(-count // 8) < 2


def test_the_checks_launch_nothing_that_was_not_recorded() -> None:
    kinds: tuple[checks.Kind | None, ...] = (None, "products", "experts", "latents")
    names = {what.source.name for kind in kinds for what, _ in checks.recorded(mx.bfloat16, MATRIX, kind)}
    assert names == {
        "kv_write", "kv_gather", "paged_reduce", "paged_decode_mma", "paged_decode_mma_split",
        "paged_decode_mma_fused", "paged_decode_mma_fused_split", "paged_extend_mma", "paged_extend_mma_split",
        "rope_kv_write", "add_rms_norm", "swiglu", "rows_mma", "expert_mma", "latent_decode", "latent_decode_split",
        "gated_mma", "route", "expert_gate", "weighed_sum", "add_weighed_rms_norm", "sort_pairs",
    }  # fmt: skip


def test_an_empty_cubin_on_disk_is_compiled_anew() -> None:
    source, compiler = cuda_source(*one_launch()), Compiler()
    store.write(KEY.folder / f"{source.name}.cubin", b"")
    assert Cubins(KEY, compiler, "sm_90").get(source)


def test_a_cache_that_cannot_be_written_is_no_fault(cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder should be")
    source, compiler = cuda_source(*one_launch()), Compiler()
    assert Cubins(KEY, compiler, "sm_90").get(source)


def test_a_launch_hands_mlx_the_cubin_and_the_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.fast, "precompiled_cuda_kernel", fake := Precompiled())
    launch = BuiltCuda(Cubins(KEY, Compiler(), "sm_90"), jit)
    for what, inputs in checks.recorded(mx.bfloat16, MATRIX):
        launch(what, inputs)
        (call,) = fake.calls
        source = cuda_source(what, inputs)
        assert call["name"] == source.name
        assert call["compiled_source"] == f"sm_90 {source.name}".encode()
        assert call["scalars"] == [size for i in source.shapes for size in inputs[i].shape]
        assert call["grid"] == (what.blocks[0] * what.threads, what.blocks[1], 1)
        assert call["threadgroup"] == (what.threads, 1, 1)
        assert len(call["inputs"]) == len(inputs)
        fake.calls.clear()


def test_a_launch_that_comes_again_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one made anew where an old one was is not taken for it."""
    monkeypatch.setattr(mx.fast, "precompiled_cuda_kernel", fake := Precompiled())
    monkeypatch.setattr(prebuilt, "_MOST_CALLS", 4)
    launch = BuiltCuda(Cubins(KEY, Compiler(), "sm_90"), jit)
    what, inputs = one_launch()
    launch(what, inputs)
    with monkeypatch.context() as patch:
        patch.setattr(prebuilt, "cuda_source", lambda what, inputs: pytest.fail("looked up again"))
        launch(what, inputs)
    fake.calls.clear()
    for rows in range(1, 40):
        launch(replace(what, blocks=(rows, 1)), inputs)
    assert [call["grid"][0] for call in fake.calls] == [rows * what.threads for rows in range(1, 40)]


def refusing(name: str, text: str, architecture: str) -> bytes:
    raise CompileError("no headers")


def test_what_cannot_be_compiled_goes_to_mlx_with_one_line(caplog: pytest.LogCaptureFixture) -> None:
    launch = BuiltCuda(Cubins(KEY, refusing, "sm_90"), jit)
    with caplog.at_level(logging.INFO, "pippin.kernels"):
        for what, inputs in checks.recorded(mx.bfloat16, MATRIX):
            assert mx.all(launch(what, inputs)[0] == 1).item()
    (line,) = said_by("pippin.kernels", caplog)
    assert "no headers" in line
    assert "JIT" in line


def test_an_mlx_that_takes_no_cubins_compiles_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """As this one: without CUDA it raises."""
    launch = BuiltCuda(Cubins(KEY, Compiler(), "sm_90"), jit)
    what, inputs = one_launch()
    assert mx.all(launch(what, inputs)[0] == 1).item()
    assert launch.refused


def test_a_wrong_cubin_sends_all_to_mlx_here_and_in_later_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake computes zeros; the reference's own launcher stands for MLX's JIT."""
    if compiler() is None:
        pytest.skip("running kernels on the host needs g++")
    monkeypatch.setattr(mx.fast, "precompiled_cuda_kernel", Precompiled())
    launch = BuiltCuda(Cubins(store.Key.here("cuda"), Compiler(), "sm_90"), host_launcher())
    assert all(checks.verdicts("cuda", launch, mx.float32, paged.Tuning()).values())
    assert launch.refused
    assert prebuilt.prefer_built("cuda", jit) is jit


def run_nvrtc() -> bool:
    return nvrtc.find_library() is not None and nvrtc.find_headers() is not None


def by_nvrtc(source: CudaSource, folder: Path) -> bytes:
    return nvrtc.compile_cubin(source.name, source.text, "sm_90")


def by_nvcc(source: CudaSource, folder: Path) -> bytes:
    return toolchain.nvcc_cubin(Machine.here(), source.name, source.text, "sm_90", folder)


COMPILERS = [
    pytest.param(by_nvrtc, marks=pytest.mark.skipif(not run_nvrtc(), reason="NVRTC is not installed")),
    pytest.param(by_nvcc, marks=pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")),
]


@pytest.mark.parametrize("compile_source", COMPILERS)
def test_the_cuda_compilers_take_our_sources(
    tmp_path: Path, compile_source: Callable[[CudaSource, Path], bytes]
) -> None:
    launches = [*checks.recorded(mx.bfloat16, MATRIX), *checks.recorded(mx.bfloat16, MATRIX, "int8")]
    launches += [*checks.recorded(mx.bfloat16, MATRIX, "latents"), *checks.recorded(mx.bfloat16, MATRIX, "products")]
    names = "kv_gather", "paged_decode_mma_fused", "paged_decode_mma_packed", "rope_kv_write_packed", "latent_decode"
    kinds = {what.source.name: (what, inputs) for what, inputs in launches}
    for name in (*names, "expert_mma"):
        source = cuda_source(*kinds[name])
        cubin = compile_source(source, tmp_path)
        assert cubin[:4] == b"\x7fELF"
        assert source.name.encode() in cubin
    broken = CudaSource("broken", "this is no CUDA", ())
    with pytest.raises(CompileError, match="broken"):
        compile_source(broken, tmp_path)


SHAPES = {
    "small": (SMALL, "paged_decode"),
    "quantized slots": (replace(SMALL, packing="int4", rotated=64), "rope_kv_write_packed"),
    "quantized weights": (replace(SMALL, hidden=128, codes=Codes(32, 8)), "rows_mma"),
    "experts": (replace(SMALL, hidden=128, codes=Codes(32, 4, "mxfp4"), experts=Experts(8, 2, 64)), "expert_mma"),
    "latents": (replace(SMALL, latents=(512, 64)), "latent_decode_split"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_cuda_build_by_nvcc_goes_through_ccache_and_is_found(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    shape, kernel = SHAPES[name]
    monkeypatch.setattr(nvrtc, "find_library", lambda: None)
    monkeypatch.setattr(toolchain, "find_library", lambda: None)
    run = Toolchain()
    machine = Machine("Linux", "x86_64", run, {"nvcc": "/bin/nvcc", "ccache": "/bin/ccache"}.get)
    told: list[str] = []
    done = build("cuda", [shape], machine, told.append, "sm_80")
    assert done.kernels == done.compiled == len(run.commands) == len(told) > 4
    assert all(c[:2] == ["/bin/ccache", "nvcc"] and "-arch=sm_80" in c for c in run.commands)
    assert any(name.startswith(f"pippin_{kernel}_") for name in told)
    manifest = store.read_manifest(done.folder)
    assert manifest
    assert manifest["compiler"] == "nvcc"
    assert (manifest["chip"], manifest["kernels"]) == ("sm_80", sorted(told))
    assert build("cuda", [shape], machine, told.append, "sm_80").compiled == 0


def test_a_build_without_a_gpu_must_say_for_which() -> None:
    if mx.default_device() == mx.Device(mx.gpu):
        pytest.skip("this machine has a GPU")
    machine = Machine("Linux", "x86_64", Toolchain(), {"nvcc": "/bin/nvcc"}.get)
    with pytest.raises(ConfigError, match="sm_90"):
        build("cuda", [SMALL], machine)
