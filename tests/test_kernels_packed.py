"""Each kernel over quantized slots, run on the host thread by thread, against the reference; planted faults are found.

Slots that no row may read hold NaN, as in test_kernels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pippin.kernels import checks, fused, paged, reference
from pippin.kernels.host import compiler, host_launcher
from pippin.kernels.launch import Launch, Launcher, Source
from pippin.kernels.packing import PACKINGS, PackedPool, Packing, line
from pippin.kernels.packing import packed as packed_pool
from tests.test_kernels import (
    DIMS,
    EXTENDS,
    FEATURES,
    Arrays,
    Case,
    agree,
    arrays,
    distance,
    expected,
    through_matrices,
)
from tests.test_kernels import extended as extended_whole

pytestmark = pytest.mark.skipif(compiler() is None, reason="kernels run on the host only where g++ is installed")


def packed(case: Case, packing: Packing) -> Arrays:
    """The same inputs with quantized pools."""
    a = arrays(case)
    pools: dict[str, Any] = {"k_pool": packed_pool(a.k_pool, packing), "v_pool": packed_pool(a.v_pool, packing)}
    mx.eval(*(pool.lines for pool in pools.values()))
    return replace(a, **pools)


def decoded(case: Case, packing: Packing, launch: Launcher) -> tuple[mx.array, mx.array]:
    """(kernel's, reference's)."""
    a = packed(case, packing)
    got = paged.paged_decode(launch, a.q, a.k_pool, a.v_pool, a.table, a.lengths, case.form, case.tuning, sinks=a.sinks)
    return got, expected(case, a)


CASES = {
    name: {**DIMS, **FEATURES}[name]
    for name in ("80", "128", "192-128", "256-f32", "8", "metal", "all", "page-16", "page-3")
}
CASES |= {f"{name}-matrix": through_matrices(case) for name, case in CASES.items() if name not in ("metal", "page-3")}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", CASES)
def test_decode_equals_the_reference(name: str, packing: Packing) -> None:
    splits = 4 if packing == "int4" else 1
    case = replace(CASES[name], tuning=replace(CASES[name].tuning, splits=splits))
    for schedule in (0, 2):
        got, want = decoded(case, packing, host_launcher(schedule, seed=schedule))
        assert agree(got, want), (schedule, distance(got, want))


@given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=5),
    packing=st.sampled_from(PACKINGS),
    splits=st.sampled_from([1, 2]),
    matrix=st.booleans(),
    schedule=st.integers(0, 5),
    seed=st.integers(0, 2**16),
)
def test_decode_equals_the_reference_for_any_lengths(
    lengths: list[int], packing: Packing, splits: int, matrix: bool, schedule: int, seed: int
) -> None:
    case = Case(tuple(lengths), group=2, dim=16, value_dim=16, tuning=paged.Tuning(splits=splits), seed=seed)
    case = through_matrices(case) if matrix else case
    got, want = decoded(case, packing, host_launcher(schedule, seed=seed))
    assert agree(got, want), distance(got, want)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", ["128", "192-128", "256-f32", "metal", "all", "all-matrix", "80-matrix"])
def test_extend_equals_the_reference(name: str, packing: Packing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.test_kernels.arrays", lambda case: packed(case, packing))
    got, want = extended_whole(EXTENDS[name], host_launcher(2, seed=4))
    assert agree(got, want), distance(got, want)


def rows_of(case: Case, count: int, dim: int) -> mx.array:
    drawn = np.random.default_rng(case.seed + dim).standard_normal((count, case.kv_heads, dim), np.float32)
    return mx.array(2 * drawn).astype(case.dtype)


def written(case: Case, packing: Packing, slots: list[int], launch: Launcher) -> bool:
    """Whether kv_write leaves both pools as the reference does, in every slot."""
    mine, theirs = (
        [PackedPool.zeros(80, line(packing, case.kv_heads, d), case.dtype) for d in (case.dim, case.value_dim)]
        for _ in range(2)
    )
    mx.eval([p.lines for p in (*mine, *theirs)])
    k, v = rows_of(case, len(slots), case.dim), rows_of(case, len(slots), case.value_dim)
    token = paged.kv_write(launch, mine[0], mine[1], k, v, mx.array(slots, dtype=mx.int32))
    reference.kv_write(theirs[0], theirs[1], k, v, mx.array(slots, dtype=mx.int32))
    rest = mx.array([s for s in range(80) if s not in slots])
    untouched = not any(bool(mx.any(p.lines[rest]).item()) for p in mine)
    return untouched and token.shape == (8,) and all(map(near, mine, theirs))


def near(mine: PackedPool, theirs: PackedPool) -> bool:
    """No number is more than one code off, hardly any is off at all, and scales agree to their last bits."""
    everything = mx.arange(mine.shape[0])
    a, b = (np.array(p[everything].astype(mx.float32)) for p in (mine, theirs))
    layout = mine.layout
    step = np.abs(b).max(axis=-1, keepdims=True) * {"int8": 1 / 127, "fp8": 1 / 7, "int4": 2 / 15}[layout.packing]
    return bool((np.abs(a - b) <= 1.05 * step).all() and (np.abs(a - b) > 1e-3 * step).mean() < 0.01)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", ["80", "128", "192-128", "64-128", "256-f32", "8"])
def test_kv_write_stores_rows_and_touches_nothing_else(name: str, packing: Packing) -> None:
    assert written(DIMS[name], packing, [7, 0, 3, 12], host_launcher(2))


@given(
    slots=st.lists(st.integers(1, 76), min_size=1, max_size=9, unique=True),
    packing=st.sampled_from(PACKINGS),
    heads=st.integers(1, 5),
    schedule=st.integers(0, 3),
    seed=st.integers(0, 999),
)
def test_kv_write_stores_any_slots(slots: list[int], packing: Packing, heads: int, schedule: int, seed: int) -> None:
    case = Case(kv_heads=heads, dim=16, value_dim=24, seed=seed)
    assert written(case, packing, slots, host_launcher(schedule))


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", ["80", "192-128", "64-128", "256-f32", "8", "page-16", "page-3"])
def test_kv_gather_equals_the_reference(name: str, packing: Packing) -> None:
    case = {**DIMS, **FEATURES}[name]
    a = packed(case, packing)
    got = paged.kv_gather(host_launcher(2), a.k_pool, a.v_pool, a.table, case.page_size)
    want = reference.kv_gather(a.k_pool, a.v_pool, a.table, page_size=case.page_size)
    for mine, theirs in zip(got, want, strict=True):
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
        assert mx.allclose(mine, theirs, rtol=1e-2 if case.dtype != mx.float32 else 1e-6, equal_nan=True)


def test_every_e4m3_code_reads_as_mlx_reads_it() -> None:
    """All but the two codes of NaN: nothing writes those beside a scale that is a number."""
    codes = mx.array(np.array([c for c in range(256) if c & 127 != 127] + [0, 0], np.uint8))
    layout = line("fp8", 2, 128)
    scales = mx.array([1.0, 1.0]).view(mx.uint32)
    lines = mx.concatenate([codes.view(mx.uint32), scales, mx.zeros(2, mx.uint32)])[None]
    pool = PackedPool(mx.concatenate([mx.zeros_like(lines), lines]), layout, mx.float32)
    mx.eval(pool.lines)
    keys, _ = paged.kv_gather(host_launcher(), pool, pool, mx.array([[1]], dtype=mx.int32), 1)
    assert mx.array_equal(keys.reshape(-1), mx.from_fp8(codes, mx.float32))


@pytest.mark.parametrize("packing", PACKINGS)
def test_rope_kv_write_stores_what_kv_write_does(packing: Packing) -> None:
    assert checks.check_rope_kv_write(host_launcher(2), mx.float32, paged.Tuning(), packing)


def test_nothing_of_quantized_slots_is_in_other_kernels() -> None:
    pool, rows = mx.zeros((4, 2, 64)), mx.zeros((1, 2, 64))
    found: list[str] = []

    def record(what: Launch, inputs: object) -> list[mx.array]:
        found.append(what.source.header("cuda"))
        return [mx.zeros(shape, dtype=dtype) for shape, dtype in what.outputs]

    paged.kv_write(record, pool, pool, rows, rows, mx.array([1]))
    assert "Coded" not in found[0]
    assert "#define PACKED 0" in found[0]
    assert fused.ROPE_KV_WRITE.headers == ()


# --- planted faults: (what runs, a line of the kernel, what it becomes) ---

FAULTS: dict[str, tuple[Literal["decode", "write", "write4"] | Packing, str, str]] = {
    "the slot's stride": ("decode", "S::WORDS;\n  Coded", "S::NUMBERS;\n  Coded"),
    "the scale of another group": ("decode", "pack / (S::GROUP / 8)]", "pack % (S::GROUP / 8)]"),
    "a scale that is not shared": (
        "write",
        "step > 0; step /= 2) {\n    const float other",
        "step > 1; step /= 2) {\n    const float other",
    ),
    "codes of negative numbers": ("write", "near + 8388736.0f", "near + 8388608.0f"),
    "a word of the wrong head": ("write", "S::NUMBERS + head * (DIM / S::GROUP)", "S::NUMBERS"),
    "a scale in the wrong half": ("write4", "up | down >> 16", "up >> 16 | down"),
    "codes under 128": ("int8", "0xc380c380u", "0xc300c300u"),
    "numbers of another pair": ("int4", "return KIND == INT4 ? 4 : 2;", "return 2;"),
    "an exponent too few": ("fp8", "0x7b807b80u", "0x7b007b00u"),
    "weights that stay lifted": ("int8", "x *= 1.0f / Weight<KIND>::LIFT;", ""),
    "one token's scale for all": ("int8", "weigh[j] = value_scales[j]", "weigh[j] = value_scales[0]"),
    "half of a sum": ("int8", "if (SUMS) mma<KT>(more", "if (false) mma<KT>(more"),
    "half a head": ("write", "lane * 8 < width", "lane * 16 < width"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run, line_of, planted = FAULTS[name]
    whole = Source.header

    def edited(source: Source, dialect: str) -> str:
        return whole(source, dialect).replace(line_of, planted)

    def right(launch: Launcher) -> bool:
        if run in PACKINGS:
            return agree(*decoded(through_matrices(Case(dim=64, value_dim=64)), run, launch))
        if run == "decode":
            return agree(*decoded(Case(dim=64, value_dim=64), "int4", launch))
        return written(DIMS["128"], "int4" if run == "write4" else "int8", [7, 0, 3, 12], launch)

    assert right(host_launcher())
    monkeypatch.setattr(Source, "header", edited)
    assert not right(host_launcher(edit=lambda text: text.replace(line_of, planted)))
