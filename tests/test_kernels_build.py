"""Kernels ahead of time: what is missing is named, the right commands run, what was built is found or not used."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from pippin.cli import run_command
from pippin.demo import demo_model_path
from pippin.errors import ConfigError, ModelError
from pippin.kernels import checks, paged, tuning
from pippin.kernels.build import metal, metal_sources, nvrtc, prebuilt, store, toolchain
from pippin.kernels.build.build import build
from pippin.kernels.build.nvrtc import CompileError
from pippin.kernels.build.prebuilt import BuiltCuda, Cubins
from pippin.kernels.build.source import CudaSource, cuda_source
from pippin.kernels.build.toolchain import Machine, Result, ToolchainError
from pippin.kernels.build.variants import ModelShape, read_config, shape_of_config, variants
from pippin.kernels.form import Form
from pippin.kernels.host import compiler, host_launcher
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


# --- toolchain ---


@pytest.mark.parametrize(
    ("machine", "says"),
    [
        (Machine("Linux", "x86_64", Toolchain()), ["not macOS", "Linux"]),
        (Machine("Darwin", "x86_64", Toolchain()), ["not arm64", "Rosetta"]),
        (mac(Toolchain({"xcode-select": 2})), ["no Command Line Tools", "xcode-select --install"]),
        (mac(Toolchain({"xcrun": 72})), ["no Metal compiler", "xcodebuild -downloadComponent MetalToolchain"]),
        (mac(Toolchain(), nanobind=False), ["no nanobind", "pip install nanobind"]),
    ],
)
def test_what_a_metal_build_lacks_is_named_with_its_mend(machine: Machine, says: list[str]) -> None:
    (line,) = toolchain.metal_missing(machine)
    assert all(word in line for word in says)
    with pytest.raises(ToolchainError, match=re.escape(says[0])):
        build("metal", [SMALL], machine)


def test_a_mac_with_everything_lacks_nothing() -> None:
    run = Toolchain()
    assert toolchain.metal_missing(mac(run)) == []
    assert run.commands == [["xcode-select", "-p"], ["xcrun", "-sdk", "macosx", "-f", "metal"]]


def test_all_that_is_missing_is_said_at_once() -> None:
    assert len(toolchain.metal_missing(mac(Toolchain({"xcode-select": 2}), nanobind=False))) == 2


@pytest.mark.parametrize(
    ("library", "headers", "nvcc", "lacks"),
    [
        (True, True, False, []),
        (False, False, True, []),
        (False, False, False, ["nvidia-cuda-nvrtc nvidia-cuda-runtime"]),
        (True, False, False, ["install nvidia-cuda-runtime`"]),
    ],
)
def test_what_a_cuda_build_lacks(
    monkeypatch: pytest.MonkeyPatch, library: bool, headers: bool, nvcc: bool, lacks: list[str]
) -> None:
    monkeypatch.setattr(toolchain, "find_library", lambda: object() if library else None)
    monkeypatch.setattr(toolchain, "find_headers", lambda: Path() if headers else None)
    machine = Machine("Linux", "x86_64", Toolchain(), {"nvcc": "/bin/nvcc"}.get if nvcc else lambda _: None)
    found = toolchain.cuda_missing(machine)
    assert len(found) == len(lacks)
    assert all(part in line for part, line in zip(lacks, found, strict=True))


def test_a_program_that_is_not_there_is_a_result() -> None:
    assert toolchain.run_command(["pippin-has-no-such-program"]).status == 127
    assert toolchain.run_command(["sh", "-c", "echo out; echo err >&2; exit 3"]) == Result(3, "out\nerr\n")


# --- which kernels ---


def test_a_models_variants_are_all_that_its_steps_launch() -> None:
    """Every launch of a model's decode, in any batch, at any length, is among them."""
    found = variants(SMALL, tuning.table("cuda").every_cut(mx.bfloat16))
    names = {cuda_source(what, inputs).name for what, inputs in found}
    q, pool = mx.zeros((5, 8, 64), dtype=mx.bfloat16), mx.zeros((9, 2, 64), dtype=mx.bfloat16)
    seen: set[str] = set()

    def launch(what: Launch, inputs: Sequence[mx.array]) -> list[mx.array]:
        seen.add(cuda_source(what, inputs).name)
        return [mx.zeros(shape, dtype=dtype) for shape, dtype in what.outputs]

    for units in (1, 3, 17, 300):
        for longest in (1, 700, 9000, 100_000):
            for new in (None, (pool[:5], pool[:5])):
                cut = tuning.choose("cuda", "decode", mx.bfloat16, units, 8, 2, longest)
                table = mx.zeros((5, 3), dtype=mx.int32)
                form = Form(1, 64**-0.5)
                paged.paged_decode(launch, q, pool, pool, table, mx.zeros(5, dtype=mx.int32), form, cut, new=new)
    assert len(seen) >= 6
    assert seen <= names
    assert len(names) < 40


