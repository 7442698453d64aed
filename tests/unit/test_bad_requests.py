"""A good checkpoint and a request that cannot be met: one sentence, the right exit code, nothing made, nothing lost."""

from __future__ import annotations

import json
import math
from importlib import metadata
from pathlib import Path

import pytest
import torch

from dernkit.builtin.scorers import GateMass
from dernkit.kernel.statistics import Accumulator
from dernkit.registry import Registry
from dernkit.types import LayerStats
from tests.unit.workbench import Workbench, dernkit, is_said, put_value, results, said, stages

COUNTS = {
    "below top-k": (
        "mixtral",
        "1",
        "keep, layer 0: must be from 2 (what the router's top-k needs) to 8 of 8 experts. Got 1 instead. Use 2.",
    ),
    "above the count": (
        "mixtral",
        "9",
        "keep, layer 0: must be from 2 (what the router's top-k needs) to 8 of 8 experts. Got 9 instead. Use 8.",
    ),
    "fraction below top-k": (
        "mixtral",
        "0.1",
        "keep, layer 0: must be from 2 (what the router's top-k needs) to 8 of "
        "8 experts. Got 0.1 (1 of 8) instead. Use 2.",
    ),
    "between multiples of the groups": (
        "deepseek_v3",
        "5",
        "keep, layer 1: must be from 4 (what the router's top-k "
        "needs) to 8 of 8 experts in steps of 2 (the router's groups). Got 5 instead. "
        "Use 4 or 6.",
    ),
    "fraction between multiples": (
        "deepseek_v3",
        "0.6",
        "keep, layer 1: must be from 4 (what the router's top-k "
        "needs) to 8 of 8 experts in steps of 2 (the router's groups). Got 0.6 (5 of 8) "
        "instead. Use 4 or 6.",
    ),
}


@pytest.mark.parametrize("case", COUNTS)
def test_a_count_that_the_router_does_not_allow_is_refused_with_the_nearest_that_it_does(tmp_path: Path, case: str):
    family, keep, sentence = COUNTS[case]
    assert Workbench(tmp_path, family).refusal(5, f"plan.keep={keep}") == sentence


