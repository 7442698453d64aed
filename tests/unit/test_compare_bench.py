"""Bench files: what they mean, and what bad ones print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dernkit.compare.bench import Bench, bound_recipe, load_bench
from dernkit.compare.rows import ORIGINAL
from dernkit.errors import RecipeError
from dernkit.registry import Registry
from tests.unit.comparing import DERN, PRUNE, SEQUENTIAL

BENCH = """\
dernkit: 1
models:
  small: {path: models/small}
  large: {path: models/large, keep: [0.875], seeds: [3], calibration: [mixed], recipes: [prune, dern]}
calibration:
  mixed: {source: {use: text-file, path: mixed.txt}, sequences: 4, length: 16}
  code: {source: {use: text-file, path: code.txt}, sequences: 4, length: 16, sample: 64}
seeds: [0, 1]
keep: [0.5, 2]
recipes:
  prune: recipes/prune.yaml
  sequential: {file: recipes/sequential.yaml, set: {plan.score: {use: gate-mass}}}
grids:
  - label: dern
    file: recipes/dern.yaml
    axes: {plan.assign.quantile: [0.25, 0.5], plan.score: [{use: reap}, {use: random}]}
evaluate: [{use: perplexity, path: heldout, length: 32}]
baseline: prune
metric: perplexity/loss
stability: {scorers: [gate-mass], shares: [0.5, 1.0]}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "recipes").mkdir()
    for name, recipe in (("prune", PRUNE), ("dern", DERN), ("sequential", SEQUENTIAL)):
        (tmp_path / f"recipes/{name}.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    (tmp_path / "bench.yaml").write_text(BENCH)
    return tmp_path


def load(folder: Path, registry: Registry, *overrides: str) -> Bench:
    return load_bench(folder / "bench.yaml", registry, overrides)


def problems(folder: Path, registry: Registry, old: str, new: str, *overrides: str) -> list[str]:
    """Lines of the refusal of the bench with one change, paths shortened."""
    assert old in BENCH
    (folder / "bench.yaml").write_text(BENCH.replace(old, new))
    with pytest.raises(RecipeError) as caught:
        load(folder, registry, *overrides)
    return str(caught.value).replace(f"{folder}/", "").split("\n")


POINTS = [f"dern[quantile={quantile}, score={score}]" for quantile in (0.25, 0.5) for score in ("reap", "random")]


def test_a_bench_is_read_with_its_grids_and_what_models_have_of_their_own(folder: Path, registry: Registry) -> None:
    bench = load(folder, registry)
    assert list(bench.recipes) == ["prune", "sequential", *POINTS]
    small, large = bench.models
    assert (small.keep, small.seeds, small.calibration) == ((0.5, 2), (0, 1), ("mixed", "code"))
    assert small.recipes == tuple(bench.recipes)
    assert (large.keep, large.seeds, large.calibration) == ((0.875,), (3,), ("mixed",))
    assert large.recipes == ("prune", *POINTS)
    assert small.path == folder / "models/small"
    assert bench.stability is not None and bench.stability.scorers[0].name == "gate-mass"


def test_a_recipe_gets_keep_seed_and_calibration_from_the_bench(folder: Path, registry: Registry) -> None:
    bench = load(folder, registry, "keep=[0.75]", "calibration.code.length=8")
    assert bench.models[0].keep == (0.75,)
    recipe = bound_recipe(bench, "sequential", "code", 0.75, 1)
    assert (recipe.plan.keep, recipe.seed, recipe.evaluators) == (0.75, 1, ())
    assert recipe.calibrate is not None and recipe.calibrate.sequential
    assert (recipe.calibrate.length, recipe.calibrate.sample) == (8, 64)
    assert recipe.plan.scorer.name == "gate-mass"
    assert recipe.calibrate.source.path == folder / "code.txt"  # type: ignore[attr-defined]
    dern = bound_recipe(bench, POINTS[2], "mixed", 0.75, 0)
    assert (dern.plan.assigner.quantile, dern.plan.scorer.name) == (0.5, "reap")  # type: ignore[union-attr]
    assert dern.calibrate is not None and not dern.calibrate.sequential


CASES: list[tuple[str, str, list[str]]] = [
    ("seeds: [0, 1]", "sead: [0]", ["bench.yaml:8: sead: a bench has no key 'sead'. Did you mean 'seeds'?"]),
    ("dernkit: 1", "dernkit: 2", ["bench.yaml:1: dernkit: must be 1. Got 2 instead."]),
    (
        "baseline: prune",
        "baseline: prun",
        [
            f"bench.yaml:18: baseline: must be a recipe of every model. Got 'prun', which '{model}' lacks, instead. "
            "Did you mean 'prune'?"
            for model in ("small", "large")
        ],
    ),
    (
        "metric: perplexity/loss",
        "metric: lm-eval/acc",
        [
            "bench.yaml:19: metric: must be EVALUATOR/METRIC of an evaluator of every model that looks at single "
            f"documents. Got 'lm-eval/acc' instead. '{model}' has perplexity."
            for model in ("small", "large")
        ],
    ),
    (
        "recipes: [prune, dern]",
        "recipes: [prune, sequentail]",
        [
            "bench.yaml:4: models.large.recipes: must be names that the bench defines. Got 'sequentail' instead. "
            "Did you mean 'sequential'?"
        ],
    ),
    (
        "calibration: [mixed]",
        "calibration: [text]",
        [
            "bench.yaml:4: models.large.calibration: must be names that the bench defines. Got 'text' instead. "
            "Known: mixed, code."
        ],
    ),
    (
        "keep: [0.5, 2]",
        "keep: [0.5, 0, 0.5]",
        [
            "bench.yaml:9: keep.1: must be a fraction above 0 up to 1.0 or a count of at least 1. Got 0 instead.",
            "bench.yaml:9: keep.2: values must be different. Got 0.5 again instead.",
        ],
    ),
    (
        "prune: recipes/prune.yaml",
        "prune: recipes/none.yaml",
        ["bench.yaml:11: recipes.prune: recipes/none.yaml: must be a file. Got a path where nothing is instead."],
    ),
    (
        "set: {plan.score:",
        "set: {plan.keep: 0.5, plan.score:",
        [
            "bench.yaml:12: recipes.sequential.set.plan.keep: must not be of 'plan.keep', which a bench says for all. "
            "Got plan.keep instead."
        ],
    ),
    (
        "quantile: [0.25, 0.5]",
        "quantile: [0.25, 7]",
        [
            "bench.yaml:14: grids.0: plan.assign.quantile: must be between 0 and 1. Got 7 instead.",
            "bench.yaml:14: grids.0: plan.assign.quantile: must be between 0 and 1. Got 7 instead.",
        ],
    ),
    (
        "quantile: [0.25, 0.5]",
        "quantile: [0.25, 0.25]",
        [
            f"bench.yaml:14: grids.0: labels must be different. Got 'dern[quantile=0.25, score={score}]' again instead."
            for score in ("reap", "random")
        ],
    ),
    (
        "axes: {plan.assign.quantile: [0.25, 0.5], plan.score: [{use: reap}, {use: random}]}",
        "axis: {}",
        [
            "bench.yaml:4: models.large.recipes: must be names that the bench defines. Got 'dern' instead. "
            "Known: prune, sequential.",
            "bench.yaml:16: grids.0.axis: 'grids.0' has no key 'axis'. Did you mean 'axes'?",
            "bench.yaml:14: grids.0.axes: must have an axis at least. Got none instead.",
        ],
    ),
    (
        "length: 16, sample: 64}",
        "length: 1, sequential: true}",
        [
            "bench.yaml:7: calibration.code.sequential: 'calibration.code' has no key 'sequential'. "
            "Did you mean 'sequences'?",
            "bench.yaml:7: calibration.code.length: must be between 2 and 1048576. Got 1 instead.",
        ],
    ),
    (
        "scorers: [gate-mass], shares: [0.5, 1.0]",
        "scorers: [gatemass], shares: [1.0, 0.5]",
        ["…unknown scorer 'gatemass'. Did you mean 'gate-mass'?…", "…must ascend to 1.0. Got 1.0, 0.5 instead."],
    ),
    (
        "evaluate: [{use: perplexity, path: heldout, length: 32}]",
        "evaluate: [{use: perplexity, path: heldout, length: 1}]",
        ["bench.yaml:17: evaluate.0.length: must be between 2 and 1048576. Got 1 instead."],
    ),
    (
        "models:\n  small: {path: models/small}\n",
        "models:\n  small: {pth: models/small}\n",
        [
            "bench.yaml:3: models.small.pth: 'models.small' has no key 'pth'. Did you mean 'path'?",
            "bench.yaml:3: models.small.path: must be given. Got nothing instead.",
        ],
    ),
]


@pytest.mark.parametrize(("old", "new", "expected"), CASES, ids=[new[:40] for _, new, _ in CASES])
def test_a_bad_bench_is_refused_with_its_lines(
    folder: Path, registry: Registry, old: str, new: str, expected: list[str]
) -> None:
    found = problems(folder, registry, old, new)
    for sentence in expected:
        assert any(_fits(line, sentence) for line in found[1:]), "\n".join(found)
    assert len(found) == len(expected) + 1, "\n".join(found)


def _fits(line: str, expected: str) -> bool:
    return line == expected or ("…" in expected and expected.strip("…") in line)


def test_problems_of_recipes_have_their_own_lines_beside_those_of_the_bench(folder: Path, registry: Registry) -> None:
    recipe = folder / "recipes/dern.yaml"
    recipe.write_text(recipe.read_text().replace("quantile", "quantle").replace("additive", "aditive"))
    line = 1 + next(i for i, text in enumerate(recipe.read_text().splitlines()) if "quantle" in text)
    found = problems(folder, registry, "baseline: prune", "basline: prune")
    assert found[0].endswith("problems in bench.yaml")
    assert any(text.startswith("bench.yaml:18: basline: a bench has no key 'basline'.") for text in found)
    assert (
        sum(f"recipes/dern.yaml:{line}: plan.assign.quantle: 'affinity' has no option" in text for text in found) == 1
    )
    assert sum("unknown router 'aditive'. Did you mean 'additive'?" in text for text in found) == 1


def test_overrides_are_named_in_their_problems(folder: Path, registry: Registry) -> None:
    found = problems(folder, registry, "dernkit: 1", "dernkit: 1", "seeds=[-1]")
    assert found[1:] == ["--set seeds.0: must be between 0 and 9223372036854775807. Got -1 instead."]


def test_a_bench_may_be_compared_with_the_originals(folder: Path, registry: Registry) -> None:
    assert load(folder, registry, f"baseline={ORIGINAL}").baseline == ORIGINAL


def test_evaluators_of_one_name_have_numbers(folder: Path, registry: Registry) -> None:
    from dernkit.compare.bench import evaluator_names

    several: Any = load(folder, registry).models[0].evaluators * 3
    assert evaluator_names(several) == ["perplexity", "perplexity.2", "perplexity.3"]
