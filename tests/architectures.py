"""A small configuration for every architecture of mlx-lm that has one, for the sweep.

``SHARED`` are names that many of them read, ``OWN`` what each needs beside.
"""

from __future__ import annotations

from typing import Any

from tests.checkpoints import COMMON, FAMILIES, HYBRIDS, LINEAR, WINDOW, YARN

SLIDING = ["sliding_attention", "sliding_attention", "full_attention"]
SHARED: dict[str, Any] = COMMON | {
    "head_dim": 16,
    "norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "use_qkv_bias": False,
    "hidden_act": "silu",
    "partial_rotary_factor": 0.5,
    "sliding_window": WINDOW,
    # experts
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "moe_num_experts": 4,
    "moe_topk": 2,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "routed_scaling_factor": 1.0,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    # latent attention
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    # other names for the same
    "n_embd": 64,
    "n_head": 4,
    "n_layer": 3,
    "n_inner": 96,
    "n_positions": 256,
    "n_ctx": 256,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "hidden_dim": 64,
    "logits_scaling": 2.0,
    "attention_multiplier": 0.2,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
}
HEADS = {"num_key_value_heads": 4}
GLOBAL_LINEAR = {"num_hidden_layers": 4, "layer_group_size": 2, "group_norm_size": 2, "num_key_value_heads": 4}
EXPANDED_MLA = {"num_key_value_heads": 4, "dim_model_base": 32, "scale_depth": 1.4, "scale_emb": 2.0}

ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
ROPES = {"sliding_attention": ROPE, "full_attention": ROPE}
GEMMA4 = SHARED | {
    "model_type": "gemma4_text",
    "num_hidden_layers": 4,
    "global_head_dim": 32,
    "vocab_size_per_layer_input": 288,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "final_logit_softcapping": 30.0,
    "num_experts": None,
}
KIMI = COMMON | FAMILIES["deepseek_v3"] | {"model_type": "deepseek_v3"}
LLAMA4 = SHARED | {
    "model_type": "llama4_text",
    "num_hidden_layers": 4,
    "attention_chunk_size": 16,
    "rope_scaling": None,
    "interleave_moe_layer_step": 2,
    "intermediate_size_mlp": 96,
    "num_experts_per_tok": 1,
    "use_qk_norm": True,
}

