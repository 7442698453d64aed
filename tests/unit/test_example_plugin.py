"""The example plugin, installed into a fresh environment as a stranger would."""

import json
import shutil
from pathlib import Path

import pytest

from tests.unit.environment import run, with_plugin

PLUGIN = Path(__file__).parents[2] / "plugins/dernkit-example"
RECIPE = """\
dernkit: 1
calibrate: {source: {use: text-file, path: calib.txt}, sequences: 128, length: 2048}
plan: {keep: 0.5, score: {use: output-energy}}
"""
PROBE = """
import json, sys
from dernkit.errors import RecipeError
from dernkit.recipe import load_recipe
from dernkit.registry import Registry
registry = Registry.load()
recipe = load_recipe(sys.argv[1], registry)
found = registry.get("scorer", "output-energy").provenance
try:
    load_recipe("my.yaml", registry)
except RecipeError as error:
    said = str(error)
print(json.dumps({
    "said": said,
    "origin": found.origin,
    "file": found.file,
    "requires": sorted(recipe.requires),
    "score": recipe.resolved()["plan"]["score"],
    "problems": [str(problem) for problem in registry.problems],
}))
"""


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment with the plugin."""
    return with_plugin(tmp_path_factory.mktemp("fresh"), PLUGIN)


def test_an_installed_plugin_is_found_and_a_recipe_can_name_its_scorer(fresh: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "my.yaml").write_text(RECIPE.replace("energy}", "energy, frequencey: false}"))
    found = json.loads(run(fresh, "-c", PROBE, "recipe.yaml", cwd=tmp_path))
    assert found["origin"] == "plugin 'example' (dernkit-example 0.1.0)"
    assert found["file"].startswith(str(fresh.parent.parent))
    assert found["requires"] == ["output_sq_sum", "routed"]
    assert found["score"] == {"use": "output-energy", "frequency": True}
    assert all(f"    {line}\n" in (PLUGIN / "README.md").read_text() for line in found["said"].split("\n"))
    assert not [problem for problem in found["problems"] if "dernkit-example" in problem]


def test_the_plugins_own_tests_pass_where_it_is_installed(fresh: Path, tmp_path: Path) -> None:
    tests = shutil.copytree(PLUGIN / "tests", tmp_path / "tests")
    assert "1 passed" in run(fresh, "-m", "pytest", "-p", "no:cacheprovider", tests, cwd=tmp_path)


def test_it_is_one_module_of_at_most_thirty_lines() -> None:
    modules = sorted(PLUGIN.glob("*.py"))
    assert [module.name for module in modules] == ["dernkit_example.py"]
    assert len(modules[0].read_text().splitlines()) <= 30
