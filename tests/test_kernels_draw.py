"""The kernels that draw tokens and find log probabilities, on the host, against plain MLX; samplers that use them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pippin import kernels, sampler, sampler_graphs
from pippin.graph import Compiler
from pippin.kernels import checks, drawing, paged, reference
from pippin.kernels.drawing import TOP_LOGPROBS, Filters
from pippin.kernels.host import KernelFault, host_launcher
from pippin.kernels.host import compiler as host_compiler
from pippin.kernels.launch import Launcher
from pippin.sampler import (
    FEW_TOPS,
    Sampled,
    SamplingInputs,
    SamplingPlan,
    allow,
    sample,
    sampling_inputs,
    token_logprobs,
)
from pippin.sampler_graphs import SamplerGraphs
from pippin.types import Request, SamplingParams, Work
from tests.planted import assert_found
from tests.test_kernels_dispatch import Gpu, played
from tests.test_sampler_graphs import fused_kernels, traced

pytestmark = pytest.mark.skipif(host_compiler() is None, reason="kernels run on the host only where g++ is installed")

DTYPES = [mx.float32, mx.float16, mx.bfloat16]
LOGITS: dict[str, Any] = {
    "flat": lambda r, n: r.normal(0, 0.5, n),
    "distinct": lambda r, n: r.normal(0, 4, n),
    "often equal": lambda r, n: r.normal(0, 2, n).round(),
    "equal": lambda r, n: np.full(n, 1.5),
    "one": lambda r, n: np.where(np.arange(n) == n - 1, 30.0, r.normal(0, 1, n)),
    "mostly refused": lambda r, n: np.where(r.random(n) < 0.95, -np.inf, r.normal(0, 2, n)),
    "zeros": lambda r, n: np.where(r.random(n) < 0.5, 0.0, -0.0),
}


@st.composite
def cases(draw: st.DrawFn) -> tuple[mx.array, int, SamplingInputs]:
    """Logits [S, V], how many exist, and what rows ask for; some of it is None."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = draw(st.one_of(st.integers(256, 300), st.integers(1000, 4200)))
    kinds = draw(st.lists(st.sampled_from(list(LOGITS)), min_size=1, max_size=5))
    size, width = len(kinds), n + draw(st.integers(0, 9))
    logits = np.stack([LOGITS[kind](rng, width) for kind in kinds])
    logits[:, n:] = 99.0  # of ids that do not exist

    def some(values: list[float], kind: Any, least: int = 0) -> mx.array | None:
        if least == 0 and draw(st.booleans()):
            return None
        return mx.array(np.array([draw(st.sampled_from(values)) for _ in range(size)], kind))

    masks = {"most": rng.integers(0, 2**32, (size, -(-n // 32)), np.uint32) >> 3, "none": 0, "all": 2**32 - 1}
    mask = draw(st.sampled_from(["", "most", "none", "all"]))
    words = np.zeros((size, -(-n // 32)), np.uint32) + np.array(masks[mask], np.uint32) if mask else None
    return (
        mx.array(logits).astype(draw(st.sampled_from(DTYPES))),
        n,
        SamplingInputs(
            some([0.0, 0.2, 1.0, 1.0, 3.0, 50.0], np.float32, 1),
            mx.array(rng.integers(0, 2**32, (size, 2), np.uint32)),
            some([1, 2, 7, 40, n - 1, n, 2**31 - 1], np.int32),
            some([1e-9, 0.03, 0.5, 0.9, 0.999, math.inf], np.float32),
            some([-math.inf, -0.2, -3.0, -9.0], np.float32),
            None,
            None if words is None else mx.array(words),
        ),
    )


def plain(logits: mx.array, n: int, inputs: SamplingInputs) -> Sampled:
    """What is drawn where no kernel runs."""
    plan = SamplingPlan(n, True, inputs.top_k is not None, inputs.top_p is not None, inputs.log_min_p is not None)
    return sample(logits, plan, inputs, mx.zeros(logits.shape[0], mx.int32))


def filters(inputs: SamplingInputs) -> Filters:
    return Filters(*inputs[:5], inputs.allowed)


def nearly(logits: mx.array, n: int, inputs: SamplingInputs, by: float) -> list[int]:
    """The same with temperature and top_p off by a little: where that changes a token, the last digits may too."""
    assert inputs.temperature is not None
    top_p = None if inputs.top_p is None else inputs.top_p * (1 + by)
    return numbers(plain(logits, n, inputs._replace(temperature=inputs.temperature * (1 + by), top_p=top_p)).tokens)


def numbers(tokens: mx.array) -> list[int]:
    return [int(token) for token in np.array(tokens)]


@given(cases(), st.integers(0, 2))
@settings(deadline=None)
def test_a_kernel_draws_what_plain_mlx_does(case: tuple[mx.array, int, SamplingInputs], schedule: int) -> None:
    logits, n, inputs = case
    tokens, finite = drawing.draw(host_launcher(schedule, 7), logits, n, filters(inputs))
    want = plain(logits, n, inputs)
    assert finite.tolist() == want.finite.tolist()
    might = zip(numbers(want.tokens), nearly(*case, 1e-5), nearly(*case, -1e-5), strict=True)
    for row, (token, choices) in enumerate(zip(numbers(tokens), might, strict=True)):
        assert token in choices, row
        if len(set(choices)) == 1:
            assert token == choices[0], row


@given(cases(), st.integers(0, 2), st.sampled_from([0, 1, 5, 32, 200, 256]))
@settings(deadline=None)
def test_the_likeliest_and_their_log_probabilities(
    case: tuple[mx.array, int, SamplingInputs], schedule: int, count: int
) -> None:
    logits, n, _ = case
    tokens = mx.array(np.arange(logits.shape[0]) * 31, mx.int32)
    found = drawing.top_logprobs(host_launcher(schedule, 7), logits, n, tokens, count)
    want = reference.top_logprobs(logits, n, tokens, count)
    np.testing.assert_allclose(np.array(found[0]), np.array(want[0]), atol=1e-4)
    if count:
        np.testing.assert_array_equal(np.array(found[1]), np.array(want[1]))
        np.testing.assert_allclose(np.array(found[2]), np.array(want[2]), atol=1e-4)


@pytest.mark.parametrize("n", [256, 257, 999, 1000])
def test_noise_is_mlxs_to_the_last_token(n: int) -> None:
    """Of equal logits the token drawn is where the noise is largest: over many keys, everywhere."""
    keys = mx.array(np.random.default_rng(n).integers(0, 2**32, (64, 2), np.uint32))
    tokens, _ = drawing.draw(host_launcher(), mx.zeros((64, n)), n, Filters(mx.ones(64), keys))
    np.testing.assert_array_equal(np.array(tokens), np.array(mx.argmax(reference.gumbel(keys, n), axis=-1)))


def test_a_wide_vocabulary() -> None:
    """Longer than what a block looks at before it goes on, and of few distinct logits."""
    rng = np.random.default_rng(5)
    logits = mx.array((rng.normal(0, 3, (3, 151_936)) * 2).round() / 2).astype(mx.bfloat16)
    inputs = SamplingInputs(
        mx.array([1.0, 2.0, 9.0]),
        mx.array(rng.integers(0, 2**32, (3, 2), np.uint32)),
        mx.array([2**31 - 1, 50_000, 2**31 - 1], mx.int32),
        mx.array([0.9, 0.4, math.inf]),
    )
    tokens, _ = drawing.draw(host_launcher(), logits, 151_669, filters(inputs))
    np.testing.assert_array_equal(np.array(tokens), np.array(plain(logits, 151_669, inputs).tokens))
    found = drawing.top_logprobs(host_launcher(), logits, 151_669, tokens, 100)
    want = reference.top_logprobs(logits, 151_669, tokens, 100)
    np.testing.assert_array_equal(np.array(found[1]), np.array(want[1]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_no_numbers_say_so(dtype: mx.Dtype) -> None:
    rows = [[math.nan], [math.inf], [-math.inf], [0.0]]
    logits = mx.array(rows).astype(dtype) + mx.zeros((4, 300), dtype)
    logits[0, 1:] = 1.0
    hot = Filters(mx.ones(4), mx.ones((4, 2), mx.uint32), mx.full(4, 3, mx.int32), mx.full(4, 0.5))
    for asked in (hot, Filters()):
        tokens, finite = drawing.draw(host_launcher(), logits, 300, asked)
        assert finite.tolist() == [False, False, False, True]
        assert bool(((tokens >= 0) & (tokens < 300)).all().item())
    logprob, ids, _ = drawing.top_logprobs(host_launcher(), logits, 300, tokens, 5)
    assert ids[:3].tolist() == [[0, 1, 2, 3, 4]] * 3
    assert bool(mx.isnan(logprob[0]).item())


def test_a_rows_token_does_not_depend_on_its_batch_or_dtype() -> None:
    """Nor on what others of it ask for: edits of another row make it float32."""
    logits, n, asked = checks.drawn_rows(mx.bfloat16)[0]
    whole, _ = drawing.draw(host_launcher(), logits, n, asked)
    wide, _ = drawing.draw(host_launcher(), logits.astype(mx.float32)[:, :n], n, asked)
    assert wide.tolist() == whole.tolist()
    for row in (1, 4, 9):
        alone = Filters(*(None if a is None else a[row : row + 1] for a in asked))
        assert drawing.draw(host_launcher(), logits[row : row + 1], n, alone)[0].item() == whole[row].item()


@pytest.mark.parametrize("masked", [False, True])
def test_a_rows_token_does_not_depend_on_how_it_is_cut(masked: bool) -> None:
    """Few rows are cut in parts, many are not."""
    logits, n, asked = checks.drawn_rows(mx.bfloat16)[2 if masked else 1]
    found = {}
    for rows in (1, 3, 32, 33):
        some = mx.array([*range(rows)]) % 32
        part = Filters(*(None if a is None else a[some] for a in asked))
        found[drawing.parts_of(rows)] = numbers(drawing.draw(host_launcher(), logits[some], n, part)[0])
    assert found.keys() == {32, 4, 1}
    assert found[32] == found[1][:3]
    assert found[4] == found[1][:32]


@given(st.integers(1, 5000))
def test_parts_fill_a_gpu_and_no_more(rows: int) -> None:
    parts = drawing.parts_of(rows)
    assert parts & (parts - 1) == 0
    assert parts == 1 or 4 <= parts <= 32
    assert parts * rows <= max(128, rows)


# --- in a sampler ---


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Gpu]:
    yield from played(monkeypatch, tmp_path, Gpu())


OPTIONS: list[dict[str, Any]] = [
    {"top_p": 0.9},
    {"top_k": 40, "min_p": 0.1},
    {"temperature": 0.0, "logprobs": True, "top_logprobs": 7},
    {},
    {"top_k": 20, "top_p": 0.8, "temperature": 0.6, "logit_bias": {5: 3.0, 900: -4.0}},
]


def drawn(options: list[dict[str, Any]], masked: bool = False) -> Sampled:
    """Rows with these options, the last of which may draw few tokens only."""
    params = [SamplingParams(seed=i, **given) for i, given in enumerate(options)]
    works = [Work(Request(str(i), [0], 1, p, row=i + 1), 0, 1, True) for i, p in enumerate(params)]
    size = len(works)
    logits = mx.array(np.random.default_rng(1).normal(0, 4, (size, 1003)).astype(np.float32)).astype(mx.bfloat16)
    plan, inputs = sampling_inputs(works, 1001, partition=False)
    if masked:
        plan, inputs = allow(plan, inputs, mx.full((size, 32), 0x00100400, mx.uint32))
    return sample(logits, plan, inputs, mx.zeros(size, mx.int32))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", [OPTIONS, OPTIONS[:4], OPTIONS[2:3], OPTIONS[:1], OPTIONS[3:4]], ids=str)
def test_sampling_goes_through_the_kernels(
    monkeypatch: pytest.MonkeyPatch, gpu: Gpu, options: list[dict[str, Any]], masked: bool
) -> None:
    kernels.verify(mx.float32, "draws"), kernels.verify(mx.bfloat16, "draws")
    gpu.launched.clear()
    mine = drawn(options, masked)
    logprobs = any("logprobs" in given for given in options)
    edits = any("logit_bias" in given for given in options)
    draws = ["draw_survey", "draw_part", "draw_pick"] if options == [{}] else ["draw"] * (1 + edits)
    assert gpu.launched == draws + ["top_logprobs"] * logprobs
    monkeypatch.setattr(kernels, "backend", lambda: None)
    for a, b in zip(mine, drawn(options, masked), strict=True):
        if a is not None and b is not None:
            np.testing.assert_allclose(np.array(a), np.array(b), atol=1e-4)


def test_many_alternatives_and_short_rows_are_left_to_mlx(gpu: Gpu) -> None:
    assert not kernels.draws(mx.zeros((2, 255)), 255)
    assert not kernels.draws(mx.zeros((2, 300)), 301)
    assert not kernels.draws(mx.zeros((2, 300), mx.int32), 300)
    assert kernels.draws(mx.zeros((2, 300)), 256)
    gpu.launched.clear()
    _, ids, _ = token_logprobs(mx.random.normal((2, 600)), 600, mx.array([1, 2]), 300)
    assert ids is not None
    assert ids.shape == (2, 300)
    assert "top_logprobs" not in gpu.launched


@pytest.mark.parametrize("wrong", ["draw", "top_logprobs"])
def test_kernels_that_are_wrong_are_not_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wrong: str) -> None:
    for gpu in played(monkeypatch, tmp_path, Gpu(wrong=(wrong,))):
        assert not kernels.verify(mx.float32, "draws")[wrong]  # type: ignore[index]
        assert not kernels.draws(mx.zeros((2, 1003), mx.bfloat16), 1001)
        gpu.launched.clear()
        mine = drawn(OPTIONS)
        assert not {"draw", "top_logprobs"} & set(gpu.launched)
    monkeypatch.setattr(kernels, "backend", lambda: None)
    assert mine.tokens.tolist() == drawn(OPTIONS).tokens.tolist()


def one_launch(logits: mx.array, *_: object) -> tuple[mx.array, mx.array]:
    """Stands for a kernel, which the host can't run while a function is traced."""
    return logits[:, 0].view(mx.int32), logits[:, 1].view(mx.int32) == 0


def test_compiled_draws_have_no_operations_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing for MLX to compile, whatever is asked for."""
    monkeypatch.setattr(kernels, "draws", lambda *_: True)
    monkeypatch.setattr(kernels, "draw", one_launch)
    logits, table, rows = mx.zeros((4, 300)), mx.zeros(9, mx.int32), mx.zeros(4, mx.int32)
    for plan, inputs in sampler_graphs._kinds(300, 4):
        stage = partial(sampler_graphs._drawn, 300, plan)
        masked = inputs._replace(allowed=mx.zeros((4, 10), mx.uint32))
        for given_inputs in (inputs, masked):
            found = fused_kernels(traced(stage, table, rows, logits, None, given_inputs), tmp_path)
            assert len(found) <= 1, found
    assert FEW_TOPS <= kernels.MOST_TOPS


def test_no_draw_is_traced_while_serving(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever requests combine, edits and masks among it."""
    monkeypatch.setattr(kernels, "draws", lambda *_: True)
    monkeypatch.setattr(kernels, "draw", one_launch)
    logits, table, rows = mx.zeros((4, 300)), mx.zeros(9, mx.int32), mx.zeros(4, mx.int32)
    compiler = Compiler()
    graphs = SamplerGraphs(300, compiler)
    graphs.warm(logits, table, tops=())
    warmed = compiler.traces
    for (plan, inputs), places, masked in product(
        sampler_graphs._kinds(300, 4), (0, *sampler.EDIT_PLACES), (False, True)
    ):
        edits = sampler_graphs._no_edits(places, 4) if places else None
        asked = inputs._replace(edits=edits, allowed=mx.zeros((4, 10), mx.uint32) if masked else None)
        graphs.draw(logits, plan, asked, rows, table, rows)
    assert compiler.traces == warmed


# --- self-checks ---


@pytest.mark.parametrize("dtype", DTYPES)
def test_checks_do_not_hang_on_last_digits(dtype: mx.Dtype) -> None:
    """A GPU's exponentials and logarithms may differ in them."""
    for logits, n, asked in checks.drawn_rows(dtype):
        for by in (1 + 2e-5, 1 - 2e-5):
            heat = None if asked.temperature is None else asked.temperature * by
            near = asked._replace(temperature=heat, top_p=None if asked.top_p is None else asked.top_p * by)
            assert reference.draw(logits, n, near).tolist() == reference.draw(logits, n, asked).tolist()


PLANTED: dict[str, tuple[str, str]] = {
    "the odd one's counter": (
        "y = i < n / 2 ? unsigned(late + i) : 0u;\n        threefry",
        "y = late + i;\n        threefry",
    ),
    "halves of another size": ("n = row.n, late = (n + 1) / 2;", "n = row.n, late = n / 2;"),
    "the key's halves": (
        "noise[2 * block_x], b = noise[2 * block_x + 1]",
        "noise[2 * block_x + 1], b = noise[2 * block_x]",
    ),
    "a round's turn": (
        "four_rounds<17, 29, 16, 24>(x, y);\n  x += b;",
        "four_rounds<17, 29, 24, 16>(x, y);\n  x += b;",
    ),
    "the other's noise": ("gumbel_of(u_late) - d[p + 1]", "gumbel_of(u) - d[p + 1]"),
    "too much ruled out": ("(best + d[p + 1]), LOG2E, 0.01f", "(best + d[p + 1]), LOG2E, -1.5f"),
    "a token too many by id": ("id <= kept.last_id", "id <= kept.last_id + 1"),
    "min_p the other way": ("distance <= kept.farthest", "(distance < kept.farthest || distance > 0.5f)"),
    "ids that do not exist": ("row.n = n;", "row.n = width;"),
    "another row's mask": ("(n + 31) / 32", "(n + 63) / 32"),
    "a mask's bit": ("row.words[id / 32] >> (id % 32)", "row.words[id / 32] >> (id % 31)"),
    "a mask's bit in a pack": ("x[u].word >> e", "x[u].word >> (e + 1)"),
    "its own mass before it": ("wide mass = range.mass;", "wide mass = range.mass + near_mass[tid];"),
    "tokens before the range": ("unsigned rank = range.count;", "unsigned rank = 0;"),
    "higher ids first": ("near_ids[i] < id", "near_ids[i] > id"),
    "a range left out": ("counts_here && place <= ends[ENDS - 2]", "counts_here && place <= ends[ENDS - 4]"),
    "masses' upper bits": ("wide(sum_high[j]) << 12", "wide(sum_high[j]) << 11"),
    "others among equals": ("key == range.tie ? unsigned(id) : 0xffffffffu", "unsigned(id)"),
    "masses before they are there": (
        "    BARRIER();\n    if (tid < range.found) {\n      const",
        "    if (tid < range.found) {\n      const",
    ),
    "the end before it is known": ("    BARRIER();\n    kept.last =", "    kept.last ="),
    "totals before they are there": ("    BARRIER();\n    if (pass == 0)", "    if (pass == 0)"),
    "a warp's best before it is there": (
        "ids[warp] = id;\n  }\n  BARRIER();",
        "ids[warp] = id;\n  }",
    ),
    "places in the list": ("const int at = int(sum_before(range.", "const int at = int(0 * sum_before(range."),
    "ranks among fewer": ("j < all", "j < all - 1"),
    "those before the range": ("range, true, at, ROOM", "range, false, at, ROOM"),
    "a warp's share of the sum": ("i < WARPS; i++) total", "i < WARPS - 1; i++) total"),
    "sums before they are there": ("  BARRIER();\n  total = 0.0f;", "  total = 0.0f;"),
    "a part's end": ("smaller(late, begin + each)", "smaller(late, begin + each - 1)"),
    "a part left out": (
        "for (int i = 1; i < parts; i++) {\n      const float",
        "for (int i = 2; i < parts; i++) {\n      const float",
    ),
    "a part's survey": ("for (int i = at + 1; i < at + parts; i++)", "for (int i = at + 2; i < at + parts; i++)"),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults_are_found(fault: str) -> None:
    """By the self-checks that would have to find them on a machine that nobody has seen."""
    line, planted = PLANTED[fault]
    suspects = [checks.check_draw, checks.check_top_logprobs]
    if line in TOP_LOGPROBS.text("host"):
        suspects.reverse()

    def passes(launch: Launcher) -> bool:
        with suppress(KernelFault):
            return all(check(launch, mx.bfloat16, paged.Tuning()) for check in suspects)
        return False

    assert_found(line, planted, passes)
