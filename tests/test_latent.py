"""Backend ``latent``: a model's own logits where single tokens attend to latents, with and without the kernels."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models.mla import MultiLinear

from pippin import kernels
from pippin.attention.latent import Latent, LatentLayer
from pippin.cache.layout import LayerShape
from pippin.cache.pool import KVPool
from pippin.errors import ModelError
from pippin.inputs import row_step
from pippin.kernels import checks, contest
from pippin.models import seam
from pippin.models.seam import Seam
from pippin.probe import choose_attention
from pippin.types import Request, SamplingParams, Work
from tests.checkpoints import build_model, family_config, make_checkpoint, random_weights
from tests.compiling import play_gpu
from tests.cores import greedy_by_mlx_lm, make_core, prompts, run, submits
from tests.test_kernels_dispatch import Gpu, gpu, needs_compiler, played
from tests.test_rows_by_page import VOCAB, WORKS, alone, logits, sequences

__all__ = ["gpu"]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """Latents 264 wide, which no head is."""
    made = build_model(family_config("deepseek_v3", kv_lora_rank=264, vocab_size=VOCAB))
    made.load_weights(list(random_weights(made, 0).items()))
    mx.eval(made.parameters())
    return made


def near(got: Any, want: Any) -> bool:
    return bool(np.abs(got - want).max() <= 1e-4 * np.abs(want).max())


@pytest.mark.parametrize("page_size", [1, 4])
def test_without_a_gpu_logits_are_the_models(model: nn.Module, page_size: int) -> None:
    choice = choose_attention(model, "mlx", VOCAB)
    assert choice.backend.name == "latent"
    assert near(logits(model, choice, page_size), alone(model, page_size))


@needs_compiler
@pytest.mark.parametrize("winner", ["kernel", "gathered"])
@pytest.mark.parametrize("page_size", [1, 4])
def test_on_a_gpu_latents_are_read_where_they_lie_if_that_is_faster(
    gpu: Gpu, model: nn.Module, monkeypatch: pytest.MonkeyPatch, winner: str, page_size: int
) -> None:
    monkeypatch.setattr(contest.Contests, "hold", lambda self, key, ways: winner)
    choice = choose_attention(model, "mlx", VOCAB)
    assert choice.backend.name == "latent"
    assert choice.pool(50).in_place
    gpu.launched.clear()
    assert near(logits(model, choice, page_size), alone(model, page_size))
    layers = len(choice.shapes)
    assert gpu.launched.count("latent_decode") == (layers * 3 if winner == "kernel" else 0)
    assert gpu.launched.count("kv_gather") > 0


@needs_compiler
@pytest.mark.parametrize("wrong", ["latent_decode", "latent_decode_split", "kv_gather"])
def test_a_kernel_that_is_wrong_for_latents_is_replaced(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Any, wrong: str
) -> None:
    want = alone(model, 1)
    monkeypatch.setattr(contest.Contests, "hold", lambda self, key, ways: "kernel")
    for machine in played(monkeypatch, tmp_path, Gpu(wrong=(wrong,))):
        named = "latent_decode" if wrong.startswith("latent") else wrong
        assert [n for n, ok in kernels.verify(mx.float32, "latents").items() if not ok] == [named]
        choice = choose_attention(model, "mlx", VOCAB)
        assert choice.pool(50).in_place == (named != "kv_gather")
        machine.launched.clear()
        assert near(logits(model, choice, 1), want)
        assert wrong not in machine.launched


@needs_compiler
def test_which_way_is_faster_is_measured_once_and_kept(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """By the launches of both ways, which the fake GPU lets take no time at all."""
    held: list[str] = []
    hold = contest.Contests.hold

    def seen(self: contest.Contests, key: str, ways: Any) -> str:
        held.append(key)
        return hold(self, key, {name: lambda: mx.zeros(1) for name in ways})

    monkeypatch.setattr(contest.Contests, "hold", seen)
    monkeypatch.setattr(contest, "SECONDS", 60.0)
    s = checks.sample(mx.float32, "latents")
    turned = mx.zeros((3, 8, 64))
    form = kernels.Form(4, 0.1)
    for _ in range(2):
        got = kernels.latent_decode(s.q, turned, s.k_pool, s.v_pool, s.table, s.lengths, form)
    assert got.shape == s.q.shape
    assert len(held) == len(set(held)) == 2
    assert len(list(tmp_path.rglob("fastest-*.json"))) == 1


@given(
    spans=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9), st.booleans()), min_size=1, max_size=8),
)
def test_each_work_is_in_one_forward_and_none_comes_before_what_it_may_read(
    spans: list[tuple[int, int, bool]],
) -> None:
    works = []
    for i, (start, count, decodes) in enumerate(spans):
        n = 1 if decodes else count
        request = Request(str(i), [1] * (start + n), start if decodes and start else start + n, SamplingParams(), row=i)
        request.slots.extend(range(100 * i + 1, 100 * i + 1 + start + n))
        works.append(Work(request, start, start + n, samples=True))
    parts = Latent().forwards(works)
    flat = [w for part in parts for w in part]
    assert sorted(map(id, flat)) == sorted(map(id, works))
    for part in parts:
        assert len({w.end - w.start <= 4 for w in part}) == 1
    at = {id(w): i for i, part in enumerate(parts) for w in part}
    waits = [w for w in works if not w.decodes]
    short = [w for w in waits if w.end - w.start <= 4]
    long = [w for w in waits if w.end - w.start > 4]
    for a in short:
        for b in long:
            if a.start < b.start:
                assert at[id(a)] < at[id(b)]
            if a.start > b.start:
                assert at[id(a)] > at[id(b)]


def test_models_that_do_something_else_are_refused() -> None:
    """Several heads, no turned queries, sinks, windows: each is a reason that the probe tells."""
    request = sequences(1)[0]
    step = row_step([Work(request, 11, 12, True)], mx.zeros(8, mx.int32))
    assert WORKS[0] == (11, 12)
    layer = LatentLayer(0, step, KVPool([LayerShape(1, 16, 8, mx.float32)], 200), Seam(None), {})
    two = mx.zeros((1, 2, 1, 16))
    with pytest.raises(ModelError, match="several heads"):
        layer.update_and_fetch(two, two)
    with pytest.raises(ModelError, match="window"):
        layer.make_mask(1, window_size=4)
    _, keys = layer.update_and_fetch(mx.zeros((1, 1, 1, 16)), mx.zeros((1, 1, 1, 8)))
    assert mx.array_equal(mx.ones((1, 3, 1, 8)) @ keys.swapaxes(-1, -2), mx.ones((1, 3, 1, 8)))
    q = mx.zeros((1, 3, 1, 16))
    for mask, sinks in ((None, None), (mx.zeros((1, 3, 1, 16)), None), (mx.zeros((1, 3, 1, 8)), mx.zeros(3))):
        with pytest.raises(ModelError, match="turned queries"):
            layer.attend(q, 1.0, mask, sinks)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("shape", [(5, 4, 1, 64), (1, 4, 1, 64), (5, 1, 1, 64), (5, 4, 3, 64)])
def test_single_tokens_are_rows_of_each_heads_product(bits: int | None, shape: tuple[int, ...]) -> None:
    layer: Any = MultiLinear(64, 32, shape[1])
    layer = layer.to_quantized(32, bits) if bits else layer
    x = mx.random.normal(shape, key=mx.random.key(2))
    want = layer(x)
    holder = nn.Sequential(layer)
    seam.install(holder, 7)
    assert type(layer) is not MultiLinear
    assert layer(x).shape == want.shape
    assert mx.allclose(layer(x), want, atol=1e-4)
    wide = mx.random.normal((*shape[:3], 32), key=mx.random.key(3))
    flat = layer(wide, transpose=False)
    assert mx.allclose(flat, mx.stack([layer(row[None], transpose=False)[0] for row in wide]), atol=1e-4)


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("options", [{}, {"page_size": 8, "chunked_prefill_size": 7}, {"disable_graph": True}], ids=str)
def test_an_engines_tokens_are_mlx_lms(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, options: dict[str, Any], on_gpu: bool
) -> None:
    """Prompts of one token and of many, chunks, decodes and what follows a cached prefix; compiled steps too."""
    if on_gpu:
        play_gpu(monkeypatch)
    path = make_checkpoint(tmp_path, "deepseek_v3")
    core = make_core(path, **options)
    assert core.info.attention_backend == "latent"
    rows = [*prompts(5), [7]]
    expected = {f"r{i}": greedy_by_mlx_lm(path, row, 12) for i, row in enumerate(rows)}
    assert run(core, submits(rows)) == expected
    assert run(core, submits(rows)) == expected, "the second time, from the cache"
    assert core.stats.cached_tokens > 0
