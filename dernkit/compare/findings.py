"""What the analysis of a comparison finds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dernkit.compare.ranks import Ranking
from dernkit.compare.statistics import Interval

Verdict = Literal["better", "worse", "undecided"]


@dataclass(frozen=True, slots=True)
class Cell:
    """A recipe on one model with one ratio and calibration set, over its seeds."""

    model: str
    keep: float
    calibration: str
    recipe: str
    seeds: int
    """Measured ones: 0 where every seed was refused. An original has 1."""
    documents: int
    value: Interval | None
    """The metric; None where nothing was measured. Wide, as it is for other documents too: see ``rise``."""
    rise: Interval | None
    """The metric less the original's on the same documents; damage is below 0 where higher is better. Originals: 0."""
    by_group: Mapping[str, float]
    """``rise`` in each domain or task; empty where nothing was measured."""
    parameters: int
    bytes: int
    expert_bytes: int
    moved: float
    layer_error: float | None
    """Mean over layers and seeds; None if no layer has one."""
    refused: str
    """The first sentence with which a seed was refused; empty where none was."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One recipe against another one, or against the original, on one model with one ratio and calibration set."""

    model: str
    keep: float
    calibration: str
    recipe: str
    against: str
    difference: Interval
    """The metric of ``recipe`` less that of ``against``, on the same documents."""
    p: float
    """Two-sided, of no difference."""
    p_adjusted: float
    """For all comparisons with the same ``against`` in one model, ratio and calibration set (Holm)."""
    documents: int
    seeds: int
    """The fewer of both; 1: the interval says nothing about other calibrations."""
    verdict: Verdict
    """What ``recipe`` is, by ``p_adjusted`` below 0.05 and whether higher is better."""
    recovered: Interval | None
    """Share of the damage of ``against`` that ``recipe`` takes back, 1 = all; None without significant damage."""


@dataclass(frozen=True, slots=True)
class Analysis:
    """All that a report says about one metric."""

    metric: str
    higher_is_better: bool
    baseline: str
    originals: tuple[Cell, ...]
    """The models as they are, in the order of the rows."""
    cells: tuple[Cell, ...]
    """All others, in the order of the rows, refused ones included."""
    against_original: tuple[Comparison, ...]
    against_baseline: tuple[Comparison, ...]
    """All recipes but the baseline, where the baseline was measured."""
    ranking: Ranking | None
    """None with fewer than three recipes or two blocks."""
    unmeasured: tuple[str, ...]
    """Models of which no row has the metric: they are in none of the above."""
    sentence: str
    """It all in a few sentences, as plain text."""
