"""DeepSeek-MoE as a transformers model: Llama, with a mixture of experts as the feed-forward part of most layers.

Dimensions: T tokens, H hidden size, E routed experts, I neurons of an expert, K experts per token.
"""

import copy
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaForCausalLM, LlamaModel, initialization
from transformers.activations import ACT2FN
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.integrations import use_experts_implementation
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.utils.output_capturing import OutputRecorder

from dernkit_deepseek_moe.configuration import DeepseekConfig


class DeepseekRouter(nn.Module):
    """Softmax over all experts in float32; the coefficients of the best K are renormalised only if config says so."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.renormalise = config.norm_topk_prob and self.top_k > 1
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits [T, E], coefficients [T, K] and expert numbers [T, K] of hidden states [T, H]."""
        logits = functional.linear(hidden, self.weight)
        coefficients, chosen = logits.softmax(dim=-1, dtype=torch.float32).topk(self.top_k, dim=-1)
        if self.renormalise:
            coefficients = coefficients / coefficients.sum(dim=-1, keepdim=True)
        return logits, coefficients, chosen


@use_experts_implementation
class DeepseekExperts(nn.Module):
    """The routed experts of a layer, gate rows above up rows."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        experts, width, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.num_experts = experts
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
        """The sum of each token's experts by their coefficients, [T, H]."""
        total = torch.zeros_like(hidden)
        for expert in chosen.unique():
            token, place = torch.where(chosen == expert)
            gate, up = functional.linear(hidden[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            output = functional.linear(self.act_fn(gate) * up, self.down_proj[expert])
            total.index_add_(0, token, (output * coefficients[token, place, None]).to(total.dtype))
        return total


class DeepseekBlock(nn.Module):
    """Routed experts and, for every token, the shared ones."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.gate = DeepseekRouter(config)
        self.experts = DeepseekExperts(config)
        if config.n_shared_experts is not None:
            shared = copy.copy(config)
            shared.intermediate_size = config.moe_intermediate_size * config.n_shared_experts
            self.shared_experts = LlamaMLP(shared)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[batch, sequence, H] to the same."""
        flat = hidden.view(-1, hidden.shape[-1])
        _, coefficients, chosen = self.gate(flat)
        routed = self.experts(flat, chosen, coefficients).view_as(hidden)
        return routed + self.shared_experts(hidden) if hasattr(self, "shared_experts") else routed


class DeepseekDecoderLayer(LlamaDecoderLayer):
    """Llama's layer, with experts where the config has them."""

    def __init__(self, config: DeepseekConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        if config.has_experts(layer_idx):
            self.mlp = DeepseekBlock(config)


class DeepseekPreTrainedModel(LlamaPreTrainedModel):
    """What transformers asks of all models of a family."""

    config: DeepseekConfig
    _no_split_modules: ClassVar = ["DeepseekDecoderLayer"]
    _can_record_outputs: ClassVar = {
        "hidden_states": DeepseekDecoderLayer,
        "attentions": LlamaAttention,
        "router_logits": OutputRecorder(DeepseekRouter, index=0),
    }

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Yes. transformers would remember a "no" that it has found out for a Llama, and that is a parent here."""
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DeepseekExperts | DeepseekRouter):
            for parameter in module.parameters():
                initialization.normal_(parameter, mean=0.0, std=self.config.initializer_range)


class DeepseekModel(DeepseekPreTrainedModel, LlamaModel):
    """The decoder without its head."""

    def __init__(self, config: DeepseekConfig) -> None:
        super(LlamaModel, self).__init__(config)  # LlamaModel's own would first build dense layers
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DeepseekDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()


class DeepseekForCausalLM(DeepseekPreTrainedModel, LlamaForCausalLM):
    """The causal language model."""

    def __init__(self, config: DeepseekConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)  # as above
        self.model = DeepseekModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


def conversions() -> list[WeightConverter]:
    """How the experts' tensors on disk become those in memory."""
    return [
        WeightConverter(
            source_patterns=["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
            target_patterns="mlp.experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            source_patterns="mlp.experts.*.down_proj.weight",
            target_patterns="mlp.experts.down_proj",
            operations=[MergeModulelist(dim=0)],
        ),
    ]
