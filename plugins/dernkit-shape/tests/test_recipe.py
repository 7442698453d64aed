"""SHAPE's recipe runs from a checkpoint to a checkpoint."""

from pathlib import Path

import torch
from workshop import recipe_with, result_of

from dernkit.recipe import load_recipe
from dernkit.registry import Registry

RECIPE = Path(__file__).parents[1] / "recipes/shape.yaml"


def test_the_recipe_runs_from_checkpoint_to_checkpoint(tmp_path: Path) -> None:
    model, plan = result_of(tmp_path, recipe_with(RECIPE))
    assert model.config.num_local_experts == 4
    assert all(len(layer["kept"]) == 4 and max(layer["scores"]) > 0 for layer in plan["layers"].values())
    assert bool(model(torch.arange(3, 20)[None]).logits.isfinite().all())


def test_the_recipe_with_coverage_is_valid() -> None:
    registry = Registry.load()
    recipe = load_recipe(RECIPE.with_name("shape-coverage.yaml"), registry)
    assert recipe.resolved()["plan"]["score"] == {"use": "coalition-shapley", "subtract": 1.0}
    assert recipe.resolved()["plan"]["budget"] == {"use": "coverage"}
    assert recipe.requires == {"sample"}
