"""Everything that takes part in a run: the recipe's components, those nested in them, and what explains the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from dernkit.components import Component
from dernkit.recipe import Recipe
from dernkit.registry import Registry

DECIDING = ("scorer", "budget", "selector", "assigner", "similarity")
"""Kinds that make plans."""
ACTING = ("merge", "router", "refit")
"""Kinds that carry them out."""


@dataclass(frozen=True, slots=True)
class Parts:
    """A recipe and where its components come from."""

    recipe: Recipe
    registry: Registry
    architecture: Component | None
    """That of the model, where a plugin brings it."""

    def adapters(self) -> list[Any]:
        """One of every registered adapter."""
        return [component.cls() for component in self.registry.components("adapter")]

    def components(self) -> list[Component]:
        """Registered components of everything that the recipe uses, nested ones included, by kind and name."""
        recipe = self.recipe
        parts = [*named(recipe), ("report", recipe.report)]
        parts += [("evaluator", evaluator) for evaluator in recipe.evaluators]
        parts += [("source", recipe.calibrate.source)] if recipe.calibrate else []
        parts += [("adapter", adapter) for adapter in self.adapters()]
        used = {*components_of(self.registry, parts), *([self.architecture] if self.architecture else [])}
        return sorted(used, key=lambda component: (component.kind, component.name))

    def readers(self) -> list[tuple[str, str, frozenset[str]]]:
        """Kind and name of all that decides and acts, and the statistics that it reads, nested ones' included."""
        return [(kind, part.name, self.registry.requires(kind, part)) for kind, part in named(self.recipe)]

    def versions(self, *kinds: str) -> list[Any]:
        """What makes a stage's code: dernkit's version and those of the plugins that take part (the model's does)."""
        taking_part = [c.provenance for c in self.components() if c.kind in (*kinds, "architecture")]
        return [metadata.version("dernkit"), sorted({f"{p.distribution} {p.version}" for p in taking_part})]

    def origins(self) -> list[dict[str, Any]]:
        """The components with plugin, version and file, as plain data."""
        return [
            asdict(c.provenance) | {"file": Path(c.provenance.file).name, "kind": c.kind, "name": c.name}
            for c in self.components()
        ]


def named(recipe: Recipe) -> list[tuple[str, Any]]:
    """Kind and instance of all that decides and acts in a recipe, nested ones left out."""
    plan, apply = recipe.plan, recipe.apply
    parts: list[tuple[str, Any]] = [("scorer", plan.scorer), ("budget", plan.budget), ("selector", plan.selector)]
    parts += [("assigner", plan.assigner), ("merge", apply.merge), ("router", apply.router), ("refit", apply.refit)]
    return [(kind, part) for kind, part in parts if part is not None]


def components_of(registry: Registry, parts: Sequence[tuple[str, Any]]) -> set[Component]:
    """Registered components of instances, by their kind, nested ones included."""
    left, used = list(parts), set()
    while left:
        kind, part = left.pop()
        component = registry.get(kind, part.name)
        used.add(component)
        nested = [(option.nested, getattr(part, option.name)) for option in component.options if option.nested]
        left += [(kind, inner) for kind, inner in nested if kind and inner is not None]
    return used
