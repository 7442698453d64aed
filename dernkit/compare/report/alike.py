"""How alike the neurons of different experts are, as figure 1 of the DERN paper shows it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from dernkit.compare.report.drawing import Picture, draw, heat, slug, thin
from dernkit.compare.report.inputs import Results

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
            place.set(xlabel="in expert", ylabel="neurons of expert")
            place.set_title(f"layer {name}", fontsize=9)
        figure.colorbar(image, ax=axes, label="mean best cosine", pad=0.02, aspect=30)

    columns = min(3, len(chosen))
    lines = -(-len(chosen) // columns)
    mean = float(np.mean([np.nanmean(table) for table in tables]))
    left = f" {len(names) - len(chosen)} layers between them are left out." if len(names) > len(chosen) else ""
    yield draw(
        slug("alike", model),
        f"{model}: how well neurons of one expert are matched in another one: the cosine with the most similar neuron "
        f"there, mean over the neurons. The mean of all pairs is {mean:.2f}; 1 would be a copy.{left}",
        paint,
        size=(1.0 + 2.1 * columns, 0.3 + 2.3 * lines),
        grid=(lines, columns),
    )
