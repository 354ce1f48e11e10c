"""Logits of tiny random models equal transformers', however the engine cuts and mixes their tokens."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pippin.types import Work
from tests.architectures import ROPE
from tests.checkpoints import FAMILIES, HYBRIDS, WINDOW
from tests.parity.engine import Engine
from tests.parity.reference import LENGTH, SHARED, Reference, build_reference

TOLERANCE = 1e-4
"""Of the largest logit; float32 through three layers stays a hundred times nearer."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {family: (family, {}) for family in FAMILIES} | {
    "qwen2-windows": (
        "qwen2",
        {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": WINDOW},
    ),
    "phi3-window": ("phi3", {"sliding_window": WINDOW}),
    "mixtral-window": ("mixtral", {"sliding_window": WINDOW}),
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT: dict[str, Any] = {
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
UNBOUNDED = {"time_step_min": 1e-30}
"""transformers bounds Nemotron-H's time steps by a setting of how its weights are drawn: see docs/models.md."""
RECURRENT: dict[str, tuple[str, dict[str, Any]]] = {
    "bailing_hybrid": (
        "bailing_hybrid",
        LATENT
        | EXPERTS
        | {"moe_shared_expert_intermediate_size": 32, "num_shared_experts": 1, "num_mtp_layers": 0}
        | {"num_experts": 8, "n_group": 2, "topk_group": 1, "layer_group_size": 2, "first_k_dense_replace": 1},
    ),
    "falcon_h1": ("falcon_h1", {"mamba_n_groups": 2}),
    "falcon_mamba": ("falcon_mamba", HYBRIDS["mamba"]),
    "granitemoehybrid": ("granitemoehybrid", {}),
    "jamba": ("jamba", {}),
    "jamba-dense": ("jamba", {"num_experts": 1, "num_experts_per_tok": 1}),
    "kimi_linear": ("kimi_linear", {}),
    "lfm2": ("lfm2", {}),
    "lfm2_moe": ("lfm2_moe", EXPERTS | {"norm_topk_prob": True}),
    "mamba": ("mamba", {}),
    "mamba2": ("mamba2", {}),
    "nemotron_h": ("nemotron_h", UNBOUNDED),
    "nemotron_h-experts": (
        "nemotron_h",
        UNBOUNDED
        | EXPERTS
        | {"hybrid_override_pattern": "ME*-", "n_routed_experts": 8, "moe_shared_expert_intermediate_size": 48}
        | {"n_group": 2, "topk_group": 1, "n_shared_experts": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.5},
    ),
    "olmo_hybrid": ("olmo_hybrid", {"linear_num_key_heads": 4}),
    "qwen3_5_moe_text": (
        "qwen3_5_moe_text",
        HYBRIDS["qwen3_5_text"] | EXPERTS | {"shared_expert_intermediate_size": 32},
    ),
    "qwen3_5_text": ("qwen3_5_text", {}),
    "qwen3_next": ("qwen3_next", {}),
    # A width whose root bfloat16 has to round.
    "recurrent_gemma": ("recurrent_gemma", {"hidden_size": 80, "lru_width": 80, "head_dim": 20}),
}
OTHERS: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "apertus": {"hidden_act": "xielu", "partial_rotary_factor": 1.0, "rope_parameters": ROPE},
    "cohere": {"tie_word_embeddings": True},
    "dbrx": {},
    "deepseek_v32": {},
    "dots1": {},
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "exaone4": {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    "exaone_moe": {},
    "gemma3": {},
    "glm": {"partial_rotary_factor": 0.5},
    "gemma3n_text": {"num_kv_shared_layers": 2, "tie_word_embeddings": True},
    "gemma4_text": {"global_head_dim": 512, "tie_word_embeddings": True, "partial_rotary_factor": 1.0},
    "glm4_moe": {},
    "glm4_moe_lite": {"partial_rotary_factor": 1.0, "head_dim": 8},
    "glm_moe_dsa": {},
    "gpt2": {"n_inner": 256, "tie_word_embeddings": True},
    "gpt_bigcode": {"tie_word_embeddings": True},
    "gpt_neox": {"attention_bias": True, "intermediate_size": 256},
    "gptj": {"n_inner": None},
    "granite": {},
    "granitemoe": {},
    "helium": {},
    "hunyuan_v1_dense": {},
    "internlm3": {},
    "laguna": {},
    "mellum": {},
    "ministral3": {},
    # A large epsilon: mlx-lm's own is 1e-5 for every model.
    "nanochat": {"rms_norm_eps": 0.01, "num_key_value_heads": 2},
    "nemotron": {},
    "olmo3": {"rope_theta": 500000.0},  # the base of the windowed layers where config.json names one for the others
    "olmoe": {},
    "phi": {"hidden_act": "gelu_new"},
    "phimoe": {"attention_bias": True, "lm_head_bias": True},
    "qwen2_moe": {},
    "seed_oss": {},
    "smollm3": {},
    "solar_open": {"partial_rotary_factor": 1.0, "first_k_dense_replace": 0},
    "stablelm": {},
    "starcoder2": {"tie_word_embeddings": True},
}
"""Compared in two steps only, so that there may be many."""

VARIANTS |= RECURRENT
SOLO = [name for name in RECURRENT if name not in ("bailing_hybrid", "kimi_linear")]
BACKENDS = {
    "gemma2": "padded_grouped",
    "deepseek_v3": "latent",
    "bailing_hybrid": "solo_padded",
    "kimi_linear": "solo_padded",
} | dict.fromkeys(SOLO, "solo")
"""Of models that compute with their mask or hide their queries, or keep a state; all others run as rows."""

Model = tuple[Reference, Engine]


@pytest.fixture(scope="module", params=VARIANTS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    family, overrides = VARIANTS[request.param]
    reference = build_reference(tmp_path_factory.mktemp("model") / request.param, family, **overrides)
    return reference, Engine(reference.path)


def assert_equal(model: Model, found: Any, at: list[tuple[int, int]]) -> None:
    """``found`` [n, vocab] are the logits after token ``length`` of sequence ``i``, for each (i, length)."""
    reference = model[0]
    expected = np.stack([reference.logits[i, length - 1] for i, length in at])
    difference = np.abs(found - expected).max(axis=1) / reference.scale
    print(f"parity {reference.path.name} {difference.max():.1e}")
    assert difference.max() <= TOLERANCE, difference


def test_backend(model: Model) -> None:
    """A fault of one backend must not hide behind the next, which the probe would choose instead."""
    reference, engine = model
    assert engine.backend == BACKENDS.get(reference.path.name, "rows")


def test_one_prompt_alone(model: Model) -> None:
    reference, engine = model
    (request,) = engine.requests(reference.tokens[0])
    assert_equal(model, engine.logits((request, 0, LENGTH)), [(0, LENGTH)])


def test_ragged_prompts_and_decodes_in_one_step(model: Model) -> None:
    reference, engine = model
    requests = engine.requests(*reference.tokens)
    lengths = [1, 5, 17, 30, LENGTH - 4]
    found = engine.logits(*((r, 0, n) for r, n in zip(requests, lengths, strict=True)))
    assert_equal(model, found, list(enumerate(lengths)))
    for step in range(3):
        # Decodes beside a second chunk of the first request.
        works = [(r, n + step, n + step + 1) for r, n in list(zip(requests, lengths, strict=True))[1:]]
        chunk = (requests[0], 1 + 13 * step, 14 + 13 * step)
        found = engine.logits(*works, chunk)
        assert_equal(model, found, [*((i + 1, w[2]) for i, w in enumerate(works)), (0, chunk[2])])


def test_chunks(model: Model) -> None:
    reference, engine = model
    first, second = engine.requests(reference.tokens[2], reference.tokens[3])
    bounds = [0, 7, 8, 9, 22, 39, 40, LENGTH]
    for start, end in pairwise(bounds):
        found = engine.logits((first, start, end), (second, start, end))
        assert_equal(model, found, [(2, end), (3, end)])


@settings(max_examples=8)
@given(st.data())
def test_any_way_to_cut_and_mix(model: Model, data: st.DataObject) -> None:
    reference, engine = model
    requests = engine.requests(*reference.tokens)
    done = [0] * len(requests)
    while unfinished := [i for i, n in enumerate(done) if n < LENGTH]:
        chosen = data.draw(st.lists(st.sampled_from(unfinished), min_size=1, unique=True), label="requests")
        ends = [min(LENGTH, done[i] + data.draw(st.sampled_from([1, 2, 9, 20, 33]), label="tokens")) for i in chosen]
        found = engine.logits(*((requests[i], done[i], end) for i, end in zip(chosen, ends, strict=True)))
        assert_equal(model, found, list(zip(chosen, ends, strict=True)))
        for i, end in zip(chosen, ends, strict=True):
            done[i] = end


def test_prefix_hits(model: Model) -> None:
    reference, engine = model
    giver, taker = engine.requests(reference.tokens[0], reference.tokens[1], shared=SHARED)
    if engine.backend.startswith("solo"):  # where the state was kept, in the same step as it is made
        found = engine.run(Work(taker, SHARED, LENGTH, True, restore=1), Work(giver, 0, SHARED, True, save=1))
        assert_equal(model, found, [(1, LENGTH), (0, SHARED)])
        return
    # In the same step as the request that fills the shared slots, then behind it.
    found = engine.logits((giver, 0, LENGTH - 1), (taker, SHARED, SHARED + 9))
    assert_equal(model, found, [(0, LENGTH - 1), (1, SHARED + 9)])
    found = engine.logits((taker, SHARED + 9, LENGTH), (giver, LENGTH - 1, LENGTH))
    assert_equal(model, found, [(1, LENGTH), (0, LENGTH)])


@pytest.mark.parametrize("family", OTHERS)
def test_other_families(family: str, tmp_path: Path) -> None:
    """A prefix, then all at once: the rest of it, a prompt, and a decode."""
    reference = build_reference(tmp_path / family, family, **OTHERS[family])
    model = reference, Engine(reference.path)
    requests = model[1].requests(*reference.tokens)
    begun = model[1].logits((requests[0], 0, 20), (requests[2], 0, 30))
    assert_equal(model, begun, [(0, 20), (2, 30)])
    found = model[1].logits((requests[2], 30, 31), (requests[0], 20, LENGTH), (requests[3], 0, 40))
    assert_equal(model, found, [(2, 31), (0, LENGTH), (3, 40)])
