"""The JSON Schema says the same as the recipe language."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from dernkit.registry import Registry
from dernkit.schema import USED, recipe_schema
from dernkit.shapes import Maybe, Number
from tests.unit.toy_components import RECIPE, toy_registry


@pytest.fixture(scope="module")
def builtins() -> Registry:
    return Registry.load(entry_points=False)


@pytest.fixture(scope="module")
def toys() -> Draft202012Validator:
    return Draft202012Validator(recipe_schema(toy_registry()))


def test_the_schema_is_one(builtins: Registry) -> None:
    Draft202012Validator.check_schema(recipe_schema(builtins))


RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_follow_it(path: Path, builtins: Registry) -> None:
    Draft202012Validator(recipe_schema(builtins)).validate(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("dernkit: 1\n", ""),
        ("dernkit: 1", "dernkit: 2"),
        ("apply:", "aply:"),
        ("  keep", "  kep"),
        ("keep: 0.5", "keep: 0"),
        ("keep: 0.5", "keep: true"),
        ("keep: 0.5", "groups: none\n  keep: 0.5"),
        ("apply: {", "apply: {mtp: keep, "),
        ("keep: 0.5", "keep: 1.5"),
        ("{use: gate-mass}", "{use: reep}"),
        ("{use: gate-mass}", "gate-mass"),
        ("{use: gate-mass}", "{use: weights, power: 0}"),
        ("threshold: 0.6", "treshold: 0.6"),
        ("threshold: 0.6", "threshold: 6"),
        ("affinity,", "affinity, similarity: {use: cosine, parts: [sideways]},"),
        ("sequences: 128", "sequences: abc"),
        (", path: calib.txt", ""),
        ("apply: {merge: {use: spherical-kmeans}}", ""),
        ("  assign: {use: affinity, threshold: 0.6}\n", ""),
        ("apply:", "evaluate: [{use: lm-eval, tasks: a}]\napply:"),
    ],
)
def test_bad_recipes_fail(toys: Draft202012Validator, old: str, new: str) -> None:
    assert toys.is_valid(yaml.safe_load(RECIPE))
    assert old in RECIPE
    assert not toys.is_valid(yaml.safe_load(RECIPE.replace(old, new, 1)))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("keep: 0.5", "keep: 1"),
        ("keep: 0.5", "keep: 4"),
        ("affinity,", "affinity, quantile: null, similarity: {use: cosine, parts: [gate]},"),
        ("  assign: {use: affinity, threshold: 0.6}\napply: {merge: {use: spherical-kmeans}}\n", "  assign: null\n"),
        ("apply:", "seed: null\nevaluate: null\nreport: {use: markdown}\napply:"),
    ],
)
def test_good_variants_pass(toys: Draft202012Validator, old: str, new: str) -> None:
    assert old in RECIPE
    toys.validate(yaml.safe_load(RECIPE.replace(old, new, 1)))


def test_every_option_appears_with_bounds_default_and_description(builtins: Registry) -> None:
    schema = recipe_schema(builtins)
    for kind in USED:
        entries = {entry["properties"]["use"]["const"]: entry for entry in schema["$defs"][kind]["oneOf"]}
        assert list(entries) == builtins.names(kind)
        for component in builtins.components(kind):
            entry = entries[component.name]
            assert entry["description"] == component.summary
            assert set(entry["properties"]) == {"use", *(option.name for option in component.options)}
            for option in component.options:
                written = entry["properties"][option.name]
                assert written["description"]
                assert option.required == (option.name in entry["required"]) == ("default" not in written)
                shape = option.shape.inner if isinstance(option.shape, Maybe) else option.shape
                if isinstance(shape, Number):
                    assert {shape.low, shape.high} <= set(numbers(written))


def test_no_mapping_takes_unknown_keys(builtins: Registry) -> None:
    def objects(value: Any) -> list[dict[str, Any]]:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
        found = [each for entry in inner for each in objects(entry)]
        return [*found, value] if isinstance(value, dict) and "use" in value.get("properties", {}) else found

    schema = recipe_schema(builtins)
    found = objects(schema)
    assert len(found) == sum(len(builtins.names(kind)) for kind in USED)
    assert all(entry["additionalProperties"] is False for entry in [*found, schema, schema["properties"]["plan"]])


def numbers(schema: dict[str, Any]) -> list[Any]:
    """Bounds in a schema of a number, also when it may be null."""
    parts = [schema, *schema.get("anyOf", [])]
    return [part[key] for part in parts for key in part if key.endswith(("imum", "inimum", "aximum"))]
