"""The recipe language, version 1: a YAML file -> a :class:`Recipe` of bound components.

The language is the example in the documentation, ``dernkit.schema`` describes it as JSON Schema, and every problem of a
recipe is reported at once with its line.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dernkit import shapes
from dernkit.binding import Binder
from dernkit.document import Document, Keys, override, read_document
from dernkit.sentences import expected
from dernkit.shapes import Choice, Flag, Number

if TYPE_CHECKING:
    from dernkit.api import Assigner, Budget, Evaluator, Merge, Refit, Report, Router, Scorer, Selector, Source
    from dernkit.registry import Registry

VERSION = 1
DEFAULT_BUDGET, DEFAULT_SELECTOR = "uniform", "top-score"
DEFAULT_ROUTER, DEFAULT_REPORT = "slice", "markdown"
SEED = Number(integer=True, low=0, high=2**63 - 1)
SEQUENCES = Number(integer=True, low=1, high=1_000_000)
LENGTH = Number(integer=True, low=2, high=1_048_576)
BATCH_SIZE = Number(integer=True, low=1, high=4096)
SAMPLE = Number(integer=True, low=1, high=100_000_000)
DEFAULT_SEED, DEFAULT_BATCH_SIZE, DEFAULT_SAMPLE = 0, 8, 16_384
HOLDOUT, DEFAULT_HOLDOUT = Number(integer=False, low=0.0, high=0.5), 0.0
SEQUENTIAL, DEFAULT_SEQUENTIAL = Flag(), False
GROUPS, DEFAULT_GROUPS = Choice(("respect", "collapse")), "respect"
WIDTH = Number(integer=True, low=1, high=10_000_000)
MTP, DEFAULT_MTP = Choice(("compress", "drop")), "compress"
EXPORT, DEFAULT_EXPORT = Choice(("auto", "padded", "dernkit")), "auto"

TOP = ("dernkit", "seed", "calibrate", "plan", "apply", "evaluate", "report")
CALIBRATE = ("source", "sequences", "length", "batch_size", "sample", "holdout", "sequential")
PLAN = ("keep", "score", "budget", "select", "assign", "groups")
APPLY = ("merge", "router", "refit", "width", "mtp", "export")


@dataclass(frozen=True, slots=True)
class Keep:
    """How many experts stay: a float in (0, 1] is a fraction, an integer a count."""

    def parse(self, value: Any, base: Path) -> int | float:
        fraction = isinstance(value, float) and 0 < value <= 1
        count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not (fraction or count):
            raise ValueError(expected("a fraction above 0 up to 1.0 or a count of at least 1", value))
        return value

    def schema(self) -> dict[str, Any]:
        fraction = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
        return {"anyOf": [fraction, {"type": "integer", "minimum": 1}]}


@dataclass(frozen=True, slots=True)
class CalibrateSpec:
    """Which tokens the statistics are collected on."""

    source: Source
    sequences: int
    length: int
    batch_size: int
    sample: int
    """Layer inputs in the reservoir, for components that read one."""
    holdout: float = DEFAULT_HOLDOUT
    """Share of the tokens, the last ones, of which no component sees layer inputs: the report tells each layer's error
    on them."""
    sequential: bool = DEFAULT_SEQUENTIAL
    """Whether each layer sees what the compressed layers before it put out."""

    def held_out(self, tokens: int) -> int:
        """Of so many tokens."""
        return int(self.holdout * tokens)

    def resolved(self, base: Path | None = None) -> dict[str, Any]:
        """The section as plain data; paths are absolute, or as they are seen from ``base``."""
        sizes = {name: getattr(self, name) for name in CALIBRATE[1:]}
        return {"source": shapes.plain(self.source, base), **sizes}


@dataclass(frozen=True, slots=True)
class PlanSpec:
    """How decisions are made. ``assigner`` is None when dropped experts are only pruned."""

    keep: int | float
    scorer: Scorer
    budget: Budget
    selector: Selector
    assigner: Assigner | None
    groups: str = DEFAULT_GROUPS
    """A router's groups: ``respect`` (as many experts of each) or ``collapse`` (they become one)."""


