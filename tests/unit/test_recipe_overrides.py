"""``--set dotted.path=value``: what it changes and what it says."""

from pathlib import Path

import pytest

from dernkit.recipe import Recipe, load_recipe
from tests.unit.toy_components import RECIPE, problems, toy_registry


def load(folder: Path, *overrides: str, more: str = "") -> Recipe:
    path = folder / "good.yaml"
    path.write_text(RECIPE + more)
    return load_recipe(path, toy_registry(), overrides)


def test_an_override_replaces_a_value_and_is_parsed_as_yaml(tmp_path: Path) -> None:
    recipe = load(tmp_path, "plan.keep=3", "plan.assign.threshold=1e-1", "seed=7")
    assert (recipe.plan.keep, recipe.plan.assigner.threshold, recipe.seed) == (3, 0.1, 7)


def test_groups_and_mtp_layers_are_options(tmp_path: Path) -> None:
    recipe = load(tmp_path, "plan.groups=collapse", "apply.mtp=drop")
    assert (recipe.plan.groups, recipe.apply.mtp) == ("collapse", "drop")
    assert (load(tmp_path).plan.groups, load(tmp_path).apply.mtp) == ("respect", "compress")


def test_an_override_makes_the_mappings_that_are_missing(tmp_path: Path) -> None:
    recipe = load(tmp_path, "plan.assign.similarity.use=cosine", "plan.assign.similarity.parts=[gate]")
    assert recipe.plan.assigner.similarity.parts == ("gate",)


def test_an_override_reaches_into_a_list(tmp_path: Path) -> None:
    recipe = load(
        tmp_path, "evaluate.1.tasks=[b]", more="evaluate: [{use: perplexity, path: a}, {use: lm-eval, tasks: [a]}]"
    )
    assert recipe.evaluators[1].tasks == ("b",)


def test_a_null_leaves_an_optional_section_out(tmp_path: Path) -> None:
    recipe = load(tmp_path, "plan.assign=null", "apply.merge=null")
    assert (recipe.plan.assigner, recipe.apply.merge) == (None, None)


def test_a_later_override_wins_and_an_alias_is_changed_in_one_place_only(tmp_path: Path) -> None:
    more = "evaluate: [&one {use: perplexity, path: a}, *one]\n"
    recipe = load(tmp_path, "evaluate.0.path=b", "evaluate.0.path=c", more=more)
    assert [evaluator.path.name for evaluator in recipe.evaluators] == ["c", "a"]


def test_paths_start_at_the_recipe_and_those_of_overrides_at_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert load(tmp_path).calibrate.source.path == tmp_path / "calib.txt"
    assert load(tmp_path, "calibrate.source.path=../x.txt").calibrate.source.path == tmp_path / "x.txt"
    whole = "calibrate.source={use: text-file, path: y.txt}"
    assert load(tmp_path, whole).calibrate.source.path == elsewhere / "y.txt"


def test_what_an_override_leaves_incomplete_is_located_at_the_override(tmp_path: Path) -> None:
    text = "dernkit: 1\nplan: {keep: 1, score: {use: weights}}\n"
    assert problems(tmp_path, text, "calibrate.length=8")[1:] == [
        "--set calibrate.source: must be given. Got nothing instead.",
        "--set calibrate.sequences: must be given. Got nothing instead.",
    ]


def test_what_an_override_makes_wrong_elsewhere_is_located_in_the_file(tmp_path: Path) -> None:
    text = RECIPE.replace("{use: gate-mass}", "{use: weights, power: 2}")
    assert problems(tmp_path, text, "plan.score.use=reap")[1:] == [
        "bad.yaml:5: plan.score.power: 'reap' has no option 'power'. Options: none."
    ]


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        (
            "plan.keep=-1",
            "--set plan.keep: must be a fraction above 0 up to 1.0 or a count of at least 1. Got -1 instead.",
        ),
        (
            "plan.score.use=reep",
            "--set plan.score.use: unknown scorer 'reep'. Did you mean 'reap'? Installed: gate-mass, reap, weights.",
        ),
        (
            "plan.assign={use: affinity, treshold: 1}",
            "--set plan.assign.treshold: 'affinity' has no option 'treshold'. Did you mean 'threshold'?",
        ),
        ("plan.kep=1", "--set plan.kep: 'plan' has no key 'kep'. Did you mean 'keep'?"),
        ("plan.keep", "--set plan.keep: must be written as path.to.key=value. Got 'plan.keep' instead."),
        ("plan..keep=1", "--set plan..keep: must be written as path.to.key=value. Got 'plan..keep=1' instead."),
        ("plan.keep.x=1", "--set plan.keep.x: must be in a mapping. Got 0.5 at 'plan.keep' instead."),
        (
            "plan.keep=[1",
            "--set plan.keep: must be valid YAML. Got 'expected ',' or ']', but got '<stream end>'' instead.",
        ),
    ],
)
def test_problems_of_overrides_name_the_override(tmp_path: Path, override: str, problem: str) -> None:
    assert problems(tmp_path, RECIPE, override) == ["1 problem in bad.yaml", problem]


def test_a_position_outside_a_list_is_a_problem(tmp_path: Path) -> None:
    text = RECIPE + "evaluate: [{use: perplexity, path: a}]\n"
    for position in ("1", "x", "-1"):
        sentence = f"must name one of the 1 entries of 'evaluate', from 0. Got '{position}' instead."
        assert problems(tmp_path, text, f"evaluate.{position}.path=b")[1:] == [
            f"--set evaluate.{position}.path: {sentence}"
        ]


def test_problems_of_overrides_come_after_those_of_the_file(tmp_path: Path) -> None:
    lines = problems(tmp_path, RECIPE.replace("length: 2048", "length: 1"), "seed=x", "plan.keep=2.5")
    assert [line.split(": ")[0] for line in lines[1:]] == ["bad.yaml:2", "--set seed", "--set plan.keep"]
