"""Damage in each domain of text or task."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dernkit.compare.findings import Cell
from dernkit.compare.report.drawing import DIVERGING, SEQUENTIAL, Picture, draw, heat, margin, short, slug
from dernkit.compare.report.inputs import Block, Results
from dernkit.compare.report.words import left_out

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RECIPES, DOMAINS = 20, 16


def domains(results: Results) -> Iterator[Picture]:
    """A picture a block: recipe × domain, the best recipe first."""
    for block in results.blocks:
        cells = [cell for cell in results.sorted_cells(block) if cell.by_group]
        names = sorted({name for cell in cells for name in cell.by_group})
        if len(names) > 1:
            yield _picture(results, block, cells, names)


def _picture(results: Results, block: Block, cells: list[Cell], names: list[str]) -> Picture:
    chosen = _shown(cells, results.analysis.baseline)
    values = np.array([[results.worse * cell.by_group.get(name, np.nan) for name in names] for cell in chosen])
    # What is damaged most stands first, and what does not fit is the least damaged.
    order = np.argsort(-np.nanmean(values, axis=0), kind="stable")[:DOMAINS]
    labels = [short(cell.recipe) for cell in chosen]
    values, columns = values[:, order], [short(names[i], 18) for i in order]

    def paint(figure: Figure, axes: Any) -> None:
        limits, cmap = _limits(values)
        image = heat(
            axes[0, 0],
            values,
            rows=labels,
            columns=columns,
            limits=limits,
            cmap=cmap,
            write="{:.3f}".format if len(columns) <= 12 else None,
        )
        word = "fall" if results.analysis.higher_is_better else "rise"
        figure.colorbar(image, ax=axes[0, 0], label=word, pad=0.02, aspect=max(15, 2 * len(chosen)))

    left = left_out(len(cells) - len(chosen), "recipe", " with more damage")
    left += left_out(len(names) - len(columns), "domain", " with less damage")
    title = f"{block.model}, {block.keep:.3g} of the experts, calibration {block.calibration}"
    return draw(
        slug("domains", block.model, block.keep, block.calibration),
        f"{title}: damage in each domain.{left}",
        paint,
        size=(max(3.9, 1.4 + 0.5 * len(columns)) + margin(labels), 1.3 + 0.27 * len(chosen)),
    )


def _shown(cells: list[Cell], baseline: str) -> list[Cell]:
    """The best ones, and the baseline in any case."""
    chosen, rest = cells[:RECIPES], cells[RECIPES:]
    last = [cell for cell in rest if cell.recipe == baseline]
    return [*chosen[: RECIPES - len(last)], *last]


def _limits(values: NDArray[np.float64]) -> tuple[tuple[float, float], str]:
    """One hue from 0 where all is damage; two, with 0 in the middle, where some of it is gain."""
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if low < -0.05 * max(high, 1e-12):
        end = max(-low, high)
        return (-end, end), DIVERGING
    return (min(low, 0.0), max(high, 1e-9)), SEQUENTIAL
