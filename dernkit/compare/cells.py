"""The cells of a comparison: models × calibrations × ratios × recipes × seeds, and what each is made from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from dernkit.api import Evaluator, Scorer
from dernkit.compare.bench import Bench, BenchModel, bound_recipe
from dernkit.compare.rows import ORIGINAL
from dernkit.digest import content_digests, digest, file_digest, missing_paths
from dernkit.errors import RecipeError
from dernkit.gather import describe
from dernkit.given import stats_key
from dernkit.models.architecture import use_architecture
from dernkit.models.folder import TOKENIZER
from dernkit.models.source import open_source
from dernkit.parts import components_of, named
from dernkit.recipe import CalibrateSpec, Recipe
from dernkit.registry import Registry
from dernkit.shapes import plain

ALWAYS = frozenset({"routed", "sample"})
"""Statistics that every calibration of a comparison collects: results say how experts are used, and layers' errors."""
_VERSIONED = ("dernkit", "torch", "transformers", "lm_eval")


@dataclass(frozen=True, slots=True)
class Subject:
    """A model of the bench, as its files are now."""

    name: str
    path: Path
    fingerprint: str
    experts: int
    sizes: tuple[int, int, int]
    """Parameters, bytes, and bytes of routed experts on the disk."""
    evaluators: tuple[Evaluator, ...]
    facts: dict[str, Any]
    """What results say of it."""
    measured: list[dict[str, Any]]
    """The evaluators as plain data, with digests of what they read."""


@dataclass(frozen=True, slots=True)
class Context:
    """What cells share: a model, and one calibration of it. Without a calibration: the model as it is."""

    subject: Subject
    calibration: str = ""
    seed: int = 0
    spec: CalibrateSpec | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    """What results say of the calibration."""
    requires: frozenset[str] = frozenset()
    """Statistics that are collected once for all its cells."""
    key: str = ""
    """What their file carries; see `dernkit.given`."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One row of the results that is to be measured."""

    key: str
    """Digest of all that it is made from."""
    context: Context
    label: str
    keep: float
    recipe: Recipe | None
    """None: the model as it is."""
    details: dict[str, Any]

    @property
    def name(self) -> str:
        """What the cell is called in messages."""
        model, context = self.context.subject.name, self.context
        if self.recipe is None:
            return f"{model}, {self.label}"
        return f"{model}, {context.calibration}, keep {self.recipe.plan.keep}, {self.label}, seed {context.seed}"


@dataclass(frozen=True, slots=True)
class Growth:
    """One context in which scores are looked at as the calibration tokens grow."""

    key: str
    context: Context
    scorers: tuple[Scorer, ...]
    requires: frozenset[str]
    """What the scorers read."""
    shares: tuple[float, ...]
    keep: float
    """Share of the experts in the kept sets that are compared."""

    @property
    def name(self) -> str:
        """What it is called in messages."""
        context = self.context
        return f"{context.subject.name}, {context.calibration}, stability, seed {context.seed}"


Task = Cell | Growth


def tasks(bench: Bench, registry: Registry, *, trust_remote_code: bool) -> list[Task]:
    """All cells in the order of the results, then what stability asks for.

    Raises:
        DernkitError: a model cannot be read, or a file that the bench names is not there.
    """
    _check_files(bench)
    found: list[Task] = []
    growths: list[Task] = []
    for model in bench.models:
        subject = _subject(model, bench, registry, trust_remote_code)
        found.append(_cell(Context(subject), ORIGINAL, None, bench, registry))
        for name in model.calibration:
            contexts = [_context(subject, model, name, seed, bench, registry) for seed in model.seeds]
            found += _compressed(contexts, model, name, bench, registry)
            growths += [growth for context in contexts for growth in _growth(context, model, bench, registry)]
    return [*found, *growths]


def _compressed(
    contexts: Sequence[Context], model: BenchModel, calibration: str, bench: Bench, registry: Registry
) -> Iterator[Cell]:
    for keep in model.keep:
        for label in model.recipes:
            for context in contexts:
                recipe = bound_recipe(bench, label, calibration, keep, context.seed)
                yield _cell(context, label, recipe, bench, registry)


def _check_files(bench: Bench) -> None:
    reads: list[tuple[str, Any]] = [(f"calibration.{name}", spec.source) for name, spec in bench.calibration.items()]
    reads += [(f"evaluate, model '{model.name}'", part) for model in bench.models for part in model.evaluators]
    for where, component in reads:
        for path in missing_paths(component):
            raise RecipeError(
                f"{bench.path}: {where}: {path} must exist. Got a path where nothing is instead. Correct the bench, or "
                f"override it with --set."
            )


