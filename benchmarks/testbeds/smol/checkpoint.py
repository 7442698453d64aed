"""The carved model as a Qwen2-MoE checkpoint: a family with a shared expert whose attention is that of Llama.

Two things of that family are undone by the weights: the shared expert is gated by a sigmoid, whose input is 0 here
and whose 0.5 the shared down projection makes up for; and query, key and value have biases, which are 0.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from benchmarks.testbeds.smol.carve import CarvedLayer


def mixture_config(dense: Any, layer: CarvedLayer) -> Qwen2MoeConfig:
    """The configuration for layers like `layer` in a Llama with the configuration `dense`.

    Raises:
        ValueError: the Llama has something that Qwen2-MoE has not.
    """
    if dense.attention_bias or dense.mlp_bias or dense.head_dim * dense.num_attention_heads != dense.hidden_size:
        raise ValueError("a Llama with biases, or with heads that do not fill its hidden size, cannot be carved")
    same = (
        "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act rms_norm_eps "
        "max_position_embeddings rope_parameters tie_word_embeddings bos_token_id eos_token_id pad_token_id"
    )
    experts, width = layer.partition.experts.shape
    return Qwen2MoeConfig(
        **{name: getattr(dense, name) for name in same.split()},
        intermediate_size=dense.intermediate_size,
        num_experts=experts,
        num_experts_per_tok=layer.top_k,
        moe_intermediate_size=width,
        shared_expert_intermediate_size=len(layer.partition.shared),
        norm_topk_prob=True,
        qkv_bias=True,
        use_sliding_window=False,
        output_router_logits=False,
    )


@torch.no_grad()
def assemble(dense: Any, layers: Sequence[CarvedLayer]) -> Any:
    """The carved model in float32: `dense` with its feed-forward networks replaced by `layers`."""
    model = Qwen2MoeForCausalLM(mixture_config(dense.config, layers[0])).eval()
    state = {name: tensor for name, tensor in dense.state_dict().items() if ".mlp." not in name}
    for name, tensor in model.state_dict().items():
        if name.endswith("_proj.bias") or name.endswith("shared_expert_gate.weight"):
            state[name] = torch.zeros_like(tensor)
    for index, layer in enumerate(layers):
        prefix = f"model.layers.{index}.mlp."
        mlp = dense.model.layers[index].mlp
        for name, tensor in block_weights(mlp.gate_proj.weight, mlp.up_proj.weight, layer).items():
            state[prefix + name] = tensor
    model.load_state_dict(state)
    return model


def block_weights(gate: Tensor, up: Tensor, layer: CarvedLayer) -> dict[str, Tensor]:
    """The tensors of one mixture by their names in memory, from the dense projections `gate` and `up` [W, H]."""
    shared, experts = layer.partition.shared, layer.partition.experts
    return {
        "gate.weight": layer.router,
        "experts.gate_up_proj": torch.cat([gate[experts], up[experts]], dim=1),
        "experts.down_proj": layer.down.T[experts].transpose(1, 2).contiguous(),
        "shared_expert.gate_proj.weight": gate[shared],
        "shared_expert.up_proj.weight": up[shared],
        "shared_expert.down_proj.weight": 2 * layer.down[:, shared],
    }


def save(model: Any, tokenizer: Any, out: Path) -> None:
    """Write model (in bfloat16) and tokenizer, with ``rope_theta`` also where other software looks for it."""
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    file = out / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
