"""Every scorer with every similarity, merge and router: no failure, no NaN; what makes no sense is refused before."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch

from dernkit.errors import RecipeError
from dernkit.kernel.compress import compress_layer, target_width
from dernkit.kernel.planning import plan_layer
from dernkit.models.stack import find_blocks
from dernkit.models.universal import Universal
from dernkit.progress import Silent
from dernkit.recipe import bind_recipe
from dernkit.registry import Registry
from dernkit.stages.apply import apply_live
from dernkit.stages.calibrate import calibrate_live
from dernkit.testing.banks import as_bank
from dernkit.types import STATISTICS
from tests import families

BUILTIN = Registry.load(entry_points=False)
ASSIGN = ("none", "cosine", "activation-correlation", "hungarian")


def named(kind: str) -> list[str]:
    """Components that need no options."""
    return [c.name for c in BUILTIN.components(kind) if not any(option.required for option in c.options)]


@functools.cache
def calibrated() -> tuple[Any, dict[int, Any]]:
    """A tiny Mixtral and all its statistics."""
    model = families.build("mixtral")
    tokens = torch.randint(3, families.VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(2))
    blocks = find_blocks(model, [Universal()])
    stats = calibrate_live(model, blocks, [tokens], frozenset(STATISTICS), sample_size=48, seed=0, progress=Silent())
    return model, stats


def assigner(name: str) -> dict[str, Any] | None:
    """Moves half of the dropped segments, the best first."""
    return None if name == "none" else {"use": "affinity", "similarity": {"use": name}, "quantile": 0.5}


@pytest.mark.parametrize("assign", ASSIGN)
@pytest.mark.parametrize("scorer", named("scorer"))
def test_every_combination_gives_finite_experts_of_the_planned_size(scorer: str, assign: str) -> None:
    model, stats = calibrated()
    block: Any = find_blocks(model, [Universal()])[1]
    bank = block.bank()
    merges = [None] if assign == "none" else named("merge")
    plan = None
    for merge in merges:
        for router in named("router"):
            recipe = bound(scorer, assign, merge, router)
            plan = plan or plan_layer(
                bank, stats[block.layer], recipe.plan.scorer, 4, recipe.plan.selector, recipe.plan.assigner
            )
            width = target_width([plan], recipe.apply.merge)
            layer = compress_layer(bank, plan, recipe.apply.merge, recipe.apply.router, width, 0, stats[block.layer])
            assert layer.up.shape == (4, width, bank.dims.hidden)
            assert width == bank.dims.width or merge == "concatenate"
            small = as_bank(layer, bank)
            outputs = torch.stack([small.output(e, stats[block.layer]["sample"]) for e in range(4)])
            assert bool(outputs.isfinite().all() and layer.router.isfinite().all())


@pytest.mark.parametrize("router", named("router"))
@pytest.mark.parametrize("merge", named("merge"))
def test_every_merge_and_router_gives_a_model_with_finite_logits(merge: str, router: str) -> None:
    original, stats = calibrated()
    model = copy.deepcopy(original)
    blocks = find_blocks(model, [Universal()])
    recipe = bound("gate-mass", "activation-correlation", merge, router)
    decide = recipe.plan
    plans = [plan_layer(b.bank(), stats[b.layer], decide.scorer, 4, decide.selector, decide.assigner) for b in blocks]
    apply_live(model, blocks, plans, recipe.apply.merge, recipe.apply.router, seed=0, stats=stats)
    assert bool(families.outputs(model, "mixtral").isfinite().all())


@pytest.mark.parametrize("merge", named("merge"))
def test_a_merge_without_moves_is_refused_at_validation(merge: str) -> None:
    with pytest.raises(RecipeError, match="merge needs segments that move"):
        bound("gate-mass", "none", merge, "slice")


def bound(scorer: str, assign: str, merge: str | None, router: str) -> Any:
    """A bound recipe; its source is never read."""
    data: dict[str, Any] = {
        "dernkit": 1,
        "calibrate": {"source": {"use": "text-file", "path": "unused.txt"}, "sequences": 4, "length": 16},
        "plan": {"keep": 0.5, "score": {"use": scorer}, "assign": assigner(assign)},
        "apply": {"router": {"use": router}, "merge": None if merge is None else {"use": merge}},
    }
    return bind_recipe(data, BUILTIN)
