"""Components that do nothing, with the names and options of real ones: what recipe tests bind."""

import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, ClassVar, Literal

import pytest
from annotated_types import Ge, Gt, Interval, Le

from dernkit.api import RecipeError, Similarity, hookimpl
from dernkit.recipe import load_recipe
from dernkit.registry import Registry

RECIPE = """\
dernkit: 1
calibrate: {source: {use: text-file, path: calib.txt}, sequences: 128, length: 2048}
plan:
  keep: 0.5
  score: {use: gate-mass}
  assign: {use: affinity, threshold: 0.6}
apply: {merge: {use: spherical-kmeans}}
"""


@functools.cache
def toy_registry() -> Registry:
    """A registry with nothing but the components below."""
    registry = Registry()
    registry.register(sys.modules[__name__], "toys")
    return registry


def plugin_of(hook: str, *classes: Any) -> ModuleType:
    """A plugin that provides these classes through one hook."""
    module = ModuleType("mine")

    def provide() -> list[Any]:
        return list(classes)

    provide.__name__ = hook
    setattr(module, hook, hookimpl(provide))
    return module


def problems(folder: Path, text: str | bytes, *overrides: str) -> list[str]:
    """The lines that loading ``bad.yaml`` with this text prints."""
    path = folder / "bad.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, toy_registry(), overrides)
    return str(caught.value).replace(f"{folder}/", "").split("\n")


@dataclass(frozen=True, slots=True)
class GateMass:
    """Total router weight."""

    name: ClassVar[str] = "gate-mass"
    requires: ClassVar[frozenset[str]] = frozenset({"gate_sum"})

    def score(self, bank: Any, stats: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Reap:
    name: ClassVar[str] = "reap"
    requires: ClassVar[frozenset[str]] = frozenset({"reap_sum", "routed"})

    def score(self, bank: Any, stats: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Weights:
    name: ClassVar[str] = "weights"
    requires: ClassVar[frozenset[str]] = frozenset()
    power: Annotated[float, Gt(0), Le(4)] = 1.0
    """Exponent of the norm."""

    def score(self, bank: Any, stats: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Uniform:
    name: ClassVar[str] = "uniform"
    requires: ClassVar[frozenset[str]] = frozenset()
    needs_measures: ClassVar[bool] = False

    def measure(self, bank: Any, scores: Any, stats: Any) -> Any: ...

    def allocate(self, measures: Any, keep: Any, limits: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class TopScore:
    name: ClassVar[str] = "top-score"
    requires: ClassVar[frozenset[str]] = frozenset()
    groups: ClassVar[bool] = False

    def select(self, bank: Any, scores: Any, count: Any, stats: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Cosine:
    name: ClassVar[str] = "cosine"
    requires: ClassVar[frozenset[str]] = frozenset()
    parts: tuple[Literal["gate", "up", "down"], ...] = ("up", "down")

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("must compare at least one part. Got none instead.")

    def match(self, bank: Any, dropped: Any, kept: Any, stats: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class OnSample:
    name: ClassVar[str] = "on-sample"
    requires: ClassVar[frozenset[str]] = frozenset({"sample"})

    def match(self, bank: Any, dropped: Any, kept: Any, stats: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Affinity:
    name: ClassVar[str] = "affinity"
    requires: ClassVar[frozenset[str]] = frozenset()
    needs_groups: ClassVar[bool] = False
    similarity: Similarity = Cosine()
    threshold: Annotated[float, Interval(ge=-1, le=1)] = 0.6
    quantile: Annotated[float, Interval(ge=0.0, le=1.0)] | None = None

    def assign(self, bank: Any, retention: Any, stats: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class SphericalKmeans:
    name: ClassVar[str] = "spherical-kmeans"
    requires: ClassVar[frozenset[str]] = frozenset()
    widens: ClassVar[bool] = False
    iterations: Annotated[int, Ge(1), Le(1000)] = 30

    def merge(self, pool: Any, width: Any, rng: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Slice:
    name: ClassVar[str] = "slice"
    requires: ClassVar[frozenset[str]] = frozenset()

    def update(self, rows: Any, plan: Any, stats: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Additive:
    name: ClassVar[str] = "additive"
    requires: ClassVar[frozenset[str]] = frozenset()

    def update(self, rows: Any, plan: Any, stats: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class TextFile:
    name: ClassVar[str] = "text-file"
    path: Path

    def tokens(self, tokenizer: Any, sequences: Any, length: Any, rng: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class LmEval:
    name: ClassVar[str] = "lm-eval"
    tasks: tuple[str, ...]
    verbose: bool = False

    def evaluate(self, subject: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Perplexity:
    name: ClassVar[str] = "perplexity"
    path: Path

    def evaluate(self, subject: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Markdown:
    name: ClassVar[str] = "markdown"
    filename: ClassVar[str] = "report.md"

    def render(self, run: Any) -> Any: ...


@hookimpl
def dernkit_scorers() -> list[type]:
    return [GateMass, Reap, Weights]


@hookimpl
def dernkit_budgets() -> list[type]:
    return [Uniform]


@hookimpl
def dernkit_selectors() -> list[type]:
    return [TopScore]


@hookimpl
def dernkit_assigners() -> list[type]:
    return [Affinity]


@hookimpl
def dernkit_similarities() -> list[type]:
    return [Cosine, OnSample]


@hookimpl
def dernkit_merges() -> list[type]:
    return [SphericalKmeans]


@hookimpl
def dernkit_routers() -> list[type]:
    return [Slice, Additive]


@hookimpl
def dernkit_sources() -> list[type]:
    return [TextFile]


@hookimpl
def dernkit_evaluators() -> list[type]:
    return [LmEval, Perplexity]


@hookimpl
def dernkit_reports() -> list[type]:
    return [Markdown]
