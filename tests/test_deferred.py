"""Values that a model passes on before they are computed: what is put together, and that nothing else changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import SwitchLinear

import pippin.attention.rows
from pippin import kernels
from pippin.kernels import Rope, reference
from pippin.models.deferred import Attended, Fusions, Gelu, Part, Residual, Source, Turn, deferring, joined_swiglu
from pippin.models.joined import join
from pippin.models.seam import Seam, active, install, one_expert
from pippin.probe import choose_attention
from tests.checkpoints import FAMILIES, build_model, family_config, random_weights

QKV, MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


def model_of(family: str, **changes: Any) -> nn.Module:
    model = build_model(family_config(family, **changes))
    model.load_weights(list(random_weights(model, 1).items()), strict=False)
    mx.eval(model.parameters())
    return model


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each of the kernels that do several operations was asked for."""
    found: Counter[str] = Counter()

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            found[name] += 1
            return original(*args, **options)

        return call

    monkeypatch.setattr(pippin.attention.rows, "rope_kv_write", counted("rope_kv_write", kernels.rope_kv_write))
    for name in ("add_rms_norm", "swiglu", "geglu"):
        monkeypatch.setattr(kernels, name, counted(name, vars(kernels)[name]))
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_a_layer_asks_for_three_kernels_where_it_did_ten_operations(family: str, calls: Counter[str]) -> None:
    choice = choose_attention(model_of(family), "mlx", 288, fuse=True)
    assert choice.fusions == Fusions(residual=True, joined=frozenset({QKV, MLP}))
    # The probe runs a prefix and the rest: two forwards of three layers, and a norm behind them.
    assert calls == {"rope_kv_write": 6, "add_rms_norm": 12, "swiglu": 6}


@pytest.mark.parametrize(
    ("family", "kernels_of_a_layer"),
    [
        ("gemma3_text", {"rope_kv_write": 1, "add_rms_norm": 2, "geglu": 1}),
        ("gpt_oss", {"rope_kv_write": 1, "add_rms_norm": 2}),
        ("phi3", {"rope_kv_write": 1, "add_rms_norm": 2, "swiglu": 1}),
    ],
)
def test_other_layouts_ask_for_them_too(family: str, kernels_of_a_layer: dict[str, int], calls: Counter[str]) -> None:
    """A sum of 1 and each norm's weight and gelu; YaRN's lengths; projections that come joined."""
    config = family_config(family)
    choice = choose_attention(model_of(family), "mlx", config["vocab_size"], fuse=True)
    assert choice.fusions.residual
    forwards = 2 * config["num_hidden_layers"]
    assert calls == {name: n * forwards for name, n in kernels_of_a_layer.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_its_logits_and_what_it_can(family: str) -> None:
    """The probe compares logits; what a model can't take (a compiled gelu) is left out, and the rest stays."""
    choice = choose_attention(model_of(family), "mlx", family_config(family)["vocab_size"], fuse=True)
    expected: dict[str, frozenset[tuple[str, ...]]] = {
        "gemma": frozenset({QKV}),  # its gelu is the exact one, and compiled
        "phi3": frozenset({("qkv_proj",), ("gate_up_proj",)}),
        "mixtral": frozenset({QKV}),
        "gpt_oss": frozenset({QKV}),
        "glm4": frozenset({QKV, ("gate_up_proj",)}),
        "deepseek_v2": frozenset({MLP, ("kv_a_proj_with_mqa",)}),
    }
    if choice.backend.name == "rows":
        experts = family in ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v2")
        assert choice.fusions == Fusions(True, expected.get(family, frozenset({QKV, MLP})), experts)
    else:
        assert choice.fusions == Fusions()


@pytest.mark.parametrize("seed", [1, 2])
def test_experts_that_are_nearly_as_good_refuse_nothing(seed: int) -> None:
    """In 16 bits rounding decides between them, and the other one's numbers are quite different."""
    yarn = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096}
    config = family_config("gpt_oss") | {"rope_scaling": yarn}
    model = build_model(config)
    model.load_weights(list(random_weights(model, seed).items()), strict=False)
    model.set_dtype(mx.bfloat16)
    nn.quantize(model, 32, 4, mode="mxfp4", class_predicate=lambda _, m: isinstance(m, SwitchLinear))
    choice = choose_attention(model, "mlx", config["vocab_size"], fuse=True)
    assert (choice.backend.name, choice.fusions) == ("rows", Fusions(True, frozenset({QKV}), experts=True))
    tokens = mx.array([[1, 2, 3, 4, 5]])
    with one_expert():
        one = model(tokens)
    assert not mx.allclose(model(tokens), one, atol=0.1).item(), "that is over with the probe"


