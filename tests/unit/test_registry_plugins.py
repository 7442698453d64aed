"""Plugins with something wrong: each gets one sentence, and all others go on working."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from dernkit.api import PluginError
from dernkit.cli import main
from dernkit.registry import Registry
from tests.unit.installed import PLUGIN, Install, installed
from tests.unit.toy_components import Reap, plugin_of

__all__ = ["installed"]

GOOD = PLUGIN.format(name="good")


def problem_of(distribution: str) -> str:
    """The one problem of that distribution; the plugin 'good', which is installed as well, is there."""
    registry = Registry.load()
    assert registry.get("scorer", "good").provenance.distribution == "z-good"
    (problem,) = [str(problem) for problem in registry.problems if distribution in str(problem)]
    return problem


@pytest.fixture
def site(installed: Install) -> Install:
    installed("z-good", GOOD)
    return installed


def test_a_plugin_without_a_name(site: Install) -> None:
    site("a-nameless", PLUGIN.format(name="nameless"), entry="")
    assert problem_of("a-nameless") == (
        "plugin of a-nameless 3.1: must have a name. Got none instead. "
        "Write my-plugin = 'my_module' below [project.entry-points.dernkit]."
    )
    with pytest.raises(PluginError, match="must have a name"):
        Registry().register(plugin_of("dernkit_scorers", Reap), " ")


def test_a_component_without_a_name(site: Install) -> None:
    folder = site("a-wordless", PLUGIN.replace('    name: ClassVar[str] = "{name}"\n', ""))
    assert problem_of("a-wordless") == (
        f"{folder}/a_wordless.py:5: scorer Scorer of plugin 'a-wordless-plugin' (a-wordless 3.1) must have a `name` in "
        "lower-case letters and digits with single hyphens between. Got None instead. "
        "Write name: ClassVar[str] = 'my-word'."
    )


def test_a_name_that_is_taken_names_both_plugins(site: Install) -> None:
    folder = site("zz-second", GOOD)
    assert problem_of("zz-second") == (
        f"{folder}/zz_second.py:5: scorer 'good' must have one provider. Got plugin 'zz-second-plugin' (zz-second 3.1) "
        "and, before it, plugin 'z-good-plugin' (z-good 3.1) instead. Uninstall or rename one."
    )


@pytest.mark.parametrize(
    ("written", "got"),
    [("extra=None", "extra=None"), ("*, extra=1", "extra=1"), ("config", "config"), ("*rest", "*rest")],
)
def test_a_hook_with_an_argument_or_a_default(site: Install, written: str, got: str) -> None:
    folder = site("a-default", PLUGIN.format(name="x").replace("rs():", f"rs({written}):"))
    assert problem_of("a-default") == (
        f"{folder}/a_default.py:11: dernkit_scorers() of plugin 'a-default-plugin' (a-default 3.1) must take no "
        f"arguments. Got '{got}' instead. Remove it."
    )


PRIVATE = {
    "from dernkit.types import ExpertBank, Pool": (
        "dernkit.types",
        "Import ExpertBank, Pool from dernkit.api.",
    ),
    "from dernkit.models.layout import Layout": ("dernkit.models.layout", "Import Layout from dernkit.architecture."),
    "from dernkit.registry import Registry": ("dernkit.registry", "Import Registry from dernkit."),
    "import dernkit.stages.plan": (
        "dernkit.stages.plan",
        "Import from dernkit.api, dernkit.errors, dernkit.kernel, dernkit.architecture, dernkit.testing only.",
    ),
    "from dernkit.builtin.scorers import Reap": (
        "dernkit.builtin.scorers",
        "Import from dernkit.api, dernkit.errors, dernkit.kernel, dernkit.architecture, dernkit.testing only.",
    ),
    "from dernkit import hookspecs": (
        "dernkit",
        "Import from dernkit.api, dernkit.errors, dernkit.kernel, dernkit.architecture, dernkit.testing only.",
    ),
}


@pytest.mark.parametrize("statement", PRIVATE)
def test_a_private_module_is_named_with_its_place_and_the_public_one(site: Install, statement: str) -> None:
    module, fix = PRIVATE[statement]
    folder = site("a-private", f"\n{statement}\n{PLUGIN.format(name='x')}")
    assert problem_of("a-private") == (
        f"{folder}/a_private.py:2: plugin 'a-private-plugin' (a-private 3.1) must import nothing private of dernkit. "
        f"Got '{module}' instead. {fix}"
    )
    assert "x" not in Registry.load().names("scorer")


@pytest.mark.parametrize(
    ("first", "helper", "line"),
    [
        ("from .helper import VALUE", "import dernkit.types\nVALUE = 1", 1),
        ("from . import helper", "VALUE = 1\nfrom dernkit.types import Pool", 2),
        ("import a_folder.helper", "VALUE = 1\ndef late():\n    from dernkit.types import Pool", 3),
    ],
)
def test_the_other_modules_of_the_package_count_imports_in_functions_too(
    site: Install, first: str, helper: str, line: int
) -> None:
    folder = site("a-folder", f"{first}\n{PLUGIN.format(name='x')}", helper=helper)
    assert f"{folder}/helper.py:{line}: plugin 'a-folder-plugin'" in problem_of("a-folder")


@pytest.mark.parametrize(
    "statement",
    [
        "import dernkit",
        "from dernkit import Registry, compress, api",
        "import dernkit.kernel.matching, dernkit.errors",
        "from dernkit.kernel.matching import best_match",
        "from dernkit.kernel import calls",
        "from dernkit.testing.banks import random_bank",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from dernkit.types import Pool",
        "import json as dernkit_registry",
    ],
)
def test_public_modules_may_be_imported(site: Install, statement: str) -> None:
    site("a-public", f"{statement}\n{PLUGIN.format(name='x')}")
    registry = Registry.load()
    assert registry.get("scorer", "x").provenance.distribution == "a-public"


def test_tests_inside_a_package_are_not_read(site: Install) -> None:
    site("a-tested", PLUGIN.format(name="x"), test_it="from dernkit.registry import Registry")
    assert Registry.load().get("scorer", "x")


def test_our_own_plugins_import_nothing_private() -> None:
    from dernkit.imports import private_imports
    from tests.unit.environment import ROOT, imported

    plugins = {"dernkit-example": "dernkit_example", "dernkit-deepseek-moe": "src/dernkit_deepseek_moe"}
    for folder, module in plugins.items():
        with imported(ROOT / "plugins" / folder / module) as plugin:
            assert list(private_imports(plugin)) == []


BROKEN = {
    "raises": ("1 / 0", "must be importable. Got ZeroDivisionError: division by zero instead."),
    "exits": ("raise SystemExit(3)", "must be importable. Got SystemExit: 3 instead."),
    "syntax": ("def (", "must be importable. Got SyntaxError: invalid syntax (a_broken.py, line 1) instead."),
    "hook exits": (
        PLUGIN.format(name="x").replace("return [Scorer]", "exit(2)"),
        "must return classes from dernkit_scorers(). Got SystemExit: 2 instead.",
    ),
    "none": (
        PLUGIN.format(name="x").replace("return [Scorer]", "pass"),
        "must return classes from dernkit_scorers(). Got TypeError: NoneType is not a list instead.",
    ),
    "instance": (
        PLUGIN.format(name="x").replace("[Scorer]", "[Scorer()]"),
        "must be a class. Got an object instead. Return the class, not an instance of it.",
    ),
    "text": (
        PLUGIN.format(name="x").replace("[Scorer]", "['Scorer']"),
        "must be a class. Got an object instead. Return the class, not an instance of it.",
    ),
    "requires exits": (
        PLUGIN.format(name="x").replace(
            "requires: ClassVar[frozenset[str]] = frozenset()", "@property\n    def requires(self): exit(4)"
        ),
        "must be readable. Got SystemExit: 4 instead.",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_has_one_sentence_and_the_listing_goes_on(site: Install, case: str) -> None:
    source, sentence = BROKEN[case]
    site("a-broken", source)
    problem = problem_of("a-broken")
    assert problem.endswith(sentence)
    result = CliRunner().invoke(main, ["plugins"])
    assert result.exit_code == 3
    assert "Traceback" not in result.output
    assert any(line.split()[:4] == ["scorer", "good", "z-good", "3.1"] for line in result.stdout.splitlines())
    assert [line for line in result.stderr.splitlines() if "a-broken" in line] == [problem]


def test_what_is_no_class_is_placed_at_its_hook(site: Install) -> None:
    folder = site("a-object", PLUGIN.format(name="x").replace("[Scorer]", "['Scorer']"))
    assert problem_of("a-object").startswith(f"{folder}/a_object.py:11: scorer 'Scorer' of plugin 'a-object-plugin'")


@pytest.mark.parametrize(
    "source", ["raise KeyboardInterrupt", PLUGIN.replace("return [Scorer]", "raise KeyboardInterrupt")]
)
def test_an_interrupt_while_plugins_load_passes(site: Install, source: str) -> None:
    site("a-interrupted", source.format(name="x") if "{name}" in source else source)
    with pytest.raises(KeyboardInterrupt):
        Registry.load()


def test_the_listing_says_where_each_component_comes_from(site: Install) -> None:
    folder: Path = site("a-package", PLUGIN.format(name="packed"), other="")
    result = CliRunner().invoke(main, ["plugins", "--json"])
    rows = {(row["kind"], row["name"]): row for row in json.loads(result.stdout)["components"]}
    found = rows["scorer", "packed"]
    assert (found["plugin"], found["distribution"], found["version"]) == ("a-package-plugin", "a-package", "3.1")
    assert (found["file"], found["line"], found["source"]) == (str(folder / "__init__.py"), 5, "__init__.py:5")


def test_a_component_that_cannot_be_built_is_a_problem_of_the_recipe(site: Install, tmp_path: Path) -> None:
    broken = PLUGIN.format(name="x").replace("def score", "def __post_init__(self): {}['x']\n    def score")
    site("a-unbuilt", broken)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("dernkit: 1\nplan: {keep: 0.5, score: {use: x}}\napply: {}\n")
    result = CliRunner().invoke(main, ["validate", str(recipe)])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1] == (
        f"{recipe}:2: plan.score: scorer 'x' of plugin 'a-unbuilt-plugin' (a-unbuilt 3.1) must be built. "
        "Got KeyError: 'x' instead."
    )
