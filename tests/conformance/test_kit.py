"""The kit itself: its ids, its expected failures, and what it says to those who use it wrongly."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dernkit.builtin.merges import SphericalKMeans
from dernkit.builtin.scorers import GateMass
from dernkit.errors import PluginError
from dernkit.testing import all_checks, parametrize_with_checks
from tests.conformance.broken import BrokenScorer

INNER = """
from dernkit.builtin.scorers import GateMass, Random
from dernkit.testing import parametrize_with_checks

@parametrize_with_checks([GateMass(), Random(seed=3)], expected_failures={expected})
def test_laws(component, check):
    check(component)
"""


def ids(components: list[Any]) -> list[str]:
    mark = parametrize_with_checks(components).mark
    return [parameters.id for parameters in mark.args[1]]


def run_inner(folder: Path, expected: str) -> str:
    (folder / "test_mine.py").write_text(INNER.replace("{expected}", expected))
    arguments = ["-m", "pytest", "-p", "no:cacheprovider", "-q", "-rA", "test_mine.py"]
    return subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False).stdout


def test_ids_name_class_options_and_law() -> None:
    assert {"GateMass-expert_permutation", "GateMass-determinism"} <= set(ids([GateMass()]))
    assert "SphericalKMeans(iterations=3)-exact_copies" in ids([SphericalKMeans(iterations=3)])


def test_every_law_is_a_sentence_with_a_version() -> None:
    for check in all_checks():
        assert check.sentence.endswith(".") and check.since == "0.1"
    names = [(check.kind, check.id) for check in all_checks()]
    assert len(names) == len(set(names))


def test_an_expected_failure_is_strict(tmp_path: Path) -> None:
    random = "'Random': {'expert_permutation': 'places'}"
    assert "1 xfailed" in run_inner(tmp_path, f"{{{random}}}") and "failed," not in run_inner(tmp_path, f"{{{random}}}")
    said = run_inner(tmp_path, f"{{{random}, 'GateMass': {{'determinism': 'none'}}}}")
    assert "[XPASS(strict)] none" in said and "1 failed" in said


@pytest.mark.parametrize(
    ("expected", "sentence"),
    [
        ({"GateMas": {"shape": "x"}}, "must name a component that is given. Got 'GateMas' instead. Did you mean"),
        ({"GateMass": {"shpe": "x"}}, "must name a law of GateMass. Got 'shpe' instead. Did you mean 'shape'?"),
        ({"GateMass": {"shape": ""}}, "shape must have a reason. Got none instead."),
    ],
)
def test_an_expected_failure_that_means_nothing_is_refused(expected: Any, sentence: str) -> None:
    with pytest.raises(PluginError) as caught:
        parametrize_with_checks([GateMass()], expected_failures=expected)
    assert sentence in str(caught.value)


@dataclass(frozen=True)
class Nothing:
    """Has no method."""


@pytest.mark.parametrize(
    ("component", "sentence"),
    [
        (GateMass, "GateMass: must be an instance, whose options are known. Got the class instead. Write GateMass()."),
        (Nothing(), "Nothing: must have the methods of one kind:"),
    ],
)
def test_what_is_no_component_is_refused(component: Any, sentence: str) -> None:
    with pytest.raises(PluginError) as caught:
        parametrize_with_checks([component])
    assert str(caught.value).startswith(sentence)


def test_without_pytest_the_kit_can_be_imported_and_says_what_is_missing() -> None:
    code = (
        "import sys; sys.modules['pytest'] = None\n"
        "from dernkit.testing import all_checks, parametrize_with_checks\n"
        "assert all_checks()\n"
        "try: parametrize_with_checks([])\n"
        "except Exception as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == (
        "dernkit.testing: parametrize_with_checks must have pytest. Got an environment without it instead. "
        "Install it with: pip install pytest"
    )


def test_pythons_own_generator_is_watched_where_no_type_checker_draws_from_it(tmp_path: Path) -> None:
    (tmp_path / "draws.py").write_text(
        "import random\nfrom tests.conformance.broken import *\n"
        "@dataclass(frozen=True)\nclass Draws:\n"
        "    name: ClassVar[str] = 'draws'\n    requires: ClassVar[frozenset[str]] = NOTHING\n"
        "    def score(self, bank, stats):\n        random.random()\n        return norms(bank)\n"
    )
    code = (
        "from draws import Draws\nfrom dernkit.testing import checks_of\n"
        "next(c for c in checks_of(Draws()) if c.id == 'global_randomness')(Draws())"
    )
    root = str(Path(__file__).parents[2])
    environment = {"PYTHONPATH": f"{tmp_path}:{root}", "PATH": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert "must leave the global random generators alone. Got that of random moved instead." in done.stderr


def test_a_component_that_keeps_the_laws_in_part_is_told_apart_by_its_options() -> None:
    expected = {"BrokenScorer(law=dtype)": {"dtype": "float32"}}
    marks = parametrize_with_checks([BrokenScorer("dtype"), BrokenScorer("shape")], expected_failures=expected).mark
    marked = [parameters.id for parameters in marks.args[1] if parameters.marks]
    assert marked == ["BrokenScorer(law=dtype)-dtype"]
