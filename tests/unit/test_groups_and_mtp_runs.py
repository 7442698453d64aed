"""What a run directory says of router groups and of multi-token-prediction layers, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.laws.mtp_checkpoints import KINDS, add, mtp_tensors
from tests.unit.workbench import Workbench, dernkit, edit_json, stages


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    """DeepSeek-V3 with two groups and an MTP layer."""
    bench = Workbench(tmp_path, "deepseek_v3", num_hidden_layers=3)
    add(bench.model, mtp_tensors(KINDS["deepseek"][0](), "deepseek", tmp_path / "scratch", fused=False))
    return bench


def test_inspect_names_mtp_layers_and_counts_their_experts(bench: Workbench) -> None:
    facts = json.loads(dernkit("inspect", str(bench.model), "--json").stdout)
    expert = 4 * 3 * 24 * 32
    assert (facts["mtp_layers"], facts["moe_layers"]) == (["model.layers.3.mlp"], 2)
    assert facts["expert_bytes"] == 8 * expert * 3
    text = dernkit("inspect", str(bench.model)).stdout
    assert f"MTP layers       {facts['mtp_bytes']:,} bytes, experts in model.layers.3.mlp\n" in text


def test_report_and_card_say_what_became_of_mtp_layers(bench: Workbench) -> None:
    bench.finish()
    report, card = (bench.out / "report.md").read_text(), (bench.out / "model/README.md").read_text()
    assert "Multi-token-prediction layers with experts (`model.layers.3.mlp`) got the plan of layer 2." in report
    assert "expert bytes fall by 50.0%" in report
    assert "\nIts multi-token-prediction layers use the plan of layer 2.\n" in card
    assert stages(bench.run("apply.mtp=drop")) == ["apply"]
    report, card = (bench.out / "report.md").read_text(), (bench.out / "model/README.md").read_text()
    assert "The multi-token-prediction layers were dropped." in report
    assert "\nIts multi-token-prediction layers are left out.\n" in card
    facts = json.loads(dernkit("inspect", str(bench.out / "model"), "--json").stdout)
    assert (facts["mtp_layers"], facts["mtp_bytes"]) == ([], 0)
    assert "MTP" not in dernkit("inspect", str(bench.out / "model")).stdout


def test_nothing_is_said_of_mtp_layers_that_are_not_there(tmp_path: Path) -> None:
    bench = Workbench(tmp_path)
    bench.finish()
    assert "prediction" not in (bench.out / "report.md").read_text() + (bench.out / "model/README.md").read_text()


def test_one_group_is_recorded_and_reported(bench: Workbench) -> None:
    bench.finish("plan.groups=collapse", "plan.keep=3")
    plan = json.loads((bench.out / "plan.json").read_text())
    lock = yaml.safe_load((bench.out / "recipe.lock.yaml").read_text())
    assert (plan["groups"], plan["recipe"]["groups"], lock["recipe"]["plan"]["groups"]) == ("collapse",) * 3
    assert "8 → 3 experts in 2 layers, router groups 2 → 1; " in (bench.out / "report.md").read_text()
    assert stages(bench.run("plan.groups=collapse", "plan.keep=3")) == []


def test_a_count_that_groups_forbid_is_refused_before_calibration(bench: Workbench) -> None:
    assert bench.refusal(5, "plan.keep=5").startswith("keep, layer 1: must be from 4")
    bench.finish("plan.keep=5", "plan.groups=collapse")


def test_a_plan_for_one_group_is_not_applied_to_two(bench: Workbench) -> None:
    bench.finish("plan.groups=collapse", "plan.keep=4")
    options = ("plan.groups=collapse", "plan.keep=4")
    edit_json(bench.out / "plan.json", lambda plan: plan["layers"]["1"].update(kept=[0, 1, 2, 4]))
    bench.finish(*options)
    edit_json(bench.out / "plan.json", lambda plan: plan.update(groups="respect"))
    assert bench.refusal(5, *options) == (
        "plan, layer 1: kept must be different experts from 0 to 7 in ascending order, as many from each group of 4. "
        "Got [0, 1, 2, 4] instead."
    )
    edit_json(bench.out / "plan.json", lambda plan: plan.update(groups="none"))
    assert "must be a plan with its plan.safetensors beside it. Got 'ValueError: " in bench.refusal(5, *options)
