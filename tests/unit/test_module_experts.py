"""Layouts and models of experts that are modules of their own which are refused, and what is said then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dernkit.api import CheckpointError
from dernkit.architecture import ExpertWeights, Layout, ModuleExperts, blocks_by_layout
from dernkit.models.layouts import Declared
from dernkit.testing.checkpoints import tiny_model
from tests.laws.module_models import Gated, LoopLayout, LoopMoE, build


class WrongRoute(LoopLayout):
    """Does not divide by the sum, as the block does."""

    def route(self, block: Any, output: Any) -> tuple[Tensor, Tensor]:
        coefficients, chosen = output.softmax(dim=-1).topk(block.consulted)
        return chosen, coefficients


class WrongOrder(LoopLayout):
    """Takes the router's answer for coefficients first, as many routers give it."""

    def route(self, block: Any, output: Any) -> tuple[Tensor, Tensor]:
        chosen, coefficients = super().route(block, output)
        return chosen.flip(-1), coefficients


class NoRoute(LoopLayout):
    route = Layout.route


class NoRouter(LoopLayout):
    router = None


class NoList(LoopLayout):
    """Says of the block that its experts are stacked."""

    expert_modules = None

    def unpack(self, module: Any) -> ExpertWeights:
        return LoopLayout().unpack(module)

    def pack(self, module: Any, weights: ExpertWeights) -> dict[str, Tensor]:
        return LoopLayout().pack(module, weights)


class NoTopK(LoopLayout):
    top_k = Layout.top_k


class Swapped(LoopLayout):
    gate, up, down = "w_val", "w_act", "w_out"


class WrongActivation(LoopLayout):
    def activation(self, module: Any, gate: Tensor | None, up: Tensor) -> Tensor:
        assert gate is not None
        return gate.relu() * up


REFUSALS = {
    WrongRoute: "must add coefficient times expert output for the routing that its layout tells. Got another sum",
    WrongOrder: "must add coefficient times expert output for the routing that its layout tells. Got another sum",
    NoRoute: "must run on hidden states alone to be understood. Got 'NoRoute has a router and no route()'",
    NoRouter: "a layout that claims a whole MoE block must name its router. Got none for 'stack.0.ffn'",
    NoList: "the same tensors and modules must exist at every expert count and width. Got 'stack.0.ffn.specialists.10.",
    NoTopK: "the router must say how many experts a token takes. Got no top-k field instead",
    Swapped: "experts must compute down(act(gate(x)) * up(x)) of the weights found. Got outputs",
    WrongActivation: "experts must compute down(act(gate(x)) * up(x)) of the weights found. Got outputs",
}


@pytest.mark.parametrize("layout", REFUSALS)
def test_a_wrong_layout_is_refused(layout: type[ModuleExperts]):
    _refused(build("own_loop"), layout(), REFUSALS[layout])


class StackedWithRouter(Declared):
    router = "gate"


def test_a_router_without_a_list_is_refused():
    _refused(tiny_model("mixtral"), StackedWithRouter(), "must say which modules the block calls. Got none for 'model.")


class Normed(Gated):
    """Has a norm of its own, which no linear layer holds."""

    def __init__(self, breadth: int, width: int) -> None:
        super().__init__(breadth, width)
        self.inner = nn.RMSNorm(width)


class Companion(LoopMoE):
    """Has a second module for each expert, outside the list."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.more = nn.ModuleList(nn.Linear(4, 4) for _ in range(config.specialists))


class NormedMoE(LoopMoE):
    expert = Normed


class RouterNorm(LoopMoE):
    """What the router sees is not what the experts see."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.selector = nn.Sequential(nn.Linear(config.breadth, config.specialists, bias=False))

    def forward(self, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        chosen, coefficients = self.routing(self.selector(2 * flat + 1))
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.called()):
            token, place = torch.where(chosen == number)
            out.index_add_(0, token, coefficients[token, place, None] * expert(flat[token]))
        return out.view_as(hidden)


MODEL_REFUSALS = {
    NormedMoE: "experts must hold the tensors that their layout packs. Got 'stack.0.ffn.specialists.0.inner.weight'",
    Companion: "the same tensors and modules must exist at every expert count and width. Got 'stack.0.ffn.more.",
    RouterNorm: "must add coefficient times expert output for the routing that its layout tells. Got another sum",
}


@pytest.mark.parametrize("moe", MODEL_REFUSALS)
def test_what_the_layout_does_not_cover_is_refused(moe: type[nn.Module]):
    layout = LoopLayout()
    layout.class_name = moe.__name__
    _refused(build(f"own_{moe.__name__.lower()}", moe), layout, MODEL_REFUSALS[moe])


def _refused(model: Any, layout: Layout, sentence: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        for block in blocks_by_layout(model, [layout]):
            block.router_kind()
            block.check()
    assert sentence in str(caught.value)