def test_pools_that_no_kernel_takes_have_no_variants() -> None:
    assert variants(replace(SMALL, dim=576), [MATRIX]) == []


@pytest.mark.parametrize(
    ("config", "want"),
    [
        ({"num_attention_heads": 32, "hidden_size": 4096}, ModelShape(32, 32, 128, 128)),
        (
            {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "torch_dtype": "float16"},
            ModelShape(8, 2, 64, 64, mx.float16),
        ),
        (
            {"text_config": {"num_attention_heads": 4, "head_dim": 256, "sliding_window": 512, "dtype": "bfloat16"}},
            ModelShape(4, 4, 256, 256, windows=(None, 512)),
        ),
        (
            {"num_attention_heads": 4, "head_dim": 64, "sliding_window": 9, "use_sliding_window": False},
            ModelShape(4, 4, 64, 64),
        ),
        (
            {"num_attention_heads": 8, "head_dim": 64, "model_type": "gpt_oss", "attn_logit_softcapping": 50.0},
            ModelShape(8, 8, 64, 64, softcap=50.0, sinks=True),
        ),
    ],
)
def test_shape_of_config(config: dict[str, Any], want: ModelShape) -> None:
    got = shape_of_config(config)
    assert replace(got, hidden=0, rotated=0) == want
    assert (got.hidden, got.rotated) == (config.get("hidden_size", 0), want.dim)


@pytest.mark.parametrize("config", [{}, {"num_attention_heads": "many"}, {"num_attention_heads": 4}])
def test_a_config_without_heads_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="how many heads"):
        shape_of_config(config)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json can't be read"):
        read_config(tmp_path)


# --- CUDA ---


def one_launch(dtype: mx.Dtype = mx.bfloat16) -> prebuilt.Recorded:
    (what, inputs), *_ = checks.recorded(dtype, MATRIX)
    return what, inputs


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


class Compiler:
    """Takes ``seconds`` for each kernel, and counts how many it works on at once."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.names: list[str] = []
        self.most_at_once = 0
        self._seconds = seconds
        self._now = 0
        self._lock = threading.Lock()

    def __call__(self, name: str, text: str, architecture: str) -> bytes:
        with self._lock:
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
            self.names.append(name)
        time.sleep(self._seconds)
        with self._lock:
            self._now -= 1
        return f"{architecture} {name}".encode()


KEY = store.Key("cuda", "sm_90", "0.32.4", "digest")


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


def test_a_machine_never_seen_compiles_its_checks_together_and_in_under_two_seconds() -> None:
    """With NVRTC's slowest kernel here, 0.3 s, for each of them."""
    compiler = Compiler(0.3)
    begin = time.process_time()
    Cubins(KEY, compiler, "sm_90").prepare(checks.recorded(mx.bfloat16, MATRIX))
    rounds = math.ceil(len(compiler.names) / compiler.most_at_once)
    assert time.process_time() - begin + 0.3 * rounds < 2
    assert compiler.most_at_once > 1
    assert len(compiler.names) == len(set(compiler.names)) > 12


