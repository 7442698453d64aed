"""What a good recipe becomes."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dernkit.recipe import Recipe, bind_recipe, load_recipe
from dernkit.registry import Registry
from tests.unit.toy_components import RECIPE, Affinity, Cosine, GateMass, OnSample, Slice, Uniform, toy_registry

RECIPES = Path(__file__).parents[2] / "recipes"
SHIPPED = sorted(RECIPES.glob("*.yaml"))


def load(folder: Path, text: str) -> Recipe:
    path = folder / "good.yaml"
    path.write_text(text)
    return load_recipe(path, toy_registry())


def test_a_recipe_holds_bound_components_and_defaults(tmp_path: Path) -> None:
    recipe = load(tmp_path, RECIPE)
    assert (recipe.version, recipe.seed, recipe.path) == (1, 0, tmp_path / "good.yaml")
    assert (recipe.calibrate.sequences, recipe.calibrate.length, recipe.calibrate.batch_size) == (128, 2048, 8)
    assert (recipe.plan.keep, recipe.plan.scorer, recipe.plan.budget) == (0.5, GateMass(), Uniform())
    assert recipe.plan.assigner == Affinity(Cosine(("up", "down")), 0.6)
    assert (recipe.apply.router, recipe.evaluators, recipe.report.name) == (Slice(), (), "markdown")


def test_keep_is_a_fraction_if_written_with_a_point_and_a_count_if_not(tmp_path: Path) -> None:
    for written, kept in (("1.0", 1.0), ("1", 1), ("0.75", 0.75), ("12", 12)):
        found = load(tmp_path, RECIPE.replace("0.5", written)).plan.keep
        assert (found, type(found)) == (kept, type(kept))


def test_options_of_a_nested_component_are_bound(tmp_path: Path) -> None:
    text = RECIPE.replace("affinity,", "affinity, similarity: {use: cosine, parts: [gate]}, quantile: 1,")
    assert load(tmp_path, text).plan.assigner == Affinity(Cosine(("gate",)), 0.6, quantile=1.0)


def test_requires_is_the_union_over_components_nested_ones_included(tmp_path: Path) -> None:
    assert load(tmp_path, RECIPE).requires == {"gate_sum"}
    text = RECIPE.replace("affinity,", "affinity, similarity: {use: on-sample},")
    recipe = load(tmp_path, text)
    assert recipe.plan.assigner.similarity == OnSample()
    assert recipe.requires == {"gate_sum", "sample"}


def test_a_recipe_without_statistics_needs_no_calibration(tmp_path: Path) -> None:
    recipe = load(tmp_path, "dernkit: 1\nplan: {keep: 2, score: {use: weights}}\n")
    assert (recipe.calibrate, recipe.requires) == (None, frozenset())
    assert "calibrate" not in recipe.resolved()


def test_yaml_is_that_of_version_1_2(tmp_path: Path) -> None:
    text = "dernkit: 1\nseed: 010\nplan: {keep: 2, score: {use: weights, power: 1e-3}}\n"
    recipe = load(tmp_path, text + "evaluate: [{use: lm-eval, tasks: [on, no, 2026-01-01, 1:30]}]\n")
    assert (recipe.seed, recipe.plan.scorer.power) == (10, 0.001)
    assert recipe.evaluators[0].tasks == ("on", "no", "2026-01-01", "1:30")


@pytest.mark.parametrize("more", ["", "evaluate: [{use: perplexity, path: h.txt}, {use: lm-eval, tasks: [a, b]}]\n"])
def test_a_resolved_recipe_is_plain_data_and_binds_to_an_equal_one(tmp_path: Path, more: str) -> None:
    recipe = load(tmp_path, RECIPE + more)
    written = json.loads(json.dumps(yaml.safe_load(yaml.safe_dump(recipe.resolved()))))
    again = bind_recipe(written, toy_registry())
    assert again == recipe
    assert again.resolved() == recipe.resolved() == written


def test_a_resolved_recipe_writes_every_default_out(tmp_path: Path) -> None:
    assert load(tmp_path, RECIPE).resolved() == {
        "dernkit": 1,
        "seed": 0,
        "calibrate": {
            "source": {"use": "text-file", "path": str(tmp_path / "calib.txt")},
            "sequences": 128,
            "length": 2048,
            "batch_size": 8,
            "sample": 16384,
            "holdout": 0.0,
            "sequential": False,
        },
        "plan": {
            "keep": 0.5,
            "score": {"use": "gate-mass"},
            "budget": {"use": "uniform"},
            "select": {"use": "top-score"},
            "assign": {
                "use": "affinity",
                "similarity": {"use": "cosine", "parts": ["up", "down"]},
                "threshold": 0.6,
                "quantile": None,
            },
            "groups": "respect",
        },
        "apply": {
            "merge": {"use": "spherical-kmeans", "iterations": 30},
            "router": {"use": "slice"},
            "mtp": "compress",
            "export": "auto",
        },
        "evaluate": [],
        "report": {"use": "markdown"},
    }


def test_a_recipe_cannot_be_changed(tmp_path: Path) -> None:
    recipe = load(tmp_path, RECIPE)
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.seed = 1  # type: ignore[misc]


def test_reading_the_language_does_not_import_torch() -> None:
    code = "import dernkit.recipe, dernkit.hookspecs, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture(scope="module")
def builtins() -> Registry:
    return Registry.load(entry_points=False)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_says_what_it_is_for(path: Path, builtins: Registry) -> None:
    recipe = load_recipe(path, builtins)
    assert bool(recipe.calibrate) == bool(recipe.requires)
    source: Any = recipe.calibrate and recipe.calibrate.source
    assert source is None or getattr(source, "text", source).path == RECIPES / "calibration.txt"
    assert bind_recipe(recipe.resolved(), builtins) == recipe
    head = path.read_text().split("dernkit: 1")[0]
    assert all(f"# {word}:" in head for word in ("Purpose", "Run", "Expect"))
    assert f"dernkit run recipes/{path.name} " in head


def test_dern_is_the_published_method(builtins: Registry) -> None:
    written = load_recipe(RECIPES / "dern.yaml", builtins).resolved()
    assert written["plan"]["score"]["use"] == "gate-mass"
    assert written["plan"]["assign"]["similarity"] == {
        "use": "cosine",
        "parts": ["up", "down"],
        "sign": False,
        "balance": False,
    }
    assert written["plan"]["assign"]["threshold"] == 0.6
    assert written["apply"]["merge"]["use"] == "spherical-kmeans"
    assert written["apply"]["router"]["use"] == "additive"
