"""The commands: what they print, and what they leave behind."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import patch

import jsonschema
import pytest
import yaml
from click.testing import CliRunner

from dernkit.builtin.reports import Markdown
from dernkit.cli import main
from dernkit.errors import PluginError
from dernkit.models.folder import SOURCE_CARD
from dernkit.registry import Registry
from dernkit.testing.checkpoints import FAMILIES
from tests.unit.workbench import DERN, Workbench, dernkit, said

COMMANDS = sorted(main.commands)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    """A whole DERN run with an evaluation."""
    bench = Workbench(tmp_path_factory.mktemp("run"))
    (bench.model / "README.md").write_text("the source's card")
    bench.write(**DERN, router="additive", evaluate=[{"use": "perplexity", "path": "calib.txt", "length": 64}])
    result = bench.run()
    assert (result.exit_code, result.stdout) == (
        0,
        f"report: {bench.out}/report.md\nmodel:  {bench.out}/model\n",
    ), result.stderr
    assert [line.partition(":")[0] for line in result.stderr.splitlines()] == [
        "calibrate",
        "plan",
        "apply",
        "evaluate before",
        "evaluate after",
    ]
    return bench


def test_a_run_leaves_its_artifacts_and_nothing_else(finished: Workbench) -> None:
    assert {file.name for file in finished.out.iterdir()} == {
        ".lock",
        "eval.json",
        "model",
        "plan.json",
        "plan.safetensors",
        "recipe.lock.yaml",
        "report.md",
        "run.json",
        "stats.safetensors",
    }
    assert {file.name for file in (finished.out / "model").iterdir()} == {
        "README.md",
        SOURCE_CARD,
        "config.json",
        "dernkit.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_the_report_says_what_was_done_and_what_it_did(finished: Workbench) -> None:
    text = (finished.out / "report.md").read_text()
    headings = [line for line in text.splitlines() if line.startswith("#")]
    sections = ["## Size", "## Before and after", "## Layers", "## Stages", "## How it was made"]
    assert headings == ["# out", *sections]
    assert "8 → 4 experts in 2 layers; expert bytes fall by 50.0%." in text
    assert "| calib/perplexity | " in text
    assert "`perplexity` (199 tokens)" in text
    assert "Calibration: 64 tokens." in text
    assert "| 0 | " in text and "| 1 | " in text
    stages = text[text.index("## Stages") : text.index("## How")].splitlines()
    assert [line.split(" | ")[0] for line in stages if line.startswith("| ")] == [
        "| stage",
        "| calibrate",
        "| plan",
        "| apply",
        "| evaluate",
    ]


def test_the_lock_names_every_component_with_its_version(finished: Workbench) -> None:
    lock = yaml.safe_load((finished.out / "recipe.lock.yaml").read_text())
    components = {(item["kind"], item["name"]): item for item in lock["components"]}
    assert components.keys() == {
        ("adapter", "universal"),
        ("assigner", "affinity"),
        ("budget", "uniform"),
        ("evaluator", "perplexity"),
        ("merge", "spherical-kmeans"),
        ("report", "markdown"),
        ("router", "additive"),
        ("scorer", "gate-mass"),
        ("selector", "top-score"),
        ("similarity", "cosine"),
        ("source", "text-file"),
    }
    assert all(item["distribution"] == "dernkit" and item["version"] for item in components.values())
    assert lock["versions"].keys() == {"dernkit", "torch", "transformers", "safetensors"}
    assert lock["model"]["name"] == str(finished.model)
    assert lock["recipe"]["plan"]["budget"] == {"use": "uniform"}


def test_the_evaluation_holds_both_models_metrics(finished: Workbench) -> None:
    metrics = json.loads((finished.out / "eval.json").read_text())
    assert metrics["before"].keys() == metrics["after"].keys() == {"0:perplexity"}
    assert metrics["before"]["0:perplexity"]["calib/tokens"] == 199
    assert metrics["before"]["0:perplexity"]["calib/loss"] != metrics["after"]["0:perplexity"]["calib/loss"]


def test_the_model_card_tells_its_origin_and_no_path(finished: Workbench) -> None:
    card = (finished.out / "model/README.md").read_text()
    plan = json.loads((finished.out / "plan.json").read_text())["layers"]
    assert "# source, 4 of 8 experts" in card
    assert all(f"| {layer} | {', '.join(map(str, item['kept']))} |" in card for layer, item in plan.items())
    assert str(finished.root) not in card
    assert (finished.out / "model" / SOURCE_CARD).read_text() == "the source's card"


def test_report_prints_the_report(finished: Workbench) -> None:
    result = dernkit("report", str(finished.out))
    assert (result.exit_code, result.stdout) == (0, (finished.out / "report.md").read_text() + "\n")


def test_there_is_no_report_of_an_unfinished_run(tmp_path: Path) -> None:
    assert said(dernkit("report", str(tmp_path)), 5) == (
        f"{tmp_path}: must be the directory of a finished run. Got no report instead. "
        f"Finish it with: dernkit run RECIPE --model MODEL --out {tmp_path}"
    )


def test_eval_prints_what_the_run_measured(finished: Workbench) -> None:
    measured = json.loads((finished.out / "eval.json").read_text())
    for name, path in (("before", finished.model), ("after", finished.out / "model")):
        result = dernkit("eval", str(finished.recipe), "--model", str(path))
        assert (result.exit_code, json.loads(result.stdout)) == (0, measured[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_inspect_describes_every_family(tmp_path: Path, family: str) -> None:
    bench = Workbench(tmp_path, family)
    facts = json.loads(dernkit("inspect", str(bench.model), "--json").stdout)
    grouped = family in ("deepseek_v2_groups", "deepseek_v3")
    dense = not family.startswith(("mixtral", "olmoe"))
    assert (facts["family"], facts["experts"], facts["top_k"]) == (family.removesuffix("_groups"), 8, 2)
    assert (facts["width"], facts["hidden"], facts["groups"]) == (24, 32, 2 if grouped else 1)
    assert facts["layers"] == ([1] if dense else [0, 1])
    assert facts["bytes"] == 4 * facts["parameters"] and facts["dtypes"] == ["F32"]
    assert facts["expert_bytes"] == 4 * 3 * 8 * 24 * 32 * len(facts["layers"])
    result = dernkit("inspect", str(bench.model))
    lines = {line[:16].strip(): line[17:] for line in result.stdout.splitlines()}
    assert (result.exit_code, result.stderr) == (0, "")
    assert lines["experts"] == "8 per layer, top-2"
    assert lines["groups"] == ("2, a token uses 1; keep a multiple of 2" if grouped else "none")
    assert lines["parameters"] == f"{facts['parameters']:,}"
    assert lines["smallest keep"] == f"{facts['smallest_keep']} of 8 experts"


def test_plugins_lists_every_component_with_its_place() -> None:
    listed = json.loads(dernkit("plugins", "--json").stdout)
    assert listed["problems"] == []
    rows = {(row["kind"], row["name"]): row for row in listed["components"]}
    assert rows["report", "markdown"]["summary"] == (Markdown.__doc__ or "").strip().splitlines()[0]
    assert rows["scorer", "gate-mass"]["source"].startswith("scorers.py:")
    text = dernkit("plugins").stdout
    assert len(text.splitlines()) == len(rows)
    assert all(row["name"] in text and row["summary"] in text for row in rows.values())


def test_a_plugin_that_cannot_be_used_is_listed_with_its_exit_code() -> None:
    broken = Registry()
    broken.problems.append(PluginError("plugin 'mine' (mine 1.0) must be importable. Got SyntaxError instead."))
    with patch("dernkit.registry.Registry.load", return_value=broken):
        result = CliRunner().invoke(main, ["plugins"])
        listed = CliRunner().invoke(main, ["plugins", "--json"])
    assert (result.exit_code, result.stderr) == (3, f"{broken.problems[0]}\n")
    assert (listed.exit_code, json.loads(listed.stdout)["problems"]) == (3, [str(broken.problems[0])])


def test_validate_prints_the_recipe_with_its_defaults(tmp_path: Path) -> None:
    bench = Workbench(tmp_path)
    result = dernkit("validate", str(bench.recipe), "--set", "plan.keep=6", "--set", "seed=3")
    printed = yaml.safe_load(result.stdout)
    assert (result.exit_code, printed["plan"]["keep"], printed["seed"]) == (0, 6, 3)
    assert printed["calibrate"]["batch_size"] == 8
    assert result.stdout.splitlines()[-1] == "# valid; collects gate_sum"
    bench.recipe.write_text(result.stdout)
    assert dernkit("validate", str(bench.recipe)).stdout == result.stdout


def test_schema_prints_what_valid_recipes_satisfy(tmp_path: Path) -> None:
    schema = json.loads(dernkit("schema").stdout)
    jsonschema.validate(yaml.safe_load(Workbench(tmp_path).recipe.read_text()), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"dernkit": 1}, schema)


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_every_command_has_help(command: str | None) -> None:
    short, long = (dernkit(*([command] if command else []), flag) for flag in ("-h", "--help"))
    assert (long.exit_code, short.stdout) == (0, long.stdout)
    callback = main if command is None else main.commands[command]
    assert (callback.help or "").splitlines()[0] in " ".join(long.stdout.split())


USAGE = {
    "no arguments": (["run"], "Missing argument 'RECIPE'."),
    "no model": (["run", "r.yaml", "--out", "x"], "Missing option '--model'."),
    "unknown option": (["plugins", "--bogus"], "No such option '--bogus'."),
    "unknown command": (["rnu"], "No such command 'rnu'."),
}


@pytest.mark.parametrize("case", USAGE)
def test_usage_errors_are_clicks_own(case: str) -> None:
    arguments, words = USAGE[case]
    result = dernkit(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr and result.stderr.startswith("Usage: ")
