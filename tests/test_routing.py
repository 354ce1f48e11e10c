"""Choices of experts and sums of what they say, as values that wait: what becomes one launch; all else is MLX's."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import glm4_moe
from mlx_lm.models.switch_layers import SwitchGLU, SwitchLinear

from pippin import kernels, probe
from pippin.kernels import Choice, Pairs
from pippin.kernels.host import compiler
from pippin.models import seam
from pippin.models.deferred import Fusions, Residual, deferring
from pippin.models.routing import Chosen, Said, Shares, Sum, open_to_routing, routing
from pippin.models.seam import Seam, active, install
from pippin.probe import choose_attention
from pippin.runner import MlxModelRunner
from pippin.types import Batch, Request, SamplingParams, Work
from tests.checkpoints import build_model, family_config, random_weights
from tests.test_kernels_dispatch import Gpu, played

needs_compiler = pytest.mark.skipif(compiler() is None, reason="kernels run on the host only where g++ is installed")
E, K = 12, 3
Routed = tuple[Any, Any]


def gpt_oss(g: mx.array) -> Routed:
    chosen = mx.stop_gradient(mx.argpartition(g, kth=-K, axis=-1)[..., -K:])
    return chosen, mx.softmax(mx.take_along_axis(g, chosen, axis=-1), axis=-1, precise=True)


def mixtral(g: mx.array) -> Routed:
    chosen = mx.stop_gradient(mx.argpartition(-g, kth=K - 1, axis=-1)[..., :K])
    return chosen, mx.softmax(mx.take_along_axis(g, chosen, axis=-1), axis=-1, precise=True)


def qwen3(g: mx.array) -> Routed:
    g = mx.softmax(g, axis=-1, precise=True)
    chosen = mx.argpartition(g, kth=-K, axis=-1)[..., -K:]
    shares = mx.take_along_axis(g, chosen, axis=-1)
    shares /= mx.sum(shares, axis=-1, keepdims=True)
    return chosen, shares


def ernie(g: mx.array) -> Routed:
    g = mx.softmax(g, axis=-1, precise=True)
    chosen = mx.stop_gradient(mx.argpartition(-g, kth=K - 1, axis=-1)[..., :K])
    shares = mx.take_along_axis(g, chosen, axis=-1)
    return chosen, shares / mx.maximum(shares.sum(axis=-1, keepdims=True), 1e-12)


def deepseek(g: mx.array) -> Routed:
    g = mx.softmax(g, axis=-1, precise=True)
    chosen = mx.argpartition(-g, kth=K - 1, axis=-1)[..., :K]
    return chosen, mx.take_along_axis(g, chosen, axis=-1) * 2.5


def glm(g: mx.array) -> Routed:
    return glm4_moe.group_expert_select(g, mx.arange(E) / 9, K, 1, 1, 2.5, True)  # type: ignore[no-any-return]


FORMS: dict[str, tuple[Callable[[mx.array], Routed], Choice]] = {
    "gpt-oss": (gpt_oss, Choice(K, later=True, soft=True)),
    "mixtral": (mixtral, Choice(K, smallest=True, soft=True)),
    "qwen3": (qwen3, Choice(K, later=True, before=True, divided=True)),
    "ernie": (ernie, Choice(K, before=True, divided=True)),
    "deepseek": (deepseek, Choice(K, before=True, factor=2.5)),
    "glm": (glm, Choice(K, smallest=True, divided=True, factor=2.5)),
}


def by_column(chosen: mx.array, shares: mx.array) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Rows with each share in its column: in what order they come is nobody's business."""
    found = np.zeros((*chosen.shape[:-1], E), np.float32)
    np.put_along_axis(found, np.array(chosen, np.int64), np.array(shares.astype(mx.float32)), axis=-1)
    return found


def logits(*shape: int) -> mx.array:
    return mx.random.normal((*shape, E), key=mx.random.key(3))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Gpu]:
    yield from played(monkeypatch, tmp_path, Gpu())


