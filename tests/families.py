"""Tiny random models of every Mixture-of-Experts family in transformers 5.23: 73 configs of 72 families.

`FAMILIES` is data; `make_config`, `build` and `inputs` turn an entry into a config, a model and the model's inputs.
Hidden size 32, vocabulary 96, unless said otherwise 8 experts of width 24, top-2.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

HIDDEN, VOCABULARY = 32, 96


@dataclass(frozen=True)
class Family:
    """Where a family's classes are and which config fields set its experts.

    ``config`` and ``model`` are names in transformers, or ``module:Class`` below ``transformers.models``. A field
    with a dot lies in a nested config.
    """

    config: str
    model: str
    experts: str
    width: str | None
    top_k: str | None
    fields: Mapping[str, Any]
    groups: str | None = None
    """Field that counts the router's groups."""
    shared: str | None = None
    """Field that counts shared experts, whose width is this many times the experts' width."""
    square: bool = False
    """The expert count must be a square number (16 instead of 8 is built)."""
    top_1: bool = False
    """The router chooses one expert only."""
    width_is_list: bool = False
    """The width field holds two widths: those of text and vision experts."""
    width_too: str | None = None
    """A second field that must have the width's value."""
    seq2seq: bool = False


_BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LAYERS = {"num_hidden_layers": 3}
_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2}
_LATENT = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "q_lora_rank": 20,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
_SPARSE = {"index_topk": 16, "index_head_dim": 16, "index_n_heads": 2}
_LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}

