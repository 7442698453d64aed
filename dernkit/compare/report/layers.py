"""What happened in each layer: expert use, scores and kept experts, moved segments, and the error of the output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from dernkit.compare.report.drawing import Picture, draw, heat, inner, margin, short, slug, thin
from dernkit.compare.report.inputs import Results
from dernkit.compare.report.words import left_out
from dernkit.compare.rows import LayerFacts, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS, RECIPES, DROPPED = 6, 20, "#8c8c8c66"
"""Heat maps of scores or moves of a model, and lines of a heat map of errors."""
Values = NDArray[np.float64]


def use(results: Results, model: str) -> Iterator[Picture]:
    """Share of the tokens that each expert of the original gets."""
    row = next((row for row in results.sample_rows(model) if all(layer.used for layer in row.layers)), None)
    if row is None:
        return
    values = _table(row.layers, lambda layer: layer.used)

    def paint(figure: Figure, axes: Any) -> None:
        image = _panel(axes[0, 0], row.layers, 100 * values, (0, 100 * float(np.nanmax(values))))
        figure.colorbar(image, ax=axes[0, 0], label="% of the tokens", pad=0.02)

    least = 100 * float(np.nanmin(values))
    yield draw(
        slug("use", model),
        f"{model}: use of the original's experts by calibration {row.calibration} (seed {row.seed}); the least used "
        f"expert gets {least:.2g} % of the tokens.",
        paint,
        size=(4.6, _height(len(row.layers))),
    )


def scores(results: Results, model: str) -> Iterator[Picture]:
    """Rank of each expert's score in its layer, the kept ones with a dot."""
    rows = _chosen(results, model, lambda row: all(layer.scores for layer in row.layers))
    if not rows:
        return

    def fill(axes: Any, row: Row) -> Any:
        image = _panel(axes, row.layers, _table(row.layers, _ranks), (0, 1))
        marks = [(expert, line) for line, layer in enumerate(row.layers) for expert in layer.kept]
        small = 14 if max(layer.experts for layer in row.layers) <= 16 else 5
        axes.scatter(*zip(*marks, strict=True), s=small, color="#ffffff", edgecolors="#111111", linewidths=0.6)
        return image

    yield _panels("scores", model, rows, fill, "score (rank in the layer)", "scores of the experts; dots: kept ones")


def moved(results: Results, model: str) -> Iterator[Picture]:
    """How many segments arrived at each kept expert."""
    rows = _chosen(results, model, lambda row: any(sum(layer.moved) for layer in row.layers))
    if not rows:
        return
    most = max(max(layer.moved, default=0) for row in rows for layer in row.layers)

    def fill(axes: Any, row: Row) -> Any:
        return _panel(axes, row.layers, _table(row.layers, _arrived), (0, most), bad=DROPPED)

    what = "segments that arrived at each kept expert; dropped experts are grey"
    yield _panels("moved", model, rows, fill, "segments", what)


def errors(results: Results, model: str) -> Iterator[Picture]:
    """Relative error of each layer's output, a picture a ratio: recipe × layer, mean over the seeds."""
    calibration = next((row.calibration for row in results.rows if row.model == model and row.calibration), "")
    mine = [row for row in results.rows if row.model == model and row.calibration == calibration]
    measured = [row for row in mine if row.layers and all(layer.error is not None for layer in row.layers)]
    for keep in dict.fromkeys(row.keep for row in measured):
        yield _errors(model, keep, calibration, [row for row in measured if row.keep == keep])


