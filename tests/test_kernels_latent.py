"""Attention over latents, on the host thread by thread, against the reference; and faults planted in it are found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pippin.kernels import latent, paged, reference
from pippin.kernels.checks import LATENT_CHECKS
from pippin.kernels.form import Form
from pippin.kernels.host import compiler, host_launcher
from pippin.kernels.launch import Launcher
from tests.planted import assert_found
from tests.test_kernels import agree, distance

pytestmark = pytest.mark.skipif(compiler() is None, reason="kernels run on the host only where g++ is installed")


@dataclass(frozen=True)
class Case:
    """One call; ``heads`` queries a row over latents ``dim`` wide and keys ``turned`` wide."""

    lengths: tuple[int, ...] = (5, 0, 70, 1)
    heads: int = 9
    dim: int = 64
    turned: int = 16
    dtype: mx.Dtype = mx.float32
    page_size: int = 1
    splits: int = 1
    most: int = 8
    seed: int = 0


@dataclass
class Arrays:
    q: mx.array
    turned: mx.array
    k_pool: mx.array
    v_pool: mx.array
    table: mx.array
    lengths: mx.array


def arrays(case: Case) -> Arrays:
    """Random inputs; pages are shuffled, and NaN lies in every slot that no row sees."""
    random = np.random.default_rng(case.seed)
    rows, width = len(case.lengths), max(1, -(-max(case.lengths) // case.page_size)) + 1
    table = (random.permutation(rows * width).reshape(rows, width) + 1).astype(np.int32)
    unseen = np.ones((rows * width + 1) * case.page_size, bool)
    for line, length in zip(table, case.lengths, strict=True):
        unseen[(line[:, None] * case.page_size + np.arange(case.page_size)).reshape(-1)[:length]] = False

    def normal(*shape: int) -> mx.array:
        return mx.array(random.standard_normal(shape, np.float32)).astype(case.dtype)

    def pool(dim: int) -> mx.array:
        return mx.where(mx.array(unseen)[:, None, None], mx.nan, normal(len(unseen), 1, dim)).astype(case.dtype)

    made = Arrays(
        normal(rows, case.heads, case.dim),
        normal(rows, case.heads, case.turned) * 0.3,
        pool(case.dim),
        pool(case.turned),
        mx.array(table),
        mx.array(np.array(case.lengths, np.int32)),
    )
    mx.eval(made.q, made.turned, made.k_pool, made.v_pool)
    return made


def attended(case: Case, launch: Launcher) -> tuple[mx.array, mx.array]:
    """(kernel's, reference's)."""
    a, form = arrays(case), Form(case.page_size, case.dim**-0.5)
    cut = latent.cut_of(paged.Tuning(heads=case.most), len(case.lengths), case.heads, max(case.lengths), 1)
    cut = replace(cut, splits=case.splits)
    given_arrays = (a.q, a.turned, a.k_pool, a.v_pool, a.table, a.lengths, form)
    return latent.latent_decode(launch, *given_arrays, cut), reference.latent_decode(*given_arrays)


CASES = {
    "small": Case(),
    "deepseek-f32": Case((33, 0, 7), heads=16, dim=512, turned=64),
    "deepseek-bf16": Case((33, 0, 70), heads=40, dim=512, turned=64, dtype=mx.bfloat16),
    "deepseek-f16": Case((19,), heads=20, dim=512, turned=64, dtype=mx.float16, page_size=16),
    "metal": Case((33, 2), heads=17, dim=512, turned=64, dtype=mx.bfloat16, most=4),
    "narrow": Case(heads=3, dim=8, turned=8, dtype=mx.float16),
    "odd": Case(heads=5, dim=320, turned=40, page_size=3, lengths=(3, 4, 6, 0, 50)),
    "one-head": Case(heads=1, lengths=(1,)),
    "only-padding": Case(lengths=(0, 0)),
    "one-long": Case(lengths=(3, 1500, 2, 0)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("splits", [1, 4])
def test_latents_are_attended_to_as_the_reference_does(name: str, splits: int) -> None:
    case = replace(CASES[name], splits=splits)
    if splits > 1:
        case = replace(case, lengths=tuple(9 * n for n in case.lengths))
    for schedule in (0, 1, 2):
        got, want = attended(case, host_launcher(schedule, seed=schedule))
        assert agree(got, want), (schedule, distance(got, want))


@given(
    lengths=st.lists(st.integers(0, 700), min_size=1, max_size=4),
    heads=st.integers(1, 12),
    splits=st.sampled_from([1, 2]),
    page_size=st.sampled_from([1, 16]),
    schedule=st.integers(0, 5),
)
def test_any_lengths_and_heads(lengths: list[int], heads: int, splits: int, page_size: int, schedule: int) -> None:
    case = Case(tuple(lengths), heads, 16, 8, page_size=page_size, splits=splits)
    got, want = attended(case, host_launcher(schedule, seed=schedule))
    assert agree(got, want), distance(got, want)


@pytest.mark.parametrize("name", ["small", "deepseek-f32", "odd", "only-padding"])
def test_products_of_gathered_latents_are_the_same(name: str) -> None:
    case = CASES[name]
    a, form = arrays(case), Form(case.page_size, case.dim**-0.5)
    k_pool, v_pool = (mx.where(mx.isnan(pool), 0.0, pool) for pool in (a.k_pool, a.v_pool))
    latents, keys = reference.kv_gather(k_pool, v_pool, a.table, page_size=case.page_size)
    got = latent.over_gathered(a.q, a.turned, latents, keys, a.lengths, form.scale)
    want = reference.latent_decode(a.q, a.turned, k_pool, v_pool, a.table, a.lengths, form)
    assert agree(got, want), distance(got, want)


@pytest.mark.parametrize(
    ("dims", "dtype", "taken", "wide"),
    [
        ((512, 64), mx.bfloat16, True, True),
        ((32, 8), mx.float32, True, False),
        ((512, 512), mx.bfloat16, False, False),
        ((516, 64), mx.bfloat16, False, False),
        ((512, 64), mx.int32, False, False),
    ],
)
def test_which_pools_are_latents(dims: tuple[int, int], dtype: mx.Dtype, taken: bool, wide: bool) -> None:
    pools = [mx.zeros((3, 1, d), dtype) for d in dims]
    assert (latent.takes(*pools), latent.are_wide(*pools)) == (taken, wide)
    assert not latent.takes(*(mx.zeros((3, 2, d), dtype) for d in dims)), "of several heads"


@given(heads=st.integers(1, 256), rows=st.integers(1, 300), most=st.sampled_from([4, 8]))
def test_a_cut_takes_each_head_once(heads: int, rows: int, most: int) -> None:
    cut = latent.cut_of(paged.Tuning(heads=most), rows, heads, 5000, 132)
    assert cut.queries <= most // 2
    assert cut.tiles * cut.warps * cut.queries >= heads
    assert (cut.tiles - 1) * cut.warps * cut.queries < heads


PLANTED = {
    "the query of the head before": ("float(q[query * D", "float(q[(query > 0 ? query - 1 : 0) * D"),
    "the turned keys left out": ("+ dot(turned[i], keys[u])", ""),
    "a token too many": ("base + from + u >= end", "base + from + u > end"),
    "tokens not waited for": ("    BARRIER();\n    for (int from", "    for (int from"),
    "the next tokens come too early": ("if (base > first) BARRIER();", ""),
    "a page's tokens exchanged": ("* PAGE + t % PAGE", "* PAGE + (PAGE - 1 - t % PAGE)"),
    "the latent's scale for all": ("e]) * LOG2E", "e]) * params[0] * LOG2E"),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults_are_found(fault: str) -> None:
    """By the self-check that would have to find them on a machine that nobody has seen."""
    check: Callable[..., bool] = LATENT_CHECKS["latent_decode"]
    with mx.stream(mx.cpu):
        assert check(host_launcher(1), mx.float32, paged.Tuning())
    assert_found(*PLANTED[fault], lambda launch: check(launch, mx.float32, paged.Tuning()))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("most", [4, 8])
@pytest.mark.parametrize("check", LATENT_CHECKS)
def test_the_kernels_for_latents_pass_their_checks(check: str, dtype: mx.Dtype, most: int) -> None:
    run: Callable[..., bool] = LATENT_CHECKS[check]  # type: ignore[index]
    assert run(host_launcher(2), dtype, paged.Tuning(heads=most, unroll=2), "latents")