OWN: dict[str, dict[str, Any]] = {
    "Klear": {},
    "afm7": {"num_kv_reuse_layers": 1, "hidden_dim_scale_factor": 1.5},
    "afmoe": {"layer_types": SLIDING, "num_dense_layers": 1, "num_key_value_heads": 2},
    "apertus": {"post_norm": False, "qk_norm": True},
    "bailing_hybrid": GLOBAL_LINEAR,
    "bailing_moe": {},
    "bailing_moe_linear": GLOBAL_LINEAR,
    "bailing_moe_v3": GLOBAL_LINEAR,
    "cohere": {},
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 3,
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 2.0, "rope_theta": 20000.0},
    },
    "deepseek": {},
    "deepseek_v32": HEADS | {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 2048},
    "dots1": {},
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "exaone": {},
    "exaone4": {"sliding_window_pattern": "LLG", "rope_scaling": None},
    "exaone_moe": {"layer_types": SLIDING, "is_moe_layer": [False, True, True]},
    "gear": {"layer_types": SLIDING},
    "gemma3": {"text_config": COMMON | FAMILIES["gemma3_text"] | {"model_type": "gemma3_text"}},
    "gemma3n": {
        "text_config": SHARED
        | {
            "model_type": "gemma3n_text",
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 1,
            "vocab_size_per_layer_input": 288,
            "rope_local_base_freq": 500.0,
            "final_logit_softcapping": 30.0,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
            "hidden_size_per_layer_input": 16,
            "altup_num_inputs": 2,
            "altup_coef_clip": 100.0,
            "altup_correct_scale": True,
            "altup_active_idx": 0,
            "laurel_rank": 8,
        }
    },
    "gemma4": {"text_config": GEMMA4},
    "gemma4_text": GEMMA4,
    "glm": {},
    "glm4_moe": {"rope_scaling": None, "use_qk_norm": True},
    "glm4_moe_lite": HEADS,
    "glm_moe_dsa": HEADS | {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 2048, "rope_parameters": ROPE},
    "gpt2": {},
    "gpt_bigcode": {"attention_bias": True, "mlp_bias": True},
    "gpt_neox": {"hidden_act": "gelu", "rotary_emb_base": 10000, "rotary_pct": 0.5},
    "gptj": {"rotary_dim": 8},
    "granite": {},
    "granitemoe": {},
    "helium": {},
    "hunyuan": {
        "num_hidden_layers": 4,
        "num_shared_expert": 1,
        "use_mixed_mlp_moe": True,
        "use_cla": True,
        "rope_scaling": {"type": "dynamic", "alpha": 2.0, "factor": 1.0},
        "cla_share_factor": 2,
        "use_qk_norm": True,
    },
    "hunyuan_v1_dense": {},
    "internlm2": {},
    "internlm3": {},
    "iquestloopcoder": {},
    "laguna": {},
    "kimi_k25": {"text_config": KIMI},
    "kimi_vl": {"text_config": KIMI},
    "lfm2-vl": {"text_config": COMMON | HYBRIDS["lfm2"] | {"model_type": "lfm2"}},
    "llama4": {"text_config": LLAMA4},
    "lfm2_moe": HYBRIDS["lfm2"] | {"use_expert_bias": True, "num_dense_layers": 1},
    "lille-130m": {"block_size": 256, "n_kv_heads": 2},
    "llama4_text": {"intermediate_size_mlp": 96, "no_rope_layers": [1, 1, 0], "use_qk_norm": True},
    "longcat_flash": HYBRIDS["longcat_flash_ngram"] | {"attention_method": "MLA", "zero_expert_type": "identity"},
    "mellum": {"layer_types": SLIDING, "rope_parameters": ROPES},
    "mimo": {},
    "minicpm": EXPANDED_MLA,
    "minicpm3": EXPANDED_MLA | {"rope_scaling": {"type": "longrope", "original_max_position_embeddings": 256}},
    "minimax": {"rotary_dim": 8},
    "ministral3": {"rope_parameters": ROPE | {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 64}},
    "mistral3": {"text_config": COMMON | {"model_type": "llama"}},
    "mistral4": HEADS | {"rope_parameters": ROPE | YARN | {"type": "yarn", "llama_4_scaling_beta": 0.1}},
    "muse_glimmer": {},
    "nanbeige": {},
    "nanochat": {"hidden_act": "relu2"},
    "nemotron": {"hidden_act": "relu2"},
    "olmo3": {"layer_types": SLIDING},
    "olmo_hybrid": LINEAR
    | {
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_allow_neg_eigval": True,
    },
    "olmoe": {},
    "openelm": {
        "num_transformer_layers": 2,
        "model_dim": 64,
        "ffn_dim_divisor": 16,
        "num_query_heads": [4, 4],
        "num_kv_heads": [2, 2],
        "ffn_multipliers": [1.0, 2.0],
    },
    "phi": {},
    "phi3small": {"dense_attention_every_n_layers": 2, "ff_intermediate_size": 96, "gegelu_limit": 20.0},
    "phimoe": {},
    "pixtral": {"text_config": COMMON | {"model_type": "llama"}},
    "plamo": {"n_shared_head": 2, "num_key_value_heads": 2},
    "plamo2": {
        "hidden_size_per_head": 16,
        "mamba_d_state": 16,
        "mamba_num_heads": 4,
        "mamba_chunk_size": 16,
        "attention_window_size": 256,
    },
    "plamo3": {},
    "qwen": {"kv_channels": 16, "num_key_value_heads": 4},
    "qwen2_moe": {"norm_topk_prob": False},
    "qwen2_vl": {},
    "qwen3_5": HYBRIDS["qwen3_5_text"],
    "qwen3_5_moe": HYBRIDS["qwen3_5_text"],
    "qwen3_vl": {},
    "qwen3_vl_moe": {"text_config": COMMON | FAMILIES["qwen3_moe"] | {"model_type": "qwen3_moe"}},
    "seed_oss": {},
    "smollm3": {},
    "solar_open": {},
    "spark2_5": {"layer_types": SLIDING, "rope_parameters": ROPES},
    "stablelm": {},
    "starcoder2": {"hidden_act": "gelu_pytorch_tanh", "use_bias": True},
    "step3p5": {"num_attention_groups": 2, "moe_top_k": 2, "share_expert_dim": 32, "layer_types": SLIDING},
    "talkie": {},
    "telechat3": {},
    "youtu_llm": HEADS,
}

UNCAPPED: dict[str, dict[str, Any]] = {"gemma2": {"final_logit_softcapping": 30.0}}


def small_config(architecture: str) -> dict[str, Any]:
    """config.json of a small model of one of mlx-lm's architectures. Raises KeyError if there is none for it."""
    known = FAMILIES | HYBRIDS
    if architecture in known:
        # A soft-cap that cuts deep makes many logits equal, and then rounding decides which token is drawn.
        return COMMON | {"model_type": architecture} | known[architecture] | UNCAPPED.get(architecture, {})
    return SHARED | {"model_type": architecture} | OWN[architecture]
