"""Routing on the routers of real models is no change of the bank that is handed to a component."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from dernkit.kernel import calls
from dernkit.models.stack import find_blocks
from dernkit.models.universal import Universal
from dernkit.testing.checkpoints import tiny_model
from dernkit.types import ExpertBank, LayerStats


@dataclass(frozen=True)
class Routing:
    """Scores by the logits of tokens that are routed twice, among all experts and among half of them."""

    name: ClassVar[str] = "routing"
    requires: ClassVar[frozenset[str]] = frozenset({"sample"})

    def score(self, bank: ExpertBank, stats: LayerStats) -> torch.Tensor:
        assert bank.route is not None
        bank.route(stats.router_inputs, torch.arange(0, bank.dims.experts, 2))
        return bank.route(stats.router_inputs, None).logits.sum(0, dtype=torch.float64)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("grad", [True, False])
def test_a_component_may_route_on_a_real_router(family: str, grad: bool) -> None:
    model = tiny_model(family)
    for block in find_blocks(model, [Universal()]):
        sample = torch.randn(6, block.dims.hidden, generator=torch.Generator().manual_seed(0))
        stats = LayerStats(6, {"sample": sample, "sample_key": torch.rand(6, dtype=torch.float64)}, 6)
        with torch.set_grad_enabled(grad):
            assert calls.score(Routing(), block.bank(), stats).shape == (block.dims.experts,)
