"""How stable scores and kept experts are as the calibration tokens grow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from dernkit.compare.report.drawing import MARKERS, PALETTE, Picture, draw, short, slug
from dernkit.compare.report.inputs import Point, Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def stable(results: Results) -> Iterator[Picture]:
    """A picture a model and calibration set: kept experts in common, and rank correlation, against the tokens."""
    for model, calibration in dict.fromkeys((point.model, point.calibration) for point in results.stability):
        points = [point for point in results.stability if (point.model, point.calibration) == (model, calibration)]
        yield _picture(model, calibration, points)


def _picture(model: str, calibration: str, points: list[Point]) -> Picture:
    scorers = list(dict.fromkeys(point.scorer for point in points))[: len(PALETTE)]

    def paint(figure: Figure, axes: Any) -> None:
        for place, name, label in (
            (axes[0, 0], "overlap", "kept experts in common"),
            (axes[0, 1], "spearman", "Spearman's ρ of scores"),
        ):
            for colour, marker, scorer in zip(PALETTE, MARKERS, scorers, strict=False):
                _line(place, [point for point in points if point.scorer == scorer], name, scorer, colour, marker)
            place.set_xscale("log", base=2)
            tokens = sorted({point.tokens for point in points})
            place.set_xticks(tokens, [_tokens(count) for count in tokens], rotation=40)
            place.minorticks_off()
            place.set(xlabel="calibration tokens", ylabel=label, ylim=(min(0.0, place.get_ylim()[0]), 1.05))
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(scorers)))

    return draw(
        slug("stability", model, calibration),
        f"{model}, calibration {calibration}: what a part of the calibration tokens says, against all of them. "
        f"Lines: mean over layers and seeds; bands: from the lowest layer to the highest, mean over seeds.",
        paint,
        size=(5.6, 3.0),
        grid=(1, 2),
    )


def _line(axes: Any, points: list[Point], name: str, scorer: str, colour: str, marker: str) -> None:
    tokens = sorted({point.tokens for point in points})
    layers = sorted({point.layer for point in points})
    means = np.array([[_mean(points, name, count, layer) for count in tokens] for layer in layers])
    axes.plot(tokens, np.nanmean(means, axis=0), color=colour, marker=marker, markersize=4, label=short(scorer))
    axes.fill_between(tokens, np.nanmin(means, axis=0), np.nanmax(means, axis=0), color=colour, alpha=0.15, linewidth=0)


def _mean(points: list[Point], name: str, tokens: int, layer: int) -> float:
    found = [getattr(point, name) for point in points if point.tokens == tokens and point.layer == layer]
    return float(np.mean(found)) if found else float("nan")


def _tokens(count: int) -> str:
    return f"{count / 1024:.3g}k" if count >= 1024 else str(count)
