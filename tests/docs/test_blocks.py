"""Every block of the documentation does what it says."""

from __future__ import annotations

import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from dernkit.compare.bench import load_bench
from dernkit.errors import RecipeError
from dernkit.recipe import TOP, bind_recipe, load_recipe
from dernkit.registry import Registry
from tests.docs import console, workspace
from tests.docs.markdown import PAGES, Block, blocks, name

RUN = ("console", "python", "yaml")
SHOWN = ("text", "sh", "toml", "json")
FILENAME = re.compile(r"# ([\w-]+\.yaml)\n")
SOURCE = re.compile(r"# ([\w/.-]+\.(?:py|toml))\n")
"""A block that begins with such a comment is a file: it is saved, not run."""


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A filled workspace, to be copied."""
    folder = tmp_path_factory.mktemp("docs") / "work"
    folder.mkdir()
    workspace.make(folder)
    return folder


@pytest.fixture
def here(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace of its own, as the working directory."""
    folder = shutil.copytree(template, tmp_path / "work", symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder / console.SITE)
    return folder


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name)
def test_the_blocks_of_a_page_run_one_after_the_other(page: Path, here: Path, registry: Registry) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.skip:
            continue
        if saved := SOURCE.match(block.text):
            (here / saved[1]).parent.mkdir(parents=True, exist_ok=True)
            (here / saved[1]).write_text(block.text, encoding="utf-8")
        if block.language == "python" and not saved:
            exec(compile("\n" * block.line + block.text, page, "exec", dont_inherit=True), names)
        elif block.language == "yaml":
            check_recipe(block, here, registry)
        elif block.language == "console":
            for command, expected in console.sessions(block.text):
                console.check(command, expected)
        elif block.language == "toml":
            tomllib.loads(block.text)


def check_recipe(block: Block, here: Path, registry: Registry) -> None:
    """A block that begins with a file name is saved under it; all must bind, but one named bad… must be refused.

    One named bench… is a bench, and what has no name may be a part of a recipe.
    """
    named = FILENAME.match(block.text)
    file = here / (named[1] if named else "fragment.yaml")
    file.write_text(block.text, encoding="utf-8")
    if file.name.startswith("bad"):
        with pytest.raises(RecipeError):
            load_recipe(file, registry)
    elif file.name.startswith("bench"):
        load_bench(file, registry)
    elif named or "dernkit: 1" in block.text:
        load_recipe(file, registry)
    else:
        bind_recipe(completed(yaml.safe_load(block.text)), registry)


def completed(fragment: dict[str, Any]) -> dict[str, Any]:
    """A recipe around some sections of one, or around a part of its plan."""
    sections = fragment if fragment.keys() <= set(TOP) else {"plan": fragment}
    recipe: dict[str, Any] = {
        "dernkit": 1,
        "calibrate": {"source": {"use": "text-file", "path": "my-text.txt"}, "sequences": 8, "length": 64},
        "plan": {"keep": 0.5, "score": {"use": "gate-mass"}},
        "apply": {},
    }
    for key, section in sections.items():
        recipe[key] = recipe.get(key, {}) | section if isinstance(section, dict) else section
    if "assign" in recipe["plan"]:
        recipe["apply"] = {"merge": {"use": "spherical-kmeans"}} | recipe["apply"]
    elif "merge" in recipe["apply"]:
        recipe["plan"]["assign"] = {"use": "affinity"}
    return recipe


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name)
def test_every_block_says_what_it_is(page: Path) -> None:
    unknown = [(block.line, block.language) for block in blocks(page) if block.language not in RUN + SHOWN]
    assert not unknown, f"{name(page)}: (line, language) of blocks that are neither run nor only shown: {unknown}"
