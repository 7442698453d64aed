"""What the rows of a comparison say about one metric: damage, differences from a baseline, and ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from dernkit.compare.blocks import Block, Place, find_originals, make_block, make_blocks
from dernkit.compare.findings import Analysis, Cell, Comparison, Verdict
from dernkit.compare.ranks import Ranking, rank
from dernkit.compare.rows import ORIGINAL, Row
from dernkit.compare.statistics import Interval, estimate, holm, panel, recovered
from dernkit.compare.summary import summary
from dernkit.errors import RecipeError
from dernkit.sentences import did_you_mean

__all__ = ["Analysis", "Cell", "Comparison", "Interval", "Ranking", "analyse", "compare_pair"]

LEVEL = 0.05
ROUNDING = 1e-6
"""Differences below this share of the metric are those of float32 arithmetic."""


def analyse(rows: Iterable[Row], *, metric: str, baseline: str) -> Analysis:
    """Damage, differences from the baseline and ranks of all recipes.

    Raises:
        RecipeError: no row has the metric, or the baseline is not among the recipes.
        CheckpointError: a model has no row of its original, or rows that are compared saw different documents.
    """
    rows = list(rows)
    originals = find_originals(rows, metric)
    _known("baseline", baseline, {row.recipe for row in rows} - {ORIGINAL})
    cells: list[Cell] = []
    against: dict[str, list[Comparison]] = {ORIGINAL: [], baseline: []}
    ranked: dict[Place, dict[str, float]] = {}
    for block in make_blocks(rows, originals, metric):
        cells += [_cell(block, recipe) for recipe in block.rows]
        measured = [recipe for recipe in block.sides if recipe != ORIGINAL]
        ranked[block.place] = {recipe: _value(block, recipe) for recipe in measured}
        for other, comparisons in against.items():
            if other in block.sides:
                family = [_compare(block, recipe, other) for recipe in measured if recipe != other]
                comparisons += _corrected(family, block)
    higher = next(row.observations[metric].higher_is_better for row in originals.values())
    parts = Analysis(
        metric=metric,
        higher_is_better=higher,
        baseline=baseline,
        originals=tuple(_original(row, metric) for row in originals.values()),
        cells=tuple(cells),
        against_original=tuple(against[ORIGINAL]),
        against_baseline=tuple(against[baseline]),
        ranking=rank(list(ranked.values()), higher_is_better=higher),
        unmeasured=tuple(dict.fromkeys(row.model for row in rows if row.model not in originals)),
        sentence="",
    )
    return replace(parts, sentence=summary(parts))


def compare_pair(
    rows: Iterable[Row], *, model: str, keep: float, calibration: str, metric: str, recipe: str, against: str
) -> Comparison:
    """One comparison by itself, so without a correction; ``against`` may be `rows.ORIGINAL`.

    Raises:
        RecipeError: one of the names is not among the rows, or a recipe was refused.
        CheckpointError: the model has no row of its original, or the rows saw different documents.
    """
    rows = list(rows)
    _known("model", model, {row.model for row in rows})
    place = Place(model, keep, calibration)
    found = find_originals([row for row in rows if row.model == model], metric)
    there = [row for row in rows if (row.model, row.keep, row.calibration) == (model, keep, calibration)]
    for name in (recipe, against):
        _known(f"{place}: recipe", name, {row.recipe for row in there} | {ORIGINAL})
    chosen = [row for row in there if row.recipe in (recipe, against) and row.recipe != ORIGINAL]
    block = make_block(place, chosen, found[model], metric)
    for name in (recipe, against):
        if name not in block.sides:
            raise RecipeError(
                f"{place}: {name}: must have been measured. Got '{block.rows[name][0].refused}' instead. "
                f"Compare another recipe."
            )
    return _corrected([_compare(block, recipe, against)], block)[0]


def _known(where: str, name: str, known: set[str]) -> None:
    if name not in known:
        raise RecipeError(
            f"{where}: must be one of {', '.join(sorted(known)) or 'some rows'}. Got '{name}' instead. "
            f"{did_you_mean(name, known) or 'Choose one of these.'}"
        )


def _value(block: Block, recipe: str) -> float:
    """The metric, mean of the seeds."""
    return float(block.panel.values[list(block.sides[recipe].values())].mean())


def _compare(block: Block, recipe: str, against: str) -> Comparison:
    """Without correction and verdict."""
    one, other = block.sides[recipe], block.sides[against]
    found = estimate(block.panel, [(1.0, one), (-1.0, other)])
    share = None
    if ORIGINAL not in (recipe, against):
        share = recovered(block.panel, one, other, block.sides[ORIGINAL], worse=block.worse)
    return Comparison(
        model=block.place.model,
        keep=block.place.keep,
        calibration=block.place.calibration,
        recipe=recipe,
        against=against,
        difference=found.interval,
        p=found.p,
        p_adjusted=1.0,
        documents=block.documents,
        seeds=found.seeds,
        verdict="undecided",
        recovered=share,
    )


def _corrected(family: Sequence[Comparison], block: Block) -> list[Comparison]:
    adjusted = holm([comparison.p for comparison in family])
    return [
        replace(comparison, p_adjusted=p, verdict=_verdict(comparison, p, block))
        for comparison, p in zip(family, adjusted, strict=True)
    ]


def _verdict(comparison: Comparison, p: float, block: Block) -> Verdict:
    difference = comparison.difference.estimate
    if p >= LEVEL or abs(difference) <= ROUNDING * abs(_value(block, comparison.against)):
        return "undecided"
    return "worse" if difference * block.worse > 0 else "better"


def _cell(block: Block, recipe: str) -> Cell:
    rows, side = block.rows[recipe], block.sides.get(recipe)
    done = [row for row in rows if not row.refused]
    value = rise = None
    by_group: dict[str, float] = {}
    if side is not None:
        value = estimate(block.panel, [(1.0, side)])
        rise = estimate(block.panel, [(1.0, side), (-1.0, block.sides[ORIGINAL])])
        by_group = dict(zip(block.panel.groups, map(float, rise.by_group), strict=True))
    errors = [layer.error for row in done for layer in row.layers if layer.error is not None]
    return Cell(
        model=block.place.model,
        keep=block.place.keep,
        calibration=block.place.calibration,
        recipe=recipe,
        seeds=len(done),
        documents=block.documents,
        value=value.interval if value else None,
        rise=rise.interval if rise else None,
        by_group=by_group,
        parameters=round(np.mean([row.parameters for row in done or rows])),
        bytes=round(np.mean([row.bytes for row in done or rows])),
        expert_bytes=round(np.mean([row.expert_bytes for row in done or rows])),
        moved=float(np.mean([row.moved for row in done or rows])),
        layer_error=float(np.mean(errors)) if errors else None,
        refused=next((row.refused for row in rows if row.refused), ""),
    )


def _original(row: Row, metric: str) -> Cell:
    measured = panel([row.observations[metric]], where=f"{row.model}, {metric}")
    return Cell(
        model=row.model,
        keep=row.keep,
        calibration=row.calibration,
        recipe=ORIGINAL,
        seeds=1,
        documents=sum(measured.documents),
        value=estimate(measured, [(1.0, {None: 0})]).interval,
        rise=Interval(0.0, 0.0, 0.0),
        by_group=dict.fromkeys(measured.groups, 0.0),
        parameters=row.parameters,
        bytes=row.bytes,
        expert_bytes=row.expert_bytes,
        moved=row.moved,
        layer_error=None,
        refused="",
    )
