"""How alike the neurons of different experts are, as figure 1 of the DERN paper shows it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from dernkit.compare.report.drawing import FAINT, PALETTE, Picture, draw, heat, inner, slug, thin
from dernkit.compare.report.inputs import Results
from dernkit.compare.report.words import left_out

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = 6


def alike(results: Results, model: str) -> Iterator[Picture]:
    """Expert × expert in each layer of the original: mean best cosine of a neuron in another expert."""
    original = results.original(model)
    found = original.details.get("similarity") if original else None
    if not found:
        return
    names = sorted(found, key=int)
    chosen = [names[i] for i in np.unique(np.linspace(0, len(names) - 1, min(PANELS, len(names))).round().astype(int))]
    tables = []
    for name in chosen:
        table = np.array(found[name], dtype=np.float64)
        np.fill_diagonal(table, np.nan)
        tables.append(table)
    if max(len(table) for table in tables) < 2:
        return
    limits = min(float(np.nanmin(t)) for t in tables), max(float(np.nanmax(t)) for t in tables)

    def paint(figure: Figure, axes: Any) -> None:
        for place, name, table in zip(axes.flat, chosen, tables, strict=False):
            image = heat(place, table, rows=[], columns=[], limits=limits)
            experts = [str(expert) for expert in range(len(table))]
            thin(place.xaxis, experts, most=8)
            thin(place.yaxis, experts, most=8)
            place.set_aspect("equal")
            place.set(xlabel="in expert", ylabel="of expert")
            place.set_title(f"layer {name}", fontsize=9)
        inner(axes, len(chosen))
        figure.colorbar(image, ax=axes, label="mean best cosine", pad=0.02, aspect=30)

    columns = min(2, len(chosen))
    lines = -(-len(chosen) // columns)
    mean = float(np.mean([np.nanmean(table) for table in tables]))
    left = left_out(len(names) - len(chosen), "layer", " between them")
    yield draw(
        slug("alike", model),
        f"{model}: how well neurons of one expert are matched in another one: the cosine with the most similar neuron "
        f"there, mean over the neurons. The mean of all pairs is {mean:.2f}; 1 would be a copy.{left}",
        paint,
        size=(1.0 + 2.1 * columns, 0.3 + 2.3 * lines),
        grid=(lines, columns),
    )


def cosines(results: Results, model: str) -> Iterator[Picture]:
    """How many neurons of the original have their best match in another expert at which cosine."""
    original = results.original(model)
    found = original.details.get("cosines") if original else None
    if not found:
        return
    edges = np.array(found["edges"], dtype=np.float64)
    counts = np.array([found["counts"][name] for name in sorted(found["counts"], key=int)], dtype=np.float64)
    if not counts.sum():
        return
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    used = np.flatnonzero(counts.sum(axis=0))
    first, last = max(0, used[0] - 1), min(len(edges) - 1, used[-1] + 2)

    def paint(figure: Figure, axes: Any) -> None:
        place = axes[0, 0]
        for layer in shares:
            place.stairs(100 * layer, edges, color=FAINT, linewidth=0.7, alpha=0.6)
        place.stairs(100 * shares.mean(axis=0), edges, color=PALETTE[0], linewidth=2)
        place.set(xlim=(edges[first], edges[last]), ylim=(0, None), ylabel="% of the neurons")
        place.set_xlabel("cosine with the most similar neuron of another expert")

    half = float(np.interp(0.5, shares.mean(axis=0).cumsum(), edges[1:]))
    yield draw(
        slug("cosines", model),
        f"{model}: neurons by their best match in any other expert. Grey: each layer; blue: their mean. Half of the "
        f"neurons find no match above {half:.2f}.",
        paint,
        size=(4.6, 3.0),
    )
