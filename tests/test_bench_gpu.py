"""The GPU benchmark on models of a few numbers: every shape's class is built, and both sides answer every case."""

from __future__ import annotations

import mlx.core as mx
import pytest

from benchmarks import gpu

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 300,
    "max_position_embeddings": 2048,
}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENTS = {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shape with few numbers, and prompts of few tokens."""
    for name, shape in gpu.SHAPES.items():
        less = SMALL | {k: v for k, v in (EXPERTS | (LATENTS if "kv_lora_rank" in shape else {})).items() if k in shape}
        monkeypatch.setitem(gpu.SHAPES, name, {**shape, **less})
    prompts = gpu.prompts
    monkeypatch.setattr(
        gpu, "prompts", lambda count, length, vocab, seed: prompts(count, max(8, length // 256), vocab, seed)
    )
    make_core = gpu.make_core
    few = {"chunked_prefill_size": 64, "max_total_tokens": 4096}  # what a step may take is measured by running one
    monkeypatch.setattr(gpu, "make_core", lambda model, **options: make_core(model, **options | few))
    monkeypatch.setattr(gpu, "DTYPE", mx.float32)  # MLX's CPU multiplies by experts in float32 alone


def rows(shape: str, codes: str, *cases: str) -> list[dict[str, object]]:
    found = gpu.measure(
        shape,
        codes,
        streams=[2],
        rounds=1,
        names=["mlx-lm", "pippin"],
        graph_rows=8,
        cases=cases,
        kv_dtypes=["auto", "int8"],
    )
    return list(found)


@pytest.mark.parametrize("name", ["30b-a3b", "mixtral-8x7b", "gpt-oss-20b:mxfp4", "deepseek-v2-lite", "8b:4"])
def test_every_shape_decodes_on_both_sides(small: None, name: str) -> None:
    shape, _, codes = name.partition(":")
    found = rows(shape, codes, "decode")
    assert [(row["side"], row["streams"]) for row in found] == [("mlx-lm", 2), ("pippin", 2)]
    assert all(float(str(row["decode"])) > 0 for row in found)


def test_every_case_is_measured(small: None) -> None:
    found = rows("0.6b", "", *gpu.CASES)
    ours = {key for row in found if row["side"] == "pippin" for key in row}
    assert {"decode", "prefill", "prompt_16k", "ttft_behind_8k_cached", "ttft_short_behind_32k", "ttft_32k"} <= ours
    assert [row["kv"] for row in found if "kv" in row] == ["auto", "int8"]
    assert [row["side"] for row in found if row.get("context") == 8192] == ["mlx-lm", "pippin"]
