"""Sequential runs: statistics and plan are made together, again if and only if what they are made from has changed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml

from dernkit import run
from dernkit.errors import RecipeError
from dernkit.recipe import bind_recipe, load_recipe
from dernkit.registry import Registry
from dernkit.stages import sequential
from tests.unit.toy_components import plugin_of
from tests.unit.workbench import DERN, Workbench, hashes, results, stages

SEQUENTIAL = "calibrate.sequential=true"


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    """A finished sequential run of DERN."""
    bench = Workbench(tmp_path)
    bench.write(**DERN)
    assert stages(bench.run(SEQUENTIAL)) == ["calibrate", "apply"]
    return bench


def artifacts(out: Path) -> dict[str, str]:
    return {name: value for name, value in results(out).items() if name != "report.md"}


def test_a_change_to_what_decides_or_acts_calibrates_again(bench: Workbench) -> None:
    """One after the other in one directory; options add up."""
    assert stages(bench.run(SEQUENTIAL)) == []
    first = artifacts(bench.out)
    options = [SEQUENTIAL]
    for option, again in (
        ("plan.keep=6", ["calibrate", "apply"]),
        ("apply.router.use=additive", ["calibrate", "apply"]),
        ("report.use=markdown", []),
    ):
        options.append(option)
        assert stages(bench.run(*options)) == again, option
    assert stages(bench.run()) == ["calibrate", "plan", "apply"]
    at_once = artifacts(bench.out)
    assert stages(bench.run(SEQUENTIAL)) == ["calibrate", "apply"]
    assert artifacts(bench.out) == first
    assert at_once["stats.safetensors"] != first["stats.safetensors"]
    assert ", each layer on the outputs of the compressed layers before it." in (bench.out / "report.md").read_text()


def test_a_plan_that_is_lost_is_made_again_from_the_statistics(bench: Workbench) -> None:
    before = artifacts(bench.out)
    for name in ("plan.json", "plan.safetensors"):
        (bench.out / name).unlink()
        assert stages(bench.run(SEQUENTIAL)) == ["plan"], name
        assert artifacts(bench.out) == before


def test_statistics_that_are_lost_are_made_again_with_the_same_bytes(bench: Workbench) -> None:
    before = artifacts(bench.out)
    (bench.out / "stats.safetensors").unlink()
    assert stages(bench.run(SEQUENTIAL)) == ["calibrate"]
    assert artifacts(bench.out) == before


@pytest.mark.parametrize("moment", ["between layers", "before the plan"])
def test_a_run_that_is_killed_ends_with_the_same_bytes(
    bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def stop(*arguments: object) -> Any:
        raise KeyboardInterrupt

    expected = artifacts(bench.out)
    bench.out = tmp_path / "killed"
    with monkeypatch.context() as patch:
        if moment == "between layers":
            patch.setattr(sequential, "compressed", stop)
        else:
            patch.setattr(run.plan, "save_plan", stop)
        assert bench.run(SEQUENTIAL).exit_code == 130
    assert list(results(bench.out)) == (["stats.safetensors"] if moment == "before the plan" else [])
    first = "plan" if moment == "before the plan" else "calibrate"
    assert stages(bench.run(SEQUENTIAL)) == [first, "apply"]
    assert artifacts(bench.out) == expected


def test_a_plan_edited_into_no_json_is_refused_before_it_is_made_again(bench: Workbench) -> None:
    (bench.out / "plan.json").write_text("{")
    assert bench.refusal(5, SEQUENTIAL, "plan.keep=6").startswith(f"{bench.out}/plan.json: must be JSON.")


@dataclass(frozen=True)
class Looking:
    """Keeps more where scores are close."""

    name: ClassVar[str] = "looking"
    requires: ClassVar[frozenset[str]] = frozenset()
    needs_measures: ClassVar[bool] = True

    def measure(self, bank: Any, scores: Any, stats: Any) -> Any:
        return torch.zeros(1)

    def allocate(self, measures: Any, keep: Any, limits: Any) -> Any:
        return [limit.experts for limit in limits]


def test_a_budget_that_looks_at_all_layers_is_refused_with_its_line(bench: Workbench, tmp_path: Path) -> None:
    registry = Registry.load(entry_points=False)
    registry.register(plugin_of("dernkit_budgets", Looking), "mine")
    data = yaml.safe_load(bench.recipe.read_text())
    data["plan"]["budget"] = {"use": "looking"}
    assert not bind_recipe(data, registry).calibrate.sequential  # type: ignore[union-attr]
    data["calibrate"]["sequential"] = True
    place = tmp_path / "bad.yaml"
    place.write_text(yaml.safe_dump(data, sort_keys=False))
    line = 1 + place.read_text().split("\n").index("  sequential: true")
    with pytest.raises(RecipeError) as caught:
        load_recipe(place, registry)
    assert str(caught.value).replace(f"{tmp_path}/", "") == (
        f"1 problem in bad.yaml\nbad.yaml:{line}: calibrate.sequential: sequential needs a budget that knows its "
        f"counts before any layer has run. Got 'looking', which looks at all layers first, instead. Use "
        f"{{use: uniform}}, or leave out sequential."
    )


def test_a_source_of_several_shards_with_groups_and_dense_layers_runs_sequentially(tmp_path: Path) -> None:
    """Twice with the same bytes."""
    bench = Workbench(tmp_path, "deepseek_v3", num_hidden_layers=3, shard="40KB")
    bench.write(**DERN)
    assert stages(bench.run(SEQUENTIAL)) == ["calibrate", "apply"]
    first = hashes(bench.out / "model")
    bench.out = tmp_path / "again"
    bench.finish(SEQUENTIAL)
    assert hashes(bench.out / "model") == first
