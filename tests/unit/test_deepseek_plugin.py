"""The plugin for DeepSeek-MoE, installed into a fresh environment as a stranger would."""

import shutil
from pathlib import Path

import pytest

from tests.unit.environment import run, with_plugin

PLUGIN = Path(__file__).parents[2] / "plugins/dernkit-deepseek-moe"


@pytest.mark.slow
def test_the_plugins_own_tests_pass_where_it_is_installed(tmp_path: Path) -> None:
    python = with_plugin(tmp_path, PLUGIN)
    tests = shutil.copytree(PLUGIN / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    said = run(python, "-m", "pytest", "-p", "no:cacheprovider", tests, cwd=tmp_path)
    assert " passed" in said and "skipped" not in said
    listed = run(tmp_path / "env/bin/python", "-m", "dernkit", "plugins", cwd=tmp_path)
    assert any(line.split()[:3] == ["architecture", "deepseek", "dernkit-deepseek-moe"] for line in listed.splitlines())