def _errors(model: str, keep: float, calibration: str, rows: Sequence[Row]) -> Picture:
    by_recipe: dict[str, list[list[float]]] = {}
    for row in rows:
        by_recipe.setdefault(row.recipe, []).append([layer.error or 0.0 for layer in row.layers])
    means = {name: np.mean(found, axis=0) for name, found in by_recipe.items()}
    order = sorted(means, key=lambda name: (float(means[name].mean()), name))
    chosen = order[:RECIPES]
    values = np.array([means[name] for name in chosen])
    layers, labels = [str(layer.layer) for layer in rows[0].layers], [short(name) for name in chosen]

    def paint(figure: Figure, axes: Any) -> None:
        image = heat(
            axes[0, 0],
            values,
            rows=labels,
            columns=layers,
            limits=(0, max(float(values.max()), 1e-9)),
            write="{:.2g}".format if len(layers) <= 12 else None,
        )
        axes[0, 0].set_xlabel("layer")
        figure.colorbar(image, ax=axes[0, 0], label="relative error", pad=0.02, aspect=max(15, 2 * len(chosen)))

    left = left_out(len(order) - len(chosen), "recipe", " with larger errors")
    return draw(
        slug("error", model, keep),
        f"{model}, {keep:.3g} of the experts: squared error of each layer's routed output over that output's square, "
        f"mean over the seeds, calibration {calibration}.{left}",
        paint,
        size=(3.4 + margin(labels), 1.2 + 0.27 * len(chosen)),
    )


def _chosen(results: Results, model: str, fits: Callable[[Row], bool]) -> list[Row]:
    """Rows of the best recipes at the smallest ratio of a model."""
    rows = [row for row in results.sample_rows(model) if fits(row)]
    smallest = min((row.keep for row in rows), default=0.0)
    by_recipe = {row.recipe: row for row in rows if row.keep == smallest}
    return [by_recipe[name] for name in results.best_recipes(len(results.recipes)) if name in by_recipe]


def _panels(
    kind: str, model: str, found: Sequence[Row], fill: Callable[[Any, Row], Any], unit: str, what: str
) -> Picture:
    rows, left = found[:PANELS], left_out(len(found) - PANELS, "recipe", " with more damage")

    def paint(figure: Figure, axes: Any) -> None:
        for place, row in zip(axes.flat, rows, strict=False):
            image = fill(place, row)
            place.set_title(short(row.recipe, 32), fontsize=9)
        inner(axes, len(rows))
        figure.colorbar(image, ax=axes, label=unit, pad=0.02, aspect=30)

    columns = min(2, len(rows))
    lines = -(-len(rows) // columns)
    first = rows[0]
    return draw(
        slug(kind, model),
        f"{model}, {first.keep:.3g} of the experts, calibration {first.calibration}, seed {first.seed}: {what}.{left}",
        paint,
        size=(0.9 + 2.35 * columns, 0.6 + lines * (_height(len(first.layers)) - 0.5)),
        grid=(lines, columns),
    )


def _panel(
    axes: Any, layers: Sequence[LayerFacts], values: Values, limits: tuple[float, float], bad: str = "#00000000"
) -> Any:
    image = heat(axes, values, rows=[str(layer.layer) for layer in layers], columns=[], limits=limits, bad=bad)
    thin(axes.xaxis, [str(expert) for expert in range(values.shape[1])], most=12)
    axes.set(xlabel="expert", ylabel="layer")
    return image


def _height(layers: int) -> float:
    return 1.2 + min(0.25 * layers, 5.0)


def _table(layers: Sequence[LayerFacts], values: Callable[[LayerFacts], Sequence[float]]) -> Values:
    """[layers, experts]; nothing (nan) where a layer has fewer experts than others."""
    table = np.full((len(layers), max(layer.experts for layer in layers)), np.nan)
    for line, layer in enumerate(layers):
        table[line, : layer.experts] = values(layer)
    return table


def _ranks(layer: LayerFacts) -> Sequence[float]:
    """0 for the lowest score, 1 for the highest."""
    ranks = np.asarray(stats.rankdata(layer.scores)) - 1
    return list(ranks / max(1, layer.experts - 1))


def _arrived(layer: LayerFacts) -> Sequence[float]:
    arrived = [np.nan] * layer.experts
    for expert, count in zip(layer.kept, layer.moved, strict=False):
        arrived[expert] = count
    return arrived