@dataclass(frozen=True, slots=True)
class ApplySpec:
    """How decisions are carried out. ``merge`` is there if and only if the plan has an assigner."""

    merge: Merge | None
    router: Router
    refit: Refit | None = None
    width: int | None = None
    """Neurons of every expert after surgery; None: what the merge needs."""
    mtp: str = DEFAULT_MTP
    """Multi-token-prediction layers: ``compress`` (by the plan of the last MoE layer) or ``drop``."""
    export: str = DEFAULT_EXPORT
    """Where layers keep different numbers of experts: ``padded`` to the largest with experts that are never chosen,
    which any runtime loads; ``dernkit``, which only dernkit loads; ``auto``: padded where the router allows it."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe whose components are bound and checked."""

    version: int
    seed: int
    calibrate: CalibrateSpec | None
    plan: PlanSpec
    apply: ApplySpec
    evaluators: tuple[Evaluator, ...]
    report: Report
    requires: frozenset[str]
    """Statistics that calibration must collect."""
    path: Path | None = field(default=None, compare=False)
    """The file that it was read from."""

    def resolved(self, base: Path | None = None) -> dict[str, Any]:
        """The same recipe as plain data with every default written out; binding it gives an equal recipe.

        Paths are absolute, or as they are seen from ``base``.
        """
        plain = functools.partial(shapes.plain, base=base)
        plan = {"keep": self.plan.keep, "score": plain(self.plan.scorer), "budget": plain(self.plan.budget)}
        plan["select"] = plain(self.plan.selector)
        if self.plan.assigner is not None:
            plan["assign"] = plain(self.plan.assigner)
        plan["groups"] = self.plan.groups
        apply = {} if self.apply.merge is None else {"merge": plain(self.apply.merge)}
        refit = {} if self.apply.refit is None else {"refit": plain(self.apply.refit)}
        width = {} if self.apply.width is None else {"width": self.apply.width}
        data: dict[str, Any] = {"dernkit": self.version, "seed": self.seed}
        if self.calibrate is not None:
            data["calibrate"] = self.calibrate.resolved(base)
        return data | {
            "plan": plan,
            "apply": {
                **apply,
                "router": plain(self.apply.router),
                **refit,
                **width,
                "mtp": self.apply.mtp,
                "export": self.apply.export,
            },
            "evaluate": [plain(evaluator) for evaluator in self.evaluators],
            "report": plain(self.report),
        }


