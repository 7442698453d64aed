"""Tiny checkpoints of DeepSeek-MoE in the published form, for tests of this plugin and of what reads its results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dernkit_deepseek_moe.configuration import DeepseekConfig
from dernkit_deepseek_moe.modeling import DeepseekForCausalLM

PUBLISHED: Mapping[str, Any] = {
    "architectures": ["DeepseekForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekConfig",
        "AutoModel": "modeling_deepseek.DeepseekModel",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
    },
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "max_position_embeddings": 4096,
    "model_type": "deepseek",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 28,
    "num_key_value_heads": 16,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0",
    "use_cache": True,
    "vocab_size": 102400,
}
"""The fields of DeepSeek-MoE-16B's config.json."""

TINY: Mapping[str, Any] = {
    **PUBLISHED,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 32,
    "intermediate_size": 56,
    "max_position_embeddings": 128,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_attention_heads": 4,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "rope_theta": 500,
    "torch_dtype": "float32",
    "vocab_size": 96,
}


def save_tiny(folder: Path, *, seed: int = 0, shard: str = "5GB", **fields: Any) -> None:
    """A random checkpoint: published tensor names, a config in the published form, and code that must never run."""
    config = {**TINY, **fields}
    torch.manual_seed(seed)
    model = DeepseekForCausalLM(DeepseekConfig(**config)).eval()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # large enough for routing to differ from token to token
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=rng))
    model.to(getattr(torch, config["torch_dtype"])).save_pretrained(folder, max_shard_size=shard)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "generation_config.json").unlink(missing_ok=True)
    for name in ("configuration_deepseek.py", "modeling_deepseek.py"):
        (folder / name).write_text("raise RuntimeError('the code of the checkpoint was run')\n", encoding="utf-8")
