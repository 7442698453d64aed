"""Run directories whose layers keep different numbers of experts: first lines, cards, evaluation, kills."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from dernkit.stages import apply
from tests.unit.workbench import DERN, Workbench, dernkit, edit_json, hashes, said, stages, succeeded

GLOBAL = ("plan.budget={use: global, normalise: none}", "plan.keep=0.6")
HELDOUT = {"use": "perplexity", "path": "calib.txt", "length": 32}


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    bench = Workbench(tmp_path_factory.mktemp("uneven"), num_hidden_layers=3)
    bench.write(evaluate=[HELDOUT])
    bench.finish(*GLOBAL)
    return bench


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    bench = Workbench(tmp_path_factory.mktemp("padded"), "gpt_oss", num_hidden_layers=3)
    bench.write(evaluate=[HELDOUT])
    bench.finish(*GLOBAL)
    return bench


def counts(bench: Workbench) -> list[int]:
    plan = json.loads((bench.out / "plan.json").read_text())
    found = [len(layer["kept"]) for layer in plan["layers"].values()]
    assert len(set(found)) > 1 and sum(found) == int(0.6 * 8 * 3)
    return found


def first_lines(bench: Workbench) -> tuple[str, str]:
    report = (bench.out / "report.md").read_text().split("\n")[0]
    card = (bench.out / "model/README.md").read_text().split("\n\n")[1].split("\n")[0]
    return report, card


def test_the_first_line_says_who_can_load_it(uneven: Workbench, padded: Workbench, tmp_path: Path) -> None:
    least, most = min(counts(uneven)), max(counts(uneven))
    sentence = f"Loads with `dernkit.load_model` only: {least} to {most} experts a layer."
    assert first_lines(uneven) == (sentence, sentence)
    least, most = min(counts(padded)), max(counts(padded))
    start = (
        f"Loads in any runtime: {least} to {most} experts a layer, padded to {most} with experts that are never chosen"
    )
    report, card = first_lines(padded)
    assert report.startswith(start) and report.endswith(" bytes of zeros.") and card == start + "."
    even = Workbench(tmp_path)
    even.finish()
    assert first_lines(even) == ("Loads in any runtime: one count (4) in every layer.",) * 2


def test_the_report_says_what_padding_costs(padded: Workbench) -> None:
    report = (padded.out / "report.md").read_text().split("\n")[0]
    most, lacking = max(counts(padded)), 3 * max(counts(padded)) - sum(counts(padded))
    with safe_open(padded.out / "model/model.safetensors", "pt") as file:
        sizes = [file.get_tensor(name).nbytes for name in file.keys() if ".experts." in name]  # noqa: SIM118
    assert f", {sum(sizes) * lacking // (3 * most):,} bytes of zeros." in report


def test_uneven_results_are_inspected_and_evaluated(uneven: Workbench) -> None:
    least, most = min(counts(uneven)), max(counts(uneven))
    lines = succeeded(dernkit("inspect", str(uneven.out / "model"))).stdout
    assert f"experts          {least} to {most} per layer, top-2" in lines
    evaluation = json.loads((uneven.out / "eval.json").read_text())
    measured = json.loads(succeeded(dernkit("eval", str(uneven.recipe), "--model", str(uneven.out / "model"))).stdout)
    assert measured == evaluation["after"] != evaluation["before"]
    again = dernkit(
        "run", str(uneven.recipe), "--model", str(uneven.out / "model"), "--out", str(uneven.root / "again")
    )
    assert "must have the same number of experts to be compressed" in said(again, 5)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_killed_and_resumed_run_writes_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    bench = Workbench(tmp_path, family, num_hidden_layers=3)
    bench.write(**DERN)
    whole = hashes(bench.finish(*GLOBAL))
    counts(bench)
    bench.out = tmp_path / "killed"
    compress_layer, done = apply.compress_layer, []

    def stop_at_second(bank, plan, *arguments):  # type: ignore[no-untyped-def]
        if done:
            raise KeyboardInterrupt
        done.append(plan.layer)
        return compress_layer(bank, plan, *arguments)

    monkeypatch.setattr(apply, "compress_layer", stop_at_second)
    assert bench.run(*GLOBAL).exit_code == 130
    monkeypatch.undo()
    assert stages(bench.run(*GLOBAL)) == ["apply"]
    assert hashes(bench.out / "model") == whole


def test_padding_that_is_impossible_is_refused_before_anything_starts(tmp_path: Path) -> None:
    bench = Workbench(tmp_path)
    sentence = bench.refusal(2, *GLOBAL, "apply.export=padded")
    assert sentence.startswith("apply.export: 'padded' needs routers with a bias") and "'dernkit'" in sentence


def test_reconstruction_aware_finds_its_sample(tmp_path: Path) -> None:
    bench = Workbench(tmp_path, num_hidden_layers=3)
    bench.finish("plan.budget={use: reconstruction-aware, points: 4}", "plan.keep=0.6", "calibrate.sample=64")
    plan = json.loads((bench.out / "plan.json").read_text())
    assert sum(len(layer["kept"]) for layer in plan["layers"].values()) == 14


def test_a_plan_edited_to_different_counts_is_carried_out(tmp_path: Path) -> None:
    bench = Workbench(tmp_path)
    bench.finish()
    edit_json(bench.out / "plan.json", lambda data: data["layers"]["1"].update(kept=[0, 1, 2]))
    bench.finish()
    sentence = "Loads with `dernkit.load_model` only: 3 to 4 experts a layer."
    assert first_lines(bench) == (sentence, sentence)
