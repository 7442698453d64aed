"""The testbed's architecture, its upcycling from a dense model, and the routing losses."""

import torch
from torch.nn import functional
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from benchmarks.testbeds.mixtral.data import SPECIAL

CE_CHUNK = 512  # tokens a piece of the cross-entropy


def model_config(experts: int, top_k: int, width: int, vocab_size: int) -> MixtralConfig:
    """The testbed's configuration, with `experts` experts of `width` neurons a layer."""
    return MixtralConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=width,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        num_local_experts=experts,
        num_experts_per_tok=top_k,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        sliding_window=None,
        pad_token_id=SPECIAL.index("<pad>"),
        bos_token_id=SPECIAL.index("<bos>"),
        eos_token_id=SPECIAL.index("<eos>"),
    )


def build(config: MixtralConfig) -> MixtralForCausalLM:
    """A randomly initialised model; output projections start smaller, by the usual depth factor."""
    model = MixtralForCausalLM(config)
    scale = (2 * config.num_hidden_layers) ** -0.5
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(scale)
            layer.mlp.experts.down_proj.mul_(scale)
    return model


@torch.no_grad()
def upcycle(dense: MixtralForCausalLM, experts: int, top_k: int, reinit: float, seed: int) -> MixtralForCausalLM:
    """A mixture of experts grown from a dense model (Drop-Upcycling, arXiv 2502.19261).

    Every FFN is copied to each expert; in each expert a random `reinit` share of the neurons, drawn anew for
    that expert, is redrawn from a normal distribution with the mean and deviation of the weights replaced.
    Routers are random.
    """
    source = dense.config
    model = build(model_config(experts, top_k, source.intermediate_size, source.vocab_size))
    expert_keys = ("mlp.experts.", "mlp.gate.")
    shared = {k: v for k, v in dense.state_dict().items() if not any(part in k for part in expert_keys)}
    model.load_state_dict(shared, strict=False)
    generator = torch.Generator().manual_seed(seed)
    width = source.intermediate_size
    for old, new in zip(dense.model.layers, model.model.layers, strict=True):
        new.mlp.experts.gate_up_proj.copy_(old.mlp.experts.gate_up_proj.expand(experts, -1, -1))
        new.mlp.experts.down_proj.copy_(old.mlp.experts.down_proj.expand(experts, -1, -1))
        for expert in range(experts):
            drop = torch.randperm(width, generator=generator)[: int(width * reinit)]
            gate_up, down = new.mlp.experts.gate_up_proj[expert], new.mlp.experts.down_proj[expert]
            gate_up[drop] = like(gate_up[drop], generator)
            gate_up[width + drop] = like(gate_up[width + drop], generator)
            down[:, drop] = like(down[:, drop], generator)
    return model


def like(weights: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Normal noise with the shape, mean and standard deviation of `weights`."""
    if weights.numel() < 2:
        return weights
    return torch.randn(weights.shape, generator=generator) * weights.std() + weights.mean()


def routing_losses(
    router_logits: tuple[torch.Tensor, ...], top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Balance loss and z-loss, averaged over layers, and each layer's expert shares (layers, experts).

    The balance loss (Switch Transformer, arXiv 2101.03961) is taken per layer: transformers' own helper joins
    the layers before averaging, so one layer's imbalance can hide another's. It is 1 at perfect balance.
    """
    balance, squares, shares = [], [], []
    for logits in router_logits:
        logits = logits.float()
        probs = logits.softmax(dim=-1)
        experts = logits.shape[-1]
        chosen = probs.topk(top_k, dim=-1).indices
        share = torch.bincount(chosen.flatten(), minlength=experts).float() / chosen.numel()
        balance.append(experts * (share * probs.mean(dim=0)).sum())
        squares.append(logits.logsumexp(dim=-1).square().mean())
        shares.append(share)
    return torch.stack(balance).mean(), torch.stack(squares).mean(), torch.stack(shares)


def hidden_and_router(model: MixtralForCausalLM, inputs: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """The last hidden states and every layer's router logits."""
    output = model.model(input_ids=inputs, output_router_logits=True, use_cache=False)
    return output.last_hidden_state, output.router_logits


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean next-token loss through the output matrix, some tokens at a time so that logits stay in cache."""

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss; its gradients are made on the way, since each chunk's logits are at hand."""
        total, hidden_grad, weight_grad = 0.0, torch.empty_like(hidden), torch.zeros_like(weight)
        parts = (tensor.split(CE_CHUNK) for tensor in (hidden, hidden_grad, targets))
        for rows, rows_grad, labels in zip(*parts, strict=True):
            log_probs = (rows @ weight.T).log_softmax(dim=-1)
            total -= log_probs.gather(1, labels[:, None]).sum()
            grad = log_probs.exp_()
            grad.scatter_add_(1, labels[:, None], torch.full((len(labels), 1), -1.0))
            torch.mm(grad, weight, out=rows_grad)
            weight_grad.addmm_(grad.T, rows)
        ctx.save_for_backward(hidden_grad.div_(len(targets)), weight_grad.div_(len(targets)))
        return total / len(targets)

    @staticmethod
    def backward(ctx, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        """The gradients made in the forward pass, scaled."""
        hidden_grad, weight_grad = ctx.saved_tensors
        return hidden_grad * upstream, weight_grad * upstream, None


def token_loss(model: MixtralForCausalLM, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next token, in nats."""
    return ChunkedCrossEntropy.apply(hidden.flatten(0, 1), model.lm_head.weight, targets.flatten())


def sorted_experts(
    module: torch.nn.Module, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The output of a layer's experts: tokens sorted by expert, each weight gradient made in one piece."""
    order = index.flatten().argsort()
    token = order // index.shape[-1]
    counts = index.flatten().bincount(minlength=module.num_experts).tolist()
    outputs = []
    experts = zip(module.gate_up_proj.unbind(0), module.down_proj.unbind(0), strict=True)
    for rows, (gate_up, down) in zip(hidden[token].split(counts), experts, strict=True):
        gate, up = functional.linear(rows, gate_up).chunk(2, dim=-1)
        outputs.append(functional.linear(module.act_fn(gate) * up, down))
    scaled = torch.cat(outputs) * weights.flatten()[order].unsqueeze(-1)
    return torch.zeros_like(hidden).index_add_(0, token, scaled.to(hidden.dtype))


ALL_EXPERTS_FUNCTIONS.register("sorted", sorted_experts)
