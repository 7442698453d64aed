"""Ranks of recipes across models, ratios and calibration sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

LEVEL = 0.05


@dataclass(frozen=True, slots=True)
class Ranking:
    """Recipes ranked in each block (model, ratio, calibration set); rank 1 is best, ties share their mean."""

    recipes: tuple[str, ...]
    """From the best mean rank to the worst: those measured in every block."""
    mean_ranks: tuple[float, ...]
    """In the order of ``recipes``."""
    blocks: int
    left_out: tuple[str, ...]
    """Recipes that are missing or refused in a block."""
    p: float
    """Of Friedman's test that all recipes are alike."""
    critical_difference: float
    """Nemenyi's at 5 %: mean ranks closer than this do not differ."""
    cliques: tuple[tuple[str, ...], ...]
    """Largest runs of at least two recipes that do not differ; they may overlap. All where ``p`` is not below 5 %."""


def rank(blocks: Sequence[Mapping[str, float]], *, higher_is_better: bool) -> Ranking | None:
    """Friedman's test with Nemenyi's critical difference, as in Demšar (2006), on the recipes of all blocks.

    Args:
        blocks: recipe -> metric, of each block.

    Returns:
        None with fewer than three such recipes, or one block.
    """
    seen = list(dict.fromkeys(recipe for block in blocks for recipe in block))
    everywhere = [recipe for recipe in seen if all(recipe in block for block in blocks)]
    if len(everywhere) < 3 or len(blocks) < 2:
        return None
    metric = np.asarray([[block[recipe] for recipe in everywhere] for block in blocks])
    ranks = stats.rankdata(-metric if higher_is_better else metric, axis=1).mean(axis=0)
    order = np.argsort(ranks, kind="stable")
    recipes = tuple(everywhere[i] for i in order)
    p = _friedman(metric)
    difference = critical_difference(len(recipes), len(blocks))
    mean_ranks = tuple(float(ranks[i]) for i in order)
    return Ranking(
        recipes=recipes,
        mean_ranks=mean_ranks,
        blocks=len(blocks),
        left_out=tuple(recipe for recipe in seen if recipe not in everywhere),
        p=p,
        critical_difference=difference,
        cliques=_cliques(recipes, mean_ranks, difference) if p < LEVEL else (recipes,),
    )


def critical_difference(recipes: int, blocks: int) -> float:
    """Nemenyi's at 5 %: by which two mean ranks must differ."""
    quantile = float(stats.studentized_range.ppf(1 - LEVEL, recipes, np.inf))
    return float(quantile / 2**0.5 * (recipes * (recipes + 1) / (6 * blocks)) ** 0.5)


def _friedman(metric: NDArray[np.float64]) -> float:
    """p of the blocks × recipes; 1 where every block ties all recipes, for which the statistic is 0 / 0."""
    if (metric == metric[:, :1]).all():
        return 1.0
    return float(stats.friedmanchisquare(*metric.T).pvalue)


def _cliques(recipes: tuple[str, ...], ranks: tuple[float, ...], difference: float) -> tuple[tuple[str, ...], ...]:
    found: list[tuple[str, ...]] = []
    reached = 0
    for first in range(len(recipes)):
        end = max(i for i in range(first, len(recipes)) if ranks[i] - ranks[first] < difference) + 1
        if end > reached and end - first > 1:
            found.append(recipes[first:end])
        reached = max(reached, end)
    return tuple(found)
