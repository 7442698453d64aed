"""The generated reference pages are those that the code would generate now."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest

from dernkit import hookspecs
from dernkit.api import Block
from dernkit.components import KINDS, Kind
from dernkit.kernel.contracts import LAWS, LAWS_OF
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


@pytest.mark.parametrize(
    "page", ["components.md", "hooks.md", "cli.md", "recipes.md", "clients.md", "architectures.md"]
)
def test_the_page_is_not_stale(page: str, registry: Registry) -> None:
    written = (ROOT / "docs/reference" / page).read_text(encoding="utf-8")
    assert generator().pages(registry)[page] == written, "run: python docs/generate.py"


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_the_reference_says_of_every_hook_what_its_classes_must_do(kind: Kind) -> None:
    text = (ROOT / "docs/reference/hooks.md").read_text(encoding="utf-8")
    section = text[text.index(f"## `{kind.hook}`") :].split("\n## ")[0]
    assert f"Since version {getattr(hookspecs, kind.hook).hook.since}. " in section
    for attribute in kind.attributes:
        assert f"- `{attribute}`: " in section
    for method in kind.methods:
        (line,) = [line for line in section.splitlines() if line.startswith(f"- `{method}(")]
        assert len(line.partition("`: ")[2]) > 20, f"{kind.protocol.__name__}.{method} needs a docstring"
    assert all(f"`{law}`" in section for law in LAWS_OF.get(kind.name, ()))


def test_the_reference_has_every_law_and_every_method_of_a_block() -> None:
    text = (ROOT / "docs/reference/hooks.md").read_text(encoding="utf-8")
    assert all(f"| `{law}` | {meaning} |" in text for law, meaning in LAWS.items())
    assert all(f"- `{name}(" in text for name in vars(Block) if name[0] != "_" and callable(vars(Block)[name]))
