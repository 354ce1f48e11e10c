"""Tiny random checkpoints of sixteen model families, written to disk without torch.

``FAMILIES`` holds each family's config.json as its makers write it, small, and with what is peculiar to the family
switched on: windows shorter than the tests' prompts, soft-caps, sinks, shared and routed experts, latent attention.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
from mlx.utils import tree_flatten

COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 288,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 20000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
YARN: dict[str, Any] = {
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 64,
}
MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "routed_scaling_factor": 1.5,
    "attention_bias": False,
    "rope_scaling": YARN | {"type": "yarn", "mscale": 0.8, "mscale_all_dim": 0.7},
}
WINDOW = 8

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "qwen3_moe": {
        "head_dim": 24,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "mistral": {"sliding_window": WINDOW, "head_dim": 16},
    "gemma": {"head_dim": 32, "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh"},
    "gemma2": {
        "head_dim": 16,
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "gemma3_text": {
        "head_dim": 16,
        "sliding_window": WINDOW,
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 24,
        "rope_local_base_freq": 500.0,
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "phi3": {"original_max_position_embeddings": 256, "partial_rotary_factor": 0.5},
    "cohere2": {
        "head_dim": 16,
        "sliding_window": WINDOW,
        "sliding_window_pattern": 3,
        "layer_norm_eps": 1e-5,
        "logit_scale": 0.25,
        "tie_word_embeddings": True,
    },
    "olmo2": {},
    "gpt_oss": {
        "head_dim": 16,
        "sliding_window": WINDOW,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_scaling": YARN | {"rope_type": "yarn", "truncate": False},
    },
    "deepseek_v2": MLA
    | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "scoring_func": "softmax"},
    "deepseek_v3": MLA
    | {
        "topk_method": "noaux_tc",
        "n_group": 4,
        "topk_group": 2,
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
    },
    "glm4": {"head_dim": 16, "partial_rotary_factor": 0.5, "attention_bias": True},
}


LINEAR: dict[str, Any] = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}

HYBRIDS: dict[str, dict[str, Any]] = {
    "qwen3_next": LINEAR
    | {
        "num_hidden_layers": 4,
        "head_dim": 16,
        "partial_rotary_factor": 0.5,
        "full_attention_interval": 2,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    },
    "falcon_h1": {
        "head_dim": 16,
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_chunk_size": 16,
        "mamba_expand": 1,
        "mamba_rms_norm": True,
        "mamba_norm_before_gate": False,
        "mlp_expansion_factor": 2,
        "attention_in_multiplier": 0.9,
        "attention_out_multiplier": 0.8,
        "embedding_multiplier": 2.5,
        "key_multiplier": 0.5,
        "lm_head_multiplier": 0.4,
        "mlp_multipliers": [0.9, 0.6],
        "ssm_in_multiplier": 1.2,
        "ssm_out_multiplier": 0.3,
        "ssm_multipliers": [0.4, 0.3, 0.4, 0.5, 0.4],
    },
    "mamba": {
        "state_size": 8,
        "intermediate_size": 128,
        "expand": 2,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 4,
    },
    "mamba2": {
        "num_heads": 8,
        "head_dim": 16,
        "expand": 2,
        "state_size": 16,
        "conv_kernel": 4,
        "n_groups": 1,
        "chunk_size": 16,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_limit": [0.0, 1e9],
        "time_step_rank": "auto",
        "layer_norm_epsilon": 1e-5,
        "residual_in_fp32": False,
    },
    "recurrent_gemma": {
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "attention_bias": False,
        "conv1d_width": 4,
        "logits_soft_cap": 30.0,
        "attention_window_size": WINDOW,
        "block_types": ["recurrent", "attention", "recurrent"],
        "lru_width": 64,
        "tie_word_embeddings": True,
    },
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_d_conv": 4,
        "mamba_d_state": 8,
        "mamba_expand": 2,
        "mamba_dt_rank": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "use_mamba_kernels": False,
    },
    "lfm2": {
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 64,
        "block_multiple_of": 16,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "layer_types": ["conv", "full_attention", "conv"],
        "tie_word_embeddings": True,
    },
    "nemotron_h": {
        "num_hidden_layers": 4,
        "head_dim": 16,
        "attention_bias": False,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "mamba_proj_bias": False,
        "ssm_state_size": 16,
        "conv_kernel": 4,
        "n_groups": 2,
        "chunk_size": 16,
        "mlp_bias": False,
        "layer_norm_epsilon": 1e-5,
        "use_bias": False,
        "use_conv_bias": True,
        "hybrid_override_pattern": "M*-M",
    },
    "granitemoehybrid": {
        "attention_bias": False,
        "embedding_multiplier": 2.0,
        "attention_multiplier": 0.1,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
        "layer_types": ["mamba", "attention", "mamba"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 32,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_proj_bias": False,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_n_groups": 1,
        "mamba_expand": 2,
        "mamba_chunk_size": 16,
        "mamba_conv_bias": True,
        "position_embedding_type": "rope",
    },
    "rwkv7": {
        "norm_eps": 1e-5,
        "head_dim": 32,
        "a_low_rank_dim": 8,
        "v_low_rank_dim": 8,
        "gate_low_rank_dim": 8,
        "decay_low_rank_dim": 8,
    },
    "kimi_linear": {
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "model_max_length": 256,
        "num_experts": 4,
        "moe_intermediate_size": 32,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "num_experts_per_token": 2,
        "num_shared_experts": 1,
        "first_k_dense_replace": 1,
        "linear_attn_config": {
            "full_attn_layers": [2, 4],
            "kda_layers": [1, 3],
            "num_heads": 4,
            "head_dim": 16,
            "short_conv_kernel_size": 4,
        },
    },
    "longcat_flash_ngram": {
        "ffn_hidden_size": 96,
        "moe_topk": 2,
        "expert_ffn_hidden_size": 32,
        "n_routed_experts": 4,
        "zero_expert_num": 2,
        "num_layers": 2,
        "kv_lora_rank": 32,
        "q_lora_rank": 24,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "routed_scaling_factor": 1.0,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
        "ngram_vocab_size_ratio": 2,
        "emb_neighbor_num": 4,
        "emb_split_num": 2,
    },
    "baichuan_m1": {
        "sliding_window": WINDOW,
        "sliding_window_layers": [1],
        "conv_window": 2,
        "num_swa_attention_heads": 4,
        "num_swa_key_value_heads": 2,
    },
    "qwen3_5_text": LINEAR
    | {
        "num_hidden_layers": 4,
        "head_dim": 16,
        "full_attention_interval": 2,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
}
"""Models that keep a recurrent state, in some layers or in all."""


def family_config(family: str, **overrides: Any) -> dict[str, Any]:
    """config.json of a tiny model of ``family``."""
    return COMMON | {"model_type": family} | (FAMILIES | HYBRIDS)[family] | overrides


def make_checkpoint(
    path: Path,
    family: str,
    *,
    dtype: mx.Dtype = mx.float32,
    seed: int = 0,
    tokenizer: Path | None = None,
    **overrides: Any,
) -> Path:
    """Writes a random model of ``family`` under ``path``, which is returned, in the layout that mlx-lm saves.

    ``overrides`` are settings of config.json; ``tokenizer`` is a directory whose tokenizer files are copied.
    """
    write_checkpoint(path, family_config(family, **overrides), dtype, seed)
    if tokenizer is not None:
        for file in tokenizer.glob("*token*"):
            shutil.copy(file, path)
    return path


def write_checkpoint(path: Path, config: dict[str, Any], dtype: mx.Dtype = mx.float32, seed: int = 0) -> Path:
    """Writes a random model as ``config`` describes it under ``path``, which is returned."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    weights = {name: value.astype(dtype) for name, value in random_weights(build_model(config), seed).items()}
    mx.save_safetensors(str(path / "model.safetensors"), weights, metadata={"format": "mlx"})
    return path


def build_model(config: dict[str, Any]) -> nn.Module:
    """A model of mlx-lm's own class, as config.json describes it; what it draws at random is the same each time."""
    mx.random.seed(0)
    model_class, args_class = mlx_lm.utils._get_classes(config)
    return model_class(args_class.from_dict(config))


def random_weights(model: nn.Module, seed: int) -> dict[str, mx.array]:
    """Weights under which activations stay near 1 and no norm, bias or sink is at its default."""
    weights: dict[str, mx.array] = {}
    for name, value in tree_flatten(model.parameters()):
        noise = mx.random.normal(value.shape, key=mx.random.key(seed + len(weights)))
        if value.ndim <= 1:
            weights[name] = value + 0.3 * noise
        else:
            weights[name] = noise if "embed" in name else 2.0 * noise / value.shape[-1] ** 0.5
    return weights