@needs_compiler
@pytest.mark.parametrize("form", FORMS)
def test_a_choice_and_its_shares_are_one_launch(form: str, gpu: Gpu) -> None:
    install(nn.Sequential(), 1)  # the compiled functions of mlx-lm's files
    run, choice = FORMS[form]
    want = by_column(*run(logits(2, 4)))
    with active(Seam(None, Fusions(experts=True))):
        chosen, shares = run(logits(2, 4))
        assert isinstance(chosen, Chosen)
        assert isinstance(shares, Shares)
        assert (shares.shape, shares.ndim, shares.dtype) == ((2, 4, K), 3, mx.float32)
        assert (chosen.shape, chosen.ndim, chosen.size) == ((2, 4, K), 3, 8 * K)
        assert shares._choice == choice
        kernels.verify(mx.float32, "experts")
        gpu.launched.clear()
        found = by_column(shares.array() * 0 + chosen.array(), shares.array())
    assert gpu.launched == ["route"]
    assert np.allclose(found, want, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("first", ["indices", "shares"])
def test_without_a_kernel_it_is_what_the_model_asked_for(form: str, first: str) -> None:
    install(nn.Sequential(), 1)
    run, _ = FORMS[form]
    want = run(logits(2, 4))
    with active(Seam(None, Fusions(experts=True))):
        found = run(logits(2, 4))
        for which in (0, 1) if first == "indices" else (1, 0):
            assert mx.allclose(found[which].array(), want[which], atol=1e-6)


def ordered(x: Any) -> mx.array:
    """From the smallest on: in which order experts come is nobody's business."""
    return mx.sort(x + 0.0, axis=-1)


def odd(x: mx.array) -> dict[str, Any]:
    """What no kernel does, of a choice and its shares."""
    whole = mx.softmax(x, axis=-1, precise=True)
    chosen = mx.argpartition(x, kth=-K, axis=-1)[..., -K:]
    shares = mx.take_along_axis(x, chosen, axis=-1)
    return {
        "another count": mx.argpartition(x, kth=-K, axis=-1)[..., -K - 1 :].sum(axis=-1) * 0,
        "the first": mx.argpartition(x, kth=2, axis=-1)[..., 0] * 0,
        "another axis": mx.argpartition(x, kth=0, axis=0)[0],
        "none": mx.argpartition(x, kth=0, axis=None)[0],
        "the smallest of a softmax": ordered(mx.take_along_axis(whole, mx.argpartition(whole, 1)[..., :2], axis=-1)),
        "a softmax of some": mx.softmax(ordered(mx.take_along_axis(whole, chosen, axis=-1) * 1), axis=-1),
        "a softmax over all": mx.softmax(x, axis=None),
        "half of a softmax": whole[..., :3] + whole.sum(axis=-1, keepdims=True),
        "of another row": ordered(mx.take_along_axis(x[..., :1] + x, chosen, axis=-1)),
        "of a narrower row": mx.take_along_axis(mx.zeros((*x.shape[:-1], 99)), chosen, axis=-1),
        "softmax twice": ordered(mx.softmax(mx.softmax(shares, axis=-1), axis=-1)),
        "divided by another sum": ordered(shares / (1 + mx.sum(shares, axis=-1, keepdims=True))),
        "a sum of all": mx.sum(shares),
        "divided by no less": ordered(shares / mx.maximum(shares.sum(axis=-1, keepdims=True), 0.5)),
        "the larger": mx.maximum(0.0, ordered(mx.maximum(shares, shares * 2))),
        "added": ordered(shares + 1),
        "times an array": ordered(shares * mx.ones(K)),
        "as 16 bits": ordered(shares.astype(mx.float16)),
        "spread": mx.expand_dims(shares, -1).sum(axis=-2),
        "spread elsewhere": mx.expand_dims(shares, 0).sum(axis=-1),
    }


def test_whatever_else_is_asked_for_is_an_array() -> None:
    x = logits(2, 4)
    want = odd(x)
    with deferring(), routing():
        found = odd(x)
    for name, value in want.items():
        got = found[name]
        got = got if isinstance(got, mx.array) else got.array()
        assert got.dtype == value.dtype, name
        assert mx.allclose(got, value, atol=1e-5), name
    assert isinstance(mx.argpartition(x, 2), mx.array), "outside, MLX's own again"
    assert isinstance(mx.softmax(x, axis=-1, precise=True), mx.array)


def said(dtype: mx.Dtype = mx.float32, bias: bool = True) -> tuple[Said, mx.array, mx.array]:
    """Of four tokens and three of five experts, 16 numbers each: with the shares, and all of it as an array."""
    keys = mx.random.split(mx.random.key(8), 3)
    y, table = (mx.random.normal((n, 16), key=k).astype(dtype) for n, k in ((12, keys[0]), (5, keys[1])))
    indices = mx.array([0, 4, 2] * 4, mx.int32)
    shares = mx.softmax(mx.random.normal((4, 1, 3), key=keys[2]), axis=-1)
    whole = (y + table[indices] if bias else y).reshape(4, 1, 3, 16)
    return Said(Pairs(y, indices, table if bias else None), (4, 1, 3)), shares, whole


@needs_compiler
@pytest.mark.parametrize("bias", [True, False])
def test_a_sum_of_experts_is_one_launch_with_whatever_comes_next(gpu: Gpu, bias: bool) -> None:
    waits, shares, whole = said(bias=bias)
    x, weight = mx.random.normal((4, 1, 16), key=mx.random.key(1)), mx.ones(16) / 2
    total = (whole * shares[..., None]).sum(axis=-2)
    kernels.verify(mx.float32, "experts")
    kernels.verify(mx.float32)
    for launches, ask, want in (
        (["weighed_sum"], lambda s: s.array(), total),
        (["weighed_sum"], lambda s: s + x, total + x),
        (["weighed_sum"], lambda s: (Residual(x) + s).array(), total + x),
        (["weighed_sum"], lambda s: s.astype(mx.float16), total.astype(mx.float16)),
        (["weighed_sum"], lambda s: s * 2, 2 * total),
        (["add_weighed_rms_norm"], lambda s: (Residual(x) + s).normed(weight, 1e-5), None),
        (["add_weighed_rms_norm"], lambda s: (s + Residual(x)).normed(weight, 1e-5), None),
    ):
        gpu.launched.clear()
        waiting = (waits * shares[..., None]).sum(axis=-2)
        assert isinstance(waiting, Sum)
        assert (waiting.shape, waiting.ndim, waiting.dtype) == ((4, 1, 16), 3, mx.float32)
        got = ask(waiting)  # type: ignore[no-untyped-call]
        if want is None:
            want = mx.fast.rms_norm(total + x, weight, 1e-5)
        assert gpu.launched == launches
        assert mx.allclose(got, want, atol=1e-3)


def test_a_residual_and_its_norm_agree_after_a_sum_of_experts() -> None:
    waits, shares, whole = said()
    x = mx.random.normal((4, 1, 16), key=mx.random.key(1))
    h = Residual(x) + (waits * shares[..., None]).sum(axis=-2)
    total = x + (whole * shares[..., None]).sum(axis=-2)
    assert mx.allclose(h.normed(mx.ones(16), 1e-5), mx.fast.rms_norm(total, mx.ones(16), 1e-5), atol=1e-5)
    assert mx.allclose(h.array(), total, atol=1e-6)


def test_sums_come_as_the_type_that_they_would_have() -> None:
    """bfloat16 rows by float32 shares are float32, until the model casts them."""
    waits, shares, whole = said(mx.bfloat16)
    product = waits * shares[..., None]
    total = (whole * shares[..., None]).sum(axis=-2)
    assert product.dtype == product.sum(axis=-2).dtype == total.dtype == mx.float32
    assert mx.allclose(product.sum(axis=-2).array(), total)
    cast = product.sum(axis=-2).astype(mx.bfloat16)
    assert isinstance(cast, Sum)
    assert cast.dtype == mx.bfloat16
    assert mx.allclose(cast.array(), total, atol=0.02)
    assert not isinstance(waits * 2, Said)
    assert mx.allclose(product.sum(axis=-1), (whole * shares[..., None]).sum(axis=-1), atol=1e-5)
    assert mx.allclose(product.sum(axis=-2, keepdims=True), total[..., None, :])
    assert isinstance(Residual(whole[:, :, 0]) + product.sum(axis=-2), Residual), "of two types: no single kernel"


def test_compiled_functions_that_choose_nothing_stay_compiled() -> None:
    plain = mx.compile(lambda x: x + 1)
    assert open_to_routing(plain) is plain
    assert open_to_routing(3) == 3

    @mx.compile
    def best(x: mx.array) -> mx.array:
        return mx.argpartition(x, kth=-2, axis=-1)[..., -2:]

    either = open_to_routing(best)
    assert open_to_routing(either) is either
    assert isinstance(either(logits(3)), mx.array)
    with routing():
        assert isinstance(either(logits(3)), Chosen)


def moe(family: str) -> tuple[nn.Module, int]:
    """A tiny model of 16-byte rows, whose experts are wide enough for every kernel."""
    config = family_config(family, num_hidden_layers=2, hidden_size=64, moe_intermediate_size=32, intermediate_size=32)
    config |= {"layer_types": config["layer_types"][:2]} if config.get("layer_types") else {}
    model = build_model(config)
    model.load_weights(list(random_weights(model, 1).items()), strict=False)
    mx.eval(model.parameters())
    return model, int(config["vocab_size"])


@needs_compiler
@pytest.mark.parametrize(
    ("family", "launched"),
    [
        ("gpt_oss", {"route": 2, "expert_gate": 2, "add_weighed_rms_norm": 2}),
        ("qwen3_moe", {"route": 1, "expert_gate": 1, "add_weighed_rms_norm": 1}),
        ("mixtral", {"route": 2, "expert_gate": 2, "add_weighed_rms_norm": 2}),
    ],
)
def test_a_layer_of_experts_asks_for_three_launches_beside_its_products(
    family: str, launched: dict[str, int], gpu: Gpu
) -> None:
    """On a GPU that the host plays, with logits that are the model's own; Qwen3's other layer has no experts."""
    model, vocab = moe(family)
    choice = choose_attention(model, "rows", vocab)
    assert choice.fusions.experts
    before = Counter(gpu.launched)
    assert before["route"] > 0
    tokens = mx.array([[5, 9, 2]])
    want = model(tokens)
    gpu.launched.clear()
    with active(Seam(None, Fusions(residual=True, experts=True))):
        got = model(tokens)
        mx.eval(got)
    assert {name: n for name, n in Counter(gpu.launched).items() if name in launched} == launched
    assert mx.abs(got - want).max() < 1e-3 * mx.abs(want).max()


class _Third(nn.Module):  # type: ignore[misc]
    """An activation that no kernel knows."""

    def __call__(self, up: mx.array, gate: mx.array) -> mx.array:
        return up * gate * gate


@needs_compiler
@pytest.mark.parametrize("known", [True, False])
def test_few_pairs_are_mlxs_products_without_a_sort(gpu: Gpu, known: bool) -> None:
    """With biases that are added where their rows are read. From 64 on MLX wants them by expert."""
    layer = SwitchGLU(64, 32, 5, bias=True) if known else SwitchGLU(64, 32, 5, activation=_Third(), bias=True)
    for name, weight in tree_flatten(layer.parameters()):
        module = layer[name.split(".")[0]]
        module[name.split(".")[1]] = mx.random.normal(weight.shape, key=mx.random.key(len(name))) / 8
    tokens, indices = (
        mx.random.normal((9, 1, 64), key=mx.random.key(2)),
        mx.array([[[i % 5, (i + 2) % 5]] for i in range(9)]),
    )
    want = layer(tokens, indices)
    seam.install(nn.Sequential(layer), 1)
    with active(Seam(None, Fusions(experts=True))):
        got = layer(tokens, indices)
        assert isinstance(got, Said)
        assert got.pairs.bias is layer.down_proj.bias
    assert mx.allclose(got.array(), want, atol=1e-4)
    assert ("expert_gate" in gpu.launched) == known
    many = mx.concatenate([(indices + i) % 5 for i in range(8)], axis=1)
    wide = mx.broadcast_to(tokens, (9, 8, 64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "backend", lambda: None)
        want = layer(wide, many)
    kernels.verify(mx.float32, "experts")
    gpu.launched.clear()
    with active(Seam(None, Fusions(experts=True))):
        got = layer(wide, many)
    assert gpu.launched == ["sort_pairs", *["expert_gate"] * known], "not mlx-lm's own sort"
    assert mx.allclose(got.array(), want, atol=1e-4)
    shares = mx.softmax(mx.random.normal((9, 8, 2), key=mx.random.key(6)), axis=-1)
    total = (got * shares[..., None]).sum(axis=-2)
    assert mx.allclose(total.array(), (want * shares[..., None]).sum(axis=-2), atol=1e-4)
    assert gpu.launched[-1] == "weighed_sum"


PROMPTS = ((5, 9, 2, 77, 31), (8,), (100, 3, 4, 4, 250, 17, 60, 2, 9))
NEW = 5


def by_itself(model: nn.Module, prompt: tuple[int, ...]) -> list[int]:
    """mlx-lm's model, greedy."""
    tokens = list(prompt)
    for _ in range(NEW):
        tokens.append(int(np.argmax(np.asarray(model(mx.array([tokens]))[0, -1]))))
    return tokens[len(prompt) :]


def served(model: nn.Module, choice: probe.Choice, vocab: int, chunk: int, together: bool) -> list[list[int]]:
    """The same by steps of our runner, prompts in chunks."""
    requests = [Request(f"r{i}", list(p), len(p), SamplingParams(), row=i + 1) for i, p in enumerate(PROMPTS)]
    for i, request in enumerate(requests):
        request.slots = array("i", range(1 + 20 * i, 21 + 20 * i))
    for group in [requests] if together else [[r] for r in requests]:
        runner = MlxModelRunner(
            model, choice.backend, choice.pool(80), max_running=4, vocab_size=vocab, fusions=choice.fusions
        )
        done = [0] * len(group)
        while any(len(r.tokens) < r.num_prompt + NEW for r in group):
            ends = [min(len(r.tokens), at + chunk) for r, at in zip(group, done, strict=True)]
            works = [Work(r, at, end, end == len(r.tokens)) for r, at, end in zip(group, done, ends, strict=True)]
            logits = runner.logits(Batch(tuple(works)))
            for work, row in zip([w for w in works if w.samples], np.asarray(logits), strict=True):
                work.request.tokens.append(int(np.argmax(row)))
            done = ends
    return [r.tokens[r.num_prompt : r.num_prompt + NEW] for r in requests]


@needs_compiler
@pytest.mark.parametrize("family", ["gpt_oss", "mixtral"])
def test_greedy_tokens_are_mlx_lms_alone_together_and_in_chunks(family: str, gpu: Gpu) -> None:
    """In float32, with all that is put together, on a GPU that the host plays."""
    model, vocab = moe(family)
    want = [by_itself(model, prompt) for prompt in PROMPTS]
    choice = choose_attention(model, "rows", vocab)
    assert choice.fusions.experts
    assert choice.fusions.joined
    gpu.launched.clear()
    for chunk, together in ((20, False), (20, True), (2, True)):
        assert served(model, choice, vocab, chunk, together) == want
    assert {"route", "expert_gate", "add_weighed_rms_norm", "rope_kv_write"} <= set(gpu.launched)


@needs_compiler
def test_experts_in_mxfp4_are_two_launches_of_products(gpu: Gpu) -> None:
    """As gpt-oss is published, in bfloat16 else: logits are the model's own through all of it."""
    model, vocab = moe("gpt_oss")
    model.set_dtype(mx.bfloat16)
    nn.quantize(model, 32, 4, mode="mxfp4", class_predicate=lambda _, m: isinstance(m, SwitchLinear))
    choice = choose_attention(model, "rows", vocab)
    assert choice.fusions == Fusions(True, frozenset({("q_proj", "k_proj", "v_proj")}), experts=True)
    gpu.launched.clear()
    assert len(served(model, choice, vocab, 20, True)) == len(PROMPTS)
    found = Counter(gpu.launched)
    layers = 2 * NEW
    assert {name: found[name] for name in ("route", "gated_mma", "expert_mma", "add_weighed_rms_norm")} == {
        "route": layers,
        "gated_mma": layers,
        "expert_mma": layers,
        "add_weighed_rms_norm": layers,
    }
    assert found["add_rms_norm"] == layers
    assert not {"rows_mma", "expert_gate", "weighed_sum", "swiglu"} & set(found)