FAMILIES: Mapping[str, Family] = {
    "mixtral": Family(
        "MixtralConfig",
        "MixtralForCausalLM",
        "num_local_experts",
        "intermediate_size",
        "num_experts_per_tok",
        {**_BASE, **_ATTENTION, **_LAYERS},
    ),
    "minimax": Family(
        "MiniMaxConfig",
        "MiniMaxForCausalLM",
        "num_local_experts",
        "intermediate_size",
        "num_experts_per_tok",
        {**_BASE, **_ATTENTION, **_LAYERS, "head_dim": 16, "block_size": 16},
    ),
    "minimax_m2": Family(
        "MiniMaxM2Config",
        "MiniMaxM2ForCausalLM",
        "num_local_experts",
        "intermediate_size",
        "num_experts_per_tok",
        {**_BASE, **_ATTENTION, **_LAYERS, "head_dim": 16},
    ),
    "minimax_m3_vl": Family(
        "MiniMaxM3VLTextConfig",
        "MiniMaxM3VLForCausalLM",
        "num_local_experts",
        "intermediate_size",
        "num_experts_per_tok",
        {
            **_BASE,
            **_ATTENTION,
            **_LAYERS,
            "head_dim": 16,
            "rotary_dim": 16,
            "dense_intermediate_size": 56,
            "shared_intermediate_size": 20,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        },
    ),
    "phimoe": Family(
        "PhimoeConfig",
        "PhimoeForCausalLM",
        "num_local_experts",
        "intermediate_size",
        "num_experts_per_tok",
        {**_BASE, **_ATTENTION, **_LAYERS},
    ),
    "qwen2_moe": Family(
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        "num_experts",
        "moe_intermediate_size",
        "num_experts_per_tok",
        {
            **_BASE,
            **_ATTENTION,
            **_LAYERS,
            "intermediate_size": 56,
            "shared_expert_intermediate_size": 20,
            "mlp_only_layers": [0],
        },
    ),
    "qwen3_moe": Family(
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        "num_experts",
        "moe_intermediate_size",
        "num_experts_per_tok",
        {
            **_BASE,
            **_ATTENTION,
            **_LAYERS,
            "head_dim": 16,
            "intermediate_size": 56,
            "mlp_only_layers": [0],
            "norm_topk_prob": True,
        },
    ),
    "qwen3_next": Family(
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        "num_experts",
        "moe_intermediate_size",
        "num_experts_per_tok",
        {
            **_BASE,
            **_ATTENTION,
            **_LINEAR,
            "num_hidden_layers": 4,
            "head_dim": 16,
            "intermediate_size": 56,
            "shared_expert_intermediate_size": 20,
        },
    ),
    "qwen3_5_moe_text": Family(
        "Qwen3_5MoeTextConfig",
        "Qwen3_5MoeForCausalLM",
        "num_experts",
        "moe_intermediate_size",
        "num_experts_per_tok",
        {
            **_BASE,
            **_ATTENTION,
            **_LINEAR,
            "num_hidden_layers": 4,
            "head_dim": 16,
            "shared_expert_intermediate_size": 20,
        },
    ),
    "qwen4_exp_text": Family(
        "Qwen4ExpTextConfig",
        "Qwen4ExpForCausalLM",
        "num_experts",
        "moe_intermediate_size",
        "num_experts_per_tok",
        {
            **_BASE,
            **_ATTENTION,
            **_LINEAR,
            "num_hidden_layers": 4,
            "head_dim": 16,
            "shared_expert_intermediate_size": 20,
            "hc_count": 2,
            "hc_lowrank": 6,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 16,
            "indexer_compress_ratio": 4,
        },
    ),
    "qwen3_vl_moe_text": Family(
        "Qwen3VLMoeTextConfig",
        "Qwen3VLMoeTextModel",
        "num_experts",
        "moe_intermediate_size",
        "num_experts_per_tok",
        {
            **_BASE,
            **_ATTENTION,
            **_LAYERS,
            "head_dim": 16,
            "intermediate_size": 56,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
        },
    ),
    "qwen3_omni_moe_text": Family(
        "qwen3_omni_moe.configuration_qwen3_omni_moe:Qwen3OmniMoeTextConfig",
        "qwen3_omni_moe.modeling_qwen3_omni_moe:Qwen3OmniMoeThinkerTextModel",
        "num_experts",
        "moe_intermediate_size",
        "num_experts_per_tok",
        {
            **_BASE,
            **_ATTENTION,
            **_LAYERS,
            "head_dim": 16,
            "intermediate_size": 56,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
        },
    ),
    "deepseek_v2": Family(
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        "n_routed_experts",
        "moe_intermediate_size",
        "num_experts_per_tok",
        {
            **_BASE,
            **_LATENT,
            **_LAYERS,
            "intermediate_size": 56,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
            "topk_method": "greedy",
            "n_group": None,
            "topk_group": None,
            "routed_scaling_factor": 1.5,
        },
        shared="n_shared_experts",
    ),
    "deepseek_v2_group": Family(
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        "n_routed_experts",
        "moe_intermediate_size",
        "num_experts_per_tok",
        {
            **_BASE,
            **_LATENT,
            **_LAYERS,
            "intermediate_size": 56,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
            "topk_method": "group_limited_greedy",
            "n_group": 2,
            "topk_group": 1,
        },
        shared="n_shared_experts",
        groups="n_group",
    ),
    "deepseek_v3": Family(
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        "n_routed_experts",
        "moe_intermediate_size",
        "num_experts_per_tok",
        {
            **_BASE,
            **_LATENT,
            **_LAYERS,
            "intermediate_size": 56,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
            "num_nextn_predict_layers": 0,
        },
        shared="n_shared_experts",
        groups="n_group",
    ),
    "deepseek_v32": Family(
        "DeepseekV32Config",
        "DeepseekV32ForCausalLM",
        "n_routed_experts",
        "moe_intermediate_size",
        "num_experts_per_tok",
        {
            **_BASE,
            **_LATENT,
            **_LAYERS,
            **_SPARSE,
            "intermediate_size": 56,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
        },
        shared="n_shared_experts",
        groups="n_group",
    ),
    "deepseek_v4": Family(
        "DeepseekV4Config",
        "DeepseekV4ForCausalLM",
        "n_routed_experts",
        "moe_intermediate_size",
        "num_experts_per_tok",
        {
            **_BASE,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "head_dim": 32,
            "q_lora_rank": 20,
            "index_n_heads": 2,
            "index_head_dim": 16,
            "index_topk": 4,
            "o_groups": 2,
            "o_lora_rank": 12,
            "hc_mult": 2,
            "sliding_window": 16,
            "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
            "layer_types": ["sliding_attention"] * 4,
            "partial_rotary_factor": 0.5,
        },
    ),
    "axk1": Family(
        "AXK1Config",
        "AXK1ForCausalLM",
        "n_routed_experts",
        "moe_intermediate_size",
        "num_experts_per_tok",
        {**_BASE, **_LATENT, **_LAYERS, "intermediate_size": 56, "n_group": 2, "topk_group": 1},
        shared="n_shared_experts",
        groups="n_group",
    ),
    "axk2": Family(
        "AXK2Config",
        "AXK2ForCausalLM",
        "n_routed_experts",
        "moe_intermediate_size",
        "num_experts_per_tok",
        {
            **_BASE,
            **_LATENT,
            **_LAYERS,
            **_SPARSE,
            "intermediate_size": 56,
            "n_group": None,
            "topk_group": None,
            "gated_norm_rank": 6,
        },
        shared="n_shared_experts",
    ),
    "dots1": Family(
        "Dots1Config",
        "Dots1ForCausalLM",
        "n_routed_experts",
        "moe_intermediate_size",
        "num_experts_per_tok",
        {
            **_BASE,
            **_ATTENTION,
            **_LAYERS,
            "head_dim": 16,
            "intermediate_size": 56,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
        },
        shared="n_shared_experts",
        groups="n_group",
    ),
    "glm4_moe": Family(
        "Glm4MoeConfig",
        "Glm4MoeForCausalLM",
        "n_routed_experts",
        "moe_intermediate_size",
        "num_experts_per_tok",
        {
            **_BASE,
            **_ATTENTION,
            **_LAYERS,
            "head_dim": 16,
            "intermediate_size": 56,
            "first_k_dense_replace": 1,
            "num_nextn_predict_layers": 0,
        },
        shared="n_shared_experts",
        groups="n_group",
    ),
    "glm4_moe_lite": Family(
        "Glm4MoeLiteConfig",
        "Glm4MoeLiteForCausalLM",
        "n_routed_experts",
        "moe_intermediate_size",
        "num_experts_per_tok",
        {**_BASE, **_LATENT, **_LAYERS, "intermediate_size": 56},
        shared="n_shared_experts",
        groups="n_group",
    ),
    "glm4v_moe_text": Family(
        "Glm4vMoeTextConfig",
        "Glm4vMoeTextModel",
        "n_routed_experts",
        "moe_intermediate_size",
        "num_experts_per_tok",
        {
            **_BASE,
            **_ATTENTION,
            **_LAYERS,
            "head_dim": 16,
            "intermediate_size": 56,
            "first_k_dense_replace": 1,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "mrope_section": [2, 1, 1],
            },
        },
        shared="n_shared_experts",
        groups="n_group",
    ),
    "glm_moe_dsa": Family(
        "GlmMoeDsaConfig",
        "GlmMoeDsaForCausalLM",
        "n_routed_experts",
        "moe_intermediate_size",
        "num_experts_per_tok",
        {**_BASE, **_LATENT, **_LAYERS, **_SPARSE, "intermediate_size": 56, "first_k_dense_replace": 1},
        shared="n_shared_experts",
        groups="n_group",
    ),
    "glm5_next_text": Family(
        "Glm5NextTextConfig",
        "Glm5NextTextModel",
        "n_routed_experts",
        "moe_intermediate_size",
        "num_experts_per_tok",
        {
            **_BASE,
            **_LATENT,
            "num_hidden_layers": 4,
            "qk_rope_head_dim": 0,
            **_SPARSE,
            "index_kpool": 4,
            "intermediate_size": 56,
            "linear_head_dim": 16,
            "linear_num_heads": 2,
            "hc_mult": 2,
        },
        shared="n_shared_experts",
        groups="n_group",
    ),
    "solar_open": Family(
        "SolarOpenConfig",
        "SolarOpenForCausalLM",
        "n_routed_experts",
        "moe_intermediate_size",
        "num_experts_per_tok",
        {**_BASE, **_ATTENTION, **_LAYERS, "head_dim": 16},
        shared="n_shared_experts",
        groups="n_group",
    ),
    "mistral4": Family(
        "Mistral4Config",
        "Mistral4ForCausalLM",
        "n_routed_experts",
        "moe_intermediate_size",
        "num_experts_per_tok",
        {**_BASE, **_LATENT, **_LAYERS, "intermediate_size": 56, "first_k_dense_replace": 1},
        shared="n_shared_experts",
        groups="n_group",
    ),
    "mistral_large4_text": Family(
        "MistralLarge4TextConfig",
        "MistralLarge4TextModel",
        "n_routed_experts",
        "moe_intermediate_size",
        "num_experts_per_tok",
        {**_BASE, **_LATENT, **_LAYERS, **_SPARSE, "intermediate_size": 56, "first_k_dense_replace": 1},
        shared="n_shared_experts",
        groups="n_group",
    ),
    "kimi_linear": Family(
        "KimiLinearConfig",
        "KimiLinearForCausalLM",
        "num_local_experts",
        "moe_intermediate_size",
        "num_experts_per_tok",
        {
            **_BASE,
            **_LATENT,
            "num_hidden_layers": 4,
            "q_lora_rank": None,
            "intermediate_size": 56,
            "linear_head_dim": 16,
            "linear_num_heads": 2,
            "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
        },
        shared="n_shared_experts",
        groups="n_group",
    ),
    "bailing_hybrid": Family(
        "BailingHybridConfig",
        "BailingHybridForCausalLM",
        "num_local_experts",
        "moe_intermediate_size",
        "num_experts_per_tok",
        {
            **_BASE,
            **_LATENT,
            "num_hidden_layers": 4,
            "head_dim": 16,
            "layer_group_size": 4,
            "intermediate_size": 56,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
            "num_nextn_predict_layers": 0,
        },
        shared="n_shared_experts",
        groups="n_group",
    ),
    "beam": Family(
        "BeamConfig",
        "BeamForCausalLM",
        "num_experts",
        "moe_intermediate_size",
        "num_experts_per_tok",
        {
            **_BASE,
            **_ATTENTION,
            **_LAYERS,
            "head_dim": 16,
            "intermediate_size": 56,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "n_group": 2,
            "topk_group": 1,
        },
        groups="n_group",
    ),
    "mimo_v2_flash": Family(
        "MiMoV2FlashConfig",
        "MiMoV2FlashForCausalLM",
        "n_routed_experts",
        "moe_intermediate_size",
        "num_experts_per_tok",
        {
            **_BASE,
            **_ATTENTION,
            **_LAYERS,
            "head_dim": 16,
            "v_head_dim": 12,
            "intermediate_size": 56,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 5000000.0, "partial_rotary_factor": 0.5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
            },
        },
        groups="n_group",
    ),
    "exaone_moe": Family(
        "ExaoneMoeConfig",
        "ExaoneMoeForCausalLM",
        "num_experts",
        "moe_intermediate_size",
        "num_experts_per_tok",
        {**_BASE, **_ATTENTION, **_LAYERS, "head_dim": 16, "intermediate_size": 56, "sliding_window": 16},
        shared="num_shared_experts",
        groups="n_group",
    ),
    "nemotron_h": Family(
        "NemotronHConfig",
        "NemotronHForCausalLM",
        "n_routed_experts",
        "moe_intermediate_size",
        "num_experts_per_tok",
        {
            **_BASE,
            **_ATTENTION,
            "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
            "head_dim": 16,
            "intermediate_size": 56,
            "moe_shared_expert_intermediate_size": 20,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 1,
            "chunk_size": 16,
        },
        groups="n_group",
    ),
    "afmoe": Family(
        "AfmoeConfig",
        "AfmoeForCausalLM",
        "num_experts",
        "moe_intermediate_size",
        "num_experts_per_tok",
        {
            **_BASE,
            **_ATTENTION,
            **_LAYERS,
            "head_dim": 16,
            "intermediate_size": 56,
            "num_dense_layers": 1,
            "num_shared_experts": 1,
            "sliding_window": 16,
        },
        shared="num_shared_experts",
    ),
    "ernie4_5_moe": Family(
        "Ernie4_5_MoeConfig",
        "Ernie4_5_MoeForCausalLM",
        "moe_num_experts",
        "moe_intermediate_size",
        "moe_k",
        {
            **_BASE,
            **_ATTENTION,
            **_LAYERS,
            "intermediate_size": 56,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
            "tie_word_embeddings": False,
        },
        shared="moe_num_shared_experts",
    ),
    "ernie4_5_vl_moe_text": Family(
        "Ernie4_5_VLMoeTextConfig",
        "Ernie4_5_VLMoeTextModel",
        "moe_num_experts",
        "moe_intermediate_size",
        "moe_k",
        {
            **_BASE,
            **_ATTENTION,
            **_LAYERS,
            "intermediate_size": 56,
            "moe_num_shared_experts": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
            "tie_word_embeddings": False,
        },
        width_is_list=True,
    ),
    "flex_olmo": Family(
        "FlexOlmoConfig",
        "FlexOlmoForCausalLM",
        "num_experts",
        "intermediate_size",
        "num_experts_per_tok",
        {**_BASE, **_ATTENTION, **_LAYERS},
    ),
    "olmoe": Family(
        "OlmoeConfig",
        "OlmoeForCausalLM",
        "num_experts",
        "intermediate_size",
        "num_experts_per_tok",
        {**_BASE, **_ATTENTION, **_LAYERS},
    ),
    "flint": Family(
        "FlintConfig",
        "FlintForCausalLM",
        "num_experts",
        "moe_intermediate_size",
        "num_experts_per_tok",
        {
            **_BASE,
            **_ATTENTION,
            **_LAYERS,
            "head_dim": 16,
            "intermediate_size": 56,
            "shared_expert_intermediate_size": 20,
            "mlp_only_layers": [0],
            "sliding_window": 16,
        },
    ),
    "kolibri1": Family(
        "Kolibri1Config",
        "Kolibri1ForCausalLM",
        "num_local_experts",
        "moe_intermediate_size",
        "num_experts_per_tok",
        {**_BASE, **_ATTENTION, **_LAYERS, "head_dim": 16, "shared_expert_intermediate_size": 20, "sliding_window": 16},
    ),
    "laguna": Family(
        "LagunaConfig",
        "LagunaForCausalLM",
        "num_experts",
        "moe_intermediate_size",
        "num_experts_per_tok",
        {
            **_BASE,
            **_ATTENTION,
            **_LAYERS,
            "head_dim": 16,
            "intermediate_size": 56,
            "shared_expert_intermediate_size": 20,
        },
    ),
    "mellum": Family(
        "MellumConfig",
        "MellumForCausalLM",
        "num_local_experts",
        "moe_intermediate_size",
        "num_experts_per_tok",
        {
            **_BASE,
            **_ATTENTION,
            **_LAYERS,
            "head_dim": 16,
            "intermediate_size": 56,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
    ),
    "cohere2_moe": Family(
        "Cohere2MoeConfig",
        "Cohere2MoeForCausalLM",
        "num_experts",
        "intermediate_size",
        "num_experts_per_tok",
        {
            **_BASE,
            **_ATTENTION,
            **_LAYERS,
            "head_dim": 16,
            "num_shared_experts": 1,
            "prefix_dense_intermediate_size": 56,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "sliding_window": 16,
            "tie_word_embeddings": False,
        },
        shared="num_shared_experts",
    ),
    "hunyuan_v1_moe": Family(
        "HunYuanMoEV1Config",
        "HunYuanMoEV1ForCausalLM",
        "num_experts",
        "intermediate_size",
        "moe_topk",
        {**_BASE, **_ATTENTION, **_LAYERS, "head_dim": 16},
    ),
    "hy_v3": Family(
        "HYV3Config",
        "HYV3ForCausalLM",
        "num_experts",
        "moe_intermediate_size",
        "num_experts_per_tok",
        {**_BASE, **_ATTENTION, **_LAYERS, "head_dim": 16, "intermediate_size": 56},
        shared="num_shared_experts",
    ),
    "hy_v4": Family(
        "HYV4Config",
        "HYV4ForCausalLM",
        "n_routed_experts",
        "moe_intermediate_size",
        "num_experts_per_tok",
        {**_BASE, **_LATENT, **_LAYERS, **_SPARSE, "intermediate_size": 56, "hc_mult": 2},
        shared="n_shared_experts",
        groups="n_group",
    ),
    "jamba": Family(
        "JambaConfig",
        "JambaForCausalLM",
        "num_experts",
        "intermediate_size",
        "num_experts_per_tok",
        {
            **_BASE,
            **_ATTENTION,
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 6,
            "mamba_d_conv": 4,
            "use_mamba_kernels": False,
        },
    ),
    "granitemoe": Family(
        "GraniteMoeConfig",
        "GraniteMoeForCausalLM",
        "num_local_experts",
        "intermediate_size",
        "num_experts_per_tok",
        {**_BASE, **_ATTENTION, **_LAYERS},
    ),
    "granitemoeshared": Family(
        "GraniteMoeSharedConfig",
        "GraniteMoeSharedForCausalLM",
        "num_local_experts",
        "intermediate_size",
        "num_experts_per_tok",
        {**_BASE, **_ATTENTION, **_LAYERS, "shared_intermediate_size": 20},
    ),
    "granitemoe_swa": Family(
        "GraniteMoeSWAConfig",
        "GraniteMoeSWAForCausalLM",
        "num_local_experts",
        "intermediate_size",
        "num_experts_per_tok",
        {**_BASE, **_ATTENTION, **_LAYERS, "shared_intermediate_size": 20, "sliding_window": 16},
    ),
    "granitemoehybrid": Family(
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridForCausalLM",
        "num_local_experts",
        "intermediate_size",
        "num_experts_per_tok",
        {
            **_BASE,
            **_ATTENTION,
            **_LAYERS,
            "shared_intermediate_size": 20,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "mamba_chunk_size": 16,
        },
    ),
    "gpt_oss": Family(
        "GptOssConfig",
        "GptOssForCausalLM",
        "num_local_experts",
        "intermediate_size",
        "num_experts_per_tok",
        {**_BASE, **_ATTENTION, **_LAYERS, "head_dim": 16, "sliding_window": 16},
    ),
    "openai_privacy_filter": Family(
        "OpenAIPrivacyFilterConfig",
        "OpenAIPrivacyFilterForTokenClassification",
        "num_local_experts",
        "intermediate_size",
        "num_experts_per_tok",
        {**_BASE, **_ATTENTION, **_LAYERS, "head_dim": 16, "sliding_window": 16},
    ),
    "lfm2_moe": Family(
        "Lfm2MoeConfig",
        "Lfm2MoeForCausalLM",
        "num_experts",
        "moe_intermediate_size",
        "num_experts_per_tok",
        {
            **_BASE,
            **_ATTENTION,
            **_LAYERS,
            "intermediate_size": 56,
            "num_dense_layers": 1,
            "layer_types": ["conv", "full_attention", "conv"],
            "tie_word_embeddings": False,
        },
    ),
    "llama4_text": Family(
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        "num_local_experts",
        "intermediate_size",
        "num_experts_per_tok",
        {
            **_BASE,
            **_ATTENTION,
            **_LAYERS,
            "head_dim": 16,
            "intermediate_size_mlp": 56,
            "interleave_moe_layer_step": 1,
            "moe_layers": [1, 2],
            "attention_chunk_size": 32,
        },
    ),
    "longcat_flash": Family(
        "LongcatFlashConfig",
        "LongcatFlashForCausalLM",
        "n_routed_experts",
        "expert_ffn_hidden_size",
        "moe_topk",
        {**_BASE, **_LATENT, "num_layers": 2, "ffn_hidden_size": 56, "zero_expert_num": 3, "head_dim": 16},
    ),
    "zaya": Family(
        "ZayaConfig",
        "ZayaForCausalLM",
        "num_experts",
        "moe_intermediate_size",
        "num_experts_per_tok",
        {
            **_BASE,
            **_ATTENTION,
            **_LAYERS,
            "head_dim": 16,
            "router_hidden_size": 20,
            "num_experts_per_tok": 1,
            "tie_word_embeddings": False,
        },
        top_1=True,
    ),
    "dbrx": Family(
        "DbrxConfig",
        "DbrxForCausalLM",
        "ffn_config.moe_num_experts",
        "ffn_config.ffn_hidden_size",
        "ffn_config.moe_top_k",
        {
            "vocab_size": VOCABULARY,
            "d_model": HIDDEN,
            "n_heads": 4,
            "n_layers": 3,
            "max_seq_len": 64,
            "pad_token_id": 0,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        },
    ),
    "jetmoe": Family(
        "JetMoeConfig",
        "JetMoeForCausalLM",
        "num_local_experts",
        "intermediate_size",
        "num_experts_per_tok",
        {**_BASE, **_LAYERS, "num_key_value_heads": 2, "kv_channels": 16, "tie_word_embeddings": False},
    ),
    "doge": Family(
        "DogeConfig",
        "DogeForCausalLM",
        "num_experts",
        None,
        "num_experts_per_tok",
        {**_BASE, **_ATTENTION, **_LAYERS, "is_moe": True, "intermediate_size": 56, "keep_window_size": 32},
        square=True,
    ),
    "aria_text": Family(
        "AriaTextConfig",
        "AriaTextForCausalLM",
        "moe_num_experts",
        "intermediate_size",
        "moe_topk",
        {**_BASE, **_ATTENTION, **_LAYERS, "moe_num_shared_experts": 1},
        shared="moe_num_shared_experts",
    ),
    "gemma4_text": Family(
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        "num_experts",
        "moe_intermediate_size",
        "top_k_experts",
        {
            **_BASE,
            **_ATTENTION,
            **_LAYERS,
            "head_dim": 16,
            "global_head_dim": 16,
            "intermediate_size": 56,
            "enable_moe_block": True,
            "hidden_size_per_layer_input": 0,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "tie_word_embeddings": False,
        },
    ),
    "inkling_text": Family(
        "InklingTextConfig",
        "InklingForCausalLM",
        "n_routed_experts",
        "moe_intermediate_size",
        "num_experts_per_tok",
        {
            **_BASE,
            **_ATTENTION,
            **_LAYERS,
            "head_dim": 16,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 16,
            "intermediate_size": 56,
            "sliding_window_size": 16,
            "d_rel": 4,
            "rel_extent": 16,
            "n_shared_experts": 2,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
    ),
    "inkling2_text": Family(
        "Inkling2TextConfig",
        "Inkling2ForCausalLM",
        "n_routed_experts",
        "moe_intermediate_size",
        "num_experts_per_tok",
        {
            **_BASE,
            **_ATTENTION,
            **_LAYERS,
            "head_dim": 16,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 16,
            "sliding_window_size": 16,
            "d_rel": 4,
            "rel_extent": 16,
            "unpadded_vocab_size": 96,
            "n_layers_per_attn_res_block": 2,
        },
    ),
    "muse_spark_text": Family(
        "MuseSparkTextConfig",
        "MuseSparkTextModel",
        "num_local_experts",
        "moe_intermediate_size",
        "num_experts_per_tok",
        {
            **_BASE,
            **_ATTENTION,
            **_LAYERS,
            "head_dim": 16,
            "intermediate_size": 56,
            "moe_hidden_size": 20,
            "sliding_window": 16,
        },
    ),
    "dots3_note_text": Family(
        "Dots3NoteTextConfig",
        "Dots3NoteForCausalLM",
        "n_routed_experts",
        "moe_intermediate_size",
        "num_experts_per_tok",
        {
            **_BASE,
            **_LATENT,
            **_LAYERS,
            **_SPARSE,
            "intermediate_size": 56,
            "first_k_dense_replace": 1,
            "shared_experts_intermediate_size": 20,
            "head_dim": 32,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4,
            "swa_q_lora_rank": 20,
            "swa_kv_lora_rank": 12,
            "swa_head_dim": 32,
            "swa_qk_nope_head_dim": 16,
            "swa_v_head_dim": 16,
            "sliding_window": 16,
        },
        groups="n_group",
    ),
    "step3p7_text": Family(
        "step3p7.configuration_step3p7:Step3p7TextConfig",
        "step3p7.modeling_step3p7:Step3p7TextModel",
        "n_routed_experts",
        "moe_intermediate_size",
        "num_experts_per_tok",
        {
            **_BASE,
            **_ATTENTION,
            **_LAYERS,
            "head_dim": 16,
            "intermediate_size": 56,
            "share_expert_dim": 20,
            "sliding_window": 16,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
    ),
    "deepseek_ocr2_text": Family(
        "deepseek_ocr2.configuration_deepseek_ocr2:DeepseekOcr2TextConfig",
        "deepseek_ocr2.modeling_deepseek_ocr2:DeepseekOcr2TextModel",
        "n_routed_experts",
        "moe_intermediate_size",
        "num_experts_per_tok",
        {
            **_BASE,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            **_LAYERS,
            "intermediate_size": 56,
            "n_shared_experts": 1,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
        shared="n_shared_experts",
    ),
    "unlimited_ocr_text": Family(
        "unlimited_ocr.configuration_unlimited_ocr:UnlimitedOcrTextConfig",
        "unlimited_ocr.modeling_unlimited_ocr:UnlimitedOcrTextModel",
        "n_routed_experts",
        "moe_intermediate_size",
        "num_experts_per_tok",
        {
            **_BASE,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            **_LAYERS,
            "intermediate_size": 56,
            "n_shared_experts": 1,
            "sliding_window": 16,
        },
        shared="n_shared_experts",
    ),
    "diffusion_gemma_text": Family(
        "diffusion_gemma.configuration_diffusion_gemma:DiffusionGemmaTextConfig",
        "diffusion_gemma.modeling_diffusion_gemma:DiffusionGemmaEncoderTextModel",
        "num_experts",
        "moe_intermediate_size",
        "top_k_experts",
        {
            **_BASE,
            **_ATTENTION,
            **_LAYERS,
            "head_dim": 16,
            "global_head_dim": 16,
            "intermediate_size": 56,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
    "switch_transformers": Family(
        "SwitchTransformersConfig",
        "SwitchTransformersForConditionalGeneration",
        "num_experts",
        "d_ff",
        None,
        {
            "vocab_size": VOCABULARY,
            "d_model": HIDDEN,
            "d_kv": 16,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_heads": 2,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "expert_capacity": 64,
            "decoder_start_token_id": 0,
            "dropout_rate": 0.0,
            "router_jitter_noise": 0.0,
        },
        seq2seq=True,
    ),
    "nllb_moe": Family(
        "NllbMoeConfig",
        "NllbMoeForConditionalGeneration",
        "num_experts",
        "encoder_ffn_dim",
        None,
        {
            "vocab_size": VOCABULARY,
            "d_model": HIDDEN,
            "max_position_embeddings": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_sparse_step": 2,
            "decoder_sparse_step": 2,
            "encoder_layerdrop": 0.0,
            "decoder_layerdrop": 0.0,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
        seq2seq=True,
        width_too="decoder_ffn_dim",
    ),
}


def make_config(name: str, *, experts: int = 8, width: int = 24, top_k: int = 2, **over: Any) -> Any:
    """The family's config; ``over`` sets further fields of its root."""
    family = FAMILIES[name]
    fields = copy.deepcopy(dict(family.fields))
    values: dict[str | None, Any] = {
        family.experts: count(name, experts),
        family.top_k: 1 if family.top_1 else top_k,
        family.width: [width, width // 2] if family.width_is_list else width,
        family.width_too: width,
    }
    for field, value in values.items():
        if field is not None:
            *parents, leaf = field.split(".")
            node = fields
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = value
    return _class(family.config)(**{**fields, **over})


def count(name: str, experts: int = 8) -> int:
    """The number of experts that `build` gives the family when it is asked for ``experts``."""
    return {8: 16, 4: 9}.get(experts, experts) if FAMILIES[name].square else experts


def model_class(name: str) -> type[nn.Module]:
    """The family's text model: a causal language model where there is one."""
    return _class(FAMILIES[name].model)


def build(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A random model in eval mode, with weights for which routing differs from token to token.

    Args:
        options: as for `make_config`.
    """
    config = make_config(name, **options)
    torch.manual_seed(seed)
    model: Any = model_class(name)(config).eval()
    randomise(model, config, seed)
    return model.to(dtype)


def randomise(model: nn.Module, config: Any, seed: int = 0) -> None:
    """Weights of matrices are spread out, biases and scales not all alike, tables of expert ids drawn at random."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("tid2eid"):
                tensor.copy_(_choices(tensor.shape, config.n_routed_experts, rng))
            elif tensor.is_floating_point() and "bias" in name:
                tensor.copy_(0.05 * torch.randn(tensor.shape, generator=rng))
            elif name.endswith("per_expert_scale"):
                tensor.copy_(1 + 0.1 * torch.randn(tensor.shape, generator=rng))
            elif isinstance(tensor, nn.Parameter) and tensor.ndim > 1:
                tensor.copy_(0.2 * torch.randn(tensor.shape, generator=rng))


def _choices(shape: torch.Size, experts: int, rng: torch.Generator) -> Tensor:
    """Different expert ids in each row."""
    return torch.stack([torch.randperm(experts, generator=rng)[: shape[1]] for _ in range(shape[0])])


def inputs(name: str, sequences: int = 2, length: int = 10) -> dict[str, Tensor]:
    """Keyword arguments of one forward: random token ids [sequences, length]."""
    ids = torch.randint(3, VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids} | ({"decoder_input_ids": ids[:, :7]} if FAMILIES[name].seq2seq else {})


def outputs(model: nn.Module, name: str, **options: Any) -> Tensor:
    """What the model computes for `inputs`: logits, or hidden states where it has no head."""
    with torch.no_grad():
        result = model(**inputs(name, **options))
    return result.logits if "logits" in result else result.last_hidden_state


def _class(name: str) -> Any:
    module, _, leaf = name.rpartition(":")
    return getattr(importlib.import_module(f"transformers.models.{module}") if module else transformers, leaf)
