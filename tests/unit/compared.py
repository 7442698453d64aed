"""Made-up measurements with planted effects, as observations, panels and rows of a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dernkit.compare.rows import ORIGINAL, LayerFacts, Row
from dernkit.compare.statistics import Floats
from dernkit.observations import Observations

METRIC = "perplexity/bits_per_byte"


@dataclass(frozen=True, slots=True)
class Spread:
    """Standard deviations of a recipe's harm over documents, over seeds, and over both at once."""

    documents: float = 0.1
    seeds: float = 0.01
    both: float = 0.02


def observe(rates: Floats, weights: Floats, *, groups: int = 4, higher: bool = False) -> Observations:
    """One rate for each document, which the domains share evenly."""
    names = tuple(f"{i:04}" for i in range(len(rates)))
    return Observations(
        names, tuple(f"domain {i % groups}" for i in range(len(rates))), rates * weights, weights, higher
    )


def layer(error: float | None) -> LayerFacts:
    return LayerFacts(1, 4, (0, 2), (0.5, 0.1, 0.3, 0.1), (0.9, 0.4, 0.5, 0.2), (0, 3), (), error)


def row(recipe: str, seen: Observations | None, **changes: object) -> Row:
    """A row with ``seen`` as its only metric; refused without it."""
    fields: dict[str, object] = {"model": "tiny", "keep": 0.5, "calibration": "mixed", "seed": 0}
    if recipe == ORIGINAL:
        fields |= {"keep": 1.0, "calibration": ""}
    fields |= {"key": "", "recipe": recipe, "parameters": 10, "bytes": 20, "expert_bytes": 8, "moved": 0.25}
    fields["refused"] = "" if seen else "plan.keep: must be 2. Got 3 instead. Keep 2."
    fields["observations"] = {METRIC: seen} if seen else {}
    return Row(**(fields | changes))  # type: ignore[arg-type]


def comparison(
    harms: Mapping[str, float],
    *,
    places: Mapping[str, tuple[float, ...]] | None = None,
    seeds: tuple[int, ...] = (0, 1, 2),
    documents: int = 120,
    spread: Spread | None = None,
    higher: bool = False,
) -> list[Row]:
    """An original and all recipes, with the mean harm of each, on models at their ratios."""
    spread = spread or Spread()
    rng = np.random.default_rng(0)
    sign = -1.0 if higher else 1.0
    rows = []
    for model, ratios in (places or {"tiny": (0.5,)}).items():
        weights = rng.uniform(50, 500, documents)
        base = rng.normal(1.5, 0.4, documents)
        rows.append(row(ORIGINAL, observe(base, weights, higher=higher), model=model))
        for keep in ratios:
            for recipe, harm in harms.items():
                each = harm + rng.normal(0, spread.documents, documents)
                for seed in seeds:
                    luck = rng.normal(0, spread.seeds) + rng.normal(0, spread.both, documents)
                    seen = observe(base + sign * (each + luck), weights, higher=higher)
                    facts = (layer(0.5), layer(None), layer(1.0))
                    rows.append(row(recipe, seen, model=model, keep=keep, seed=seed, layers=facts))
    return rows
