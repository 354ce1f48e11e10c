"""The kernel that finds how far limits reach, on the host, against bisection; and draws that go through it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pippin import kernels, sampler
from pippin.kernels import checks, paged, reference, select
from pippin.kernels.host import KernelFault, compiler, host_launcher
from pippin.kernels.launch import Launcher
from pippin.kernels.select import Limits
from pippin.sampler import kept_tokens, prompt_logprobs, sample, sampling_inputs, top_ids
from pippin.types import Request, SamplingParams, Work
from tests.planted import assert_found
from tests.test_kernels_dispatch import Gpu, played

pytestmark = pytest.mark.skipif(compiler() is None, reason="kernels run on the host only where g++ is installed")

Floats = npt.NDArray[np.float32]


def by_bisection(bits: mx.array, mass: mx.array | None, limits: Limits, signed: bool = False) -> mx.array:
    """What is kept where no kernel runs."""
    limits = limits.column()
    return sampler._nearest(bits, mass, limits, sampler._bisect(bits, mass, limits, 31 if signed else 30))


def mass_of(distance: mx.array) -> mx.array:
    """As ``kept_tokens`` makes it; a row without any allowed token has none."""
    weights = mx.exp(-distance)
    total = weights.sum(axis=-1, keepdims=True)
    return sampler._integers(weights, mx.where(total > 0, sampler.PROBABILITY_1 / total, 0.0))


NAN = np.array(2**31 - 1, np.uint32).view(np.float32)  # as CUDA makes it
DISTANCES: dict[str, Any] = {
    "distinct": lambda r, n: np.abs(r.normal(0, 4, n)),
    "often equal": lambda r, n: np.abs(r.normal(0, 4, n)).round(),
    "cold": lambda r, n: np.abs(r.normal(0, 4, n)) * 1e5,
    "hot": lambda r, n: np.abs(r.normal(0, 4, n)) * 1e-5,
    "equal": lambda r, n: np.full(n, r.choice([0.0, 1.5, 9.0])),
    "masked": lambda r, n: np.where(r.random(n) < 0.9, np.inf, np.abs(r.normal(0, 2, n))),
    "nothing": lambda r, n: np.full(n, np.inf),
    "numbers": lambda r, n: np.where(r.random(n) < 0.5, NAN, 1.0),
    "one apart": lambda r, n: np.where(np.arange(n) == n - 1, 0.0, 20.0),
}


@st.composite
def rows(draw: st.DrawFn) -> tuple[Floats, list[int], list[float]]:
    """Distances [S, n], and each row's top_k and top_p."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = draw(st.one_of(st.integers(8, 70), st.integers(500, 3000)))
    kinds = draw(st.lists(st.sampled_from(list(DISTANCES)), min_size=1, max_size=4))
    found = np.stack([DISTANCES[kind](rng, n) for kind in kinds]).astype(np.float32)
    nearest = np.fmin.reduce(found, axis=1, keepdims=True)
    found -= np.where(np.isfinite(nearest), nearest, 0)  # the likeliest has a distance of 0
    most = st.sampled_from([0, 1, 2, 7, 40, n // 2, n - 1, n, n + 1, 2**31 - 1])
    share = st.sampled_from([0.0, 1e-9, 0.03, 0.5, 0.9, 0.999, 0.9999999, 1.0, math.inf, math.nan])
    size = len(kinds)
    tokens = draw(st.lists(most, min_size=size, max_size=size))
    return found, tokens, draw(st.lists(share, min_size=size, max_size=size))


@given(rows(), st.sampled_from([(True, False), (False, True), (True, True)]), st.integers(0, 2))
def test_what_is_kept_is_bisections_to_the_last_token(
    case: tuple[Floats, list[int], list[float]], limited: tuple[bool, bool], schedule: int
) -> None:
    distance, most, share = mx.array(case[0]), mx.array(case[1], mx.int32), mx.array(case[2])
    by_count, by_mass = limited
    mass = mass_of(mx.where(mx.isnan(distance), mx.inf, distance)) if by_mass else None
    target = share * mass.sum(axis=-1).astype(mx.float32) if mass is not None else None
    limits, bits = Limits(most if by_count else None, target), distance.view(mx.uint32)
    found = select.boundary(host_launcher(schedule, 5), bits, mass, limits)
    want = np.array(by_bisection(bits, mass, limits))
    np.testing.assert_array_equal(np.array(select.tokens_up_to(bits, *found)), want)
    np.testing.assert_array_equal(np.array(reference.kept(bits, mass, limits)), want)


@given(st.integers(0, 2**32 - 1), st.integers(1, 3000), st.integers(8, 3000), st.sampled_from([1, 1 << 16, 1 << 29]))
@settings(max_examples=25)
def test_words_of_all_sizes_are_ordered(seed: int, most: int, n: int, step: int) -> None:
    """As the likeliest tokens are found: by count alone, with the highest bit."""
    rng = np.random.default_rng(seed)
    bits = mx.array(rng.integers(0, 2**32, (2, n), np.uint32) // step * step)
    limits = Limits(mx.array([most, min(most, n)], mx.int32), None)
    found = select.boundary(host_launcher(), bits, None, limits, signed=True)
    np.testing.assert_array_equal(
        np.array(select.tokens_up_to(bits, *found)), np.array(by_bisection(bits, None, limits, signed=True))
    )


def test_a_wide_vocabulary() -> None:
    """As long as there are, of which few differ."""
    rng = np.random.default_rng(3)
    distance = mx.array((np.abs(rng.normal(0, 3, (2, 262_143))) * 4).round().astype(np.float32) / 4)
    mass, bits = mass_of(distance), distance.view(mx.uint32)
    limits = Limits(mx.array([200_000, 2**31 - 1], mx.int32), mx.array([0.95, 0.37]) * 2**31)
    found = select.boundary(host_launcher(), bits, mass, limits)
    kept = np.array(select.tokens_up_to(bits, *found))
    np.testing.assert_array_equal(kept, np.array(by_bisection(bits, mass, limits)))
    assert (kept.sum(axis=1) > 1000).all()
    assert (kept.sum(axis=1) < 250_000).all()


# --- in a sampler ---


def works(options: Sequence[dict[str, Any]]) -> list[Work]:
    params = [SamplingParams(seed=i, **given) for i, given in enumerate(options)]
    return [Work(Request(str(i), [0], 1, p, row=i + 1), 0, 1, True) for i, p in enumerate(params)]


MIXED: list[dict[str, Any]] = [
    {"top_p": 0.9},
    {"top_k": 40},
    {"temperature": 0.0},
    {},
    {"top_k": 20, "top_p": 0.8, "temperature": 0.6},
    {"top_p": 0.3, "logprobs": True, "top_logprobs": 7},
]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Gpu]:
    monkeypatch.setattr(kernels, "draws", lambda *_: False)  # what takes over where that kernel is wrong
    yield from played(monkeypatch, tmp_path, Gpu())


def drawn() -> list[Any]:
    """Of rows with limits of every kind: what is kept, the tokens, and the likeliest."""
    logits = mx.array(np.random.default_rng(1).normal(0, 4, (6, 1003)).astype(np.float32)).astype(mx.bfloat16)
    plan, inputs = sampling_inputs(works(MIXED), 1001, partition=False)
    assert inputs.temperature is not None
    distance = mx.abs(logits.astype(mx.float32))
    sampled = sample(logits, plan, inputs, mx.zeros(6, mx.int32))
    likeliest = top_ids(logits.astype(mx.float32), 9, partition=False)
    scored = prompt_logprobs(logits, mx.array([1, 2, 3, 4, 5, 6]), 3)
    found = (kept_tokens(distance, plan, inputs), *sampled[:2], likeliest, *scored)
    return [np.array(a) for a in found if a is not None]


def test_draws_are_the_same_by_kernel(monkeypatch: pytest.MonkeyPatch, gpu: Gpu) -> None:
    mine = drawn()
    assert gpu.launched.count("boundary") > 4
    monkeypatch.setattr(kernels, "backend", lambda: None)
    for a, b in zip(mine, drawn(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_kernel_that_is_wrong_is_not_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernels, "draws", lambda *_: False)
    for gpu in played(monkeypatch, tmp_path, Gpu(wrong=("boundary",))):
        mine = drawn()
        checked = gpu.launched.count("boundary")
        drawn()
        assert gpu.launched.count("boundary") == checked
        assert kernels.verify(mx.float32, "limits") == {"boundary": False}
    monkeypatch.setattr(kernels, "backend", lambda: None)
    for a, b in zip(mine, drawn(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_short_rows_are_left_to_mlx(gpu: Gpu) -> None:
    bits = mx.zeros((2, 7), mx.uint32)
    assert kernels.boundary(bits, None, Limits(mx.array([1, 2]), None)) is None
    assert kernels.boundary(mx.zeros((2, 8), mx.uint32), None, Limits(mx.array([1, 2]), None)) is not None


# --- planted faults ---

PLANTED: dict[str, tuple[str, str]] = {
    "a row's beginning": ("lead = int(begin % 4)", "lead = 0"),
    "tokens before the range": ("&& key >= low", ""),
    "others among equals": ("(!by_id || x[u].w[e] == tie)", "true"),
    "higher ids first": ("near_ids[i] < id", "near_ids[i] > id"),
    "the range begins a number early": ("from = ends[j - 1] + 1;", "from = ends[j - 1];"),
    "ranges too short": ("step * unsigned(j + 1) - 1", "step * unsigned(j + 1) - 2"),
    "the last id left out": ("high = unsigned(n - 1)", "high = unsigned(n - 2)"),
    "all but one is all": ("most_tokens >= n)", "most_tokens >= n - 1)"),
    "the range's last token": (" || rank + 1 == count + unsigned(found)", ""),
    "its own mass before it": (
        "unsigned rank = count;",
        "unsigned rank = count; mass_before += near_mass[tid];",
    ),
    "mass before the range": ("mass_before += before_mass;", ""),
    "tokens before the range's": ("count += before;", ""),
    "a warp's sums": ("i < WARPS; i++", "i < WARPS - 1; i++"),
    "places of other warps": ("i < warp; i++", "i + 1 < warp; i++"),
    "an empty range": ("by_id ? tie : low", "tie"),
    "no token": ("last[block_x] = none ? -1 : n;", "last[block_x] = n;"),
    "places before they are known": ("  BARRIER();\n  for (int i = 0; i < warp", "  for (int i = 0; i < warp"),
    "ranks before the list": ("  BARRIER();\n  if (found == 0", "  if (found == 0"),
    "totals before they are there": ("    BARRIER();\n    // The last", "    // The last"),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults_are_found(fault: str) -> None:
    """By the self-check that would have to find them on a machine that nobody has seen."""

    def passes(launch: Launcher) -> bool:
        with suppress(KernelFault):
            return checks.check_boundary(launch, mx.float32, paged.Tuning())
        return False

    assert_found(*PLANTED[fault], passes)
