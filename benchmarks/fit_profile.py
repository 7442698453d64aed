"""Fits the curve by which `dernkit profile` predicts the rise of the loss, from the comparisons of `make bench`.

    python benchmarks/fit_profile.py

writes dernkit/data/profile.json, and prints what it says. Every cell that was measured and whose layers have an error
is a point: the mean of its layers' errors, and how much the metric rose over that of the original. Recipes that
calibrate sequentially are left out: their errors are taken on other inputs.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from dernkit.compare.rows import ORIGINAL, Row, read_rows
from dernkit.profiling.curve import FEWEST, FILE, UNITS, Cell, Curves, as_json, fit

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
COMPARISONS = ("methods", "claims", "smol")
"""Not those of `make bench-recombination`: what a refit was fitted to says too little of its error."""


def cells(rows: Iterable[Row], metric: str) -> list[Cell]:
    """The points of one comparison; originals are matched by the model's name."""
    rows = list(rows)
    before = {
        row.model: row.observations[metric].mean()
        for row in rows
        if row.recipe == ORIGINAL and metric in row.observations
    }
    found = []
    for row in rows:
        errors = [layer.error for layer in row.layers if layer.error is not None]
        if row.recipe == ORIGINAL or row.refused or not errors or metric not in row.observations or sequential(row):
            continue
        rise = row.observations[metric].mean() - before[row.model]
        found.append(Cell(row.model, sum(errors) / len(errors), rise))
    return found


def sequential(row: Row) -> bool:
    return bool(row.details["recipe"]["calibrate"]["sequential"])


def fitted(files: Iterable[Path], commit: str) -> tuple[Curves, dict[str, list[Cell]]]:
    """One curve for each unit that has enough cells, and the cells."""
    tables = [read_rows(file) for file in files]
    points = {unit: [cell for rows in tables for cell in cells(rows, metric)] for metric, unit in UNITS.items()}
    curves = {unit: curve for unit, found in points.items() if (curve := fit(found)) is not None}
    models = sorted({cell.model for found in points.values() for cell in found})
    return Curves(curves, tuple(models), commit), points


def main() -> None:
    files = [file for name in COMPARISONS if (file := RESULTS / name / "results.parquet").exists()]
    git = ["git", "-C", str(ROOT), "log", "-1", "--format=%h", "--", *map(str, files)]
    commit = subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip() if files else ""
    curves, points = fitted(files, commit)
    if not curves.by_unit:
        seen = ", ".join(f"{len(found)} in {unit}" for unit, found in points.items())
        sys.exit(f"no curve: must have {FEWEST} cells of 2 models that rise with the error. Got {seen} instead.")
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(as_json(curves), encoding="utf-8")
    for unit, curve in curves.by_unit.items():
        order = ", ".join(f"{model} {value:.2f}" for model, value in curve.spearman.items())
        print(
            f"{unit}: {curve.scale:.3g} * error^{curve.power:.3g}, {curve.cells} cells ({curve.left_out} left out), "
            f"half within a factor {curve.typical:.2f}, nine of ten within {curve.factor:.2f}; Spearman: {order}"
        )


if __name__ == "__main__":
    main()
