"""Tiny random models in the published formats, for tests of dernkit and of plugins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

VOCABULARY = 96
_BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "max_position_embeddings": 128,
    "num_hidden_layers": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts_per_tok": 2,
}
_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2}
_LATENT_ATTENTION = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "q_lora_rank": 20,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "intermediate_size": 56,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
}
_QWEN = {"num_experts": 8, "moe_intermediate_size": 24, "intermediate_size": 56, "mlp_only_layers": [0]}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {**_ATTENTION, "num_local_experts": 8, "intermediate_size": 24}),
    "qwen2_moe": ("Qwen2Moe", {**_ATTENTION, **_QWEN, "shared_expert_intermediate_size": 20}),
    "qwen3_moe": ("Qwen3Moe", {**_ATTENTION, **_QWEN, "head_dim": 16, "norm_topk_prob": True}),
    "olmoe": ("Olmoe", {**_ATTENTION, "num_experts": 8, "intermediate_size": 24}),
    "deepseek_v2": (
        "DeepseekV2",
        {**_LATENT_ATTENTION, "topk_method": "greedy", "n_group": None, "routed_scaling_factor": 1.5},
    ),
    "deepseek_v2_groups": (
        "DeepseekV2",
        {**_LATENT_ATTENTION, "topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1},
    ),
    "deepseek_v3": ("DeepseekV3", {**_LATENT_ATTENTION, "n_group": 2, "topk_group": 1}),
}
"""Name -> (prefix of the transformers classes, config fields). Dense first layers where the family has them."""
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_oss": (
        "GptOss",
        {**_ATTENTION, "num_local_experts": 8, "hidden_size": 64, "intermediate_size": 32, "head_dim": 16},
    ),
}
"""The same for families that single features need: widths are multiples of 32, as MXFP4 wants them."""


def tiny_model(family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **fields: Any) -> Any:
    """A random causal language model of ``family`` in eval mode; ``fields`` override its config.

    Weights are large enough for routing to differ from token to token, correction biases are not zero.
    """
    prefix, family_fields = (FAMILIES | OTHERS)[family]
    config = getattr(transformers, f"{prefix}Config")(**{**_BASE, **family_fields, **fields})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("correction_bias"):
                tensor.copy_(0.05 * torch.randn(tensor.shape, generator=rng))
            elif tensor.ndim > 1:
                tensor.copy_(0.2 * torch.randn(tensor.shape, generator=rng))
    return model.to(dtype)


def save_tiny(folder: Path, family: str, *, fused: bool = False, shard: str = "5GB", **options: Any) -> Any:
    """Save a tiny model in the family's published per-expert format, or with fused experts; returns the model."""
    model = tiny_model(family, **options)
    model.save_pretrained(folder, save_original_format=not fused, max_shard_size=shard)
    return model


def tiny_tokenizer() -> Any:
    """A tokenizer of characters, with the vocabulary of the tiny models."""
    characters = "\n" + "".join(map(chr, range(32, 127)))
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *characters][:VOCABULARY]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def tokens(sequences: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids [sequences, length]."""
    return torch.randint(3, VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(seed))
