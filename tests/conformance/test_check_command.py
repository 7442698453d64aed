"""`dernkit check` on the plugins of this repository, and on what is none."""

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dernkit.cli import main

PLUGINS = Path(__file__).parents[2] / "plugins"
BROKEN = '''
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
import torch
from dernkit.api import hookimpl

@dataclass(frozen=True)
class Places:
    name: ClassVar[str] = "places"
    requires: ClassVar[frozenset[str]] = frozenset()
    def score(self, bank, stats):
        return torch.arange(bank.dims.experts, dtype=torch.float64)

@dataclass(frozen=True)
class Listed:
    """Scores in a file."""
    name: ClassVar[str] = "listed"
    requires: ClassVar[frozenset[str]] = frozenset()
    path: Path
    def score(self, bank, stats):
        return torch.ones(bank.dims.experts, dtype=torch.float64)

@hookimpl
def dernkit_scorers():
    return [Places, Listed]
'''


def check(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["check", *arguments])


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and the search path as it was afterwards."""
    import sys

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


@pytest.mark.parametrize(
    ("plugin", "shown"),
    [
        ("dernkit-example", "OutputEnergy"),
        ("dernkit-deepseek-moe", "DeepseekMoE"),
        ("dernkit-hc-smoe", "Agglomerative"),
        ("dernkit-shape", "Coverage"),
    ],
)
def test_a_plugin_of_this_repository_keeps_all_laws_in_its_folder(work: Path, plugin: str, shown: str) -> None:
    done = check(str(PLUGINS / plugin))
    assert done.exit_code == 0, done.output
    assert shown in done.stdout and done.stdout.splitlines()[-1].startswith("0 of ")


def test_a_plugin_is_found_as_a_module_and_as_a_file(work: Path) -> None:
    shutil.copyfile(PLUGINS / "dernkit-example/dernkit_example.py", work / "my_copy.py")
    for name in ("my_copy", "my_copy.py"):
        done = check(name)
        assert (done.exit_code, done.stdout.count("OutputEnergy")) == (0, 15), done.output


def test_a_broken_law_is_a_sentence_and_exit_code_1(work: Path) -> None:
    (work / "places.py").write_text(BROKEN)
    done = check("places")
    assert done.exit_code == 1
    assert "scorer 'listed': not checked, as path must be given; see dernkit_examples" in done.stderr
    assert "scorer 'places', law expert_permutation, 8 gated experts: must give every expert" in done.stderr
    assert done.stdout.splitlines()[-1].startswith("1 of ")


def test_a_plugin_says_which_instances_are_examples_and_which_laws_are_broken_on_purpose(work: Path) -> None:
    extra = """
def dernkit_examples():
    return [Listed(Path("/scores.txt"))]

def dernkit_expected_failures():
    return {"Places": {"expert_permutation": "it is about places", "shape": "it is said to be wrong"}}
"""
    (work / "meant.py").write_text(BROKEN + extra)
    done = check("meant")
    assert "Places, expert_permutation: broken as expected, it is about places" in done.stdout
    assert "Listed(path=scores.txt)" in done.stdout and "not checked" not in done.output
    assert "law shape: must be broken, as is expected (it is said to be wrong). Got it kept instead." in done.stderr
    assert done.exit_code == 1


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("dernkitt", "Got 'dernkitt' instead. Did you mean 'dernkit'?"),
        ("empty", "must declare a plugin. Got no [project.entry-points.dernkit] instead."),
        ("falls.py", "must be importable. Got ZeroDivisionError: division by zero instead."),
    ],
)
def test_what_is_no_plugin_is_a_sentence(work: Path, name: str, sentence: str) -> None:
    (work / "empty").mkdir()
    (work / "empty/pyproject.toml").write_text("[project]\nname = 'empty'\n")
    (work / "falls.py").write_text("1 / 0\n")
    done = check(name)
    assert (done.exit_code, len(done.stderr.splitlines())) == (3, 1)
    assert sentence in done.stderr


def test_the_list_has_every_law_with_its_version() -> None:
    lines = check("--list").stdout.splitlines()
    assert any(line.split()[:3] == ["merge", "exact_copies", "0.1"] for line in lines)
    assert check().exit_code == check("--list", "dernkit").exit_code == 2
