"""The documentation is complete: links lead somewhere, and commands, hooks, recipes, errors and options are in it."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from dernkit import errors, hookspecs, recipe
from dernkit.cli import main
from dernkit.recipe import bind_recipe, load_recipe
from dernkit.registry import Registry
from tests.docs.markdown import PAGES, ROOT, anchors, headings, links, name
from tests.laws.test_every_family import REFUSED

DOCS = ROOT / "docs"
HOOKS = [hook for hook in vars(hookspecs) if hook.startswith("dernkit_")]
ERRORS = [cls for cls in vars(errors).values() if inspect.isclass(cls) and issubclass(cls, errors.DernkitError)]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
EVERYWHERE = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for path, anchor in links(page):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name(page)}: {path} does not exist"
        assert not anchor or anchor in anchors(target), f"{name(page)}: {path}#{anchor} is no heading"


def test_the_index_leads_to_every_page() -> None:
    linked = {(DOCS / path).resolve() for path, _ in links(DOCS / "index.md")}
    missing = [name(page) for page in DOCS.rglob("*.md") if page not in linked and page.name != "index.md"]
    assert not missing


@pytest.mark.parametrize("command", main.commands)
def test_every_command_is_in_the_reference_and_in_an_example(command: str) -> None:
    assert f"dernkit {command}" in headings(DOCS / "reference/cli.md")
    assert re.search(rf"^\$ dernkit {command}\b", EVERYWHERE, re.MULTILINE)


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_has_a_heading(hook: str) -> None:
    assert f"`{hook}`" in headings(DOCS / "how-to/write-a-plugin.md")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_in_the_reference_and_is_valid(path: Path, registry: Registry) -> None:
    assert f"`{path.name}`" in (DOCS / "reference/recipes.md").read_text(encoding="utf-8")
    bound = load_recipe(path, registry)
    assert bind_recipe(bound.resolved(), registry) == bound


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_every_error_is_in_the_reference_with_its_exit_code(error: type[errors.DernkitError]) -> None:
    row = f"| `{error.__name__}` | {error.exit_code} |"
    assert row in (DOCS / "reference/errors.md").read_text(encoding="utf-8")


def test_the_refused_families_are_those_that_the_tests_see_refused() -> None:
    text = (DOCS / "reference/families.md").read_text(encoding="utf-8")
    rows = text[text.index("## Refused") : text.index("## Whatever the family")]
    named = set(re.findall(r"^\| `(\w+)` \|", rows, re.MULTILINE))
    assert named == {name.removesuffix("_text") for name in REFUSED}


@pytest.mark.parametrize("section", ["TOP", "CALIBRATE", "PLAN", "APPLY"])
def test_every_key_of_the_recipe_language_is_in_the_reference(section: str) -> None:
    text = (DOCS / "reference/recipe.md").read_text(encoding="utf-8")
    prefix = "" if section == "TOP" else f"{section.lower()}."
    missing = [key for key in getattr(recipe, section) if f"`{prefix}{key}`" not in text]
    assert not missing


def test_the_pages_hold_no_path_of_a_machine() -> None:
    assert not re.search(r"(?<![\w.])/(?:work|home|root|tmp)/", EVERYWHERE)
