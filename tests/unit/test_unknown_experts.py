"""Families that nobody has met: each is handled right or refused with a reason, never mangled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.integrations.moe import use_experts_implementation

import dernkit
from dernkit.errors import CheckpointError
from dernkit.models.layouts import Declared
from dernkit.models.stack import find_blocks
from dernkit.models.universal import Universal, blocks_by_layout
from dernkit.registry import Registry
from tests.laws.every_model import aligned, masked
from tests.laws.pipeline import recipe

TOKENS = torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(0))


class Experts(nn.Module):
    """What the odd classes share: a loop over experts; subclasses say where the weights are."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_experts = config.num_local_experts
        self.make(self.num_experts, config.intermediate_size, config.hidden_size)

    def make(self, experts: int, width: int, hidden: int) -> None:
        raise NotImplementedError

    def one(self, expert: int, hidden: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, hidden: Tensor, chosen: Tensor, coefficients: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for expert in chosen.unique().tolist():
            token, place = torch.where(chosen == expert)
            out.index_add_(0, token, coefficients[token, place, None] * self.one(expert, hidden[token]))
        return out


class Standard(Experts):
    """Names as declared experts have them."""

    def make(self, experts: int, width: int, hidden: int) -> None:
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))
        self.act_fn = nn.SiLU()

    def one(self, expert: int, hidden: Tensor) -> Tensor:
        return self._apply_gate(hidden @ self.gate_up_proj[expert].T) @ self.down_proj[expert].T


@use_experts_implementation
class UpBeforeGate(Standard):
    """The halves are the other way round, and `_apply_gate` knows: nothing outside can tell them apart."""

    def _apply_gate(self, fused: Tensor) -> Tensor:
        up, gate = fused.chunk(2, dim=-1)
        return torch.tanh(gate) * up


@use_experts_implementation(is_concatenated=False, is_transposed=True)
class Interleaved(Experts):
    def make(self, experts: int, width: int, hidden: int) -> None:
        self.gate_up_proj = nn.Parameter(torch.empty(experts, hidden, 2 * width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, hidden))

    def _apply_gate(self, fused: Tensor) -> Tensor:
        return torch.sigmoid(fused[..., ::2]) * (fused[..., 1::2] + 1)

    def one(self, expert: int, hidden: Tensor) -> Tensor:
        return self._apply_gate(hidden @ self.gate_up_proj[expert]) @ self.down_proj[expert]


@use_experts_implementation
class OddNames(Experts):
    def make(self, experts: int, width: int, hidden: int) -> None:
        self.w_in = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.w_out = nn.Parameter(torch.empty(experts, hidden, width))

    def one(self, expert: int, hidden: Tensor) -> Tensor:
        gate, up = (hidden @ self.w_in[expert].T).chunk(2, dim=-1)
        return (gate.tanh() * up) @ self.w_out[expert].T


@use_experts_implementation
class Squared(Standard):
    """Says that it is a gated MLP and squares the result."""

    def one(self, expert: int, hidden: Tensor) -> Tensor:
        return super().one(expert, hidden).square()


@use_experts_implementation
class FalseFlags(Standard):
    """Interleaves what it declares as concatenated."""

    def one(self, expert: int, hidden: Tensor) -> Tensor:
        fused = hidden @ self.gate_up_proj[expert].T
        return (torch.nn.functional.silu(fused[..., ::2]) * fused[..., 1::2]) @ self.down_proj[expert].T


@use_experts_implementation
class OwnScales(Standard):
    def make(self, experts: int, width: int, hidden: int) -> None:
        super().make(experts, width, hidden)
        self.scale = nn.Parameter(torch.ones(experts))

    def one(self, expert: int, hidden: Tensor) -> Tensor:
        return self.scale[expert] * super().one(expert, hidden)


class Undeclared(Standard):
    _apply_gate = UpBeforeGate._apply_gate


class ReversedRouter(nn.Module):
    """Row r decides about expert E - 1 - r."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_local_experts, config.hidden_size))
        self.top_k = config.num_experts_per_tok

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = hidden @ self.weight.T
        weights, rows = logits.softmax(dim=-1).topk(self.top_k, dim=-1)
        return logits, weights, len(self.weight) - 1 - rows


def odd(experts: type[nn.Module], router: type[nn.Module] | None = None) -> Any:
    """A Mixtral with other experts (and another router)."""

    class Odd(transformers.MixtralForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            for layer in self.model.layers:
                layer.mlp.experts = experts(config)
                if router is not None:
                    layer.mlp.gate = router(config)

    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_local_experts": 8, "num_hidden_layers": 2}
    config = transformers.MixtralConfig(vocab_size=96, num_attention_heads=4, num_key_value_heads=2, **sizes)
    model = Odd(config).eval()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=rng))
    return model


@pytest.mark.parametrize("experts", [UpBeforeGate, Interleaved])
def test_odd_but_honest_experts_are_compressed_rightly(experts: type[nn.Module], registry: Registry):
    model, original = odd(experts), odd(experts)
    plans = dernkit.compress(model, recipe(registry), TOKENS.split(2), registry=registry)
    with torch.no_grad(), masked(original, plans):
        expected = original(TOKENS).logits
    with torch.no_grad():
        torch.testing.assert_close(aligned(model)(TOKENS).logits, expected, rtol=1e-4, atol=1e-5)
    assert find_blocks(model, [Universal()])[0].dims.experts == 4


REFUSALS = {
    "names": (OddNames, "declared experts must hold down_proj, gate_up_proj and no other parameter. Got w_in, w_out"),
    "more weights": (OwnScales, "declared experts must hold down_proj, gate_up_proj and no other parameter. Got down"),
    "another function": (Squared, r"experts must compute down\(act\(gate\(x\)\) \* up\(x\)\) of the weights found"),
    "false flags": (FalseFlags, r"experts must compute down\(act\(gate\(x\)\) \* up\(x\)\) of the weights found"),
    "no declaration": (Undeclared, "experts must be declared by transformers' experts interface"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_not_understood_is_refused_and_left_alone(case: str, registry: Registry):
    experts, sentence = REFUSALS[case]
    _refused(odd(experts), sentence, registry)


def test_a_router_that_numbers_its_rows_otherwise_is_refused(registry: Registry):
    _refused(odd(UpBeforeGate, ReversedRouter), "the router must choose the experts whose entries it holds", registry)


def _refused(model: Any, sentence: str, registry: Registry) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=sentence):
        dernkit.compress(model, recipe(registry), TOKENS.split(2), registry=registry)
    assert model.config.num_local_experts == 8
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_block_whose_routing_is_not_seen_is_refused(registry: Registry):
    class Deaf(Declared):
        def listen(self, block: nn.Module, module: nn.Module, callback: Any) -> Any:
            return nn.Identity().register_forward_pre_hook(lambda *_: None)

    block = blocks_by_layout(odd(UpBeforeGate), [Deaf()])[0]
    with pytest.raises(CheckpointError, match=r"must show its routing\. Got none where Deaf listens"):
        block.router_kind()
