"""The generated reference pages are those that the code would generate now."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest

from dernkit.registry import Registry
from tests.docs.markdown import ROOT


def generator() -> ModuleType:
    """docs/generate.py, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs/generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["components.md", "cli.md", "recipes.md", "clients.md", "architectures.md"])
def test_the_page_is_not_stale(page: str, registry: Registry) -> None:
    written = (ROOT / "docs/reference" / page).read_text(encoding="utf-8")
    assert generator().pages(registry)[page] == written, "run: python docs/generate.py"
