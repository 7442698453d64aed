"""`ExpertBank.route` is the model's own router: among all experts, and among some it is the pruned model's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dernkit.builtin.routers import Slice
from dernkit.errors import CheckpointError
from dernkit.kernel.selection import select
from dernkit.models.rerouting import routes_again
from dernkit.models.stack import find_blocks
from dernkit.models.universal import Universal
from dernkit.progress import Silent
from dernkit.stages.apply import apply_live
from dernkit.stages.calibrate import calibrate_live
from dernkit.types import Assignment, LayerPlan, Routing
from tests import families
from tests.laws.test_every_family import every_family


@every_family
def test_route_is_the_models_own_router(family: str):
    model = families.build(family)
    blocks: list[Any] = find_blocks(model, [Universal()])
    seen = observed(model, family, blocks)
    for block, (inputs, told) in zip(blocks, seen, strict=True):
        if block.tables:
            with pytest.raises(CheckpointError, match="table of token ids"):
                block.bank().route(inputs, None)
            continue
        if family == "zaya" and block is not blocks[0]:  # its routers read the state of the one before
            assert not routes_again(block.bank(), inputs, told.chosen, told.coefficients)
            continue
        assert routes_again(block.bank(), inputs, told.chosen, told.coefficients)
        found = block.bank().route(inputs, None)
        assert torch.equal(found.chosen, told.chosen)
        torch.testing.assert_close(found.coefficients, told.coefficients, rtol=1e-5, atol=1e-6)
        assert found.logits.shape == (len(inputs), block.dims.experts) and bool(found.logits.isfinite().all())


@every_family
def test_logits_are_the_routers_rows_times_the_features_that_routing_tells(family: str):
    """Also where the router normalises (Gemma 4) or projects (ZAYA) its inputs first: log-mass fits rows to them."""
    model = families.build(family)
    blocks: list[Any] = [block for block in find_blocks(model, [Universal()]) if not block.tables][:1]
    bank, (inputs, _) = blocks[0].bank(), observed(model, family, blocks)[0]
    found = bank.route(inputs, None)
    bias = 0 if bank.router_bias is None else bank.per_expert[bank.router_bias]
    torch.testing.assert_close(found.features @ bank.router.T + bias, found.logits, rtol=1e-4, atol=1e-5)


@every_family
def test_route_among_some_experts_is_the_pruned_models_router(family: str):
    model = families.build(family)
    blocks: list[Any] = find_blocks(model, [Universal()])
    dims = blocks[0].dims
    scores = torch.rand(dims.experts, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept = select(scores, max(dims.smallest_keep, dims.experts // 2), dims.groups)
    first = next(block for block in blocks if not block.tables)
    inputs = observed(model, family, [first])[0][0]
    expected = first.bank().route(inputs, kept)
    plans = [LayerPlan(b.layer, dims.experts, b.dims.width, scores, kept, Assignment.empty()) for b in blocks]
    others = [block for block in blocks if block.layer < first.layer]
    apply_live(model, blocks, plans, None, Slice(), seed=0)
    pruned: Any = next(block for block in find_blocks(model, [Universal()]) if block.layer == first.layer)
    told_inputs, told = observed(model, family, [pruned])[0]
    if others:  # what lies before the first routed layer is pruned too, so its inputs are others
        expected = families_route(family, first.layer, told_inputs, kept)
    identity = told.chosen >= len(kept)
    chosen = torch.where(identity, told.chosen - len(kept) + dims.experts, kept[told.chosen.clamp(max=len(kept) - 1)])
    assert torch.equal(expected.chosen, chosen)
    torch.testing.assert_close(expected.coefficients, told.coefficients, rtol=1e-4, atol=1e-5)
    gone = sorted(set(range(dims.experts)) - set(kept.tolist()))
    assert bool((expected.logits[:, gone] == -torch.inf).all())


@every_family
def test_other_rows_route_as_long_as_they_are_asked_for(family: str):
    model = families.build(family)
    block: Any = next(block for block in find_blocks(model, [Universal()]) if not block.tables)
    bank, inputs = block.bank(), observed(model, family, [block])[0][0]
    bias = () if bank.router_bias is None else (bank.per_expert[bank.router_bias][:, None],)
    rows = torch.cat([bank.router, *bias], dim=1)
    before = bank.route(inputs)
    own, other, after = bank.route(inputs, None, rows), bank.route(inputs, None, 1.5 * rows), bank.route(inputs)
    for same in (own, after):
        assert torch.equal(same.chosen, before.chosen) and torch.equal(same.coefficients, before.coefficients)
    torch.testing.assert_close(other.logits, 1.5 * before.logits, rtol=1e-4, atol=1e-5)


def families_route(family: str, layer: int, inputs: Tensor, kept: Tensor) -> Routing:
    """The routing by the same layer of an untouched copy of the model."""
    blocks: list[Any] = find_blocks(families.build(family), [Universal()])
    return next(block for block in blocks if block.layer == layer).bank().route(inputs, kept)


def observed(model: Any, family: str, blocks: list[Any]) -> list[tuple[Tensor, Routing]]:
    """What each block's router sees and does in one forward of the whole model."""
    seen: dict[int, list[Any]] = {block.layer: [] for block in blocks}
    handles = []
    for block in blocks:
        found = seen[block.layer]
        handles.append(block.on_router_inputs(found.append))

        def told(_: Tensor, chosen: Tensor, coefficients: Tensor, found: list[Any] = found) -> None:
            found.append(Routing(chosen, coefficients.to(torch.float32), torch.empty(len(chosen), 0)))

        handles.append(block.on_routing(told))
    families.outputs(model, family)
    for handle in handles:
        handle.remove()
    return [(seen[block.layer][0], seen[block.layer][1]) for block in blocks]


def test_a_router_that_reads_more_than_hidden_states_is_not_run_again():
    model = families.build("zaya")
    blocks = find_blocks(model, [Universal()])
    tokens = torch.randint(3, families.VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(2))
    stats = calibrate_live(model, blocks, [tokens], frozenset({"sample"}), sample_size=8, seed=0, progress=Silent())
    first, second = (stats[block.layer] for block in blocks[:2])
    assert blocks[0].bank().route(first.router_inputs, None).chosen.shape == (8, 1)
    with pytest.raises(CheckpointError, match="must be routed by their hidden states alone"):
        blocks[1].bank().route(second.router_inputs, None)


@every_family
def test_a_sample_changes_no_other_statistic(family: str):
    model = families.build(family)
    blocks = find_blocks(model, [Universal()])
    tokens = torch.randint(3, families.VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(2))
    options = {"sample_size": 8, "seed": 0, "progress": Silent()}
    counted = calibrate_live(model, blocks, [tokens], frozenset({"routed", "reap_sum"}), **options)
    sampled = calibrate_live(model, blocks, [tokens], frozenset({"routed", "reap_sum", "sample"}), **options)
    for layer, stats in counted.items():
        assert stats.tokens == sampled[layer].tokens
        assert all(torch.equal(stats[name], sampled[layer][name]) for name in ("routed", "reap_sum"))
