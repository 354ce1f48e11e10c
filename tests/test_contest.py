"""What is fastest here: who wins, what is kept, how long it may take, and what the products make of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models.switch_layers import SwitchGLU

from pippin import kernels
from pippin.kernels import contest, grouped, products
from pippin.kernels.build.prebuilt import BuiltCuda, Recorded
from pippin.kernels.contest import Contests, Way, queued
from pippin.kernels.launch import Launch
from pippin.kernels.products import Weights
from pippin.models import seam
from pippin.models.matrices import matrices
from pippin.models.seam import Seam
from tests.test_kernels_dispatch import Gpu, gpu, needs_compiler, played

__all__ = ["gpu"]


class Track:
    """A clock that a run of a way moves on by what that way takes."""

    def __init__(self, **taken: float) -> None:
        self.now = 0.0
        self.runs: list[str] = []
        self._taken = taken

    def ways(self) -> dict[str, Way]:
        def way(name: str) -> Way:
            def run() -> mx.array:
                self.runs.append(name)
                self.now += self._taken[name]
                if self._taken[name] < 0:
                    raise RuntimeError("not on this chip")
                return mx.zeros(1)

            return run

        return {name: way(name) for name in self._taken}

    def contests(self, path: Path | None = None, seconds: float = 100.0) -> Contests:
        def run(way: Way, launches: int) -> None:
            for _ in range(launches):
                way()

        return Contests(path, seconds, lambda: self.now, run)


@pytest.mark.parametrize(
    ("taken", "winner"),
    [
        ({"mlx": 3.0, "kernel": 1.0}, "kernel"),
        ({"mlx": 1.0, "kernel": 3.0}, "mlx"),
        ({"mlx": 1.0, "kernel": 0.97}, "mlx"),
        ({"mlx": 1.0, "kernel": 0.9, "whole": 0.5}, "whole"),
        ({"mlx": 1.0, "kernel": -1.0}, "mlx"),
        ({"mlx": -1.0, "kernel": 5.0}, "kernel"),
    ],
)
def test_the_fastest_wins_if_it_is_faster_than_the_first_by_more_than_noise(
    taken: dict[str, float], winner: str, tmp_path: Path
) -> None:
    track = Track(**taken)
    held = track.contests(tmp_path / "fastest.json")
    assert held.hold("a", track.ways()) == winner
    before = len(track.runs)
    assert held.hold("a", track.ways()) == held.known("a") == winner
    assert len(track.runs) == before, "held once"
    held.keep()
    later = Track(**taken)
    assert later.contests(tmp_path / "fastest.json").hold("a", later.ways()) == winner
    assert later.runs == [], "and by one process"


def test_time_is_bounded_and_the_next_process_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "fastest.json"
    for expected in range(1, 4):
        track = Track(mlx=0.2, kernel=0.1)
        held = track.contests(path, seconds=0.5)
        for key in "abc":
            assert held.hold(key, track.ways()) in ("mlx", "kernel")
        held.keep()
        assert len(json.loads(path.read_text())) == expected
        assert track.now < 3.0
    assert set(json.loads(path.read_text()).values()) == {"kernel"}


def test_first_runs_which_compile_are_not_what_is_bounded_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They have a bound of their own."""

    class Slow(Track):
        def contests(self, path: Path | None = None, seconds: float = 100.0) -> Contests:
            seen: set[int] = set()

            def run(way: Way, launches: int) -> None:
                if id(way) not in seen:
                    seen.add(id(way))
                    self.now += 3.0
                for _ in range(launches):
                    way()

            return Contests(path, seconds, lambda: self.now, run)

    track = Slow(mlx=0.02, kernel=0.01)
    monkeypatch.setattr(contest, "FIRST_RUNS", 10.0)
    held = track.contests(tmp_path / "fastest.json", seconds=1.0)
    ways = [track.ways() for _ in "abcd"]  # all alive: each is another way
    with caplog.at_level("INFO", contest.__name__):
        won = [held.hold(key, each) for key, each in zip("abcd", ways, strict=True)]
        held.keep()
    assert won == ["kernel", "kernel", "mlx", "mlx"]
    assert "no time to find out what is fastest in 2 cases" in caplog.text
    assert [held.known(key) for key in "abcd"] == ["kernel", "kernel", None, None]