def test_the_checks_launch_nothing_that_was_not_recorded() -> None:
    names = {what.source.name for what, _ in checks.recorded(mx.bfloat16, MATRIX)}
    assert names == {
        "kv_write", "kv_gather", "paged_reduce", "paged_decode_mma", "paged_decode_mma_split",
        "paged_decode_mma_fused", "paged_decode_mma_fused_split", "paged_extend_mma", "paged_extend_mma_split",
        "rope_kv_write", "add_rms_norm", "swiglu", "rows_mma", "expert_mma",
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
    kinds = {what.source.name: (what, inputs) for what, inputs in launches}
    for name in ("kv_gather", "paged_decode_mma_fused", "paged_decode_mma_packed", "rope_kv_write_packed"):
        source = cuda_source(*kinds[name])
        cubin = compile_source(source, tmp_path)
        assert cubin[:4] == b"\x7fELF"
        assert source.name.encode() in cubin
    broken = CudaSource("broken", "this is no CUDA", ())
    with pytest.raises(CompileError, match="broken"):
        compile_source(broken, tmp_path)


def test_a_cuda_build_by_nvcc_goes_through_ccache_and_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "find_library", lambda: None)
    monkeypatch.setattr(toolchain, "find_library", lambda: None)
    run = Toolchain()
    machine = Machine("Linux", "x86_64", run, {"nvcc": "/bin/nvcc", "ccache": "/bin/ccache"}.get)
    told: list[str] = []
    done = build("cuda", [SMALL], machine, told.append, "sm_80")
    assert done.kernels == done.compiled == len(run.commands) == len(told) > 8
    assert all(c[:2] == ["/bin/ccache", "nvcc"] and "-arch=sm_80" in c for c in run.commands)
    manifest = store.read_manifest(done.folder)
    assert manifest
    assert manifest["compiler"] == "nvcc"
    assert (manifest["chip"], manifest["kernels"]) == ("sm_80", sorted(told))
    assert build("cuda", [SMALL], machine, told.append, "sm_80").compiled == 0


def test_a_build_without_a_gpu_must_say_for_which() -> None:
    if mx.default_device() == mx.Device(mx.gpu):
        pytest.skip("this machine has a GPU")
    machine = Machine("Linux", "x86_64", Toolchain(), {"nvcc": "/bin/nvcc"}.get)
    with pytest.raises(ConfigError, match="sm_90"):
        build("cuda", [SMALL], machine)


# --- Metal ---

SPOKEN = "".join(
    f"Generated source code for `custom_kernel_{name}`:\n```\nkernel of {name}\n```\n"
    for name in ("one", "two", "three")
)


def with_nanobind(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "nanobind").mkdir()
    real: Callable[[str], Path] = metal.package_folder
    monkeypatch.setattr(metal, "package_folder", lambda n: folder / n if n == "nanobind" else real(n))


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


# --- the command ---


def test_the_command_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    machine = Machine("Darwin", "x86_64", Toolchain())
    monkeypatch.setattr(Machine, "here", staticmethod(lambda: machine))
    assert run_command(["kernels", "build", "--check"]) == 1
    assert "not arm64" in capsys.readouterr().out
    assert run_command(["kernels", "build"]) == 1
    error = capsys.readouterr().err
    assert "not arm64" in error
    assert "Traceback" not in error


def test_the_command_builds_the_demo_models_kernels(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(nvrtc, "find_library", lambda: None)
    machine = Machine("Linux", "x86_64", Toolchain(), {"nvcc": "/bin/nvcc"}.get)
    monkeypatch.setattr(Machine, "here", staticmethod(lambda: machine))
    assert run_command(["kernels", "build", "--arch", "sm_90"]) == 0
    assert re.search(r"\d+ kernels, \d+ compiled in", capsys.readouterr().out)
    assert run_command(["kernels", "build", "--arch", "sm_90", "--dtype", "int8"]) == 2
    assert "--dtype" in capsys.readouterr().err
    assert run_command(["kernels", "build", "--arch", "sm_90", "--model-path", "./nowhere"]) == 1
    assert "nowhere" in capsys.readouterr().err
    assert shape_of_config(read_config(demo_model_path())).heads > 0


def test_the_nanobind_module_names_what_the_loader_calls() -> None:
    source = Path(metal.__file__).with_name("metal_host.cpp").read_text()
    assert f"NB_MODULE({prebuilt.HOST_MODULE}, m)" in source
    assert '"preload"' in source


def test_files_appear_whole() -> None:
    """A file appears under its name only when all of it is there."""
    store.write(KEY.folder / "x.cubin", b"1" * 1000)
    assert [p.name for p in KEY.folder.iterdir()] == ["x.cubin"]
