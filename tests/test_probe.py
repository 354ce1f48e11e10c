"""The probe at load: exact backends are chosen, wrong ones are found out, and the reason is told."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import ArraysCache, ChunkedKVCache

from pippin.attention import register_attention_backend
from pippin.attention.rows import RowLayer, Rows, Window
from pippin.cache.pool import KVPool
from pippin.errors import ConfigError, ModelError
from pippin.inputs import Group, Step
from pippin.models.deferred import Fusions
from pippin.models.seam import Seam, off_by_a_rounding
from pippin.probe import choose_attention, measure_activations, measure_caches
from pippin.types import Work
from tests.checkpoints import build_model, family_config, random_weights

COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
MLA: dict[str, Any] = {
    "moe_intermediate_size": 32,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "qk_nope_head_dim": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}


def tiny(family: str, **overrides: Any) -> Any:
    """A tiny random model of a family of mlx-lm's, weights evaluated."""
    module = importlib.import_module(f"mlx_lm.models.{family}")
    mx.random.seed(3)
    model = module.Model(module.ModelArgs.from_dict({"model_type": family, **COMMON, **overrides}))
    mx.eval(model.parameters())
    return model


@pytest.mark.parametrize(
    ("family", "overrides", "backend"),
    [
        ("qwen3", {}, "rows"),
        ("llama", {"tie_word_embeddings": False}, "rows"),
        ("gemma3_text", {"sliding_window": 4, "sliding_window_pattern": 2}, "rows"),
        ("gpt_oss", {"sliding_window": 4, "num_local_experts": 4, "num_experts_per_tok": 2}, "rows"),
        ("gemma2", {}, "padded_grouped"),
        ("deepseek_v3", MLA, "latent"),
    ],
)
def test_each_family_gets_the_backend_that_is_exact(family: str, overrides: dict[str, Any], backend: str) -> None:
    choice = choose_attention(tiny(family, **overrides), "mlx", 300)
    assert choice.backend.name == backend
    assert choice.reason.startswith("exact in the probe")
    assert all(choice.shapes)


def test_windows_are_read_off_the_models_own_caches() -> None:
    model = tiny("gemma3_text", sliding_window=4, sliding_window_pattern=2)
    assert [s.window for s in measure_caches(model).shapes if s] == [4, None, 4, None]


class _Far(RowLayer):
    """A layer that forgets how far back it may look."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._window = None

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Window:
        return Window(None)


class _Wrong(Rows):
    """Rows with one thing wrong."""

    def __init__(self, fault: str) -> None:
        self.name = f"wrong-{fault}"
        self._fault = fault

    def step(self, works: Sequence[Work], last_token: mx.array, pool: KVPool) -> Step:
        step = super().step(works, last_token, pool)
        if self._fault == "position":
            return replace(step, positions=step.positions + 1 * (step.positions > 3))
        if self._fault == "context":
            return replace(step, groups=tuple(map(_turned, step.groups)))
        return step

    def layers(self, step: Step, pool: KVPool, seam: Seam) -> list[object]:
        kind = _Far if self._fault == "window" else RowLayer
        return [kind(i, step, pool, seam, {}) for i in range(len(pool.shapes))]


def _turned(group: Group) -> Group:
    assert group.slots is not None
    return replace(group, slots=mx.concatenate([group.slots[:, 1:], group.slots[:, :1]], axis=1))


@pytest.mark.parametrize("fault", ["position", "context", "window"])
def test_a_backend_that_is_wrong_is_refused_with_its_distance(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = _Wrong(fault)
    monkeypatch.setattr("pippin.attention._BACKENDS", {})
    register_attention_backend(backend)
    model = tiny("gemma3_text", sliding_window=4, sliding_window_pattern=2)
    with pytest.raises(ModelError, match=rf"{backend.name}: logits differ by"):
        choose_attention(model, backend.name, 300)


def deep(family: str, layers: int = 12, seed: int = 2) -> Any:
    """A random model in bfloat16 that makes much of rounding."""
    config = family_config(family, num_hidden_layers=layers)
    model = build_model(config)
    model.load_weights(list(random_weights(model, seed).items()), strict=False)
    model.set_dtype(mx.bfloat16)
    return model


def test_rounding_alone_refuses_nothing_however_much_a_model_makes_of_it() -> None:
    """Rotation that is rounded once moves these logits by a sixth of the largest, and so does a bit of attention's."""
    choice = choose_attention(deep("llama"), "mlx", 288, fuse=True)
    assert choice.backend.name == "rows"
    assert choice.fusions == Fusions(True, frozenset({("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")}))


@pytest.mark.parametrize("fault", ["position", "context"])
def test_in_16_bits_too_a_backend_that_is_wrong_is_refused(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = _Wrong(fault)
    monkeypatch.setattr("pippin.attention._BACKENDS", {})
    register_attention_backend(backend)
    with pytest.raises(ModelError, match=rf"{backend.name}: logits differ by"):
        choose_attention(deep("llama"), backend.name, 288)


def test_what_a_rounding_does_is_asked_for_only_where_logits_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[None] = []

    def counted() -> AbstractContextManager[None]:
        asked.append(None)
        return off_by_a_rounding()

    monkeypatch.setattr("pippin.probe.off_by_a_rounding", counted)
    choose_attention(deep("qwen3", layers=2), "mlx", 288)
    assert asked == []
    choose_attention(deep("llama"), "mlx", 288, fuse=True)
    assert asked == [None]
    model = deep("llama", layers=2)
    plain = model(mx.array([[5, 9]]))
    with off_by_a_rounding():
        moved = model(mx.array([[5, 9]]))
    assert 0 < mx.abs(moved - plain).max() < 0.2 * mx.abs(plain).max()
    assert mx.array_equal(model(mx.array([[5, 9]])), plain)


def test_caches_of_an_unknown_kind_are_refused_by_their_name() -> None:
    model = tiny("qwen3")
    model.make_cache = lambda: [ChunkedKVCache(8)]
    with pytest.raises(ModelError, match="ChunkedKVCache"):
        choose_attention(model, "mlx", 300)


class _Growing:
    """A model whose state takes up each token that it sees."""

    def make_cache(self) -> list[ArraysCache]:
        return [ArraysCache(1)]

    def __call__(self, tokens: mx.array, cache: list[ArraysCache]) -> mx.array:
        seen = tokens if cache[0][0] is None else mx.concatenate([cache[0][0], tokens], axis=1)
        cache[0][0] = seen
        return seen


def test_states_that_grow_are_refused() -> None:
    with pytest.raises(ModelError, match="changes its shape with the context"):
        measure_caches(_Growing())


@pytest.mark.parametrize("name", ["rows", "padded"])
def test_recurrent_models_are_refused_where_nobody_minds_their_state(name: str) -> None:
    model = build_model(family_config("mamba2"))
    with pytest.raises(ModelError, match=rf"{name}: it keeps recurrent state"):
        choose_attention(model, name, 288)


def test_an_unknown_backend_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"--attention-backend: must be one of mlx, rows, latent, padded.* 'flash'"):
        choose_attention(tiny("qwen3"), "flash", 300)


def test_activations_grow_with_the_chunk() -> None:
    model = tiny("qwen3")
    choice = choose_attention(model, "mlx", 300)
    small, large = (
        measure_activations(model, choice, chunk=chunk, max_running=4, vocab_size=300, context_length=512)
        for chunk in (32, 256)
    )
    assert 0 < small < large / 2
