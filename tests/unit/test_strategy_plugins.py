"""The strategy plugins, installed into fresh environments as a stranger would, run, and uninstalled again."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.unit.environment import run, with_plugin
from tests.unit.workbench import Workbench

PLUGINS = Path(__file__).parents[2] / "plugins"
# Distribution, components that it adds, its recipe, and what is missing once it is gone.
STRATEGIES = {
    "dernkit-hc-smoe": (["selector agglomerative"], "hc-smoe", "plan.select.use: unknown selector 'agglomerative'."),
    "dernkit-shape": (
        ["scorer coalition-shapley", "budget coverage"],
        "shape",
        "plan.score.use: unknown scorer 'coalition-shapley'.",
    ),
}
IGNORED = shutil.ignore_patterns("__pycache__")


@pytest.fixture(params=STRATEGIES, ids=str)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def python(name: str, tmp_path: Path) -> Path:
    """Python of an environment with the plugin."""
    return with_plugin(tmp_path / "fresh", PLUGINS / name)


def test_a_plugin_runs_its_recipe_and_without_it_the_recipe_names_what_is_missing(
    name: str, python: Path, tmp_path: Path
) -> None:
    components, recipe, missing = STRATEGIES[name]
    listed = run(python, "-m", "dernkit", "plugins", cwd=tmp_path).splitlines()
    assert [" ".join(line.split()[:2]) for line in listed if name in line.split()] == components
    bench = Workbench(tmp_path / "bench")
    short = ["calibrate.source.path=calib.txt", "calibrate.sequences=4", "calibrate.length=16"]
    settings = [word for setting in short for word in ("--set", setting)]
    file = PLUGINS / name / "recipes" / f"{recipe}.yaml"
    command = [python, "-m", "dernkit", "run", file, "--model", bench.model, "--out", bench.out, *settings]
    run(*command, cwd=bench.root)
    config = json.loads((bench.out / "model/config.json").read_text())
    assert config["num_local_experts"] == 4
    run(python, "-m", "pip", "uninstall", "--yes", "--quiet", "--disable-pip-version-check", name, cwd=tmp_path)
    gone = subprocess.run([*map(str, command)], cwd=bench.root, capture_output=True, text=True, check=False)
    assert gone.returncode == 2
    assert missing in gone.stderr and "Traceback" not in gone.stderr


@pytest.mark.slow
def test_a_plugins_own_tests_pass_where_it_is_installed(name: str, python: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(PLUGINS / name, tmp_path / "copy", ignore=IGNORED)
    next(copy.glob("*.py")).unlink()  # the installed module is the one to test
    said = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=copy)
    assert " passed" in said and "skipped" not in said


def test_a_plugin_imports_what_plugins_may(name: str) -> None:
    (module,) = (PLUGINS / name).glob("*.py")
    imports = [line.split()[1] for line in module.read_text().splitlines() if line.startswith(("import ", "from "))]
    own = [found for found in imports if found.split(".")[0] == "dernkit"]
    assert own and all(f"{found}.".startswith(("dernkit.api.", "dernkit.errors.", "dernkit.kernel.")) for found in own)
    assert len(module.read_text().splitlines()) <= 250
