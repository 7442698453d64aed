"""Plain PyTorch models whose experts are modules of their own, and the adapters that a plugin would bring for them.

Config fields, tensors and linear layers have names of their own, and the MoE block itself calls its experts in a loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from dernkit.api import Block
from dernkit.architecture import ModuleExperts, blocks_by_layout


class OwnConfig(PreTrainedConfig):
    """Sizes under names of their own."""

    attribute_map: ClassVar[dict[str, str]] = {"vocab_size": "vocabulary"}
    vocabulary: int = 96
    breadth: int = 32
    depth: int = 2
    specialists: int = 8
    specialist_breadth: int = 24
    consulted: int = 2


class Gated(nn.Module):
    """One expert."""

    bias = False

    def __init__(self, breadth: int, width: int) -> None:
        super().__init__()
        self.w_out = nn.Linear(width, breadth, bias=self.bias)
        self.w_val = nn.Linear(breadth, width, bias=self.bias)
        self.w_act = nn.Linear(breadth, width, bias=self.bias)
        self.act_fn = nn.SiLU()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.w_out(self.act_fn(self.w_act(hidden)) * self.w_val(hidden))


class Biased(Gated):
    bias = True


class Plain(nn.Module):
    """One expert without a gate."""

    def __init__(self, breadth: int, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(breadth, width, bias=False)
        self.second = nn.Linear(width, breadth, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.second(functional.gelu(self.first(hidden)))


class LoopMoE(nn.Module):
    """A router, a list of experts, a shared expert as wide as they are, and a loop over all of them."""

    expert: type[nn.Module] = Gated

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.consulted = config.consulted
        self.selector = nn.Linear(config.breadth, config.specialists, bias=False)
        self.specialists = self.collected(
            [self.expert(config.breadth, config.specialist_breadth) for _ in range(config.specialists)]
        )
        self.generalist = self.expert(config.breadth, config.specialist_breadth)

    def collected(self, experts: list[nn.Module]) -> Any:
        return nn.ModuleList(experts)

    def called(self) -> list[nn.Module]:
        return list(self.specialists)

    def routing(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        coefficients, chosen = logits.softmax(dim=-1).topk(self.consulted)
        return chosen, coefficients / coefficients.sum(dim=-1, keepdim=True)

    def forward(self, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        chosen, coefficients = self.routing(self.selector(flat))
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.called()):
            token, place = torch.where(chosen == number)
            out.index_add_(0, token, coefficients[token, place, None] * expert(flat[token]))
        return (out + self.generalist(flat)).view_as(hidden)


class DictMoE(LoopMoE):
    """Experts in a dict, with biases; their sum is scaled."""

    expert = Biased

    def collected(self, experts: list[nn.Module]) -> Any:
        return nn.ModuleDict({f"expert_{number}": expert for number, expert in enumerate(experts)})

    def called(self) -> list[nn.Module]:
        return [self.specialists[f"expert_{number}"] for number in range(len(self.specialists))]

    def routing(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        coefficients, chosen = logits.sigmoid().topk(self.consulted)
        return chosen, 2.5 * coefficients


class PlainMoE(LoopMoE):
    """Experts without gates."""

    expert = Plain


class Around(nn.ModuleList):
    """A list of experts that is called with the routing."""

    def forward(self, hidden: Tensor, chosen: Tensor, coefficients: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for number in chosen.unique().tolist():
            token, place = torch.where(chosen == number)
            out.index_add_(0, token, coefficients[token, place, None] * self[number](hidden[token]))
        return out


class CalledMoE(LoopMoE):
    """The list is called, not what is in it; the block remembers how many there are."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.count = config.specialists

    def collected(self, experts: list[nn.Module]) -> Any:
        return Around(experts)

    def forward(self, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        return self.specialists(flat, *self.routing(self.selector(flat))).view_as(hidden)


class Layer(nn.Module):
    def __init__(self, config: Any, moe: type[nn.Module]) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(config.breadth), nn.RMSNorm(config.breadth)
        self.mix = nn.Linear(config.breadth, config.breadth, bias=False)
        self.ffn = moe(config)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.mix(self.norm1(hidden)).cumsum(dim=1) / 8
        return hidden + self.ffn(self.norm2(hidden))


class Own(PreTrainedModel):
    """A causal model that mixes tokens by a running sum."""

    config_class = OwnConfig
    moe: type[nn.Module] = LoopMoE

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.tokens = nn.Embedding(config.vocabulary, config.breadth)
        self.stack = nn.ModuleList(Layer(config, self.moe) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.breadth)
        self.head = nn.Linear(config.breadth, config.vocabulary, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, **unused: Any) -> CausalLMOutput:
        hidden = self.tokens(input_ids)
        for layer in self.stack:
            hidden = layer(hidden)
        return CausalLMOutput(logits=self.head(self.norm(hidden)))


def architecture(kind: str, moe: type[nn.Module]) -> type[Any]:
    """A config and a model class of their own, which transformers' Auto classes know."""
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

    if kind in CONFIG_MAPPING:
        return AutoModelForCausalLM._model_mapping[CONFIG_MAPPING[kind]]
    config = type(f"{moe.__name__}Config", (OwnConfig,), {"model_type": kind})
    model = type(f"{moe.__name__}ForCausalLM", (Own,), {"config_class": config, "moe": moe})
    AutoConfig.register(kind, config)
    AutoModelForCausalLM.register(config, model)
    return model


class LoopLayout(ModuleExperts):
    class_name = "LoopMoE"
    expert_modules = "specialists"
    gate, up, down = "w_act", "w_val", "w_out"
    router = "selector"

    def route(self, block: Any, output: Any) -> tuple[Tensor, Tensor]:
        coefficients, chosen = output.softmax(dim=-1).topk(block.consulted)
        return chosen, coefficients / coefficients.sum(dim=-1, keepdim=True)

    def top_k(self, block: Any) -> int:
        return block.consulted


class DictLayout(LoopLayout):
    class_name = "DictMoE"

    def route(self, block: Any, output: Any) -> tuple[Tensor, Tensor]:
        coefficients, chosen = output.sigmoid().topk(block.consulted)
        return chosen, coefficients  # without the factor 2.5, which is found


class PlainLayout(LoopLayout):
    class_name = "PlainMoE"
    gate, up, down = None, "first", "second"

    def activation(self, module: Any, gate: Tensor | None, up: Tensor) -> Tensor:
        return functional.gelu(up)


class CalledLayout(ModuleExperts):
    class_name = "Around"
    expert_modules = ""
    gate, up, down = "w_act", "w_val", "w_out"

    def top_k(self, block: Any) -> int:
        return block.consulted


@final
@dataclass(frozen=True)
class OwnAdapter:
    """What a plugin would bring."""

    name: ClassVar[str] = "own"

    def blocks(self, model: Any) -> list[Block]:
        return blocks_by_layout(model, [LoopLayout(), DictLayout(), PlainLayout(), CalledLayout()])


MODELS = {
    "own_loop": LoopMoE,
    "own_dict": DictMoE,
    "own_plain": PlainMoE,
    "own_called": CalledMoE,
}


def build(kind: str, moe: type[nn.Module] | None = None) -> Any:
    """A random model of one kind, in float32."""
    cls = architecture(kind, moe or MODELS[kind])
    model = cls(cls.config_class()).eval()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=rng) + (parameter.ndim == 1))
    return model
