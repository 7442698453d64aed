"""A bench, version 1: a YAML file that says which recipes are compared, on which models, and how they are measured.

Its problems, and those of the recipes that it names, are reported at once, each with its file and line. Relative paths
start at the folder of the file that they are in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dernkit.api import Evaluator, Observing, Scorer
from dernkit.binding import Binder
from dernkit.compare.entries import Entry, bind_entry, entries, values
from dernkit.compare.rows import ORIGINAL
from dernkit.document import Keys, override, read_document
from dernkit.recipe import CALIBRATE, SEED, VERSION, CalibrateSpec, Keep, Recipe, bind_calibrate
from dernkit.registry import Registry
from dernkit.sentences import did_you_mean, expected
from dernkit.shapes import Choice, FilePath, Number, Text

TOP = (
    *("dernkit", "models", "calibration", "seeds", "keep", "recipes", "grids"),
    *("evaluate", "baseline", "metric", "stability"),
)
MODEL = ("path", "keep", "seeds", "calibration", "recipes", "evaluate")
STABILITY = ("scorers", "shares")
SHARE = Number(integer=False, low=0.0, high=1.0, above_low=True)
DEFAULT_SHARES = (0.0625, 0.125, 0.25, 0.5, 1.0)


@dataclass(frozen=True, slots=True)
class BenchModel:
    """A model, and what is done with it."""

    name: str
    path: Path
    keep: tuple[int | float, ...]
    seeds: tuple[int, ...]
    calibration: tuple[str, ...]
    recipes: tuple[str, ...]
    """Labels."""
    evaluators: tuple[Evaluator, ...]


@dataclass(frozen=True, slots=True)
class Stability:
    """How scores change as calibration tokens grow: by which scorers, at which shares of the tokens."""

    scorers: tuple[Scorer, ...]
    shares: tuple[float, ...]
    """Ascending, the last one 1."""


@dataclass(frozen=True, slots=True)
class Bench:
    """A comparison that is bound and checked."""

    path: Path
    models: tuple[BenchModel, ...]
    calibration: Mapping[str, CalibrateSpec]
    recipes: Mapping[str, Recipe]
    """By label; their keep, seed and calibration are not those of a cell yet."""
    baseline: str
    metric: str
    stability: Stability | None

    @property
    def base(self) -> Path:
        """The folder from which paths are told."""
        return self.path.absolute().parent


def load_bench(path: Path, registry: Registry, overrides: Sequence[str] = ()) -> Bench:
    """The bench in a file, changed by ``dotted.path=value`` overrides.

    Raises:
        RecipeError: all problems at once, each with its file and line or its override.
    """
    document = read_document(path)
    override(document, overrides)
    binder = Binder(document, registry, "a bench")
    binder.section((), TOP)
    binder.entry(("dernkit",), Choice((VERSION,)))
    found = entries(binder)
    recipes = {entry.label: bind_entry(entry, binder) for entry in found}
    calibration = _calibration(binder)
    models = _models(binder, list(calibration), found)
    baseline, metric = binder.entry(("baseline",), Text()), binder.entry(("metric",), Text())
    for model in models:
        _check_baseline(binder, baseline, model)
        _check_metric(binder, metric, model)
    stability = _stability(binder)
    document.raise_problems()
    bound = {label: recipe for label, recipe in recipes.items() if recipe is not None}
    return Bench(path, tuple(models), calibration, bound, baseline, metric, stability)


def evaluator_names(evaluators: Sequence[Evaluator]) -> list[str]:
    """What metrics begin with: each evaluator's name, from the second one of a name on with its number."""
    names = [evaluator.name for evaluator in evaluators]
    return [name if (n := names[:i].count(name)) == 0 else f"{name}.{n + 1}" for i, name in enumerate(names)]


def _calibration(binder: Binder) -> dict[str, CalibrateSpec]:
    here: Keys = ("calibration",)
    sections = binder.value(here)
    if not isinstance(sections, Mapping) or not sections:
        binder.problem(here, expected("a mapping of names to calibrate sections", sections))
        return {}
    known = [name for name in CALIBRATE if name != "sequential"]  # each recipe's own
    found = {name: bind_calibrate(binder, (*here, name), known) for name in sections}
    for name in sections:
        if sections[name] is None:
            binder.missing((*here, name))
    return {name: spec for name, spec in found.items() if spec is not None}


