"""A stage runs again if and only if what it is made from has changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.unit.workbench import DERN, TEXT, Workbench, edit_json, hashes, is_said, put_value, stages

ALL = ["calibrate", "plan", "apply", "evaluate"]
EVALUATE = [{"use": "perplexity", "path": "heldout.txt", "length": 64}]


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    """A finished run that prunes and evaluates."""
    bench = Workbench(tmp_path)
    (tmp_path / "heldout.txt").write_text(TEXT[:300])
    bench.write(evaluate=EVALUATE)
    bench.finish()
    return bench


def times(folder: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file() and file.name != ".lock"}


def test_the_same_command_again_writes_nothing(bench: Workbench) -> None:
    before = times(bench.out)
    assert stages(bench.run()) == []
    assert times(bench.out) == before


def reverse(file: Path) -> None:
    file.write_text(" ".join(reversed(file.read_text().split())))


Change = Callable[[Workbench], object]
CHANGES: dict[str, tuple[Change, list[str], list[str]]] = {
    "where segments go": (lambda bench: bench.write(**DERN, evaluate=EVALUATE), [], ["plan", "apply", "evaluate"]),
    "how segments are merged": (lambda bench: None, ["apply.merge.use=weighted-average"], ["apply", "evaluate"]),
    "the router": (lambda bench: None, ["apply.router.use=additive"], ["apply", "evaluate"]),
    "how many stay": (lambda bench: None, ["plan.keep=6"], ["plan", "apply", "evaluate"]),
    "the evaluation": (lambda bench: None, ["evaluate.0.length=32"], ["evaluate"]),
    "nothing": (lambda bench: None, [], []),
    "the seed": (lambda bench: None, ["seed=1"], ALL),
    "calibration text": (lambda bench: reverse(bench.text), [], ALL),
    "held-out text": (lambda bench: reverse(bench.root / "heldout.txt"), [], ["evaluate"]),
    "a weight": (
        lambda bench: put_value(bench.model / "model.safetensors", "model.embed_tokens.weight", 0.5),
        [],
        ALL,
    ),
    "the tokenizer": (
        lambda bench: edit_json(bench.model / "tokenizer_config.json", lambda data: data.update(note="new")),
        [],
        ALL,
    ),
    "a file beside the weights": (
        lambda bench: (bench.model / "LICENSE").write_text("terms"),
        [],
        ["apply", "evaluate"],
    ),
}


def test_a_change_reaches_what_is_made_from_it_and_nothing_else(bench: Workbench) -> None:
    """One after the other in one directory; options add up."""
    options: list[str] = []
    for what, (change, option, again) in CHANGES.items():
        change(bench)
        options += option
        assert stages(bench.run(*options)) == again, what


LOST = {
    "stats.safetensors": ["calibrate"],
    "plan.json": ["plan"],
    "plan.safetensors": ["plan"],
    "eval.json": ["evaluate"],
    "model": ["apply"],
    "model/model.safetensors": ["apply"],
    "model/tokenizer.json": ["apply"],
    "model/dernkit.json": ["apply"],
    "report.md": [],
    "recipe.lock.yaml": [],
    "run.json": [],
}


def test_what_is_lost_or_cut_is_made_again_as_it_was(bench: Workbench) -> None:
    """One after the other in one directory; record and report hold times, so they are not compared."""
    before = hashes(bench.out)
    for name, again in LOST.items():
        place = bench.out / name
        if place.is_dir():
            shutil.rmtree(place)
        elif name == "model/model.safetensors":
            place.write_bytes(place.read_bytes()[:-1])
        else:
            place.unlink()
        assert stages(bench.run()) == again, name
        after = hashes(bench.out)
        timeless = before.keys() - {"run.json", "report.md"}
        assert {file: after[file] for file in timeless} == {file: before[file] for file in timeless}, name
    assert (bench.out / "report.md").exists()


def kept(plan: Path, layer: int) -> list[int]:
    return json.loads(plan.read_text())["layers"][str(layer)]["kept"]


def swap(plan: Path, layer: int) -> list[int]:
    """Let the first expert go and a dropped one stay."""
    old = kept(plan, layer)
    new = sorted([*old[1:], min({*range(8)} - {*old})])
    edit_json(plan, lambda data: data["layers"][str(layer)].update(kept=new))
    return new


def test_an_expert_swapped_by_hand_is_the_one_that_stays(bench: Workbench) -> None:
    plan = bench.out / "plan.json"
    new, text = swap(plan, 1), plan.read_text()
    assert stages(bench.run()) == ["apply", "evaluate"]
    assert plan.read_text() == text
    source, result = (load_file(folder / "model.safetensors") for folder in (bench.model, bench.out / "model"))
    name = "model.layers.1.block_sparse_moe.experts.{}.w1.weight"
    for position, expert in enumerate(new):
        assert torch.equal(result[name.format(position)], source[name.format(expert)])
    assert f"| 1 | {', '.join(map(str, new))} |" in (bench.out / "report.md").read_text()


ORDER = "plan, layer 1: kept must be different experts from 0 to 7 in ascending order. Got {kept} instead."
EDITS: dict[str, tuple[Any, str]] = {
    "an expert twice": ([0, 0, 1, 2], ORDER),
    "out of order": ([3, 2, 1, 0], ORDER),
    "one too high": ([0, 1, 2, 8], ORDER),
    "words": (["0", "1", "2", "3"], "{out}/plan.json: must be a plan with its plan.safetensors beside it. Got '…"),
    "halves": ([0.5, 1, 2, 3], "{out}/plan.json: must be a plan with its plan.safetensors beside it. Got '…"),
    "no list": (4, "{out}/plan.json: must be a plan with its plan.safetensors beside it. Got '…"),
}


def test_a_plan_edited_into_what_cannot_be_done_is_refused_and_stays(bench: Workbench) -> None:
    plan = bench.out / "plan.json"
    for case, (experts, words) in EDITS.items():
        edit_json(plan, lambda data, experts=experts: data["layers"]["1"].update(kept=experts))
        assert is_said(bench.refusal(5), words.format(out=bench.out, kept=experts)), case
    plan.write_text(plan.read_text()[:-3])
    sentence = bench.refusal(5)
    assert sentence.startswith(f"{plan}: must be JSON. Got '")
    assert sentence.endswith("instead. Correct it, or delete it to plan again.")


def test_experts_between_which_segments_move_cannot_be_swapped_by_hand(tmp_path: Path) -> None:
    bench = Workbench(tmp_path)
    bench.write(**DERN)
    bench.finish()
    old = kept(bench.out / "plan.json", 0)
    new = swap(bench.out / "plan.json", 0)
    assert bench.refusal(5) == (
        f"plan.json, layer 0: kept must be {old}, for which the moves in plan.safetensors were made. Got {new} "
        f"instead. Undo the edit, or plan without plan.assign: there kept can be edited."
    )


def test_groups_stay_equally_large_when_a_plan_is_edited(tmp_path: Path) -> None:
    bench = Workbench(tmp_path, "deepseek_v3")
    bench.finish()
    edit_json(bench.out / "plan.json", lambda data: data["layers"]["1"].update(kept=[0, 1, 2, 4]))
    assert bench.refusal(5) == (
        "plan, layer 1: kept must be different experts from 0 to 7 in ascending order, as many from each group of 4. "
        "Got [0, 1, 2, 4] instead."
    )
