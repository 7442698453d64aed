"""The layer error is what surgery really does to a block's routed output, in every family, with new router rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from dernkit.builtin.merges import SphericalKMeans
from dernkit.builtin.routers import Additive
from dernkit.kernel.compress import compress_layer
from dernkit.kernel.layer_error import layer_error
from dernkit.kernel.outputs import layer_output
from dernkit.kernel.selection import select
from dernkit.models.groups import regrouped
from dernkit.models.stack import find_blocks
from dernkit.models.universal import Universal
from dernkit.stages.apply import apply_live
from dernkit.testing.checkpoints import tiny_model
from dernkit.types import Assignment, LayerPlan, LayerStats, Routing
from tests import families
from tests.laws.test_every_family import every_family
from tests.laws.test_routing_laws import observed


@dataclass(frozen=True)
class Shaken:
    """Rows (and biases of logits) that no slice of the old ones has."""

    name: ClassVar[str] = "shaken"
    requires: ClassVar[frozenset[str]] = frozenset()

    def update(self, rows: Tensor, plan: LayerPlan, stats: LayerStats) -> Float[Tensor, "kept row"]:
        """1.2 times the old ones, and noise."""
        kept = rows[plan.kept]
        return 1.2 * kept + 0.1 * torch.randn(kept.shape, generator=torch.Generator().manual_seed(3))


MERGE, ROUTER = SphericalKMeans(), Shaken()


def decided(block: Any, *, one_group: bool = False) -> LayerPlan:
    """Half the experts stay; every neuron of the first one that goes moves to the first that stays."""
    dims = block.dims
    scores = torch.rand(dims.experts, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept = select(scores, max(dims.smallest_keep, dims.experts // 2), dims.groups)
    gone = next(expert for expert in range(dims.experts) if expert not in kept.tolist())
    neurons = torch.arange(dims.width)
    moves = Assignment(gone * dims.width + neurons, torch.zeros_like(neurons), neurons, torch.full((dims.width,), 0.5))
    return LayerPlan(block.layer, dims.experts, dims.width, scores, kept, moves, one_group)


@every_family
def test_it_is_the_change_of_what_the_live_models_router_and_experts_do(family: str):
    model = families.build(family)
    blocks: list[Any] = find_blocks(model, [Universal()])
    at = next(index for index, block in enumerate(blocks) if not block.tables)
    plans = [decided(block) for block in blocks]
    apply_live(model, blocks, plans, MERGE, ROUTER, seed=0)
    after: Any = find_blocks(model, [Universal()])[at]
    seen, inputs, told = forward(model, family, after)
    bank = find_blocks(families.build(family), [Universal()])[at].bank()
    whole = layer_output(bank, inputs, bank.route(seen))
    expected = energy(layer_output(after.bank(), inputs, told) - whole) / energy(whole)
    compressed = compress_layer(bank, plans[at], MERGE, ROUTER, bank.dims.width, 0)
    stats = LayerStats(len(inputs), {"sample": inputs, "router_sample": seen})
    assert layer_error(bank, compressed, plans[at].kept, stats) == pytest.approx(expected, rel=1e-3)
    assert expected > 0.01


@every_family
def test_it_is_0_when_all_stay(family: str):
    model = families.build(family)
    block: Any = next(block for block in find_blocks(model, [Universal()]) if not block.tables)
    seen, inputs, _ = forward(model, family, block)
    dims, kept = block.dims, torch.arange(block.dims.experts)
    plan = LayerPlan(block.layer, dims.experts, dims.width, torch.ones(len(kept)).double(), kept, Assignment.empty())
    compressed = compress_layer(block.bank(), plan, MERGE, Additive(), dims.width, 0)
    stats = LayerStats(len(inputs), {"sample": inputs, "router_sample": seen})
    assert layer_error(block.bank(), compressed, kept, stats) == 0


@pytest.mark.parametrize("collapse", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v2", "deepseek_v2_groups", "deepseek_v3"])
def test_it_is_the_change_of_the_whole_blocks_output(family: str, collapse: bool):
    """Shared experts give the same before and after; what a block gives is taken from its own forward."""
    model = tiny_model(family)
    blocks: list[Any] = regrouped(model, find_blocks(model, [Universal()]), collapse=collapse)
    block, module = blocks[0], model.get_submodule(blocks[0].path)
    inputs = torch.randn(64, block.dims.hidden, generator=torch.Generator().manual_seed(4))
    bank, plan, original = block.bank(), decided(block, one_group=collapse), block.route()
    whole = layer_output(bank, inputs, original(inputs))
    compressed = compress_layer(bank, plan, MERGE, ROUTER, bank.dims.width, 0)
    stats = LayerStats(len(inputs), {"sample": inputs})
    error = layer_error(bank, compressed, plan.kept, stats, original)
    with torch.no_grad():
        before = output(module, inputs)
        plans = [plan, *(decided(other, one_group=collapse) for other in blocks[1:])]
        apply_live(model, blocks, plans, MERGE, ROUTER, seed=0)
        after = output(module, inputs)
    expected = energy(after - before) / energy(whole)
    assert error == pytest.approx(expected, rel=1e-3)
    assert expected > 0.01


def test_a_layer_whose_experts_a_table_chooses_has_none():
    block: Any = next(block for block in find_blocks(families.build("deepseek_v4"), [Universal()]) if block.tables)
    plan = decided(block)
    compressed = compress_layer(block.bank(), plan, MERGE, ROUTER, block.dims.width, 0)
    stats = LayerStats(8, {"sample": torch.randn(8, block.dims.hidden)})
    assert layer_error(block.bank(), compressed, plan.kept, stats) is None


def forward(model: Any, family: str, block: Any) -> tuple[Tensor, Tensor, Routing]:
    """What the block's router and its experts see in one forward of the whole model, and the routing."""
    inputs: list[Tensor] = []
    handle = block.on_routing(lambda seen, *_: inputs.append(seen))
    router_inputs, told = observed(model, family, [block])[0]
    handle.remove()
    return router_inputs, inputs[0], told


def energy(output: Tensor) -> float:
    return float(output.detach().square().sum(dtype=torch.float64))


def output(module: Any, inputs: Tensor) -> Tensor:
    """[n, H] from a block that may give its router's logits as well."""
    found = module(inputs[None])
    return (found[0] if isinstance(found, tuple) else found).reshape(inputs.shape)
