"""What is installed and how: dependencies, pins, licences, commands of the Makefile, import contracts."""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
NEEDED = [Requirement(text) for text in PROJECT["dependencies"]]
OPTIONAL = [Requirement(text) for extra in EXTRAS.values() for text in extra]
ALL = [*NEEDED, *(requirement for requirement in OPTIONAL if requirement.name != PROJECT["name"])]
MODULE_OF = {"pyyaml": "yaml", "lm-eval": "lm_eval", "huggingface-hub": "huggingface_hub"}


def pins() -> dict[str, str]:
    """Package -> version in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def imported() -> set[str]:
    """Top-level names of everything that the package imports."""
    found = set()
    for file in (ROOT / "dernkit").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add((node.module or "").partition(".")[0])
    return found


def modules(requirements: list[Requirement]) -> set[str]:
    """What the packages are imported as."""
    return {MODULE_OF.get(canonicalize_name(r.name), canonicalize_name(r.name).replace("-", "_")) for r in requirements}


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make in the repository."""
    return subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def test_everything_that_is_imported_is_declared() -> None:
    foreign = imported() - set(sys.stdlib_module_names) - {"dernkit", "__future__"}
    optional = modules([Requirement(text) for extra in ("eval", "compare", "test") for text in EXTRAS[extra]])
    assert foreign - modules(NEEDED) <= optional


@pytest.mark.parametrize("requirement", ALL, ids=lambda requirement: requirement.name)
def test_every_dependency_is_pinned_to_a_version_that_is_allowed(requirement: Requirement) -> None:
    version = pins()[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(version, prereleases=True)


def test_the_readme_says_which_transformers() -> None:
    ranges = {spec.operator: spec.version for r in NEEDED if r.name == "transformers" for spec in r.specifier}
    sentence = (
        f"dernkit needs transformers ≥ {ranges['>=']} and < {ranges['<']} and is tested with {pins()['transformers']}."
    )
    assert sentence in " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


def test_the_version_is_that_of_the_project() -> None:
    assert metadata.version("dernkit") == PROJECT["version"]


def test_the_licence_is_apache_2_in_full() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text
    assert all((ROOT / file).stat().st_size for file in PROJECT["license-files"])


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from dernkit.cli import main; main(['--help'], standalone_mode=False); "
        "sys.exit(bool({'torch', 'transformers', 'safetensors'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_make_help_names_every_target_and_is_the_default() -> None:
    targets = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert targets is not None
    shown = make("help").stdout
    assert all(f"make {target} " in shown for target in targets[1].split() if target != "help")
    assert make().stdout == shown


def test_an_unsuitable_python_is_refused_in_one_sentence(tmp_path: Path) -> None:
    old = tmp_path / "python2.7"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = make("test", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}")
    assert done.returncode != 0 and not (tmp_path / "venv").exists()
    assert f"PYTHON must be Python 3.11 or newer. Got '{old}' instead. Set PYTHON" in done.stderr


def test_ci_runs_make_test() -> None:
    script = ROOT / ".ci/run"
    assert script.stat().st_mode & 0o111
    assert re.search(r"^make test VENV=", script.read_text(encoding="utf-8"), re.MULTILINE)


def test_builtins_may_import_nothing_of_the_package_but_api_errors_and_kernel() -> None:
    contracts = configparser.ConfigParser()
    contracts.read(ROOT / ".importlinter", encoding="utf-8")
    forbidden = set(contracts["importlinter:contract:builtin"]["forbidden_modules"].split())
    package = ROOT / "dernkit"
    names = {path.stem for path in package.glob("*.py")} | {path.parent.name for path in package.glob("*/__init__.py")}
    allowed = {"__init__", "__main__", "api", "builtin", "errors", "kernel"}
    assert forbidden == {f"dernkit.{name}" for name in names - allowed}