def _models(binder: Binder, calibration: list[str], recipes: Sequence[Entry]) -> list[BenchModel]:
    here: Keys = ("models",)
    sections = binder.value(here)
    if not isinstance(sections, Mapping) or not sections:
        binder.problem(here, expected("a mapping of names to models", sections))
        return []
    keep, seeds = values(binder, ("keep",), Keep(), ()), values(binder, ("seeds",), SEED, (0,))
    evaluators, labels = _evaluators(binder, ("evaluate",)), [entry.label for entry in recipes]
    found = []
    for name in sections:
        keys: Keys = (*here, name)
        if not binder.section(keys, MODEL):
            if binder.value(keys) is None:
                binder.missing(keys)
            continue
        chosen = values(binder, (*keys, "recipes"), Text(), labels)
        model = BenchModel(
            name=name,
            path=binder.entry((*keys, "path"), FilePath()),
            keep=values(binder, (*keys, "keep"), Keep(), keep),
            seeds=values(binder, (*keys, "seeds"), SEED, seeds),
            calibration=values(binder, (*keys, "calibration"), Text(), calibration),
            recipes=tuple(label for each in chosen for label in _labels(binder, (*keys, "recipes"), each, recipes)),
            evaluators=_evaluators(binder, (*keys, "evaluate")) or evaluators,
        )
        _check_known(binder, (*keys, "calibration"), model.calibration, calibration)
        if not model.keep:
            binder.problem((*keys, "keep"), "must be given here or for all models. Got nothing instead.")
        if not model.evaluators:
            binder.problem((*keys, "evaluate"), "must be given here or for all models. Got nothing instead.")
        found.append(model)
    return found


def _labels(binder: Binder, keys: Keys, name: str | None, recipes: Sequence[Entry]) -> list[str]:
    """The recipe of that label, or the points of the grid of that label."""
    found = [entry.label for entry in recipes if name in (entry.label, entry.grid)]
    if not found and name is not None:
        _check_known(binder, keys, (name,), [entry.label for entry in recipes])
    return found


def _check_known(binder: Binder, keys: Keys, names: Sequence[str | None], known: Sequence[str]) -> None:
    for name in names:
        if name is not None and name not in known:
            hint = did_you_mean(name, known) or f"Known: {', '.join(known) or 'none'}."
            binder.problem(keys, f"must be names that the bench defines. Got '{name}' instead. {hint}")


def _evaluators(binder: Binder, keys: Keys) -> tuple[Any, ...]:
    return tuple(binder.component((*keys, position), "evaluator") for position in binder.entries(keys))


def _check_baseline(binder: Binder, baseline: str | None, model: BenchModel) -> None:
    if baseline in (None, ORIGINAL) or baseline in model.recipes or not model.recipes:
        return
    hint = did_you_mean(str(baseline), model.recipes) or f"They are: {', '.join(model.recipes)}."
    binder.problem(
        ("baseline",), f"must be a recipe of every model. Got '{baseline}', which '{model.name}' lacks, instead. {hint}"
    )


def _check_metric(binder: Binder, metric: str | None, model: BenchModel) -> None:
    if metric is None or None in model.evaluators:
        return
    pairs = zip(evaluator_names(model.evaluators), model.evaluators, strict=True)
    names = [name for name, evaluator in pairs if isinstance(evaluator, Observing)]
    if metric.partition("/")[0] not in names or "/" not in metric:
        binder.problem(
            ("metric",),
            f"must be EVALUATOR/METRIC of an evaluator of every model that looks at single documents. "
            f"Got '{metric}' instead. '{model.name}' has {', '.join(names) or 'none'}.",
        )


def _stability(binder: Binder) -> Stability | None:
    here: Keys = ("stability",)
    if not binder.section(here, STABILITY):
        return None
    names = binder.value((*here, "scorers"))
    if isinstance(names, list):  # a name alone will do
        names[:] = [{"use": name} if isinstance(name, str) else name for name in names]
    found = [binder.component((*here, "scorers", i), "scorer") for i in binder.entries((*here, "scorers"))]
    if not found:
        binder.missing((*here, "scorers"))
    shares = values(binder, (*here, "shares"), SHARE, DEFAULT_SHARES)
    if None not in shares and shares and (list(shares) != sorted(shares) or shares[-1] != 1):
        binder.problem((*here, "shares"), f"must ascend to 1.0. Got {', '.join(map(str, shares))} instead.")
    return Stability(tuple(found), shares)


def bound_recipe(bench: Bench, label: str, calibration: str, keep: int | float, seed: int) -> Recipe:
    """The recipe of one cell. It calibrates sequentially where its file says so, and measures nothing itself."""
    recipe = bench.recipes[label]
    assert recipe.calibrate is not None
    spec = replace(bench.calibration[calibration], sequential=recipe.calibrate.sequential)
    return replace(recipe, seed=seed, calibrate=spec, plan=replace(recipe.plan, keep=keep))
