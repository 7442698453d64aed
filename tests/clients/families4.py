"""Tiny configs of the MoE families that transformers 4.57.6 knows, in its own field names. A new family is one row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

EXPERTS, WIDTH = 8, 24
"""Of every model here; no other field that says how wide something is says 24."""
ROPE_THETA = 50_000.0
"""No family's default: a reader that misses the field computes something else."""
DBRX_THETA = 10_000.0
"""What transformers 5.23 computes with whatever DBRX's own field says (published models say 500,000)."""

_BASE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "max_position_embeddings": 128,
    "num_hidden_layers": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_theta": ROPE_THETA,
    "num_experts_per_tok": 2,
}
_ATTENTION = {**_BASE, "num_attention_heads": 4, "num_key_value_heads": 2}
_HEADS = {**_ATTENTION, "head_dim": 16}
_LATENT = {
    **_BASE,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "q_lora_rank": 20,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
_LOCAL = {"num_local_experts": EXPERTS, "intermediate_size": WIDTH}
_PLAIN = {"num_experts": EXPERTS, "intermediate_size": WIDTH}
_QWEN = {"num_experts": EXPERTS, "moe_intermediate_size": WIDTH, "intermediate_size": 56, "mlp_only_layers": [0]}
_ROUTED = {
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "moe_intermediate_size": WIDTH,
    "intermediate_size": 56,
    "first_k_dense_replace": 1,
}
_TWO_SHARED = {**_ROUTED, "n_shared_experts": 2}
_GROUPS = {"n_group": 2, "topk_group": 1}
_LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_ERNIE = {
    "moe_num_experts": EXPERTS,
    "moe_k": 2,
    "moe_num_shared_experts": 1,
    "moe_layer_start_index": 1,
    "moe_intermediate_size": WIDTH,
    "intermediate_size": 56,
    "tie_word_embeddings": False,
}
_JAMBA = {
    "num_hidden_layers": 4,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "mamba_d_state": 6,
    "mamba_d_conv": 4,
    "use_mamba_kernels": False,
}
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16}
_ARIA = {"moe_num_experts": EXPERTS, "moe_topk": 2, "moe_num_shared_experts": 1, "intermediate_size": WIDTH}
_LLAMA4 = {"intermediate_size_mlp": 56, "interleave_moe_layer_step": 1, "attention_chunk_size": 32}
_LONGCAT = {
    "num_layers": 2,
    "n_routed_experts": EXPERTS,
    "moe_topk": 2,
    "zero_expert_num": 3,
    "expert_ffn_hidden_size": WIDTH,
    "ffn_hidden_size": 56,
    "head_dim": 16,
}
_DBRX = {
    "vocab_size": 96,
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 3,
    "max_seq_len": 128,
    "pad_token_id": 0,
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": DBRX_THETA},
    "ffn_config": {"moe_num_experts": EXPERTS, "moe_top_k": 2, "ffn_hidden_size": WIDTH},
}
_EYES = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32, "patch_size": 8}
_TOWER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def _mrope(*sections: int) -> dict[str, Any]:
    return {"rope_scaling": {"rope_type": "default", "mrope_section": list(sections)}}


@dataclass(frozen=True)
class Family:
    """A family as transformers 4.57.6 writes it."""

    classes: str
    """What its classes begin with."""
    fields: dict[str, Any]
    count: str = "num_local_experts"
    """The field that counts experts."""
    model: str = "ForCausalLM"
    """What its model class ends with."""
    refused: str = ""
    """What dernkit says when it refuses it."""
    rope_theta: float = ROPE_THETA

    @property
    def experts(self) -> dict[str, Any]:
        """The fields, or those of the part of the config that describes experts."""
        return next((self.fields[part] for part in ("text_config", "ffn_config") if part in self.fields), self.fields)

    @property
    def width(self) -> str:
        """The field that says how many neurons an expert has."""
        return next(name for name, value in self.experts.items() if value == WIDTH)

    @property
    def shared(self) -> str | None:
        """The field that counts shared experts, which are as wide as the others."""
        return next((name for name in self.experts if name.endswith("_shared_experts")), None)


