"""A profile says of every ratio what a run with that ratio makes, from one calibration and one layer in memory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dernkit.kernel.compress import compress_layer
from dernkit.kernel.layer_error import layer_error
from dernkit.models.store import Store
from dernkit.profiling import command
from dernkit.profiling.curve import Curve, Curves
from dernkit.progress import Silent
from dernkit.recipe import load_recipe
from dernkit.registry import Registry
from dernkit.stages.calibrate import load_stats
from dernkit.stages.plan import load_plan
from tests.laws.pipeline import source
from tests.unit.workbench import DERN, Workbench, dernkit, said, succeeded

ACTIVATION = {**DERN, "assign": {**DERN["assign"], "similarity": {"use": "activation-correlation"}}}  # type: ignore[dict-item]
"""Reads the sample, so that a run's statistics hold it."""
LINE = Curve(scale=0.1, power=1.0, typical=1.2, factor=2.0, highest=0.9, cells=40, left_out=1, spearman={"a": 0.9})
CURVES = Curves({"nats per token": LINE, "bits per byte": replace(LINE, scale=0.05)}, ("a",), "0123abc")


def profiled(bench: Workbench, *options: str) -> dict[str, Any]:
    result = succeeded(dernkit("profile", str(bench.recipe), "--model", str(bench.model), "--json", *options))
    return json.loads(result.stdout)


def tensor_bytes(folder: Path) -> int:
    return sum(tensor.nbytes for file in folder.glob("*.safetensors") for tensor in load_file(file).values())


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3"])
@pytest.mark.parametrize("merge", ["spherical-kmeans", "concatenate"])
def test_a_ratio_is_what_a_run_with_it_makes(tmp_path: Path, registry: Registry, family: str, merge: str) -> None:
    bench = Workbench(tmp_path, family)
    bench.write(assign=ACTIVATION["assign"], merge={"use": merge}, router="additive")
    model = bench.finish("plan.keep=0.5")
    half = next(ratio for ratio in profiled(bench)["ratios"] if ratio["share"] == 0.5)
    assert half["bytes"] == tensor_bytes(model)
    assert half["size"] == pytest.approx(half["bytes"] / tensor_bytes(bench.model))
    stats, how = load_stats(bench.out / "stats.safetensors"), load_recipe(bench.recipe, registry).apply
    store, blocks = source(bench.model).open(keep_dtypes=True)
    for block, plan in zip(blocks, load_plan(bench.out), strict=True):
        store.load(block.path)
        with torch.no_grad():
            args = (block.bank(), plan, how.merge, how.router, max(plan.pool_sizes()), 0, stats[plan.layer])
            compressed = compress_layer(*args) if merge == "concatenate" else compress_layer(*args[:4], plan.width, 0)
        error = layer_error(block.bank(), compressed, plan.kept, stats[plan.layer])
        assert half["error"]["layers"][str(plan.layer)] == pytest.approx(error, rel=1e-5)
    errors = half["error"]["layers"]
    assert half["error"]["mean"] == pytest.approx(sum(errors.values()) / len(errors))
    assert half["error"]["max"] == errors[str(half["error"]["worst_layer"])] == max(errors.values())


def test_without_ratios_all_that_the_router_allows_are_tried_and_fewer_experts_are_worse(tmp_path: Path) -> None:
    found = profiled(Workbench(tmp_path))["ratios"]
    assert [ratio["keep"] for ratio in found] == [7, 6, 5, 4, 3, 2]
    assert [ratio["experts"] for ratio in found] == [[keep, keep] for keep in (7, 6, 5, 4, 3, 2)]
    errors = [ratio["error"]["mean"] for ratio in found]
    assert errors == sorted(errors) and errors[0] > 0
    sizes = [ratio["bytes"] for ratio in found]
    assert sizes == sorted(sizes, reverse=True)


def test_many_counts_are_thinned_and_groups_are_respected(tmp_path: Path) -> None:
    many = profiled(Workbench(tmp_path / "many", num_local_experts=32))["ratios"]
    assert [ratio["keep"] for ratio in many] == [31, 27, 23, 19, 14, 10, 6, 2]
    groups = profiled(Workbench(tmp_path / "groups", "deepseek_v3"))["ratios"]
    assert [ratio["keep"] for ratio in groups] == [6, 4]


