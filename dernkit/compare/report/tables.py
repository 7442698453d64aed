"""The tables of a report, as plain text in cells that HTML and Markdown both show."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from dernkit.compare.findings import Cell, Comparison, Verdict
from dernkit.compare.report.inputs import Block, Results, block_of
from dernkit.compare.report.words import counted, interval, number, probability, share
from dernkit.compare.rows import ORIGINAL
from dernkit.compare.statistics import Interval

Tone = Literal["", "better", "worse", "undecided", "none"]
_SIGNS = {"better": "▲", "worse": "▼", "undecided": "○"}


@dataclass(frozen=True, slots=True)
class Entry:
    """What one place of a table says."""

    text: str
    tone: Tone = ""
    bold: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A table with a line for its header; numbers are in all columns but the first ``words``."""

    title: str
    header: tuple[str, ...]
    lines: tuple[tuple[Entry, ...], ...]
    note: str = ""
    words: int = 1


MARKS = "▲ better than the baseline, ▼ worse, ○ undecided, by p below 0.05, adjusted for a table's recipes (Holm)."
LEGEND = (
    f"{MARKS} In brackets: 95 % intervals of one comparison by itself, over documents "
    "and calibration seeds. Taken back: the share of the "
    "baseline's damage that a recipe does not do. Moved: segments that were moved, per segment of a dropped expert."
)


def overview(results: Results) -> Table:
    """Recipe × block: the change from the original with the verdict against the baseline."""
    analysis = results.analysis
    blocks = results.blocks
    verdicts = {(block_of(one), one.recipe): one.verdict for one in analysis.against_baseline}
    cells = {(block_of(cell), cell.recipe): cell for cell in analysis.cells}
    best = {block: results.sorted_cells(block)[0].recipe for block in blocks}
    digits = {block: _block_digits(results.sorted_cells(block)) for block in blocks}
    ranks = dict(zip(analysis.ranking.recipes, analysis.ranking.mean_ranks, strict=True)) if analysis.ranking else {}
    lines = []
    order = results.best_recipes(len(results.recipes))
    for recipe in (*order, *(name for name in results.recipes if name not in order)):
        line = [Entry(_recipe(recipe, analysis.baseline), bold=recipe == analysis.baseline)]
        line += [
            _change(
                cells.get((block, recipe)), verdicts.get((block, recipe)), digits[block], best=best[block] == recipe
            )
            for block in blocks
        ]
        lines.append((*line, Entry(f"{ranks[recipe]:.2f}" if recipe in ranks else "–")) if ranks else tuple(line))
    several = len({block.calibration for block in blocks}) > 1
    names = [f"{block.model} {block.keep:.3g}{f' {block.calibration}' if several else ''}" for block in blocks]
    return Table(
        f"Change of {analysis.metric} from the original",
        ("recipe", *names, *(["mean rank"] if ranks else [])),
        tuple(lines),
        f"Columns: model and share of the experts that stay. Bold: the least damage of a column. {MARKS}",
    )


def _change(cell: Cell | None, verdict: Verdict | None, digits: int, *, best: bool) -> Entry:
    if cell is None:
        return Entry("–", "none")
    if cell.rise is None:
        return Entry("refused", "none")
    sign = f" {_SIGNS[verdict]}" if verdict else ""
    return Entry(f"{number(cell.rise.estimate, digits, sign=True)}{sign}", verdict or "", bold=best)


def blocks(results: Results) -> Iterator[Table]:
    """A table a block with everything known of each recipe, the best first."""
    for block in results.blocks:
        yield _block(results, block)


def _block(results: Results, block: Block) -> Table:
    analysis = results.analysis
    original = next(cell for cell in analysis.originals if cell.model == block.model)
    against = {one.recipe: one for one in analysis.against_baseline if block_of(one) == block}
    cells = results.sorted_cells(block)
    assert original.value
    digits = _block_digits(cells)
    first = [ORIGINAL, number(original.value.estimate, digits), "", "", "", "", _size(original, original), ""]
    lines = [tuple(Entry(text) for text in first)]
    for cell in cells:
        lines.append(_line(cell, original, against.get(cell.recipe), analysis.baseline, digits))
    return Table(
        f"{block.model}, {block.keep:.3g} of the experts, calibration {block.calibration}",
        (
            *("recipe", analysis.metric.rpartition("/")[2], "change from the original"),
            *("difference from the baseline", "adjusted p", "taken back", "size", "moved"),
        ),
        tuple(lines),
        _sampled(cells),
    )


def _line(cell: Cell, original: Cell, one: Comparison | None, baseline: str, digits: int) -> tuple[Entry, ...]:
    assert cell.value and cell.rise
    is_baseline = cell.recipe == baseline
    tone: Tone = one.verdict if one else ""
    against = f"{_SIGNS[one.verdict]} {interval(one.difference, digits)}" if one else "baseline" if is_baseline else "–"
    return (
        Entry(cell.recipe, bold=is_baseline),
        Entry(number(cell.value.estimate, digits)),
        Entry(interval(cell.rise, digits)),
        Entry(against, tone),
        Entry(probability(one.p_adjusted) if one else ""),
        Entry(share(one.recovered) if one and one.recovered else "" if is_baseline else "–"),
        Entry(_size(cell, original)),
        Entry(f"{100 * cell.moved:.0f} %"),
    )


def _sampled(cells: Sequence[Cell]) -> str:
    documents = _spread([cell.documents for cell in cells], "document")
    seeds = _spread([cell.seeds for cell in cells], "calibration seed")
    return f"{documents}, {seeds}."


def _spread(counts: Sequence[int], what: str) -> str:
    low, high = min(counts), max(counts)
    return f"{low:,} to {counted(high, what)}" if low < high else counted(high, what)


def refused(results: Results) -> Table | None:
    """The sentences of what dernkit refused."""
    places: dict[tuple[str, str, str], dict[str, list[str]]] = {}
    for row in results.rows:
        if row.refused:
            where = places.setdefault((row.recipe, row.model, row.refused), {})
            where.setdefault(f"keep {row.keep:.3g}, {row.calibration}", []).append(str(row.seed))
    lines = []
    for (recipe, model, why), found in places.items():
        cells = "; ".join(f"{where}, seed {', '.join(seeds)}" for where, seeds in found.items())
        lines.append((Entry(recipe), Entry(model), Entry(cells), Entry(why)))
    if not lines:
        return None
    return Table("Cells without a result", ("recipe", "model", "where", "why"), tuple(lines), words=4)


def _recipe(name: str, baseline: str) -> str:
    return f"{name} (baseline)" if name == baseline else name


def _size(cell: Cell, original: Cell) -> str:
    return f"{cell.bytes / 1e6:,.1f} MB ({100 * cell.bytes / original.bytes:.0f} %)"


def _block_digits(cells: Sequence[Cell]) -> int:
    """The same for all recipes of a block: most of their intervals show two digits of their width."""
    found = sorted(_digits(cell.rise) for cell in cells if cell.rise and cell.rise.high > cell.rise.low)
    return found[len(found) // 2] if found else 4


def _digits(found: Interval) -> int:
    """Decimals that show two digits of the interval's width."""
    width = found.high - found.low
    return min(6, max(0, 1 - math.floor(math.log10(width)))) if width > 0 else 4