FAMILIES4: dict[str, Family] = {
    "aria_text": Family("AriaText", {**_ATTENTION, **_ARIA}, "moe_num_experts"),
    "dbrx": Family("Dbrx", _DBRX, "moe_num_experts", rope_theta=DBRX_THETA),
    "deepseek_v2": Family("DeepseekV2", {**_LATENT, **_TWO_SHARED, "topk_method": "greedy"}, "n_routed_experts"),
    "deepseek_v2_groups": Family(
        "DeepseekV2", {**_LATENT, **_TWO_SHARED, **_GROUPS, "topk_method": "group_limited_greedy"}, "n_routed_experts"
    ),
    "deepseek_v3": Family("DeepseekV3", {**_LATENT, **_ROUTED, **_GROUPS}, "n_routed_experts"),
    "dots1": Family("Dots1", {**_HEADS, **_ROUTED}, "n_routed_experts"),
    "ernie4_5_moe": Family("Ernie4_5_Moe", {**_ATTENTION, **_ERNIE}, "moe_num_experts"),
    "flex_olmo": Family("FlexOlmo", {**_ATTENTION, **_PLAIN}, "num_experts"),
    "glm4_moe": Family("Glm4Moe", {**_HEADS, **_ROUTED}, "n_routed_experts"),
    "glm4v_moe": Family(
        "Glm4vMoe",
        {"text_config": {**_HEADS, **_ROUTED, **_mrope(2, 1, 1)}, "vision_config": {**_EYES, "image_size": 32}},
        "n_routed_experts",
        "ForConditionalGeneration",
    ),
    "gpt_oss": Family("GptOss", {**_HEADS, **_LOCAL, "sliding_window": 16}),
    "granitemoe": Family("GraniteMoe", {**_ATTENTION, **_LOCAL}),
    "granitemoehybrid": Family(
        "GraniteMoeHybrid",
        {
            **_ATTENTION,
            **_LOCAL,
            **_MAMBA2,
            "shared_intermediate_size": 20,
            "layer_types": ["mamba", "attention", "mamba"],
        },
    ),
    "granitemoeshared": Family("GraniteMoeShared", {**_ATTENTION, **_LOCAL, "shared_intermediate_size": 20}),
    "hunyuan_v1_moe": Family("HunYuanMoEV1", {**_HEADS, **_PLAIN, "moe_topk": 2}, "num_experts"),
    "jamba": Family("Jamba", {**_ATTENTION, **_PLAIN, **_JAMBA}, "num_experts"),
    "jetmoe": Family(
        "JetMoe",
        {**_BASE, **_LOCAL, "num_key_value_heads": 2, "kv_channels": 16},
        refused="attention heads that are experts too",
    ),
    "llama4": Family(
        "Llama4",
        {"text_config": {**_HEADS, **_LOCAL, **_LLAMA4}, "vision_config": {**_TOWER, "vision_output_dim": 32}},
        model="ForConditionalGeneration",
    ),
    "longcat_flash": Family(
        "LongcatFlash",
        {**_LATENT, **_LONGCAT},
        "n_routed_experts",
        refused="the checkpoint must fit config.json. Got shape [8, 48, 32] for "
        "'model.layers.0.mlp.experts.gate_up_proj', not [11, 48, 32], instead.",
    ),
    "minimax": Family("MiniMax", {**_HEADS, **_LOCAL, "block_size": 16}),
    "mixtral": Family("Mixtral", {**_ATTENTION, **_LOCAL}),
    "nllb_moe": Family(
        "NllbMoe",
        {"vocab_size": 96, "d_model": 32, "num_experts": 8, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24},
        "num_experts",
        "ForConditionalGeneration",
        refused="a router that transformers runs wrongly",
    ),
    "olmoe": Family("Olmoe", {**_ATTENTION, **_PLAIN}, "num_experts"),
    "phimoe": Family("Phimoe", {**_ATTENTION, **_LOCAL}),
    "qwen2_moe": Family("Qwen2Moe", {**_ATTENTION, **_QWEN, "shared_expert_intermediate_size": 20}, "num_experts"),
    "qwen3_moe": Family("Qwen3Moe", {**_HEADS, **_QWEN, "norm_topk_prob": True}, "num_experts"),
    "qwen3_next": Family(
        "Qwen3Next",
        {**_HEADS, **_QWEN, **_LINEAR, "num_hidden_layers": 4, "shared_expert_intermediate_size": 20},
        "num_experts",
    ),
    "qwen3_vl_moe": Family(
        "Qwen3VLMoe",
        {
            "text_config": {**_HEADS, **_QWEN, **_mrope(4, 2, 2)},
            "vision_config": {**_EYES, "deepstack_visual_indexes": [0]},
        },
        "num_experts",
        "ForConditionalGeneration",
    ),
    "switch_transformers": Family(
        "SwitchTransformers",
        {"vocab_size": 96, "d_model": 32, "d_kv": 16, "d_ff": 24, "num_experts": 8, "num_layers": 2, "num_heads": 2},
        "num_experts",
        "ForConditionalGeneration",
        refused="an encoder and a decoder",
    ),
}
"""All MoE families of 4.57.6 but two: it cannot run the mixture of doge, and qwen3_omni_moe is several models."""
