"""What a bad recipe prints."""

from pathlib import Path

import pytest

from dernkit.errors import RecipeError
from dernkit.recipe import bind_recipe, load_recipe
from tests.unit.toy_components import RECIPE, problems, toy_registry


def test_the_example_of_the_design_prints_all_three_problems(tmp_path: Path) -> None:
    text = (
        "# bad\ndernkit: 1\nplan:\n  keep: 0.5\n  score: {use: reep}\n  assign:\n    use: affinity\n"
        "    treshold: 0.5\n    threshold: 6\napply: {merge: {use: spherical-kmeans}}\n"
    )
    assert problems(tmp_path, text) == [
        "3 problems in bad.yaml",
        "bad.yaml:5: plan.score.use: unknown scorer 'reep'. Did you mean 'reap'? Installed: gate-mass, reap, weights.",
        "bad.yaml:8: plan.assign.treshold: 'affinity' has no option 'treshold'. Did you mean 'threshold'?",
        "bad.yaml:9: plan.assign.threshold: must be between -1 and 1. Got 6 instead.",
    ]


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("dernkit: 1\n", "", "bad.yaml:1: dernkit: must be given. Got nothing instead."),
        ("dernkit: 1", "dernkit: 2", "bad.yaml:1: dernkit: must be 1. Got 2 instead."),
        ("dernkit: 1", "dernkit: true", "bad.yaml:1: dernkit: must be 1. Got true instead."),
        ("apply:", "seed: -1\napply:", "bad.yaml:7: seed: must be between 0 and 9223372036854775807. Got -1 instead."),
        ("apply:", "aply:", "bad.yaml:7: aply: a recipe has no key 'aply'. Did you mean 'apply'?"),
        ("  keep", "  kep", "bad.yaml:4: plan.kep: 'plan' has no key 'kep'. Did you mean 'keep'?"),
        (
            "  keep",
            "  zzz: 1\n  keep",
            "bad.yaml:4: plan.zzz: 'plan' has no key 'zzz'. Keys: keep, score, budget, select, assign, groups.",
        ),
        ("  keep: 0.5\n", "", "bad.yaml:3: plan.keep: must be given. Got nothing instead."),
        (
            "  keep",
            "  groups: none\n  keep",
            "bad.yaml:4: plan.groups: must be one of respect, collapse. Got 'none' instead.",
        ),
        (
            "apply: {",
            "apply: {mtp: keep, ",
            "bad.yaml:7: apply.mtp: must be one of compress, drop. Got 'keep' instead.",
        ),
        (
            "keep: 0.5",
            "keep: 0",
            "bad.yaml:4: plan.keep: must be a fraction above 0 up to 1.0 or a count of at least 1. Got 0 instead.",
        ),
        (
            "threshold: 0.6",
            "threshold: high",
            "bad.yaml:6: plan.assign.threshold: must be a number. Got 'high' instead.",
        ),
        ("threshold: 0.6", "threshold: true", "bad.yaml:6: plan.assign.threshold: must be a number. Got true instead."),
        ("threshold: 0.6", "threshold: ", "bad.yaml:6: plan.assign.threshold: must be a number. Got null instead."),
        (
            "threshold: 0.6",
            "threshold: .nan",
            "bad.yaml:6: plan.assign.threshold: must be a number. Got '.nan' instead.",
        ),
        ("sequences: 128", "sequences: abc", "bad.yaml:2: calibrate.sequences: must be an integer. Got 'abc' instead."),
        ("sequences: 128", "sequences: 1.0", "bad.yaml:2: calibrate.sequences: must be an integer. Got 1.0 instead."),
        ("length: 2048", "length: 1", "bad.yaml:2: calibrate.length: must be between 2 and 1048576. Got 1 instead."),
        (", path: calib.txt", "", "bad.yaml:2: calibrate.source.path: must be given. Got nothing instead."),
        ("path: calib.txt", "path: [a]", "bad.yaml:2: calibrate.source.path: must be a path. Got a list instead."),
        (
            "score: {use: gate-mass}",
            "score: reap",
            "bad.yaml:5: plan.score: must be a mapping. Got 'reap' instead. Write {use: reap}.",
        ),
        (
            "score: {use: gate-mass}",
            "score: {}",
            "bad.yaml:5: plan.score.use: must be the name of a scorer. Got nothing instead. "
            "Installed: gate-mass, reap, weights.",
        ),
        (
            "score: {use: gate-mass}",
            "score: {use: weights, power: 0}",
            "bad.yaml:5: plan.score.power: must be above 0 and at most 4. Got 0 instead.",
        ),
        (
            "use: affinity,",
            "use: affinity, similarity: {use: cosine, parts: []},",
            "bad.yaml:6: plan.assign.similarity: must compare at least one part. Got none instead.",
        ),
        (
            "use: affinity,",
            "use: affinity, similarity: {use: cosine, parts: [sideways]},",
            "bad.yaml:6: plan.assign.similarity.parts: must be one of gate, up, down. Got 'sideways' instead.",
        ),
        (
            "use: affinity,",
            "use: affinity, similarity: {use: cosinus},",
            "bad.yaml:6: plan.assign.similarity.use: unknown similarity 'cosinus'. Did you mean 'cosine'? "
            "Installed: cosine, on-sample.",
        ),
        ("apply:", "evaluate: perplexity\napply:", "bad.yaml:7: evaluate: must be a list. Got 'perplexity' instead."),
        (
            "apply:",
            "evaluate:\n- {use: perplexity, path: a}\n- {use: lm-eval, tasks: arc_easy}\napply:",
            "bad.yaml:9: evaluate.1.tasks: must be a list. Got 'arc_easy' instead.",
        ),
        (
            "apply:",
            "evaluate:\n- {use: lm-eval, tasks: [a], verbose: yes}\napply:",
            "bad.yaml:8: evaluate.0.verbose: must be true or false. Got 'yes' instead.",
        ),
        (
            "apply: {merge: {use: spherical-kmeans}}",
            "",
            "bad.yaml:6: plan.assign: assign moves segments: apply.merge must say how they are merged. "
            "Got nothing instead. Add apply.merge, or leave out plan.assign to prune only.",
        ),
        (
            "  assign: {use: affinity, threshold: 0.6}\n",
            "",
            "bad.yaml:6: apply.merge: merge needs segments that move: plan.assign must say which. "
            "Got nothing instead. Add plan.assign, or leave out apply.merge to prune only.",
        ),
        (
            "  keep: 0.5\n",
            "  keep: 0.5\n  keep: 0.25\n",
            "bad.yaml:5: plan.keep: must be given once. Got it again instead; it is first given in line 4.",
        ),
        (
            "score: {use: gate-mass}",
            "score: !!python/name:os.system {use: gate-mass}",
            "bad.yaml:5: plan.score: must be plain YAML. Got the tag python/name:os.system instead.",
        ),
        (
            "keep: 0.5",
            "keep: !!python/name:os.system x",
            "bad.yaml:4: plan.keep: must be plain YAML. Got the tag python/name:os.system instead.",
        ),
        (
            "keep: 0.5",
            "keep: !!int x",
            "bad.yaml:4: plan.keep: must be what its tag int says. Got 'x' instead.",
        ),
        (
            "keep: 0.5",
            "keep: &me [*me]",
            "bad.yaml:4: plan.keep.0: must not contain itself. Got an alias of what it is in instead.",
        ),
        ("keep: 0.5", f"keep: {'[' * 60}{']' * 60}", None),
    ],
)
def test_each_problem_is_one_located_sentence(tmp_path: Path, old: str, new: str, problem: str | None) -> None:
    assert old in RECIPE
    lines = problems(tmp_path, RECIPE.replace(old, new, 1))
    if problem is not None:
        assert problem in lines
    assert lines[0] == f"{len(lines) - 1} problem{'s' if len(lines) > 2 else ''} in bad.yaml"


