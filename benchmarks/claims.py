"""What the DERN paper says, held against benchmarks/results: one verdict for each claim, model and ratio.

    python -m benchmarks.claims [--write-docs]

Reads the results of the comparisons in benchmarks/comparisons (`make bench` makes them) and prints the tables of
docs/explanation/does-dern-work.md; with --write-docs it puts them there, between their markers.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.tables import BASELINE, METRIC, RESULTS, ROOT, blocks, dropped, interval, markdown, pairs, write_page
from dernkit.compare.analysis import Comparison, compare_pair
from dernkit.compare.rows import ORIGINAL, Row, read_rows
from dernkit.compare.statistics import holm

PAGE = ROOT / "docs" / "explanation" / "does-dern-work.md"
IDENTICAL = 1e-12
"""Bits per byte; two recipes that did the same differ by less."""


@dataclass(frozen=True, slots=True)
class Claim:
    """``recipe`` should do less damage than ``against``."""

    says: str
    comparison: str
    recipe: str
    against: str


CLAIMS = (
    Claim("DERN beats dropping the same experts", "methods", "dern", "prune-gate-mass"),
    Claim("DERN beats frequency pruning", "methods", "dern", "prune-frequency"),
    Claim("DERN beats the best subset (NAEE)", "methods", "dern", "prune-best-subset"),
    Claim("DERN beats merging by groups (M-SMoE)", "methods", "dern", "m-smoe"),
    Claim("DERN beats merging by clusters (HC-SMoE)", "methods", "dern", "hc-smoe"),
    Claim("DERN beats REAP, which is younger than the paper", "methods", "dern", "prune-reap"),
    Claim("A threshold of 0.6 beats 0", "claims", "dern", "dern/threshold-0.0"),
    Claim("A threshold of 0.6 beats 0.8", "claims", "dern", "dern/threshold-0.8"),
    Claim("A threshold of 0.6 beats 1, where nothing moves", "claims", "dern", "prune-gate-mass"),
    Claim("Similarity is better without the gate", "claims", "dern", "dern/gate"),
    Claim("… with 30% of the segments moved (gate)", "claims", "moved", "moved/gate"),
    Claim("Centroids from the largest gate rows beat random ones", "claims", "dern", "dern/random-init"),
    Claim("… with 30% of the segments moved (random)", "claims", "moved", "moved/random-init"),
    Claim("They beat the kept expert's own neurons", "claims", "dern", "dern/own-init"),
    Claim("… with 30% of the segments moved (own)", "claims", "moved", "moved/own-init"),
    Claim("Weights by score beat equal weights", "claims", "dern", "dern/uniform-weights"),
    Claim("… with 30% of the segments moved (weights)", "claims", "moved", "moved/uniform-weights"),
    Claim("Adding router rows beats leaving them", "claims", "dern", "dern/slice"),
    Claim("… with 30% of the segments moved (rows)", "claims", "moved", "moved/slice"),
)


def verdict(found: Comparison, p: float) -> str:
    """A claim says that the difference is below 0."""
    if max(abs(found.difference.low), abs(found.difference.high)) < IDENTICAL:
        return "the same"
    if p >= 0.05:
        return "not confirmed"
    return "**confirmed**" if found.difference.estimate < 0 else "**contradicted**"


def claims_table(results: dict[str, list[Row]], comparison: str) -> tuple[list[str], list[list[str]]]:
    """A row a claim, a column a model and ratio; p-values are adjusted over the claims of all tables (Holm)."""
    found = [
        (claim, each) for claim in CLAIMS for each in pairs(results[claim.comparison], claim.recipe, claim.against)
    ]
    adjusted = holm([each.p for _, each in found])
    cells: dict[str, dict[str, str]] = {}
    counts: dict[str, str] = {}
    for (claim, each), p in zip(found, adjusted, strict=True):
        if claim.comparison == comparison:
            column = f"{each.model}, {dropped(each.keep)}"
            cells.setdefault(claim.says, {})[column] = f"{verdict(each, p)}: {interval(each.difference, '+.4f')}"
            counts[column] = f"{each.documents} × {each.seeds}"
    table = [[says, *(row.get(column, "-") for column in counts)] for says, row in cells.items()]
    return ["claim", *counts], [*table, ["windows × seeds", *counts.values()]]


def recovered_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """How much of the damage of frequency pruning each recipe takes back, a column a model and ratio."""
    columns = list(blocks(rows, BASELINE))
    table = []
    for recipe in dict.fromkeys(row.recipe for row in rows if row.recipe not in (ORIGINAL, BASELINE)):
        shares = {(each.model, each.keep, each.calibration): each.recovered for each in pairs(rows, recipe, BASELINE)}
        table.append([recipe, *(interval(shares.get(block), ".0%") for block in columns)])
    return ["recipe", *(f"{model}, {dropped(keep)}" for model, keep, _ in columns)], table


THRESHOLDS = {"0": "dern/threshold-0.0", "0.2": "dern/threshold-0.2", "0.4": "dern/threshold-0.4", "0.6": "dern"}
THRESHOLDS |= {"0.8": "dern/threshold-0.8"}


def thresholds_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """DERN at each threshold less dropping the same experts, and the share of dropped segments that move."""
    against = "prune-gate-mass"
    columns = list(blocks(rows, *THRESHOLDS.values(), against))
    table = []
    for threshold, recipe in THRESHOLDS.items():
        cells = [threshold]
        for model, keep, calibration in columns:
            found = compare_pair(
                rows, model=model, keep=keep, calibration=calibration, metric=METRIC, recipe=recipe, against=against
            )
            moved = [row.moved for row in rows if (row.model, row.keep, row.recipe) == (model, keep, recipe)]
            cells += [f"{sum(moved) / len(moved):.0%}", interval(found.difference, "+.4f")]
        table.append(cells)
    header = ["threshold"]
    for model, keep, _ in columns:
        header += [f"{model}, {dropped(keep)}: moved", "difference (95%)"]
    return header, table


def tables(results: dict[str, list[Row]]) -> dict[str, str]:
    """Name of a place in the page -> what goes there."""
    return {
        "methods": markdown(*claims_table(results, "methods")),
        "choices": markdown(*claims_table(results, "claims")),
        "thresholds": markdown(*thresholds_table(results["claims"])),
        "recovered": markdown(*recovered_table(results["methods"])),
        "smol": markdown(*recovered_table(results["smol"])),
    }


def main() -> None:
    """Print the tables, or write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write-docs", action="store_true", help="put the tables into the page")
    arguments = parser.parse_args()
    results = {name: read_rows(RESULTS / name / "results.parquet") for name in ("methods", "claims", "smol")}
    found = tables(results)
    if arguments.write_docs:
        write_page(PAGE, found)
    else:
        print("\n\n".join(found.values()))


if __name__ == "__main__":
    main()
