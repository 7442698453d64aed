"""The page about plugins shows the example plugin as it is, and what it shows works."""

from __future__ import annotations

import tomllib

from tests.docs.markdown import ROOT, blocks

PAGE = ROOT / "docs/how-to/write-a-plugin.md"
PLUGIN = ROOT / "plugins/dernkit-example"


def test_the_module_is_that_of_the_example_plugin() -> None:
    module = (PLUGIN / "dernkit_example.py").read_text(encoding="utf-8")
    assert module in [block.text for block in blocks(PAGE) if block.language == "python"]


def test_the_entry_point_is_that_of_the_example_plugin() -> None:
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    shown = [tomllib.loads(block.text)["project"] for block in blocks(PAGE) if block.language == "toml"]
    assert shown and all(
        project[key] == value for shape in shown for key, value in shape.items() if key != "entry-points"
    )
    assert any(shape["entry-points"] == project["entry-points"] for shape in shown)