def test_all_experts_change_nothing(tmp_path: Path) -> None:
    bench = Workbench(tmp_path)
    bench.write(**DERN, router="additive")
    (ratio,) = profiled(bench, "--keep", "1.0")["ratios"]
    assert set(ratio["error"]["layers"].values()) == {0.0}
    assert ratio["bytes"] == tensor_bytes(bench.model)


def test_budgets_divide_every_ratio_as_in_a_run(tmp_path: Path) -> None:
    bench = Workbench(tmp_path)
    budget = ("--set", "plan.budget={use: global, normalise: sum}", "--set", "apply.export=dernkit")
    (ratio,) = profiled(bench, "--keep", "0.5", *budget)["ratios"]
    bench.finish("plan.keep=0.5", *(option for option in budget if option != "--set"))
    assert ratio["experts"] == [len(plan.kept) for plan in load_plan(bench.out)]
    assert ratio["share"] == sum(ratio["experts"]) / 16


def test_statistics_of_a_run_give_the_same_profile(tmp_path: Path) -> None:
    bench = Workbench(tmp_path)
    bench.write(**ACTIVATION)
    bench.finish()
    given = profiled(bench, "--keep", "6,4", "--statistics", str(bench.out / "stats.safetensors"))
    own = profiled(bench, "--keep", "6,4")
    for one, other in zip(given.pop("ratios"), own.pop("ratios"), strict=True):
        assert one.pop("error")["layers"] == pytest.approx(other.pop("error")["layers"], rel=1e-5)
        for unit, rise in one.pop("rise").items():
            assert rise == pytest.approx(other["rise"].pop(unit), rel=1e-5)
        assert not other.pop("rise") and one == other
    assert given == own


def test_one_layer_is_in_memory(tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Workbench(tmp_path, num_hidden_layers=4)
    bench.write(**ACTIVATION)
    bench.finish()
    loaded: list[str] = []
    most: list[int] = []
    load, unload = Store.load, Store.unload

    def counted(store: Store, prefix: str) -> None:
        loaded.append(prefix)
        most.append(len(loaded))
        load(store, prefix)

    monkeypatch.setattr(Store, "load", counted)
    monkeypatch.setattr(Store, "unload", lambda store, prefix: (loaded.remove(prefix), unload(store, prefix)))
    recipe, given = load_recipe(bench.recipe, registry), bench.out / "stats.safetensors"
    command.profile(recipe, "m", bench.model, registry, Silent(), given=given)
    assert max(most) == 1 and len(most) == 8 and not loaded


def test_without_a_curve_no_loss_is_predicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "load_curves", lambda: None)
    bench = Workbench(tmp_path)
    told = profiled(bench)
    assert told["safe"] is None and told["proxy"] is None and not any(ratio["rise"] for ratio in told["ratios"])
    assert told["sentence"].startswith("No loss is predicted: no curve has been fitted on testbeds here.")


def test_what_is_safe_is_the_smallest_whose_whole_range_is_within_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "load_curves", lambda: CURVES)
    bench = Workbench(tmp_path)
    found = profiled(bench)["ratios"]
    third = found[2]["error"]["mean"]
    told = profiled(bench, "--rise", f"{2.001 * 0.1 * third}")
    assert told["safe"] == 5
    expected = {"expected": 0.1 * third, "low": 0.05 * third, "high": 0.2 * third, "beyond_testbeds": False}
    assert told["ratios"][2]["rise"]["nats per token"] == pytest.approx(expected)
    assert told["ratios"][2]["rise"]["bits per byte"]["expected"] == pytest.approx(0.05 * third)
    assert "keep 5 (62% of all)" in told["sentence"] and "a proxy and no measurement" in told["sentence"]
    assert "Spearman correlation of 0.90 to 0.90" in told["sentence"]
    nothing = profiled(bench, "--rise", "0")
    assert nothing["safe"] is None and nothing["sentence"].startswith(
        "No ratio of this sweep is safe under a rise of 0"
    )
    low = replace(CURVES, by_unit={"nats per token": replace(LINE, highest=third * 0.99)})
    monkeypatch.setattr(command, "load_curves", lambda: low)
    beyond = profiled(bench, "--rise", "100")
    assert beyond["safe"] == 6 and beyond["ratios"][2]["rise"]["nats per token"]["beyond_testbeds"]


