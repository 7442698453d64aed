"""Ranks of recipes across models, ratios and calibration sets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dernkit.compare.ranks import Ranking
from dernkit.compare.report.drawing import FAINT, PALETTE, Picture, draw, margin, short
from dernkit.compare.report.inputs import Results
from dernkit.compare.report.words import left_out

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RECIPES = 40


def ranking(results: Results) -> Iterator[Picture]:
    """Mean ranks, with a bar beside each run of recipes that do not differ (Demšar, JMLR 7, 2006, figure 1)."""
    if results.analysis.ranking:
        yield _picture(results.analysis.ranking)


def _picture(ranks: Ranking) -> Picture:
    names = ranks.recipes[:RECIPES]
    bars = _bars(ranks, names)
    lowest, highest = ranks.mean_ranks[0], ranks.mean_ranks[len(names) - 1]
    step = max(highest - lowest, 1.0) * 0.035

    from matplotlib.ticker import MaxNLocator

    labels = [short(name) for name in names]

    def paint(figure: Figure, axes: Any) -> None:
        place = axes[0, 0]
        place.scatter(ranks.mean_ranks[: len(names)], range(len(names)), color=PALETTE[0], zorder=3, s=28)
        place.hlines(range(len(names)), lowest, ranks.mean_ranks[: len(names)], color=FAINT, linewidth=0.8)
        for (top, bottom), column in bars:
            x = highest + step * (2 + column)
            place.vlines(x, top - 0.25, bottom + 0.25, color=PALETTE[1], linewidth=3)
        end = lowest + ranks.critical_difference
        place.plot([lowest, end], [-1, -1], color=PALETTE[1], marker="|", linewidth=1.5)
        place.text((lowest + end) / 2, -1.25, f"critical difference {ranks.critical_difference:.2f}", ha="center")
        place.set_yticks(range(len(names)), labels)
        place.set(
            xlabel="mean rank (1 is best)", ylim=(len(names) - 0.4, -1.9), xlim=(min(lowest, 1.0) - 3 * step, None)
        )
        ticks = MaxNLocator(integer=True).tick_values(1, highest)
        place.set_xticks([tick for tick in ticks if 1 <= tick <= highest + 0.5])

    left = left_out(len(ranks.recipes) - len(names), "recipe", " with worse ranks")
    return draw(
        "mean-ranks",
        f"Mean ranks over {ranks.blocks} blocks (model, ratio, calibration set). Recipes beside one bar do not differ "
        f"at 5 % (Nemenyi); the test that all are alike (Friedman) gives p = {ranks.p:.2g}.{left}",
        paint,
        size=(3.5 + margin(labels), 1.3 + 0.26 * len(names)),
    )


def _bars(ranks: Ranking, names: Sequence[str]) -> list[tuple[tuple[int, int], int]]:
    """First and last line of each clique, and the leftmost column that is free there."""
    bars: list[tuple[tuple[int, int], int]] = []
    for clique in ranks.cliques:
        lines = [names.index(name) for name in clique if name in names]
        if len(lines) < 2:
            continue
        top, bottom = min(lines), max(lines)
        taken = {column for (first, last), column in bars if first <= bottom and top <= last}
        bars.append(((top, bottom), next(i for i in range(len(bars) + 1) if i not in taken)))
    return bars
