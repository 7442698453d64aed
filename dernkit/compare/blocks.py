"""Rows that are compared with each other: one model, ratio and calibration set, with the original's row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dernkit.compare.rows import ORIGINAL, Row
from dernkit.compare.statistics import Panel, Side, panel
from dernkit.errors import CheckpointError, RecipeError
from dernkit.sentences import did_you_mean


@dataclass(frozen=True, slots=True)
class Place:
    """Where recipes are compared."""

    model: str
    keep: float
    calibration: str

    def __str__(self) -> str:
        return f"{self.model} at keep {self.keep:g} ({self.calibration})"


@dataclass(frozen=True, slots=True)
class Block:
    """All rows of one place, and what was measured there."""

    place: Place
    rows: Mapping[str, Sequence[Row]]
    """Recipe -> its rows in their order, refused ones included; not `ORIGINAL`."""
    panel: Panel
    sides: Mapping[str, Side]
    """Recipe -> seed -> measurement of the panel; `ORIGINAL` included, recipes that were refused left out."""
    higher_is_better: bool

    @property
    def documents(self) -> int:
        return sum(self.panel.documents)

    @property
    def worse(self) -> float:
        """The sign of a change for the worse."""
        return -1.0 if self.higher_is_better else 1.0


def find_originals(rows: Sequence[Row], metric: str) -> dict[str, Row]:
    """Model -> the row of its original, of all models that the metric was measured on.

    Raises:
        RecipeError: no row has the metric.
        CheckpointError: a model's original has not been measured.
    """
    known = {name for row in rows for name in row.observations}
    if metric not in known:
        names = ", ".join(sorted(known)) or "there is none"
        raise RecipeError(
            f"metric: must be one that was measured document by document ({names}). "
            f"Got '{metric}' instead. {did_you_mean(metric, known) or 'Choose one of these.'}"
        )
    found: dict[str, Row] = {}
    for model in dict.fromkeys(row.model for row in rows if metric in row.observations):
        originals = [row for row in rows if row.model == model and row.recipe == ORIGINAL]
        if len(originals) != 1 or metric not in originals[0].observations:
            got = f"{len(originals)} of them" if len(originals) != 1 else "one without it"
            raise CheckpointError(
                f"{model}: must have one row '{ORIGINAL}' with {metric}, which damage is measured from. "
                f"Got {got} instead. Run the comparison again."
            )
        found[model] = originals[0]
    return found


def make_blocks(rows: Sequence[Row], originals: Mapping[str, Row], metric: str) -> list[Block]:
    """The rows of models with originals by place, in the order of the rows.

    Raises:
        CheckpointError: rows that cannot be compared.
    """
    by_place: dict[Place, list[Row]] = {}
    for row in rows:
        if row.recipe != ORIGINAL and row.model in originals:
            by_place.setdefault(Place(row.model, row.keep, row.calibration), []).append(row)
    return [make_block(place, some, originals[place.model], metric) for place, some in by_place.items()]


def make_block(place: Place, rows: Sequence[Row], original: Row, metric: str) -> Block:
    """The rows of one place.

    Raises:
        CheckpointError: rows without the metric, of other documents, or twice the same recipe and seed.
    """
    by_recipe: dict[str, list[Row]] = {}
    sides: dict[str, dict[int | None, int]] = {ORIGINAL: {None: 0}}
    seen = [original.observations[metric]]
    for row in rows:
        where = f"{place}: {row.recipe}, seed {row.seed}"
        by_recipe.setdefault(row.recipe, []).append(row)
        if row.refused:
            continue
        side = sides.setdefault(row.recipe, {})
        if row.seed in side or metric not in row.observations:
            got = "two rows" if row.seed in side else f"one without {metric}"
            raise CheckpointError(
                f"{where}: must have one row, measured like the original. Got {got} instead. Run the comparison again."
            )
        side[row.seed] = len(seen)
        seen.append(row.observations[metric])
    measured = panel(seen, where=f"{place}, {metric}")
    return Block(place, by_recipe, measured, sides, original.observations[metric].higher_is_better)