REQUESTS = {
    "text shorter than one sequence": (
        2,
        ["calibrate.length=1000"],
        "calibrate.source: text must give at least one sequence of 1000 tokens. Got 200 tokens instead. "
        "Use a longer text or a smaller length.",
    ),
    "fewer sequences than asked for": (
        2,
        ["calibrate.sequences=100"],
        "calibrate.source: text must give 100 sequences of 16 tokens. Got 12 instead. Use a longer text or lower "
        "sequences to 12.",
    ),
    "calibration file that is not there": (
        2,
        ["calibrate.source.path=none.txt"],
        "calibrate.source: {here}/none.txt must exist. Got a path where nothing is instead. Correct the recipe, or "
        "override it with --set.",
    ),
    "held-out file that is not there": (
        2,
        ["evaluate=[{use: perplexity, path: none.txt}]"],
        "evaluate.0: {here}/none.txt must exist. Got a path where nothing is instead. Correct the recipe, or override "
        "it with --set.",
    ),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_text_that_is_missing_or_short_is_refused_before_anything_is_made(tmp_path: Path, case: str) -> None:
    code, options, sentence = REQUESTS[case]
    assert Workbench(tmp_path).refusal(code, *options) == sentence.format(here=Path.cwd())


MODELS = {
    "hub id that cannot be reached": (
        "nobody/such-model",
        "--model: must be a directory or a hub id that can be reached. Got 'nobody/such-model' instead (…",
    ),
    "no hub id": (
        "a/b/c",
        "--model: must be a directory or a hub id that can be reached. Got 'a/b/c' instead (…",
    ),
    "path where nothing is": (
        "./nothing",
        "--model: must be a directory or a hub id. Got './nothing', which is neither, instead.",
    ),
    "file": (
        __file__,
        f"--model: must be a directory or a hub id. Got '{__file__}', which is neither, instead.",
    ),
}


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("command", ["run", "eval", "inspect"])
def test_a_model_that_cannot_be_found_is_refused(tmp_path: Path, case: str, command: str) -> None:
    model, sentence = MODELS[case]
    bench = Workbench(tmp_path)
    bench.write(evaluate=[{"use": "perplexity", "path": "calib.txt"}])
    arguments = {
        "run": [str(bench.recipe), "--model", model, "--out", str(bench.out)],
        "eval": [str(bench.recipe), "--model", model],
        "inspect": [model],
    }
    assert is_said(said(dernkit(command, *arguments[command]), 5), sentence)
    assert not bench.out.exists()


@pytest.mark.parametrize("broken", [False, True])
def test_calibration_without_a_tokenizer_is_refused(tmp_path: Path, broken: bool) -> None:
    bench = Workbench(tmp_path)
    for file in bench.model.glob("token*"):
        file.write_text("{") if broken else file.unlink()
    sentence = f"{bench.model}: must hold a tokenizer that transformers can load. Got '…"
    assert is_said(bench.refusal(5), sentence)


FAULTY = """\
dernkit: 1
calibrate: {source: {use: text-file, path: calib.txt}, sequences: 4, length: 16}
plan:
  keep: 0.5
  score: {use: reep}
  assign:
    use: affinity
    treshold: 0.6
aply: {merge: {use: spherical-kmeans}}
apply: {merge: {use: spherical-kmeans}}
"""


@pytest.mark.parametrize("command", ["validate", "run", "eval"])
def test_every_fault_of_a_recipe_is_printed_with_its_line(tmp_path: Path, command: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(FAULTY)
    bench = Workbench(tmp_path)
    places = {"validate": [], "eval": ["--model", str(bench.model)]}
    places["run"] = [*places["eval"], "--out", str(bench.out)]
    result = dernkit(command, str(file), *places[command])
    installed = ", ".join(Registry.load(entry_points=False).names("scorer"))
    assert (result.exit_code, result.stdout, bench.out.exists()) == (2, "", False)
    assert result.stderr.splitlines() == [
        f"3 problems in {file}",
        f"{file}:5: plan.score.use: unknown scorer 'reep'. Did you mean 'reap'? Installed: {installed}.",
        f"{file}:8: plan.assign.treshold: 'affinity' has no option 'treshold'. Did you mean 'threshold'?",
        f"{file}:9: aply: a recipe has no key 'aply'. Did you mean 'apply'?",
    ]


def test_evaluating_nothing_is_refused(tmp_path: Path) -> None:
    bench = Workbench(tmp_path)
    sentence = f"{bench.recipe}: evaluate: must list at least one evaluator. Got none instead."
    assert said(dernkit("eval", str(bench.recipe), "--model", str(bench.model)), 2) == sentence


def test_a_component_that_breaks_its_contract_ends_the_run_and_statistics_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Workbench(tmp_path)
    nothing = torch.full((8,), math.nan, dtype=torch.float64)
    monkeypatch.setattr(GateMass, "score", lambda self, bank, stats: nothing)
    assert said(bench.run(), 4) == (
        f"plugin 'dernkit.builtin.scorers' (dernkit {metadata.version('dernkit')}), scorer 'gate-mass', layer 0: score "
        "must be finite, also for an expert that saw no token (law finite). Got nan at [0] instead. Divide by no "
        "count, weight or norm of 0."
    )
    assert results(bench.out).keys() == {"stats.safetensors"}
    monkeypatch.undo()
    assert stages(bench.run()) == ["plan", "apply"]


def test_an_expert_that_saw_no_token_is_named_and_its_score_is_finite(tmp_path: Path) -> None:
    bench = Workbench(tmp_path, "deepseek_v3")
    put_value(bench.model / "model.safetensors", "model.layers.1.mlp.gate.e_score_correction_bias", -100.0)
    bench.finish()
    layer = json.loads((bench.out / "plan.json").read_text())["layers"]["1"]
    assert layer["unrouted"] == [3] and 3 not in layer["kept"]
    assert all(math.isfinite(score) for score in layer["scores"])
    row = next(line for line in (bench.out / "report.md").read_text().splitlines() if line.startswith("| 1 | "))
    assert row.endswith("| 3 |")


def test_a_statistic_that_is_not_finite_is_named(tmp_path: Path) -> None:
    bench = Workbench(tmp_path)
    bench.finish()
    put_value(bench.out / "stats.safetensors", "layers.1.gate_sum", float("nan"))
    assert bench.refusal(5) == (
        f"{bench.out}/stats.safetensors: statistics must be finite. Got NaN or infinity in 'layers.1.gate_sum' "
        f"instead. Delete the file and run again."
    )


def test_statistics_that_overflow_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Workbench(tmp_path)
    monkeypatch.setattr(Accumulator, "stats", lambda self: LayerStats(4, {"routed": torch.full((8,), math.inf)}))
    assert bench.refusal(5) == (
        "statistics: must be finite. Got NaN or infinity in 'layers.0.routed' instead. The model overflows "
        "on this text: set 'dtype' in config.json to float32, or take other text."
    )
