"""Quality against size: what a recipe costs and what it saves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dernkit.compare.findings import Cell
from dernkit.compare.report.drawing import FAINT, MARKERS, PALETTE, Picture, draw, short, slug
from dernkit.compare.report.inputs import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def pareto(results: Results) -> Iterator[Picture]:
    """A picture a model: damage with its interval against size, and the front that nothing beats on both."""
    drawn = results.best_recipes(len(PALETTE))
    for model in results.models:
        cells = [cell for cell in results.analysis.cells if cell.model == model and cell.rise]
        if cells:
            yield _picture(results, model, cells, drawn)


def _picture(results: Results, model: str, cells: list[Cell], drawn: tuple[str, ...]) -> Picture:
    def paint(figure: Figure, axes: Any) -> None:
        _panel(axes[0, 0], results, cells, drawn)
        figure.legend(loc="outside lower center", ncols=columns, fontsize=8, handletextpad=0.3, columnspacing=1)

    names = [short(name) for name in drawn]
    columns = 1 if max(map(len, names)) > 26 else 2
    rest = len({cell.recipe for cell in cells} - set(drawn))
    grey = (
        f" In colour: the best {len(drawn)} over all models and the baseline; the others, {rest}, in grey."
        if rest
        else ""
    )
    return draw(
        slug("pareto", model),
        f"{model}: quality against size. Bars are 95 % intervals of the difference from the original; the line is the "
        f"front that no other recipe beats in both. Lower and further left is better. "
        f"Points of one size stand side by side to be told apart.{grey}",
        paint,
        size=(4.6, 3.4 + 0.17 * -(-(len(names) + 1) // columns)),
    )


def _panel(axes: Axes, results: Results, cells: list[Cell], drawn: tuple[str, ...]) -> None:
    width = max(cell.bytes for cell in cells) / 1e6
    for place, name in enumerate((*drawn, None)):
        mine = [cell for cell in cells if (cell.recipe == name if name else cell.recipe not in drawn)]
        if not mine:
            continue
        # Recipes of one ratio have one size: side by side their bars can be told apart.
        shift = (place - len(drawn) / 2) * width * 0.004
        damages = [results.damage(cell) for cell in mine]
        ends = [sorted(results.worse * end for end in (cell.rise.low, cell.rise.high)) for cell in mine if cell.rise]
        below = [max(0.0, damage - end[0]) for damage, end in zip(damages, ends, strict=True)]
        above = [max(0.0, end[1] - damage) for damage, end in zip(damages, ends, strict=True)]
        axes.errorbar(
            [cell.bytes / 1e6 + shift for cell in mine],
            damages,
            yerr=[below, above],
            fmt=MARKERS[place % len(MARKERS)] if name else ".",
            color=PALETTE[place % len(PALETTE)] if name else FAINT,
            alpha=1.0 if name else 0.6,
            markersize=5,
            elinewidth=1 if name else 0,
            capsize=2 if name else 0,
            zorder=3 if name else 1,
            label=short(name) if name else "others",
        )
    front = _front(results, cells)
    axes.plot([size for size, _ in front], [damage for _, damage in front], color=FAINT, linewidth=1.2, zorder=2)
    axes.axhline(0, color=FAINT, linewidth=0.8, linestyle=":")
    axes.set(xlabel="size of the checkpoint (MB)", ylabel=_axis(results))


def _axis(results: Results) -> str:
    word = "fall" if results.analysis.higher_is_better else "rise"
    return f"{word} of {short(results.analysis.metric)}"


def _front(results: Results, cells: list[Cell]) -> list[tuple[float, float]]:
    """Size and damage of those that nothing smaller equals, and of the original."""
    points = [(cell.bytes / 1e6, results.damage(cell)) for cell in cells]
    models = {cell.model for cell in cells}
    points += [(cell.bytes / 1e6, 0.0) for cell in results.analysis.originals if cell.model in models]
    front: list[tuple[float, float]] = []
    for size, damage in sorted(points):
        if not front or damage < front[-1][1]:
            front.append((size, damage))
    return front
