"""The config.json of DeepSeek-MoE: Llama's fields, those of its experts, and the defaults of the published code."""

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig


@strict
class DeepseekConfig(LlamaConfig):
    """Config of a DeepSeek-MoE model; without ``n_routed_experts`` all layers are dense."""

    model_type = "deepseek"

    vocab_size: int = 102400
    moe_intermediate_size: int = 1407
    """Neurons of one routed expert; the shared ones are one network of ``n_shared_experts`` times as many."""
    num_hidden_layers: int = 30
    n_routed_experts: int | None = None
    n_shared_experts: int | None = None
    num_experts_per_tok: int | None = None
    first_k_dense_replace: int = 0
    """So many first layers are dense, ``intermediate_size`` wide."""
    moe_layer_freq: int = 1
    """Of the others, those whose number is a multiple of this have experts."""
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"
    bos_token_id: int | None = 100000
    eos_token_id: int | list[int] | None = 100001

    def has_experts(self, layer: int) -> bool:
        """Whether a decoder layer has experts."""
        late = layer >= self.first_k_dense_replace
        return self.n_routed_experts is not None and late and layer % self.moe_layer_freq == 0

    def validate_routing(self) -> None:
        """Refuses what the model would compute wrongly."""
        if self.scoring_func != "softmax":
            raise ValueError(f"scoring_func must be 'softmax'. Got '{self.scoring_func}' instead.")
        if self.n_routed_experts is not None and self.num_experts_per_tok is None:
            raise ValueError("num_experts_per_tok must be given with n_routed_experts. Got none instead.")