@pytest.mark.parametrize("each", [1, 2, 4, 8])
@pytest.mark.parametrize("rows", [1, 4, 16, 32, 128])
def test_every_usual_batch_of_decodes_has_a_measurement_of_its_own(rows: int, each: int) -> None:
    """Neither fewer pairs nor many more decide for it."""
    pairs = rows * each
    assert products.size_of(pairs, products.PAIRS) == max(pairs, products.PAIRS[0])
    assert products.size_of(rows, products.ROWS) <= max(8, 4 * rows)


@needs_compiler
def test_decodes_are_measured_first_and_of_these_the_largest_matrices(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = winning(monkeypatch, lambda key, ways: next(iter(ways)))
    found = [weights("mxfp4", 6, n=64), weights("mxfp4", 6, n=128)]
    kernels.measure_products(found, mx.bfloat16)
    sizes = [int(key.rpartition(" ")[2]) for key in held]
    decodes = [size for size in products.PAIRS if size <= products.MOST_DECODES]
    many = [size for size in products.PAIRS if size > products.MOST_DECODES]
    assert sizes == decodes * 2 + many * 2
    assert all("128 x 128" in key for key in held[: len(decodes)])
    held.clear()
    kernels.measure_products(found, mx.bfloat16)
    assert held == [], "once"


class Compiling(BuiltCuda):
    """Notes which kernels are compiled together, and what runs after."""

    def __init__(self, gpu: Gpu) -> None:
        self.refused = None
        self.prepared: list[str] = []
        self._gpu = gpu

    def prepare(self, launches: Iterable[Recorded]) -> None:
        self.prepared += [what.source.name for what, _ in launches]

    def __call__(self, what: Launch, inputs: Sequence[mx.array]) -> list[mx.array]:
        return self._gpu(what, inputs)


@needs_compiler
def test_kernels_that_are_compared_are_compiled_together(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first of them runs, each once."""
    launch = Compiling(gpu)
    monkeypatch.setattr(kernels, "gpu_launcher", lambda platform, stream=None: launch)
    winning(monkeypatch, lambda key, ways: next(iter(ways)))
    kernels.verify(mx.bfloat16, "products")
    kernels.verify(mx.bfloat16, "tiles")
    assert {"gated_mma", "grouped_gated_mma"} <= set(launch.prepared)
    gpu.launched.clear()
    launch.prepared.clear()
    found = [weights("mxfp4", 6), weights("affine-4")]
    kernels.measure_products(found, mx.bfloat16)
    assert gpu.launched == []
    rows = [size for size in products.ROWS if size <= 2 * products.MOST_ROWS]
    pairs = [size for size in products.PAIRS if size <= products.MOST_PAIRS]
    tiles = [size for size in products.PAIRS if size >= grouped.LEAST_PAIRS]
    by_tiles = {"expert_tiles": len(tiles), "grouped_mma": len(tiles)}
    assert Counter(launch.prepared) == {"expert_mma": len(pairs), "rows_mma": len(rows)} | by_tiles
    launch.prepared.clear()
    kernels.measure_products(found, mx.bfloat16)
    assert launch.prepared == [], "what is known needs nothing"


def test_what_can_not_be_kept_or_read_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("[1]")
    track = Track(mlx=3.0, kernel=1.0)
    for path in (tmp_path / "file" / "below.json", tmp_path / "file", None):
        held = track.contests(path)
        assert held.known("a") is None
        assert held.hold("a", track.ways()) == "kernel"
        held.keep()
    assert held.hold("a", {"other": track.ways()["mlx"]}) == "other", "a winner that is not there any more"


def test_ways_are_queued_together() -> None:
    found: list[mx.array] = []

    def way() -> mx.array:
        found.append(mx.zeros(1) + 1)
        return found[-1]

    queued(way, 3)
    assert len(found) == 3


@given(st.integers(1, 5000))
def test_rows_go_by_the_next_size_that_was_measured(rows: int) -> None:
    size = products.size_of(rows, products.ROWS)
    assert size in products.ROWS
    assert size >= min(rows, products.ROWS[-1])
    assert all(other < rows or other >= size for other in products.ROWS)


# --- products: which way is taken ---

MODES = {"affine-4": (64, 4, "affine"), "affine-8": (64, 8, "affine"), "mxfp4": (32, 4, "mxfp4")}


def weights(name: str, experts: int = 0, n: int = 64, k: int = 128) -> Weights:
    group, bits, mode = MODES[name]
    whole = mx.random.normal((experts or 1, n, k), key=mx.random.key(1)).astype(mx.bfloat16) / 8
    packed, scales, *rest = mx.quantize(whole if experts else whole[0], group, bits, mode)
    return Weights(packed, scales, rest[0] if rest else None, bits, group, mode)


def whole(w: Weights) -> mx.array:
    assert w.scales is not None
    return mx.dequantize(w.w, w.scales, w.biases, w.group, w.bits, w.mode, dtype=mx.bfloat16)


def winning(monkeypatch: pytest.MonkeyPatch, choose: Callable[[str, Mapping[str, Way]], str]) -> list[str]:
    """Has contests end as ``choose`` says; returns the keys of those that were held."""
    held: list[str] = []

    def hold(self: Contests, key: str, ways: Mapping[str, Way]) -> str:
        held.append(key)
        self._winners[key] = choose(key, ways)
        return self._winners[key]

    monkeypatch.setattr(Contests, "hold", hold)
    return held


@needs_compiler
@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("winner", ["kernel", "mlx", "whole"])
def test_a_product_is_computed_as_was_found_to_be_fastest(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, name: str, winner: str
) -> None:
    held = winning(monkeypatch, lambda key, ways: winner if winner in ways else next(iter(ways)))
    w = weights(name)
    kernels.measure_products([w, w, weights(name)], mx.bfloat16)
    assert len(held) == len(set(held)) == len(products.ROWS)
    gpu.launched.clear()
    for rows in (3, 600):
        x = mx.random.normal((rows, 128), key=mx.random.key(rows)).astype(mx.bfloat16)
        got = kernels.quantized_product(x, w)
        want = x.astype(mx.float32) @ whole(w).astype(mx.float32).T
        assert mx.abs(got.astype(mx.float32) - want).max() <= 0.05 * mx.abs(want).max()
        assert gpu.launched == (["rows_mma"] if winner == "kernel" else [])


@needs_compiler
@pytest.mark.parametrize(("name", "kernel"), [("affine-4", True), ("affine-8", False), ("mxfp4", False)])
def test_without_a_measurement_what_an_h200_found_goes_by_the_kernel_and_experts_do(
    gpu: Gpu, name: str, kernel: bool
) -> None:
    kernels.verify(mx.bfloat16, "products")
    gpu.launched.clear()
    w, x = weights(name), mx.ones((5, 128), mx.bfloat16)
    kernels.measure_products([w], mx.bfloat16)  # for which there is no time
    mx.eval(kernels.quantized_product(x, w))
    assert gpu.launched == ["rows_mma"] * kernel
    pairs = kernels.expert_product(x, weights(name, 4), kernels.Routed(mx.zeros(20, mx.int32)), 4)
    assert pairs is not None
    assert gpu.launched == ["rows_mma"] * kernel + ["expert_mma"]


@needs_compiler
@pytest.mark.parametrize("name", ["affine-8", "mxfp4"])
def test_a_kernel_that_won_once_and_is_wrong_now_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    w, x = weights(name), mx.ones((5, 128), mx.bfloat16)
    for machine in played(monkeypatch, tmp_path, Gpu(wrong=("rows_mma",))):
        with monkeypatch.context() as patch:
            winning(patch, lambda key, ways: "kernel")
            kernels.measure_products([w], mx.bfloat16)
        machine.launched.clear()
        got = kernels.quantized_product(x, w)
        assert machine.launched == []
        assert mx.array_equal(got, products.by_mlx(x, w))


def experts(mode: str, bias: bool) -> SwitchGLU:
    group, bits, kind = MODES[mode]
    layer = SwitchGLU(128, 64, 6, bias=bias)
    layer.set_dtype(mx.bfloat16)
    for projection in (layer.up_proj, layer.gate_proj, layer.down_proj) if bias else ():
        projection["bias"] = mx.random.normal(projection["bias"].shape).astype(mx.bfloat16) / 4
    nn.quantize(layer, group, bits, mode=kind)
    return layer


def in_float32(layer: SwitchGLU) -> SwitchGLU:
    """The same with weights that are made whole: MLX multiplies 16-bit numbers roughly on a CPU."""
    plain = SwitchGLU(128, 64, 6, bias="bias" in layer.up_proj)
    for name in ("up_proj", "gate_proj", "down_proj"):
        plain[name]["weight"] = whole(seam.weights_of(layer[name])).astype(mx.float32)
        if "bias" in layer[name]:
            plain[name]["bias"] = layer[name]["bias"].astype(mx.float32)
    return plain


@needs_compiler
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bias", [False, True])
def test_experts_of_every_mode_take_their_pairs(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, mode: str, bias: bool
) -> None:
    winning(monkeypatch, lambda key, ways: "kernel" if "kernel" in ways else next(iter(ways)))
    layer = experts(mode, bias)
    x = mx.random.normal((7, 1, 128), key=mx.random.key(4)).astype(mx.bfloat16)
    indices = mx.array([[i % 6, (i + 2) % 6] for i in range(7)])[:, None]
    want = in_float32(layer)(x.astype(mx.float32), indices)
    holder = nn.Sequential(layer)
    seam.install(holder, 7)
    kernels.measure_products(matrices(holder), mx.bfloat16)
    gpu.launched.clear()
    with seam.active(Seam(None)):
        got = layer(x, indices).astype(mx.float32)
    assert gpu.launched == ["gated_mma", "expert_mma"]
    assert got.shape == want.shape
    assert mx.abs(got - want).max() <= 0.02 * mx.abs(want).max()


@pytest.fixture
def quantized() -> Any:
    class Two(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 32, bias=False), nn.Linear(64, 32)
            self.e, self.plain = experts("mxfp4", True), nn.Linear(8, 8)

    model = Two()
    nn.quantize(model, 32, 8, class_predicate=lambda path, m: path in ("a", "b"))
    return model


def test_a_models_matrices_are_those_with_several_ways(quantized: Any) -> None:
    found = matrices(quantized)
    assert sorted((w.bits, w.mode, w.w.ndim) for w in found) == [(4, "mxfp4", 3)] * 3 + [(8, "affine", 2)] * 2


def test_nothing_is_measured_where_there_is_one_way_only(monkeypatch: pytest.MonkeyPatch) -> None:
    held = winning(monkeypatch, lambda key, ways: next(iter(ways)))
    for platform in (None, "metal"):
        monkeypatch.setattr(kernels, "backend", lambda platform=platform: platform)
        kernels.measure_products([weights("affine-4")], mx.bfloat16)
    assert held == []
    assert contest.SECONDS <= 5


@pytest.mark.parametrize("pairs", [products.SORTED, 4])
def test_mlx_gets_rows_that_lie_as_their_shape_says(monkeypatch: pytest.MonkeyPatch, pairs: int) -> None:
    """Of an axis that was put in, its product of sorted pairs on a GPU takes a stride for that of rows, which is 1."""
    given: list[mx.array] = []

    def gather(rows: mx.array, w: mx.array, **options: Any) -> mx.array:
        given.append(rows)
        return mx.zeros((rows.shape[0], 1, w.shape[-1]))

    monkeypatch.setattr(mx, "gather_mm", gather)
    x, indices = mx.ones((pairs, 8)), mx.zeros(pairs, mx.int32)
    products.by_mlx_routed(x, Weights(mx.ones((2, 4, 8))), indices)
    mx.eval(given)
    assert memoryview(given[0]).strides == (32, 32, 4)  # type: ignore[arg-type]
