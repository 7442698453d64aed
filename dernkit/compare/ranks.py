"""Ranks of recipes across models, ratios and calibration sets."""

from __future__ import annotations

from dataclasses import dataclass


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
    """Largest runs of at least two recipes that do not differ; they may overlap."""
