"""Products of many pairs by tiles, on the host, thread by thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pippin import kernels
from pippin.kernels import experts, grouped, paged, products, reference
from pippin.kernels.build.source import cuda_source
from pippin.kernels.contest import Contests
from pippin.kernels.grouped import Routed
from pippin.kernels.host import compiler, host_launcher
from pippin.kernels.launch import Launch
from pippin.kernels.product_checks import TILES_CHECKS
from pippin.kernels.products import Gated, Weights
from pippin.kernels.routed import Gate, Pairs
from tests.planted import assert_found
from tests.test_kernels_dispatch import Gpu, played
from tests.test_kernels_experts import layer, normal
from tests.test_kernels_rows import FORMS, TOLERANCE, distance

pytestmark = pytest.mark.skipif(compiler() is None, reason="kernels run on the host only where g++ is installed")


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=400), st.integers(0, 2))
def test_tiles_hold_each_pair_once_by_expert_in_order(chosen: list[int], schedule: int) -> None:
    made = grouped.tiles(host_launcher(schedule), mx.array(chosen, mx.int32), 7)
    order, table = np.array(made.order).tolist(), np.array(made.table).tolist()
    assert order == sorted(range(len(chosen)), key=lambda i: chosen[i])
    want = reference.tiles(mx.array(chosen, mx.int32), 7)
    assert mx.array_equal(made.order, want.order)
    assert mx.array_equal(made.table, want.table)
    found: list[tuple[int, int]] = []
    for expert, first, count in table:
        assert 0 <= count <= grouped.ROWS
        found += [(expert, pair) for pair in order[first : first + count]]
    assert found == [(chosen[pair], pair) for pair in order]
    for expert in range(7):
        counts = [count for e, _, count in table if e == expert and count]
        assert all(count == grouped.ROWS for count in counts[:-1]), "none but the last is not full"


# (tokens, N, K, experts, pairs a token)
SHAPES = {
    "two-tiles-of-each": (70, 136, 96, 2, 2),
    "edge-of-columns": (50, 72, 64, 4, 3),
    "one-expert-has-all": (150, 16, 32, 3, 1),
    "most-have-none": (3, 40, 160, 9, 1),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_by_tiles_are_those_of_the_weights(shape: str, dtype: mx.Dtype, form: str) -> None:
    made = layer(form, dtype, *SHAPES[shape], one_has_all=shape == "one-expert-has-all")
    launch = host_launcher(1)
    tiles = grouped.tiles(launch, made.indices, SHAPES[shape][3])
    got = grouped.product(launch, made.x, made.gate, tiles, made.each)
    assert got.dtype == dtype
    assert distance(got, made.product) < TOLERANCE[dtype]
    for gates, want in made.gated:
        got = grouped.gated_product(launch, made.x, gates, tiles, made.each)
        assert distance(got, want) < TOLERANCE[dtype]


def test_a_row_is_computed_alike_whoever_is_beside_it() -> None:
    x, w = normal(1, 200, 64, dtype=mx.bfloat16), Weights(normal(2, 3, 24, 64, dtype=mx.bfloat16))
    indices = mx.array(np.random.default_rng(3).integers(0, 3, 200).astype(np.int32))
    launch = host_launcher()
    whole = grouped.product(launch, x, w, grouped.tiles(launch, indices, 3), 1)
    for part in (slice(0, 1), slice(37, 150)):
        alone = grouped.product(launch, x[part], w, grouped.tiles(launch, indices[part], 3), 1)
        assert mx.array_equal(whole[part], alone)


PLANTED: dict[str, tuple[str, str, str]] = {
    "pairs of experts before": ("tiles", "below += indices[i] < expert", "below += indices[i] < expert - 1"),
    "places not counted": ("tiles", "before += t < tid ? same[t] : 0", "before += 0"),
    "a tile too few": ("tiles", "(start + total) / ROWS + expert + 1", "(start + total) / ROWS + expert"),
    "tiles that begin at others'": ("tiles", "start / ROWS + expert, end", "start / ROWS, end"),
    "what is left over": ("tiles", "smaller(ROWS, total - done)", "smaller(ROWS, total)"),
    "another pair's row": ("tiles", "order[first + a_row] / PER", "order[first + a_row] / 1 % 75"),
    "a step not waited for": ("tiles", "    BARRIER();\n    bring(", "    bring("),
    "copies not waited for": ("tiles", "copies_wait<STAGES - 2>", "copies_wait<STAGES - 1>"),
    "codes of another step": ("tiles_8", "store(codes, step + 1);\n    load", "load"),
    "the step after": ("tiles", "multiply(step % STAGES)", "multiply((step + 1) % STAGES)"),
    "halves not exchanged back": ("tiles_mxfp4", "(column ^ (r / 2 % 2))];\n        a[h]", "column];\n        a[h]"),
    "nibbles meet others": ("tiles_mxfp4", "FAR ? far_pairs(row) : row", "row"),
    "the next group's scale": ("tiles_mxfp8", "at / GROUP", "(at + 16) / GROUP % GROUPS"),
    "the first half twice": ("tiles_8", "from_codes<T, KIND>(codes.packed, u,", "from_codes<T, KIND>(codes.packed, 0,"),
    "the bias of codes": ("tiles_8", "KIND < 10 ? scale_of<T, KIND>(bias_words, group) : 0u", "0u"),
    "the gate twice": ("tiles", "second ? up_w : w", "w"),
    "the gate's scales": ("tiles_nvfp4", "second ? up_scales : scales", "scales"),
    "rows of the other half": ("tiles", "h * 8 + line;\n      if (r >= count)", "line;\n      if (r >= count)"),
    "another expert's bias": ("tiles", "gate_bias[size_t(expert) * N", "gate_bias[size_t(expert / 2) * N"),
    "up beside another gate": ("tiles", "c[m][t + NT / 2]", "c[m][t]"),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults_are_found(fault: str) -> None:
    name, line, planted = PLANTED[fault]
    check: Callable[..., bool] = TILES_CHECKS[name]  # type: ignore[index]
    assert_found(line, planted, lambda launch: check(launch, mx.bfloat16, paged.Tuning(matrix=True)))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Gpu]:
    yield from played(monkeypatch, tmp_path, Gpu())


@pytest.mark.parametrize(("tokens", "launched"), [(100, "expert_mma"), (1500, "grouped_mma")])
def test_many_pairs_go_by_tiles_which_are_made_once(gpu: Gpu, tokens: int, launched: str) -> None:
    kernels.verify(mx.bfloat16, "products")
    kernels.verify(mx.bfloat16, "tiles")
    w = [Weights(normal(s, 3, n, k, dtype=mx.bfloat16)) for s, n, k in ((1, 8, 32), (2, 8, 32), (3, 32, 8 * 4))]
    x = normal(4, tokens, 32, dtype=mx.bfloat16)
    indices = mx.array(np.random.default_rng(5).integers(0, 3, tokens * 2).astype(np.int32))
    chosen = Routed(indices)
    gpu.launched.clear()
    inner = experts.gated_product(x, Gated(w[0], w[1], None, Gate()), chosen, 2)
    again = experts.product(normal(6, tokens * 2, 32, dtype=mx.bfloat16), w[2], chosen, 1)
    assert inner is not None
    assert again is not None
    mx.eval(inner, again)
    gated = "gated_mma" if launched == "expert_mma" else "grouped_gated_mma"
    tiles = ["expert_tiles"] * (launched == "grouped_mma")
    assert gpu.launched == [*tiles, gated, launched]
    rows = x.astype(mx.float32)[mx.arange(tokens * 2) // 2]
    y, z = ((rows[:, None] @ a.w.astype(mx.float32)[indices].swapaxes(1, 2))[:, 0] for a in w[:2])
    want = reference.expert_gate(Pairs(y, indices), Pairs(z, indices), Gate())
    assert distance(inner, want) < TOLERANCE[mx.bfloat16]


def test_gates_of_few_pairs_are_one_launch_whoever_won(
    gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Others(Contests):
        def known(self, key: str) -> str:
            return "mlx"

    monkeypatch.setattr(kernels, "contests", cache(lambda platform: Others(tmp_path / "fastest.json")))
    kernels.verify(mx.bfloat16, "products")
    w, x = Weights(normal(1, 3, 8, 32, dtype=mx.bfloat16)), normal(2, 40, 32, dtype=mx.bfloat16)
    gpu.launched.clear()
    for pairs in (1, products.FEW_PAIRS, products.FEW_PAIRS + 1):
        chosen = Routed(mx.zeros(pairs, mx.int32))
        made = experts.gated_product(x[:pairs], Gated(w, w, None, Gate()), chosen, 1)
        assert (made is None) == (pairs > products.FEW_PAIRS)
        assert kernels.expert_product(x[:pairs], w, chosen, 1) is None
    assert gpu.launched == ["gated_mma"] * 2


def test_where_we_compile_two_blocks_have_room_on_a_processor() -> None:
    seen: list[str] = []

    def record(what: Launch, inputs: Sequence[mx.array]) -> list[mx.array]:
        seen.append(cuda_source(what, inputs).text)
        return [mx.zeros(shape, dtype=dtype) for shape, dtype in what.outputs]

    x, w = mx.zeros((8, 32), mx.bfloat16), Weights(mx.zeros((3, 8, 32), mx.bfloat16))
    tiles = grouped.tiles(record, mx.zeros(8, mx.int32), 3)
    grouped.product(record, x, w, tiles, 1)
    assert ["__launch_bounds__(256, 2)" in text for text in seen] == [False, True]


def test_tiles_that_are_wrong_leave_many_pairs_to_mlx(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for _ in played(monkeypatch, tmp_path, Gpu(wrong=("expert_tiles",))):
        w = Weights(normal(1, 3, 8, 32, dtype=mx.bfloat16))
        assert kernels.product_way(mx.bfloat16, w, 5000) == "mlx"
        assert kernels.product_way(mx.bfloat16, w, 500) == "kernel"


def test_a_contest_may_prefer_tiles_to_what_else_takes_as_many(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kernels.verify(mx.bfloat16, "products")
    kernels.verify(mx.bfloat16, "tiles")
    offered: dict[int, set[str]] = {}

    class Preferring(Contests):
        def hold(self, key: str, ways: object) -> str:
            assert isinstance(ways, dict)
            offered[int(key.rpartition(" ")[2])] = set(ways)
            self._winners[key] = "tiles" if "tiles" in ways else "kernel"
            return self._winners[key]

    held = Preferring(tmp_path / "fastest.json")
    monkeypatch.setattr(kernels, "contests", cache(lambda platform: held))
    w = Weights(normal(1, 3, 8, 32, dtype=mx.bfloat16))
    kernels.measure_products([w], mx.bfloat16)
    assert offered[256] == {"kernel", "mlx"}
    assert offered[grouped.LEAST_PAIRS] == {"kernel", "tiles", "mlx"}
    assert offered[products.PAIRS[-1]] == {"tiles", "mlx"}
    assert [kernels.product_way(mx.bfloat16, w, n) for n in (256, 512, 9000)] == ["kernel", "tiles", "tiles"]