def load_recipe(path: Path | str, registry: Registry, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a file, changed by ``dotted.path=value`` overrides.

    Relative paths start at the recipe's folder; those in overrides start at the working directory.

    Raises:
        RecipeError: all problems at once, each with its line or its override.
    """
    document = read_document(Path(path))
    override(document, overrides)
    return dataclasses.replace(_sound(document, registry), path=Path(path))


def bind_recipe(mapping: Mapping[str, Any], registry: Registry, base: Path = Path()) -> Recipe:
    """The recipe in plain data; relative paths start at ``base``.

    Raises:
        RecipeError: all problems at once, each with its dotted path.
    """
    return _sound(Document("the recipe", base, data=mapping), registry)


def _sound(document: Document, registry: Registry) -> Recipe:
    recipe = bind_document(document, registry)
    document.raise_problems()
    return recipe


def bind_document(document: Document, registry: Registry) -> Recipe:
    """The recipe in a document, which is sound if that has no problems afterwards."""
    binder = Binder(document, registry)
    binder.section((), TOP)
    version = binder.entry(("dernkit",), Choice((VERSION,)))
    seed = binder.entry(("seed",), SEED, DEFAULT_SEED)
    calibrate, plan, apply = bind_calibrate(binder, ("calibrate",)), _plan(binder), _apply(binder)
    evaluators = tuple(binder.component(("evaluate", i), "evaluator") for i in binder.entries(("evaluate",)))
    report = binder.component(("report",), "report", DEFAULT_REPORT)
    requires = _check_statistics(binder)
    _check_sequential(binder, calibrate, plan)
    return Recipe(version, seed, calibrate, plan, apply, evaluators, report, requires)


def bind_calibrate(binder: Binder, here: Keys, known: Sequence[str] = CALIBRATE) -> CalibrateSpec | None:
    """The `calibrate` section at ``here``, which may have the keys ``known``; None where there is none."""
    if not binder.section(here, known):
        return None
    return CalibrateSpec(
        source=binder.component((*here, "source"), "source"),
        sequences=binder.entry((*here, "sequences"), SEQUENCES),
        length=binder.entry((*here, "length"), LENGTH),
        batch_size=binder.entry((*here, "batch_size"), BATCH_SIZE, DEFAULT_BATCH_SIZE),
        sample=binder.entry((*here, "sample"), SAMPLE, DEFAULT_SAMPLE),
        holdout=binder.entry((*here, "holdout"), HOLDOUT, DEFAULT_HOLDOUT),
        sequential=binder.entry((*here, "sequential"), SEQUENTIAL, DEFAULT_SEQUENTIAL),
    )


def _plan(binder: Binder) -> PlanSpec:
    here: Keys = ("plan",)
    if not binder.section(here, PLAN):
        if binder.value(here) is None:
            binder.missing(here)
        return PlanSpec(1, None, None, None, None)  # type: ignore[arg-type]
    assigned = binder.value((*here, "assign")) is not None
    plan = PlanSpec(
        keep=binder.entry((*here, "keep"), Keep()),
        scorer=binder.component((*here, "score"), "scorer"),
        budget=binder.component((*here, "budget"), "budget", DEFAULT_BUDGET),
        selector=binder.component((*here, "select"), "selector", DEFAULT_SELECTOR),
        assigner=binder.component((*here, "assign"), "assigner") if assigned else None,
        groups=binder.entry((*here, "groups"), GROUPS, DEFAULT_GROUPS),
    )
    _check_groups(binder, plan)
    return plan


def _check_groups(binder: Binder, plan: PlanSpec) -> None:
    """An assigner that carries out groups needs a selector that makes them."""
    assigner, selector = plan.assigner, plan.selector
    if assigner is None or selector is None or not assigner.needs_groups or selector.groups:
        return
    selectors: dict[str, Any] = {each.name: each.cls for each in binder.registry.components("selector")}
    grouping = [name for name, cls in selectors.items() if cls.groups]
    binder.problem(
        ("plan", "assign"),
        f"'{assigner.name}' needs a selector that groups experts. Got '{selector.name}' instead. "
        f"Set plan.select; installed ones that group: {', '.join(grouping) or 'none'}.",
    )


def _apply(binder: Binder) -> ApplySpec:
    here: Keys = ("apply",)
    binder.section(here, APPLY)
    merged = binder.value((*here, "merge")) is not None
    assigned = binder.value(("plan", "assign")) is not None
    if assigned and not merged:
        binder.problem(
            ("plan", "assign"),
            "assign moves segments: apply.merge must say how they are merged. Got nothing instead. "
            "Add apply.merge, or leave out plan.assign to prune only.",
        )
    if merged and not assigned:
        binder.problem(
            (*here, "merge"),
            "merge needs segments that move: plan.assign must say which. Got nothing instead. "
            "Add plan.assign, or leave out apply.merge to prune only.",
        )
    return ApplySpec(
        merge=binder.component((*here, "merge"), "merge") if merged else None,
        router=binder.component((*here, "router"), "router", DEFAULT_ROUTER),
        refit=binder.component((*here, "refit"), "refit") if binder.value((*here, "refit")) is not None else None,
        width=binder.entry((*here, "width"), WIDTH) if binder.value((*here, "width")) is not None else None,
        mtp=binder.entry((*here, "mtp"), MTP, DEFAULT_MTP),
        export=binder.entry((*here, "export"), EXPORT, DEFAULT_EXPORT),
    )


def _check_statistics(binder: Binder) -> frozenset[str]:
    """The union of what all bound components read; without calibration it must be empty."""
    if binder.value(("calibrate",)) is None:
        for name, needed in binder.requires:
            if needed:
                found = f"'{name}' reads {', '.join(sorted(needed))}"
                binder.problem(("calibrate",), f"must be given, because {found}. Got nothing instead.")
                break
    return frozenset().union(*(needed for _, needed in binder.requires))


def _check_sequential(binder: Binder, calibrate: CalibrateSpec | None, plan: PlanSpec) -> None:
    """A layer is decided on when the later ones have not run yet."""
    if calibrate is not None and calibrate.sequential and plan.budget is not None and plan.budget.needs_measures:
        binder.problem(
            ("calibrate", "sequential"),
            f"sequential needs a budget that knows its counts before any layer has run. Got '{plan.budget.name}', "
            f"which looks at all layers first, instead. Use {{use: {DEFAULT_BUDGET}}}, or leave out sequential.",
        )
