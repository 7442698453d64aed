"""Distributions with one plugin module each, on the path as if they were installed."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Install = Callable[..., Path]

PLUGIN = """\
from dataclasses import dataclass
from typing import ClassVar
from dernkit.api import hookimpl

@dataclass(frozen=True)
class Scorer:
    name: ClassVar[str] = "{name}"
    requires: ClassVar[frozenset[str]] = frozenset()
    def score(self, bank, stats): ...

@hookimpl
def dernkit_scorers():
    return [Scorer]
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs a distribution 3.1; returns the folder of its modules.

    ``source`` is its module's, ``entry`` the name of its entry point, ``others`` are further files.
    """
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    before = set(sys.modules)

    def install(distribution: str, source: str, *, entry: str | None = None, **others: str) -> Path:
        module = distribution.replace("-", "_")
        place = site / module / "__init__.py" if others else site / f"{module}.py"
        place.parent.mkdir(exist_ok=True)
        place.write_text(textwrap.dedent(source))
        for name, text in others.items():
            (place.parent / f"{name}.py").write_text(textwrap.dedent(text))
        info = site / f"{module}-3.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 3.1\n")
        name = f"{distribution}-plugin" if entry is None else entry
        (info / "entry_points.txt").write_text(f"[dernkit]\n{name} = {module}\n")
        return place.parent

    yield install
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(site)):
            del sys.modules[name]
