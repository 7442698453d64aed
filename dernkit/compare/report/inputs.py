"""What a report is made from: the rows of a comparison, what they say about one metric, and its stability."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dernkit.compare.analysis import analyse
from dernkit.compare.findings import Analysis, Cell, Comparison
from dernkit.compare.rows import ORIGINAL, Row, read_rows
from dernkit.errors import CheckpointError

RESULTS, STABILITY = "results.parquet", "stability.json"


@dataclass(frozen=True, slots=True)
class Point:
    """One layer's scores from a part of the calibration tokens, against those from all tokens."""

    model: str
    calibration: str
    scorer: str
    seed: int
    layer: int
    tokens: int
    """Calibration tokens in this part."""
    overlap: float
    """Share of the experts kept with all tokens that are kept with these."""
    spearman: float
    """Rank correlation of the scores."""


@dataclass(frozen=True, slots=True)
class Block:
    """Cells that stand side by side: one model, ratio and calibration set."""

    model: str
    keep: float
    calibration: str


@dataclass(frozen=True, slots=True)
class Results:
    """Everything a report shows."""

    rows: tuple[Row, ...]
    analysis: Analysis
    stability: tuple[Point, ...]

    @property
    def models(self) -> tuple[str, ...]:
        """In the order of the rows."""
        return tuple(dict.fromkeys(row.model for row in self.rows))

    @property
    def recipes(self) -> tuple[str, ...]:
        """In the order of the rows, without the original."""
        return tuple(dict.fromkeys(row.recipe for row in self.rows if row.recipe != ORIGINAL))

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Those with a measured cell, in the order of the rows."""
        return tuple(dict.fromkeys(block_of(cell) for cell in self.analysis.cells if cell.value))

    def original(self, model: str) -> Row | None:
        return next((row for row in self.rows if row.model == model and row.recipe == ORIGINAL), None)

    def damage(self, cell: Cell) -> float:
        """How much worse than the original: above 0 is worse, whichever way the metric goes."""
        assert cell.rise is not None
        return cell.rise.estimate * self.worse

    @property
    def worse(self) -> int:
        """1 where a higher metric is worse, else −1."""
        return -1 if self.analysis.higher_is_better else 1

    def sorted_cells(self, block: Block) -> list[Cell]:
        """The measured cells of a block, the best first; ties by their names."""
        cells = [cell for cell in self.analysis.cells if cell.rise and block_of(cell) == block]
        return sorted(cells, key=lambda cell: (self.damage(cell), cell.recipe))

    def best_recipes(self, count: int) -> tuple[str, ...]:
        """The baseline and the recipes with the least mean share of each block's largest damage, best first."""
        shares: dict[str, list[float]] = {}
        for block in self.blocks:
            cells = self.sorted_cells(block)
            largest = max(abs(self.damage(cell)) for cell in cells) or 1.0
            for cell in cells:
                shares.setdefault(cell.recipe, []).append(self.damage(cell) / largest)
        order = sorted(shares, key=lambda name: (sum(shares[name]) / len(shares[name]), name))
        chosen = order[:count]
        if self.analysis.baseline in order[count:]:
            chosen[-1] = self.analysis.baseline
        return tuple(chosen)

    def sample_rows(self, model: str) -> Iterator[Row]:
        """One row for each recipe and ratio of a model: the first calibration set and seed that was measured."""
        seen = set()
        for row in self.rows:
            cell = (row.recipe, row.keep)
            if row.model == model and row.recipe != ORIGINAL and row.layers and cell not in seen:
                seen.add(cell)
                yield row


def block_of(one: Cell | Comparison) -> Block:
    return Block(one.model, one.keep, one.calibration)


def read(out: Path, *, metric: str, baseline: str) -> Results:
    """What a comparison left in ``out``.

    Raises:
        CheckpointError: there are no results, or a file is something else.
        RecipeError: the metric or the baseline is not among the results.
    """
    rows = tuple(read_rows(out / RESULTS))
    file = out / STABILITY
    return Results(rows, analyse(rows, metric=metric, baseline=baseline), _points(file) if file.exists() else ())


def _points(file: Path) -> tuple[Point, ...]:
    """``{"points": [{"model": …, "calibration": …, …}]}``, with the fields of `Point`."""
    try:
        content: Mapping[str, Sequence[Mapping[str, Any]]] = json.loads(file.read_bytes())
        return tuple(Point(**{name: item[name] for name in Point.__slots__}) for item in content["points"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file}: must hold the stability of a comparison. Got '{type(error).__name__}: {error}' instead. "
            f"Run the comparison again."
        ) from None
