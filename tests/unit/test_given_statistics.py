"""Calibrate once, try other recipes: planning from the statistics of another run, and what is refused there."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import Result

from dernkit.errors import CheckpointError
from dernkit.progress import Silent
from dernkit.recipe import load_recipe
from dernkit.registry import Registry
from dernkit.stages.calibrate import load_stats
from dernkit.stages.plan import plan_checkpoint
from tests.laws.pipeline import source
from tests.unit.workbench import DERN, Workbench, dernkit, edit_tensors, put_value, results, said, stages


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    """A finished run that prunes by gate mass."""
    bench = Workbench(tmp_path)
    bench.finish()
    return bench


def run(bench: Workbench, statistics: Path, out: str, *options: str) -> Result:
    settings = [word for option in options for word in ("--set", option)]
    place = ["--model", str(bench.model), "--out", str(bench.root / out), "--statistics", str(statistics)]
    return dernkit("run", str(bench.recipe), *place, *settings)


def refusal(bench: Workbench, statistics: Path, code: int, *options: str) -> str:
    """The sentence, after a look that nothing was made."""
    sentence = said(run(bench, statistics, "refused", *options), code)
    assert not (bench.root / "refused").exists()
    return sentence


def artifacts(out: Path) -> dict[str, str]:
    return {name: value for name, value in results(out).items() if name != "report.md"}


def test_another_recipe_is_planned_without_calibrating(bench: Workbench, tmp_path: Path) -> None:
    given = bench.out / "stats.safetensors"
    bench.write(**DERN)
    bench.text.unlink()  # it is not read
    assert stages(run(bench, given, "other")) == ["plan", "apply"]
    assert stages(run(bench, given, "other")) == []
    report = (tmp_path / "other/report.md").read_text()
    assert f"Calibration: 64 tokens, statistics of another run (`{given}`)." in report
    assert stages(run(bench, given, "other", "plan.keep=6")) == ["plan", "apply"]


def test_the_result_is_that_of_a_run_that_calibrates(bench: Workbench, tmp_path: Path) -> None:
    given = bench.out / "stats.safetensors"
    bench.write(**DERN)
    run(bench, given, "other")
    bench.out = tmp_path / "own"
    bench.finish()
    assert artifacts(tmp_path / "other") == artifacts(bench.out)


def test_a_statistic_that_is_lacking_is_named_with_the_command_that_adds_it(bench: Workbench, tmp_path: Path) -> None:
    given = bench.out / "stats.safetensors"
    assert refusal(bench, given, 5, "plan.score.use=reap") == (
        f"scorer 'reap' reads reap_sum: '{given}' must hold it. Got only gate_sum, routed instead. Add it with: "
        f"dernkit run {bench.recipe} --model {bench.model} --out {tmp_path / 'refused'}"
    )
    edit_tensors(given, lambda tensors: tensors.pop("layers.1.gate_sum"))
    assert refusal(bench, given, 5).startswith(f"scorer 'gate-mass' reads gate_sum: '{given}' must hold it.")


def test_statistics_of_another_model_are_refused(bench: Workbench) -> None:
    given = bench.out / "stats.safetensors"
    put_value(bench.model / "model.safetensors", "model.embed_tokens.weight", 0.5)
    assert refusal(bench, given, 5) == (
        f"--statistics: must be made from the model that is compressed. Got '{given}', made from another one, instead. "
        f"Leave out --statistics to calibrate."
    )


def test_sequential_statistics_belong_to_their_own_plan(bench: Workbench) -> None:
    given = bench.out / "stats.safetensors"
    assert refusal(bench, given, 2, "calibrate.sequential=true") == (
        "calibrate.sequential: statistics must be collected while the layers are compressed as this recipe says. "
        "Got --statistics with those of another run instead. Leave out one of the two."
    )
    bench.finish("calibrate.sequential=true")
    assert refusal(bench, given, 5) == (
        f"--statistics: must be made from the model as it is. Got '{given}', made while it was compressed as another "
        f"plan says, instead. Take those of a run without calibrate.sequential."
    )


def test_a_file_that_holds_no_statistics_is_refused(bench: Workbench, tmp_path: Path) -> None:
    nothing = tmp_path / "nothing.safetensors"
    assert refusal(bench, nothing, 5) == (
        f"--statistics: must be the stats.safetensors of a run. Got '{nothing}', where none is, instead."
    )
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((bench.out / "stats.safetensors").read_bytes()[:-9])
    for other in (bench.recipe, bench.out / "plan.safetensors", bench.model / "model.safetensors", cut):
        assert refusal(bench, other, 5) == (
            f"--statistics: must be the stats.safetensors of a run. Got '{other}', another file, instead."
        )


def test_a_plan_from_python_names_what_is_lacking(bench: Workbench, registry: Registry) -> None:
    bound = load_recipe(bench.recipe, registry, ["plan.score.use=reap"])
    stats = load_stats(bench.out / "stats.safetensors")
    with pytest.raises(CheckpointError) as caught:
        plan_checkpoint(source(bench.model), bound.plan, stats, Silent())
    assert str(caught.value) == (
        "scorer 'reap', layer 0: statistics must hold reap_sum, which it requires. Got gate_sum, routed instead. "
        "Collect them with the recipe that names it: dernkit run RECIPE --model MODEL --out OUT."
    )