def test_a_model_that_is_changed_by_it_is_served_without(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = reference.rope

    def one_too_far(x: mx.array, positions: mx.array, *rest: Any, **options: Any) -> mx.array:
        return exact(x, positions + 1, *rest, **options)

    monkeypatch.setattr(reference, "rope", one_too_far)  # of keys and queries alike: only a cached prefix shows it
    choice = choose_attention(model_of("llama"), "mlx", 288, fuse=True)
    assert choice.fusions.joined in (frozenset({MLP}), frozenset({QKV, MLP}))
    monkeypatch.setattr(reference, "swiglu", lambda y: exact_swiglu(y) * 1.1)
    choice = choose_attention(model_of("llama"), "mlx", 288, fuse=True)
    assert MLP not in choice.fusions.joined


exact_swiglu = reference.swiglu


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_joined_layers_keep_their_weights_and_alone_compute_what_they_did(bits: int | None) -> None:
    model = model_of("qwen2", hidden_size=64, intermediate_size=128)
    if bits:
        nn.quantize(model, 32, bits)
    before = {name: np.array(a) for name, a in tree_flatten(model.parameters())}
    tokens = mx.array([[5, 9, 2, 7]])
    expected = model(tokens)
    mx.eval(expected)
    found = join(model, lambda: model(mx.array([[1]]), cache=make_prompt_cache(model)))
    assert found == {QKV, MLP}
    after = {name: np.array(a) for name, a in tree_flatten(model.parameters())}
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert mx.array_equal(model(tokens), expected).item()
    assert join(model, lambda: model(mx.array([[1]]), cache=make_prompt_cache(model))) == found, "once is enough"


def test_weights_are_not_stored_twice() -> None:
    model = model_of("llama", hidden_size=512, intermediate_size=2048)
    mx.clear_cache()
    before = mx.get_active_memory()
    join(model, lambda: model(mx.array([[1]]), cache=make_prompt_cache(model)))
    mx.clear_cache()
    assert mx.get_active_memory() < before + 100_000


def part(heads: int = 4, dim: int = 8, rows: int = 3) -> Part:
    y = mx.random.normal((rows, 1, heads * dim + 16), key=mx.random.key(3))
    return Part(Source(y), 16, heads * dim)


@given(
    st.lists(
        st.sampled_from(["split", "swap", "norm", "stretch", "turn", "scale", "slice", "cast", "flatten", "half"]),
        min_size=1,
        max_size=6,
    )
)
def test_whatever_is_asked_of_a_part_gives_what_an_array_would(asked: list[str]) -> None:
    """In any order, with what it can't note among it."""
    weight, offset = mx.arange(8).astype(mx.float32) / 8, mx.array([0, 5, 9])
    x: Any = part()
    y: Any = x.array()
    steps: dict[str, Callable[[Any], Any]] = {
        "split": lambda a: a.reshape(3, 1, 4, -1) if a.ndim == 3 else a,
        "swap": lambda a: a.transpose(0, 2, 1, 3) if a.ndim == 4 else a,
        "norm": lambda a: mx.fast.rms_norm(a, weight, 1e-5) if a.shape[-1] == 8 else a,
        "turn": lambda a: (
            mx.fast.rope(a, 8, traditional=False, base=100.0, scale=1.0, offset=offset) if a.ndim == 4 else a
        ),
        "stretch": lambda a: a.at[..., :8].multiply(1.5) if a.ndim == 4 else a,
        "half": lambda a: mx.split(a, 2, axis=-1)[1] if a.shape[-1] == 32 else a,
        "scale": lambda a: 2 * a + 1,
        "slice": lambda a: a[1:] if a.ndim == 2 else a,
        "cast": lambda a: a.astype(mx.float32),
        "flatten": lambda a: a.reshape(3, -1) if a.ndim == 4 else a,
    }
    for name in asked:
        y = steps[name](y)
        with deferring():
            x = steps[name](x)
        assert tuple(x.shape) == tuple(y.shape)
        assert x.ndim == y.ndim
    got = x.array() if isinstance(x, Part) else x
    assert np.allclose(np.array(got), np.array(y), atol=1e-5)


def test_a_split_projection_is_parts_wherever_it_is_cut() -> None:
    whole = part()
    with deferring():
        loose: Any = whole
        pieces: Any = mx.split(loose, [8, 24], axis=-1)
        halves: Any = mx.split(loose, 2, axis=2)
        rows: Any = mx.split(loose, 3, axis=0)
    assert all(isinstance(p, Part) for p in (*pieces, *halves))
    assert not any(isinstance(p, Part) for p in rows)
    assert [p.width for p in pieces] == [8, 16, 8]
    joined = mx.concatenate([p.array() for p in pieces], axis=-1)
    assert mx.array_equal(joined, whole.array()).item()
    assert mx.array_equal(mx.concatenate(rows), whole.array()).item()


def test_gelu_of_a_gate_waits_for_what_it_is_multiplied_with() -> None:
    source = Source(mx.random.normal((2, 1, 16)))
    gate, up = Part(source, 0, 8), Part(source, 8, 8)
    want = nn.gelu_approx(gate.array()) * up.array()
    with deferring():
        loose: Any = gate
        waits: Any = nn.gelu_approx(loose)
        assert type(waits) is Gelu
        loose_gelu: Any = waits
        assert mx.allclose(waits * up, want, atol=1e-5).item()
        assert mx.allclose(up.array() * waits, want, atol=1e-5).item()
        assert mx.allclose(1 + loose_gelu, nn.gelu_approx(gate.array()) + 1, atol=1e-5).item()
    assert (waits.shape, waits.dtype) == ((2, 1, 8), mx.float32)


def test_norms_by_one_and_their_weight_keep_the_sum() -> None:
    model = model_of("gemma3_text")
    norm = model.model.layers[0].input_layernorm
    x = mx.random.normal((2, 1, 64))
    expected = norm(x)
    choose_attention(model, "mlx", 288, fuse=True)
    with active(Seam(None, Fusions(residual=True))):
        assert mx.array_equal(norm(x), expected).item()
        norm.weight = norm.weight + 1  # what is kept is the sum
        assert mx.array_equal(norm(x), expected).item()


def test_a_residual_is_summed_once_however_it_is_used() -> None:
    a, b = mx.arange(6).reshape(1, 6).astype(mx.float32), mx.ones((1, 6))
    weight = mx.ones(6)
    with deferring():
        h = Residual(a) + b
        normed = mx.fast.rms_norm(h, weight, 1e-5)  # type: ignore[arg-type]
        assert mx.allclose(normed, mx.fast.rms_norm(a + b, weight, 1e-5)).item()
        assert mx.array_equal(h.array(), a + b).item()
        assert mx.array_equal((h + h).array(), 2 * (a + b)).item()
        assert mx.array_equal((h * 3).array(), 3 * (a + b)).item()
        loose: Any = h
        assert mx.array_equal((1 + loose * 2).array(), 1 + 2 * (a + b)).item()
        assert mx.array_equal(b + loose, a + 2 * b).item(), "an array on the left asks for the array"
        assert mx.array_equal(mx.fast.layer_norm(h, None, None, 1e-5), mx.fast.layer_norm(a + b, None, None, 1e-5))  # type: ignore[arg-type]
    assert mx.fast.rms_norm is not None
    with pytest.raises(TypeError):
        mx.fast.rms_norm(h, weight, 1e-5)  # type: ignore[arg-type]  # outside, MLX's own again


def test_attention_comes_out_as_the_next_projection_takes_it() -> None:
    y = mx.arange(24).reshape(2, 1, 12)
    out = Attended(y, 3)
    assert out.shape == (2, 3, 1, 4)
    assert out.transpose(0, 2, 1, 3).reshape(2, 1, -1) is y
    assert out.swapaxes(1, 2).reshape(2, 1, 12) is y
    assert mx.array_equal(out.transpose(0, 2, 1, 3).array(), y.reshape(2, 1, 3, 4)).item()
    assert mx.array_equal(out.reshape(2, 12), y.reshape(2, 12)).item()


def test_gate_and_up_are_one_only_if_they_are_a_whole_source() -> None:
    source = Source(mx.random.normal((2, 1, 16)))
    gate, up = Part(source, 0, 8), Part(source, 8, 8)
    whole = joined_swiglu(gate, up)
    assert whole is not None
    assert mx.allclose(whole, nn.silu(gate.array()) * up.array(), atol=1e-6).item()
    assert joined_swiglu(up, gate) is None
    assert joined_swiglu(gate, Part(Source(source.y), 8, 8)) is None


def test_ropes_are_alike_by_what_they_do() -> None:
    periods = mx.arange(1, 5).astype(mx.float32)
    assert Rope(8, False, 1e4, 1.0).same_as(Rope(8, False, 1e4, 1.0))
    assert not Rope(8, False, 1e4, 1.0).same_as(Rope(8, True, 1e4, 1.0))
    assert Rope(8, False, None, 1.0, periods).same_as(Rope(8, False, None, 1.0, periods))
    assert not Rope(8, False, None, 1.0, periods).same_as(Rope(8, False, None, 1.0, periods + 0))
    assert np.allclose(np.array(Rope(8, False, None, 0.5, periods).frequencies)[:4], 0.5 / np.arange(1, 5))
    assert Turn(Rope(8, False, 1e4, 1.0), 3).offset == 3


def test_outside_of_a_fused_forward_nothing_is_deferred() -> None:
    model = model_of("qwen3")
    tokens = mx.array([[5, 9, 2]])
    expected = model(tokens)
    choose_attention(model, "mlx", 288, fuse=True)
    assert mx.allclose(model(tokens), expected, atol=1e-5).item()
    install(model, 288)
    with active(Seam(None)):
        assert isinstance(model.model.embed_tokens(tokens), mx.array)
        assert isinstance(model.model.layers[0].self_attn.q_proj(mx.zeros((1, 1, 64))), mx.array)
