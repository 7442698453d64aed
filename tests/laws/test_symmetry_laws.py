"""Laws 4 and 5 on whole checkpoints: permuted copies are found, and order means nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import dernkit
from dernkit.builtin.assigners import Affinity
from dernkit.builtin.merges import SphericalKMeans
from dernkit.builtin.routers import Slice
from dernkit.models.stack import find_blocks
from dernkit.models.universal import Universal
from dernkit.registry import Registry
from dernkit.stages.apply import apply_live
from dernkit.testing.checkpoints import FAMILIES, tiny_model, tokens
from dernkit.types import Assignment, LayerPlan, LayerStats, Retention
from tests.laws.pipeline import DERN, recipe, run

every_family = pytest.mark.parametrize("family", FAMILIES)
EXPERT_ORDER = torch.tensor([2, 0, 3, 1, 7, 5, 4, 6])
"""Stays inside the two groups of the families that have groups."""


def permute_neurons(experts: Any, expert: int, order: torch.Tensor) -> None:
    """The same function with the neurons in another order."""
    rows = torch.cat([order, order + len(order)])
    experts.gate_up_proj.data[expert] = experts.gate_up_proj.data[expert][rows]
    experts.down_proj.data[expert] = experts.down_proj.data[expert][:, order]


def shuffled(width: int, seed: int) -> torch.Tensor:
    return torch.randperm(width, generator=torch.Generator().manual_seed(seed))


def moe_blocks(model: Any) -> list[Any]:
    return find_blocks(model, [Universal()])


@every_family
def test_experts_and_neurons_in_another_order_give_the_same_function(tmp_path: Path, registry: Registry, family: str):
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "a")
    for block in moe_blocks(model):
        for tensor in block.tensors().values():
            tensor.copy_(tensor[EXPERT_ORDER])
        for expert in range(8):
            permute_neurons(block.experts, expert, shuffled(block.dims.width, expert))
    model.save_pretrained(tmp_path / "b")
    bound = recipe(registry, assign={**DERN, "quantile": 0.5}, router="additive")
    plans = {name: run(tmp_path / name, tmp_path / f"{name}-out", bound, tokens(4, 16)) for name in ("a", "b")}
    for mine, theirs in zip(plans["a"], plans["b"], strict=True):
        assert sorted(EXPERT_ORDER[theirs.kept].tolist()) == mine.kept.tolist()
        assert len(mine.assignment) == len(theirs.assignment) > 0
    ids = tokens(2, 20, seed=5)
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(tmp_path / f"{n}-out")(ids).logits for n in ("a", "b")]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


@every_family
def test_a_dropped_permuted_copy_of_a_kept_expert_leaves_it_as_it_was(family: str):
    """Every segment finds its twin with cosine 1, and merging twins gives the twin."""
    model = tiny_model(family)
    kept = torch.tensor([0, 2, 4, 6])
    for block in moe_blocks(model):
        experts = block.experts
        for expert in kept.tolist():
            experts.gate_up_proj.data[expert + 1] = experts.gate_up_proj.data[expert]
            experts.down_proj.data[expert + 1] = experts.down_proj.data[expert]
            permute_neurons(experts, expert + 1, shuffled(block.dims.width, expert))
    pruned, merged = tiny_model(family), tiny_model(family)
    for other in (pruned, merged):
        other.load_state_dict(model.state_dict())
    stats = LayerStats(tokens=0)
    plans = []
    for block in moe_blocks(merged):
        moves = Affinity(threshold=0.999).assign(
            block.bank(), Retention(torch.ones(8, dtype=torch.float64), kept), stats
        )
        assert len(moves) == 4 * block.dims.width and bool((moves.affinity == 1).all())
        plans.append(LayerPlan(block.layer, 8, block.dims.width, torch.ones(8, dtype=torch.float64), kept, moves))
    nothing = [LayerPlan(p.layer, 8, p.width, p.scores, kept, Assignment.empty()) for p in plans]
    apply_live(merged, moe_blocks(merged), plans, SphericalKMeans(), Slice(), seed=0)
    apply_live(pruned, moe_blocks(pruned), nothing, None, Slice(), seed=0)
    ids = tokens(2, 20, seed=5)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, pruned(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_model_in_training_mode_comes_back_in_training_mode(registry: Registry):
    model = tiny_model("mixtral").train()
    dernkit.compress(model, recipe(registry), tokens(4, 16).split(2), registry=registry)
    assert model.training
