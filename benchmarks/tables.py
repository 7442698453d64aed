"""Tables of comparisons' results, and pages that they are put into."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from dernkit.compare.analysis import Comparison, Interval, compare_pair
from dernkit.compare.rows import ORIGINAL, Row

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
METRIC = "perplexity/bits_per_byte"
BASELINE = "prune-frequency"


def blocks(rows: Sequence[Row], *recipes: str) -> Iterator[tuple[str, float, str]]:
    """Model, ratio and calibration set of which all ``recipes`` were measured, in the order of the rows."""
    found: dict[tuple[str, float, str], set[str]] = {}
    for row in rows:
        if row.recipe != ORIGINAL and not row.refused:
            found.setdefault((row.model, row.keep, row.calibration), set()).add(row.recipe)
    return (block for block, there in found.items() if there.issuperset(recipes))


def pairs(rows: Sequence[Row], recipe: str, against: str) -> list[Comparison]:
    """The comparison on every model and ratio."""
    return [
        compare_pair(
            rows, model=model, keep=keep, calibration=calibration, metric=METRIC, recipe=recipe, against=against
        )
        for model, keep, calibration in blocks(rows, recipe, against)
    ]


def dropped(keep: float) -> str:
    """A ratio in words."""
    return f"{1 - keep:.1%} dropped".replace(".0%", "%")


def interval(found: Interval | None, form: str) -> str:
    """``estimate (low to high)``."""
    return "-" if found is None else f"{found.estimate:{form}} ({found.low:{form}} to {found.high:{form}})"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def write_page(page: Path, found: dict[str, str]) -> None:
    """Put each table between its markers."""
    text = page.read_text(encoding="utf-8")
    for name, table in found.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}"
    page.write_text(text, encoding="utf-8")