def test_the_table_has_a_row_for_each_ratio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "load_curves", lambda: CURVES)
    bench, file = Workbench(tmp_path), tmp_path / "profile.json"
    options = ["--keep", "0.75,4", "--out", str(file)]
    lines = succeeded(dernkit("profile", str(bench.recipe), "--model", str(bench.model), *options)).stdout.splitlines()
    assert "rise, nats per token" in lines[0] and "rise, bits per byte" in lines[0]
    assert [line.split()[:2] for line in lines[2:4]] == [["0.75", "6"], ["4", "4"]]
    told = json.loads(file.read_text())
    assert told["sentence"] == lines[-1]
    assert f"{told['ratios'][1]['error']['mean']:.3g}" in lines[3]
    assert not (tmp_path / "profile.json.partial").exists()


def test_a_model_that_cannot_route_again_has_no_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dernkit.profiling.sweep.layer_error", lambda *_: None)
    bench = Workbench(tmp_path)
    told = profiled(bench, "--keep", "4")
    assert told["ratios"][0]["error"] == {
        "mean": None,
        "max": None,
        "worst_layer": None,
        "layers": {"0": None, "1": None},
    }
    assert told["sentence"].startswith("No layer error, and so no loss")
    succeeded(dernkit("profile", str(bench.recipe), "--model", str(bench.model), "--keep", "4"))


REFUSALS = {
    ("--keep", "0.5,1.5"): "--keep: must be fractions above 0 up to 1.0 or counts of at least 1, with commas between "
    "them. Got '1.5' instead. Write 0.75,0.5 or 6,4.",
    ("--keep", "1"): "keep, layer 0: must be from 2 (what the router's top-k needs) to 8 of 8 experts. "
    "Got 1 instead. Use 2.",
    ("--set", "calibrate.sequential=true"): "calibrate.sequential: must be false to profile, as one calibration is for "
    "all ratios. Got true instead. Add --set calibrate.sequential=false.",
    (
        "--set",
        "calibrate.source.path=nowhere",
    ): f"calibrate.source: {Path('nowhere').resolve()} must exist. "
    "Got a path where nothing is instead. Correct the recipe, or override it with --set.",
}


@pytest.mark.parametrize("options", REFUSALS, ids=" ".join)
def test_what_cannot_be_profiled_is_refused(tmp_path: Path, options: tuple[str, str]) -> None:
    bench = Workbench(tmp_path)
    result = dernkit("profile", str(bench.recipe), "--model", str(bench.model), *options)
    assert said(result, 5 if options[1] == "1" else 2) == REFUSALS[options]


def test_tokens_are_needed(tmp_path: Path) -> None:
    bench = Workbench(tmp_path)
    bench.recipe.write_text("dernkit: 1\nplan: {keep: 0.5, score: {use: weight-norm}}\n")
    sentence = said(dernkit("profile", str(bench.recipe), "--model", str(bench.model)), 2)
    assert sentence.startswith("calibrate: must be given to profile")


def test_statistics_without_a_sample_are_refused(tmp_path: Path) -> None:
    bench = Workbench(tmp_path)
    bench.finish()
    file, again = bench.out / "stats.safetensors", f"dernkit profile {bench.recipe} --model {bench.model}"
    result = dernkit("profile", str(bench.recipe), "--model", str(bench.model), "--statistics", str(file))
    assert said(result, 5) == (
        f"command 'profile' reads sample: '{file}' must hold it. Got only gate_sum, routed instead. "
        f"Add it with: {again}"
    )


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    bench, file = Workbench(tmp_path), tmp_path / "nowhere" / "profile.json"
    options = ["--model", str(bench.model), "--keep", "4", "--out", str(file)]
    sentence = said(dernkit("profile", str(bench.recipe), *options), 2)
    assert sentence == (
        f"--out: must be a file that can be written. Got '{file}' (No such file or directory) instead. "
        "Choose another one."
    )
