"""Each kernel, run on the host thread by thread, against the reference; and faults planted in them are found.

Slots that no row may read hold NaN, which spoils any result that it touches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pippin.kernels import paged, reference
from pippin.kernels.form import Form
from pippin.kernels.host import KernelFault, compiler, host_launcher
from pippin.kernels.launch import Launcher

pytestmark = pytest.mark.skipif(compiler() is None, reason="kernels run on the host only where g++ is installed")

# Of a result about 1 in size: a few roundings of its dtype, and of the sums in float32.
TOLERANCE = {mx.float32: 3e-6, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}


@dataclass(frozen=True)
class Case:
    """One call: shapes, dtype, contexts (``lengths``) and what attention computes."""

    lengths: tuple[int, ...] = (5, 0, 70, 1)
    kv_heads: int = 2
    group: int = 4
    dim: int = 64
    value_dim: int = 64
    dtype: mx.Dtype = mx.float32
    page_size: int = 1
    window: int | None = None
    sinks: bool = False
    softcap: float | None = None
    tuning: paged.Tuning = field(default_factory=paged.Tuning)
    seed: int = 0

    @property
    def form(self) -> Form:
        return Form(self.page_size, self.dim**-0.5, self.window, self.softcap)


@dataclass
class Arrays:
    q: mx.array
    k_pool: mx.array
    v_pool: mx.array
    table: mx.array
    lengths: mx.array
    sinks: mx.array | None


def arrays(case: Case) -> Arrays:
    """Random inputs; a sequence a row, in shuffled pages, and NaN in every slot that no row sees."""
    random = np.random.default_rng(case.seed)
    rows, width = len(case.lengths), max(1, -(-max(case.lengths) // case.page_size)) + 1
    pages = rows * width + 1
    table = (random.permutation(pages - 1)[: rows * width].reshape(rows, width) + 1).astype(np.int32)
    unseen = np.ones(pages * case.page_size, bool)
    for line, length in zip(table, case.lengths, strict=True):
        slots = (line[:, None] * case.page_size + np.arange(case.page_size)).reshape(-1)
        unseen[slots[max(0, length - (case.window or length)) : length]] = False

    def pool(dim: int) -> mx.array:
        values = random.standard_normal((pages * case.page_size, case.kv_heads, dim), np.float32)
        values[unseen] = np.nan
        return mx.array(values).astype(case.dtype)

    heads = case.kv_heads * case.group
    made = Arrays(
        q=mx.array(random.standard_normal((rows, heads, case.dim), np.float32)).astype(case.dtype),
        k_pool=pool(case.dim),
        v_pool=pool(case.value_dim),
        table=mx.array(table),
        lengths=mx.array(np.array(case.lengths, np.int32)),
        sinks=mx.array(random.standard_normal(heads, np.float32)).astype(case.dtype) if case.sinks else None,
    )
    mx.eval(made.q, made.k_pool, made.v_pool)
    return made


def decoded(case: Case, launch: Launcher) -> tuple[mx.array, mx.array]:
    """(kernel's, reference's)."""
    a = arrays(case)
    got = paged.paged_decode(launch, a.q, a.k_pool, a.v_pool, a.table, a.lengths, case.form, case.tuning, sinks=a.sinks)
    return got, expected(case, a)


def expected(case: Case, a: Arrays) -> mx.array:
    return reference.paged_decode(a.q, a.k_pool, a.v_pool, a.table, a.lengths, case.form, sinks=a.sinks)


def distance(got: mx.array, want: mx.array) -> float:
    """The largest difference; infinite where one side is not a number."""
    difference = np.abs(np.array(got.astype(mx.float32)) - np.array(want.astype(mx.float32)))
    return float(np.where(np.isnan(difference), np.inf, difference).max())


def agree(got: mx.array, want: mx.array) -> bool:
    return got.dtype == want.dtype and distance(got, want) <= TOLERANCE[want.dtype]


DIMS = {
    "64": Case(dim=64, value_dim=64, dtype=mx.bfloat16, group=8),
    "80": Case(dim=80, value_dim=80, dtype=mx.float16, group=1),
    "96": Case(dim=96, value_dim=96, dtype=mx.bfloat16, group=4),
    "128": Case(dim=128, value_dim=128, dtype=mx.bfloat16, group=4),
    "128-f32": Case(dim=128, value_dim=128, group=8),
    "192-128": Case(dim=192, value_dim=128, dtype=mx.float16, group=8),
    "64-128": Case(dim=64, value_dim=128, dtype=mx.bfloat16, group=1),
    "256": Case(dim=256, value_dim=256, dtype=mx.bfloat16, group=8),
    "256-f32": Case(dim=256, value_dim=256, group=4),
    "8": Case(dim=8, value_dim=16, dtype=mx.float16, group=2),
    "seven-heads": Case(dim=128, value_dim=128, dtype=mx.bfloat16, group=7),
    "eleven-heads": Case(dim=64, value_dim=64, group=11),
    "metal": Case(dim=128, value_dim=128, dtype=mx.float16, group=8, tuning=paged.Tuning(unroll=2, heads=4)),
}
FEATURES = {
    "window": Case(window=20),
    "window-1": Case(window=1),
    "sinks": Case(sinks=True),
    "softcap": Case(softcap=1.5),
    "all": Case(window=33, sinks=True, softcap=2.0, page_size=16, dtype=mx.bfloat16),
    "page-16": Case(page_size=16, lengths=(15, 16, 17, 32, 33, 0)),
    "page-3": Case(page_size=3, lengths=(2, 3, 4, 6)),
    "one-row": Case(lengths=(1,)),
    "only-padding": Case(lengths=(0, 0)),
    "one-long": Case(lengths=(3, 1500, 2, 0)),
}


def through_matrices(case: Case) -> Case:
    """The same case in a 16-bit type and through matrix products."""
    dtype = mx.bfloat16 if case.dtype == mx.float32 else case.dtype
    return replace(case, dtype=dtype, tuning=replace(case.tuning, matrix=True))


CASES = {**DIMS, **FEATURES}
CASES |= {f"{name}-matrix": through_matrices(case) for name, case in CASES.items()}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("splits", [1, 4])
def test_decode_equals_the_reference(name: str, splits: int) -> None:
    case = CASES[name]
    lengths = tuple(5 * n for n in case.lengths) if splits > 1 else case.lengths
    case = replace(case, lengths=lengths, tuning=replace(case.tuning, splits=splits))
    for schedule in (0, 1, 2):
        got, want = decoded(case, host_launcher(schedule, seed=schedule))
        assert agree(got, want), (schedule, distance(got, want))


@given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=5),
    splits=st.sampled_from([1, 2, 8]),
    page_size=st.sampled_from([1, 16]),
    matrix=st.booleans(),
    schedule=st.integers(0, 5),
    seed=st.integers(0, 2**16),
)
def test_decode_equals_the_reference_for_any_lengths(
    lengths: list[int], splits: int, page_size: int, matrix: bool, schedule: int, seed: int
) -> None:
    tuning = paged.Tuning(splits=splits)
    case = Case(tuple(lengths), group=2, dim=16, value_dim=16, page_size=page_size, tuning=tuning, seed=seed)
    case = through_matrices(case) if matrix else case
    got, want = decoded(case, host_launcher(schedule, seed=seed))
    assert agree(got, want), distance(got, want)


def fused(case: Case, launch: Launcher) -> tuple[Arrays, Arrays, mx.array, mx.array]:
    """Writes and attends in one launch: (the kernel's arrays after it, the reference's, the two results)."""
    a, b = arrays(case), arrays(case)
    random = np.random.default_rng(case.seed + 1)
    rows = len(case.lengths)
    k = mx.array(random.standard_normal((rows, case.kv_heads, case.dim), np.float32)).astype(case.dtype)
    v = mx.array(random.standard_normal((rows, case.kv_heads, case.value_dim), np.float32)).astype(case.dtype)
    got = paged.paged_decode(
        launch, a.q, a.k_pool, a.v_pool, a.table, a.lengths, case.form, case.tuning, sinks=a.sinks, new=(k, v)
    )
    reference.kv_write(b.k_pool, b.v_pool, k, v, reference.newest_slots(b.table, b.lengths, case.page_size))
    return a, b, got, expected(case, b)


FUSED = ["128", "192-128", "eleven-heads", "metal", "window", "all", "page-16", "one-row"]


@pytest.mark.parametrize("name", [*FUSED, *(f"{name}-matrix" for name in FUSED)])
@pytest.mark.parametrize("splits", [1, 4])
def test_decode_stores_the_newest_token_and_attends_to_it(name: str, splits: int) -> None:
    case = CASES[name]
    case = replace(case, tuning=replace(case.tuning, splits=splits), lengths=tuple(4 * n for n in case.lengths))
    a, b, got, want = fused(case, host_launcher(2, seed=3))
    assert agree(got, want), distance(got, want)
    # The reference stores padding rows in scratch, which the kernel leaves alone.
    first = case.page_size
    assert mx.array_equal(a.k_pool[first:], b.k_pool[first:], equal_nan=True)
    assert mx.array_equal(a.v_pool[first:], b.v_pool[first:], equal_nan=True)


def written(case: Case, slots: list[int], launch: Launcher) -> bool:
    """Whether kv_write leaves both pools as the reference does, in every slot."""
    a, b = arrays(case), arrays(case)
    random = np.random.default_rng(case.seed + 1)
    k = mx.array(random.standard_normal((len(slots), case.kv_heads, case.dim), np.float32)).astype(case.dtype)
    v = mx.array(random.standard_normal((len(slots), case.kv_heads, case.value_dim), np.float32)).astype(case.dtype)
    token = paged.kv_write(launch, a.k_pool, a.v_pool, k, v, mx.array(slots, dtype=mx.int32))
    reference.kv_write(b.k_pool, b.v_pool, k, v, mx.array(slots, dtype=mx.int32))
    return bool(
        token.shape == (8,)
        and mx.array_equal(a.k_pool, b.k_pool, equal_nan=True)
        and mx.array_equal(a.v_pool, b.v_pool, equal_nan=True)
    )


@pytest.mark.parametrize("name", ["80", "128", "192-128", "64-128", "256-f32", "8"])
def test_kv_write_stores_rows_and_touches_nothing_else(name: str) -> None:
    assert written(DIMS[name], [7, 0, 3, 12], host_launcher(2))


@given(slots=st.lists(st.integers(1, 76), min_size=1, max_size=9, unique=True), schedule=st.integers(0, 3))
def test_kv_write_stores_any_slots(slots: list[int], schedule: int) -> None:
    assert written(Case(group=2, dim=16, value_dim=24), slots, host_launcher(schedule))


@pytest.mark.parametrize("name", ["80", "128", "192-128", "64-128", "256-f32", "8", "page-16", "page-3", "one-row"])
def test_kv_gather_equals_the_reference(name: str) -> None:
    case = {**DIMS, **FEATURES}[name]
    a = arrays(case)
    got = paged.kv_gather(host_launcher(2), a.k_pool, a.v_pool, a.table, case.page_size)
    want = reference.kv_gather(a.k_pool, a.v_pool, a.table, page_size=case.page_size)
    for mine, theirs in zip(got, want, strict=True):
        assert mine.shape == theirs.shape
        assert mx.array_equal(mine, theirs, equal_nan=True)


@dataclass(frozen=True)
class Extend:
    """Sequences with contexts ``case.lengths``, the last ``counts`` of whose tokens are rows."""

    case: Case
    counts: tuple[int, ...]
    pad_to: int | None = None


def extended(extend: Extend, launch: Launcher) -> tuple[mx.array, mx.array]:
    """(kernel's, reference's)."""
    case = extend.case
    a = arrays(replace(case, window=None))
    lengths = [n - count + 1 + i for n, count in zip(case.lengths, extend.counts, strict=True) for i in range(count)]
    random = np.random.default_rng(case.seed + 2)
    heads = case.kv_heads * case.group
    q = mx.array(random.standard_normal((len(lengths), heads, case.dim), np.float32)).astype(case.dtype)
    rows = mx.array(np.array(lengths, np.int32))
    most = paged.rows_per_tile(case.group, case.dtype, case.tuning)
    tiles = mx.array(paged.tile_rows(extend.counts, most, extend.pad_to))
    got = paged.paged_extend(launch, q, a.k_pool, a.v_pool, a.table, rows, tiles, case.form, case.tuning, sinks=a.sinks)
    want = reference.paged_extend(q, a.k_pool, a.v_pool, a.table, rows, tiles, case.form, sinks=a.sinks)
    return got, want


TWO = paged.Tuning(unroll=2)
EXTENDS = {
    "128": Extend(Case((90, 5, 33), dim=128, value_dim=128, dtype=mx.bfloat16, tuning=TWO), (8, 5, 1)),
    "128-f32": Extend(Case((70, 3), dim=128, value_dim=128, group=8, tuning=TWO), (6, 3)),
    "192-128": Extend(Case((70, 3), dim=192, value_dim=128, dtype=mx.float16, group=1, tuning=TWO), (9, 2)),
    "256": Extend(Case((70, 3), dim=256, value_dim=256, dtype=mx.bfloat16, group=8, tuning=TWO), (4, 3)),
    "256-f32": Extend(Case((40, 3), dim=256, value_dim=256, group=3, tuning=TWO), (4, 3)),
    "80": Extend(Case((70, 3), dim=80, value_dim=80, dtype=mx.float16, group=7, tuning=TWO), (11, 3)),
    "metal": Extend(Case((70, 3), group=8, tuning=paged.Tuning(unroll=2, heads=4)), (6, 3), pad_to=6),
    "all": Extend(Case((200, 66), window=33, sinks=True, softcap=2.0, page_size=16, tuning=TWO), (17, 66)),
    "one-row-each": Extend(Case((1, 2, 65), tuning=TWO), (1, 1, 1), pad_to=5),
}


EXTENDS |= {f"{n}-matrix": replace(e, case=through_matrices(e.case)) for n, e in EXTENDS.items()}


@pytest.mark.parametrize("name", EXTENDS)
@pytest.mark.parametrize("splits", [1, 3])
def test_extend_equals_the_reference(name: str, splits: int) -> None:
    extend = EXTENDS[name]
    case = replace(extend.case, tuning=replace(extend.case.tuning, splits=splits))
    if splits > 1:
        case = replace(case, lengths=tuple(n + 130 for n in case.lengths))
    for schedule in (0, 1, 2):
        got, want = extended(replace(extend, case=case), host_launcher(schedule, seed=schedule))
        assert agree(got, want), (schedule, distance(got, want))


@given(
    sequences=st.lists(st.tuples(st.integers(1, 150), st.integers(1, 12)), min_size=1, max_size=4),
    window=st.sampled_from([None, 7]),
    splits=st.sampled_from([1, 2]),
    matrix=st.booleans(),
    schedule=st.integers(0, 5),
)
def test_extend_equals_the_reference_for_any_sequences(
    sequences: list[tuple[int, int]], window: int | None, splits: int, matrix: bool, schedule: int
) -> None:
    tuning = replace(TWO, splits=splits)
    contexts = tuple(before + count for before, count in sequences)
    case = Case(contexts, group=2, dim=16, value_dim=16, window=window, tuning=tuning)
    case = through_matrices(case) if matrix else case
    got, want = extended(Extend(case, tuple(c for _, c in sequences)), host_launcher(schedule, seed=schedule))
    assert agree(got, want), distance(got, want)


# --- planted faults: (what runs, a line of the kernel, what it becomes) ---

Run = Callable[[Launcher], bool]


def decode_run(case: Case) -> Run:
    return lambda launch: agree(*decoded(case, launch))


def extend_run(extend: Extend) -> Run:
    return lambda launch: agree(*extended(extend, launch))


def fused_run(launch: Launcher) -> bool:
    a, b, got, want = fused(Case((9, 64, 70)), launch)
    return agree(got, want) and bool(mx.array_equal(a.k_pool[1:], b.k_pool[1:], equal_nan=True))


def matrix_fused_run(launch: Launcher) -> bool:
    _, _, got, want = fused(through_matrices(Case((9, 64, 70))), launch)
    return agree(got, want)


WIDE = replace(DIMS["256"], lengths=(40, 3))
FAULTS: dict[str, tuple[Run, str, str]] = {
    "race: warps joined too early": (
        decode_run(Case()),
        "    BARRIER();\n    for (int i = tid",
        "    for (int i = tid",
    ),
    "race: heads overwritten": (decode_run(WIDE), "if (from > 0) BARRIER();", ""),
    "race: tile read too early": (extend_run(EXTENDS["128"]), "    BARRIER();\n    for (int from", "    for (int from"),
    "race: tile overwritten": (extend_run(EXTENDS["256"]), "if (base > first) BARRIER();", ""),
    "off by one: one token too many": (decode_run(Case()), "sub >= old) s[u]", "sub > old) s[u]"),
    "off by one: newest token left out": (
        decode_run(Case()),
        "smaller(length, first + per)",
        "smaller(length - 1, first + per)",
    ),
    "off by one: window": (decode_run(FEATURES["window"]), "length - WINDOW)", "length - WINDOW - 1)"),
    "off by one: table's line": (
        decode_run(Case()),
        "size_t(row) * table_shape[1]",
        "size_t(row) * (table_shape[1] - 1)",
    ),
    "split: a token between two parts": (
        decode_run(Case((1700,), tuning=paged.Tuning(splits=2))),
        "begin + blocks_y - 1) / blocks_y",
        "begin) / blocks_y - 1",
    ),
    "sink of another head": (decode_run(FEATURES["sinks"]), "sinks[head * G + tile * GT + g]", "sinks[tile * GT + g]"),
    "page: offset lost": (decode_run(FEATURES["page-16"]), "* PAGE + t % PAGE", "* PAGE"),
    "extend: row sees its neighbour's length": (extend_run(EXTENDS["128"]), "lengths[first_row + r] : 0", "stop : 0"),
    "extend: window": (extend_run(EXTENDS["all"]), "t < seen[i] - WINDOW", "t <= seen[i] - WINDOW"),
    "write: neighbouring slot": (lambda f: written(Case(), [3, 9], f), "slots[block_x])", "slots[block_x]) + 1"),
    "write: last pack left out": (lambda f: written(Case(), [3, 9], f), "if (i < KEY)", "if (i < KEY - 1)"),
    "fused: newest token read from the pool": (fused_run, "smaller(end, length - 1)", "end"),
    "matrix, race: warps joined too early": (
        decode_run(CASES["128-matrix"]),
        "    BARRIER();\n    for (int j = tid",
        "    for (int j = tid",
    ),
    "matrix, race: sums overwritten": (
        extend_run(EXTENDS["256-matrix"]),
        "if (from > 0) BARRIER();",
        "",
    ),
    "matrix: a row's last token": (extend_run(EXTENDS["128-matrix"]), "t >= seen[h][c])", "t > seen[h][c])"),
    "matrix: tokens of a value swapped": (
        decode_run(CASES["128-matrix"]),
        "column * 2 + j % 2",
        "column * 2 + 1 - j % 2",
    ),
    "matrix: maximum of half a line": (
        decode_run(CASES["softcap-matrix"]),
        "step < 32; step *= 2) next",
        "step < 16; step *= 2) next",
    ),
    "matrix, fused: newest token read from the pool": (
        matrix_fused_run,
        "if (smaller(base + token, end - 1) == stop - 1) {\n            keys",
        "if (false) {\n            keys",
    ),
    "matrix: a value from before the window": (
        decode_run(CASES["all-matrix"]),
        "WINDOW > 0 ? larger(token, since) : token",
        "token",
    ),
    "fused: nothing stored": (fused_run, "if (writes && part + n * LANES < KEY)", "if (false)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault: str) -> None:
    run, line, planted = FAULTS[fault]

    def edit(text: str) -> str:
        return text.replace(line, planted)

    assert run(host_launcher())
    assert not all(run(host_launcher(schedule, seed=schedule, edit=edit)) for schedule in (0, 1, 2, 3))


@pytest.mark.parametrize(
    ("line", "planted", "words"),
    [
        ("    BARRIER();\n    for (int i = tid", "    if (lane < 5) BARRIER();\n    for (int i = tid", "never come"),
        ("SHARED(float, totals, WARPS * GT);", "SHARED(float, totals, 9000);", "too many"),
        ("  SHARED(float, tops", "  if (warp > 0) BARRIER(); else BARRIER_2();\n  SHARED(float, tops", "different"),
    ],
)
def test_broken_rules_are_named(line: str, planted: str, words: str) -> None:
    planted = planted.replace("BARRIER_2()", "pippin::barrier(-1)")
    with pytest.raises(KernelFault, match=words):
        decoded(Case(), host_launcher(edit=lambda text: text.replace(line, planted)))


def test_a_kernel_that_does_not_compile_says_why() -> None:
    with pytest.raises(KernelFault, match="no_such_name"):
        decoded(Case(), host_launcher(edit=lambda text: text + "no_such_name();"))