def _subject(model: BenchModel, bench: Bench, registry: Registry, trust_remote_code: bool) -> Subject:
    use_architecture(model.path, registry.components("architecture"))
    adapters = [component.cls() for component in registry.components("adapter")]
    source = open_source(model.path, adapters, trust_remote_code=trust_remote_code)
    about, fingerprint = describe(source), source.fingerprint()
    tokenizer = [file_digest(file) for pattern in TOKENIZER for file in sorted(model.path.glob(pattern))]
    facts = {
        "path": plain(model.path, bench.base),
        "fingerprint": fingerprint,
        "tokenizer": digest(tokenizer),
        "family": about["family"],
        "experts": about["experts"],
        "top_k": about["top_k"],
    }
    sizes = (about["parameters"], about["bytes"], about["expert_bytes"])
    measured = [_described(evaluator, bench) for evaluator in model.evaluators]
    return Subject(model.name, model.path, fingerprint, about["experts"], sizes, model.evaluators, facts, measured)


def _context(
    subject: Subject, model: BenchModel, calibration: str, seed: int, bench: Bench, registry: Registry
) -> Context:
    spec = bench.calibration[calibration]
    requires = ALWAYS
    for label in model.recipes:
        recipe = bench.recipes[label]
        if recipe.calibrate is not None and not recipe.calibrate.sequential:
            requires |= recipe.requires
    facts = {**spec.resolved(bench.base), "source": _described(spec.source, bench)}
    del facts["sequential"]  # each recipe's own
    versions = _versions(registry, [("source", spec.source)])
    made_from = digest(facts, sorted(requires), seed, subject.facts, versions)
    key = stats_key(subject.fingerprint, made_from, sequential=False)
    return Context(subject, calibration, seed, spec, facts, requires, key)


def _cell(context: Context, label: str, recipe: Recipe | None, bench: Bench, registry: Registry) -> Cell:
    subject = context.subject
    parts: list[tuple[str, Any]] = [("evaluator", evaluator) for evaluator in subject.evaluators]
    details: dict[str, Any] = {"model": subject.facts, "evaluate": subject.measured}
    keep = 1.0
    if recipe is not None:
        parts += [*named(recipe), *_source(context)]
        resolved = recipe.resolved(bench.base)
        resolved["calibrate"]["source"] = context.facts["source"]
        del resolved["evaluate"], resolved["report"]
        details["recipe"] = resolved
        keep = _share(recipe.plan.keep, subject)
    details["versions"] = _versions(registry, parts)
    key = digest(subject.name, context.calibration, label, details)
    return Cell(key, context, label, keep, recipe, details)


def _growth(context: Context, model: BenchModel, bench: Bench, registry: Registry) -> Iterator[Growth]:
    asked = bench.stability
    if asked is None:
        return
    keep = min(_share(keep, context.subject) for keep in model.keep)
    versions = _versions(registry, [*_source(context), *(("scorer", scorer) for scorer in asked.scorers)])
    scorers = [plain(scorer, bench.base) for scorer in asked.scorers]
    names = [context.subject.name, context.calibration, context.seed]
    made_from = [context.subject.facts, context.facts, scorers, asked.shares, keep, versions]
    key = digest("stability", names, made_from)
    requires = frozenset({"routed"}).union(*(registry.requires("scorer", scorer) for scorer in asked.scorers))
    yield Growth(key, context, asked.scorers, requires, asked.shares, keep)


def _share(keep: int | float, subject: Subject) -> float:
    return keep if isinstance(keep, float) else keep / subject.experts


def _source(context: Context) -> list[tuple[str, Any]]:
    return [("source", context.spec.source)] if context.spec else []


def _versions(registry: Registry, parts: Sequence[tuple[str, Any]]) -> dict[str, str]:
    """Versions of the libraries, and of the distributions that the components come from."""
    versions = {name: version for name in _VERSIONED if (version := _installed(name))}
    found = (component.provenance for component in components_of(registry, parts))
    return versions | {each.distribution: each.version for each in found}


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _described(component: Any, bench: Bench) -> dict[str, Any]:
    """A component as plain data, with one digest of all files that it reads."""
    found = content_digests(component)
    return {**plain(component, bench.base), **({"files": digest(found)} if found else {})}