def test_statistics_without_calibration_are_a_problem(tmp_path: Path) -> None:
    assert problems(tmp_path, "dernkit: 1\nplan: {keep: 1, score: {use: reap}}\n") == [
        "1 problem in bad.yaml",
        "bad.yaml:1: calibrate: must be given, because 'reap' reads reap_sum, routed. Got nothing instead.",
    ]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "bad.yaml:1: must be a mapping that starts with 'dernkit: 1'. Got an empty file instead."),
        (
            "# only a comment\n",
            "bad.yaml:1: must be a mapping that starts with 'dernkit: 1'. Got an empty file instead.",
        ),
        ("\n- a\n", "bad.yaml:2: must be a mapping that starts with 'dernkit: 1'. Got a list instead."),
        ("reap\n", "bad.yaml:1: must be a mapping that starts with 'dernkit: 1'. Got a plain value instead."),
        ("dernkit: 1\nplan:\n\tkeep: 1\n", "bad.yaml:3: must be indented with spaces. Got a tab instead."),
        (
            "dernkit: 1\nplan: {keep: 1\n",
            "bad.yaml:3: must be valid YAML. Got 'expected ',' or '}', but got '<stream end>'' instead.",
        ),
        ("a: 1\n---\nb: 2\n", "bad.yaml:2: must be valid YAML. Got 'but found another document' instead."),
        ("a: \x00\n", "bad.yaml:1: must be text. Got the character '\\x00' instead."),
        (b"PK\x03\x04\x80", "bad.yaml: must be a text file in UTF-8. Got byte 0x80 at position 4 instead."),
        ("a: " + "[" * 2000, "bad.yaml:1: must not be nested this deeply. Got hundreds of levels instead."),
    ],
)
def test_what_is_no_recipe_is_refused_in_one_sentence(tmp_path: Path, text: str | bytes, sentence: str) -> None:
    assert problems(tmp_path, text) == [sentence]


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.yaml: must be a file\. Got a path where nothing is instead\."):
        load_recipe(tmp_path / "none.yaml", toy_registry())
    with pytest.raises(RecipeError, match=r": must be a file that can be read\. Got 'Is a directory' instead\."):
        load_recipe(tmp_path, toy_registry())


def test_a_recipe_in_memory_is_located_by_keys() -> None:
    with pytest.raises(RecipeError) as caught:
        bind_recipe({"dernkit": 1, "plan": {"keep": True, "score": {"use": "weights", "power": 9}}}, toy_registry())
    assert str(caught.value).split("\n") == [
        "2 problems in the recipe",
        "plan.keep: must be a fraction above 0 up to 1.0 or a count of at least 1. Got true instead.",
        "plan.score.power: must be above 0 and at most 4. Got 9 instead.",
    ]
    with pytest.raises(RecipeError, match=r"must be a mapping\. Got a list instead"):
        bind_recipe([], toy_registry())  # type: ignore[arg-type]
