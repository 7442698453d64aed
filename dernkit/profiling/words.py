"""A sweep as plain data, as a table, and as the sentence that says what is safe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dernkit.profiling.curve import NATS, Curve, Curves
from dernkit.profiling.sweep import Ratio

Facts = Mapping[str, Any]


def facts(
    ratios: Sequence[Ratio], layers: Sequence[int], size: int, curves: Curves | None, rise: float
) -> dict[str, Any]:
    """All that a profile says.

    Args:
        ratios: of the sweep.
        layers: numbers of the MoE layers.
        size: bytes of the model's tensors.
        curves: fitted on the testbeds, if they were.
        rise: budget in nats per token.
    """
    rows = [_row(ratio, layers, size, curves) for ratio in ratios]
    safe = _safe(rows, rise)
    return {
        "ratios": rows,
        "budget": rise,
        "safe": None if safe is None else safe["keep"],
        "proxy": None if curves is None else _proxy(curves),
        "sentence": f"{_found(rows, safe, rise)} {_trust(curves)}" if curves and _any(rows) else _no_loss(rows),
    }


def _row(ratio: Ratio, layers: Sequence[int], size: int, curves: Curves | None) -> dict[str, Any]:
    by_layer = dict(zip(map(str, layers), ratio.errors, strict=True))
    known = {layer: error for layer, error in by_layer.items() if error is not None}
    worst = max(known, key=lambda layer: known[layer], default=None)
    return {
        "keep": ratio.keep,
        "share": ratio.share,
        "experts": list(ratio.counts),
        "bytes": ratio.bytes,
        "size": ratio.bytes / size,
        "error": {
            "mean": ratio.mean,
            "max": None if worst is None else known[worst],
            "worst_layer": None if worst is None else int(worst),
            "layers": by_layer,
        },
        "rise": {
            unit: _predicted(curve, ratio.mean)
            for unit, curve in (curves.by_unit if curves else {}).items()
            if ratio.mean is not None
        },
    }


def _predicted(curve: Curve, error: float) -> dict[str, Any]:
    rise = curve.rise(error)
    beyond = error > curve.highest
    return {"expected": rise, "low": rise / curve.factor, "high": rise * curve.factor, "beyond_testbeds": beyond}


def _safe(rows: Sequence[Facts], budget: float) -> Facts | None:
    """The smallest result for which, as for all larger ones, the whole range of the rise is within the budget."""
    best = None
    for row in sorted(rows, key=lambda row: -row["share"]):
        found = row["rise"].get(NATS)
        if found is None or found["beyond_testbeds"] or found["high"] > budget:
            break
        best = row
    return best


def _proxy(curves: Curves) -> dict[str, Any]:
    return {
        "models": list(curves.models),
        "commit": curves.commit,
        "units": {
            unit: {
                "scale": curve.scale,
                "power": curve.power,
                "typical_factor": curve.typical,
                "range_factor": curve.factor,
                "cells": curve.cells,
                "spearman": dict(curve.spearman),
            }
            for unit, curve in curves.by_unit.items()
        },
    }


def _any(rows: Sequence[Facts]) -> bool:
    return any(row["error"]["mean"] is not None for row in rows)


def _found(rows: Sequence[Facts], safe: Facts | None, budget: float) -> str:
    if safe is not None:
        return (
            f"Safe under a rise of {budget:g} nats per token: keep {safe['keep']} ({safe['share']:.0%} of all). "
            f"Expected there: {_range(safe['rise'][NATS])}."
        )
    first = max(rows, key=lambda row: row["share"])
    return (
        f"No ratio of this sweep is safe under a rise of {budget:g} nats per token. Expected at keep "
        f"{first['keep']}: {_range(first['rise'][NATS])}."
    )


def _trust(curves: Curves) -> str:
    """How well the proxy tracked the true loss."""
    curve = curves.by_unit[NATS]
    order = [f"{value:.2f}" for value in sorted(curve.spearman.values())]
    return (
        f"This is a proxy and no measurement: on {len(curve.spearman)} testbeds ({curve.cells} cells) it was off by a "
        f"factor of {curve.typical:.2g} in half of the cells and of more than {curve.factor:.2g} in a tenth of them, "
        f"for models that the curve was not fitted on; within a model its order had a Spearman correlation of "
        f"{order[0]} to {order[-1]} with that of the true loss. Measure the ratio that you choose."
    )


def _no_loss(rows: Sequence[Facts]) -> str:
    if not _any(rows):
        return (
            "No layer error, and so no loss: this model's tokens cannot be routed again by their hidden states. "
            "Measure the ratio that you choose."
        )
    return (
        "No loss is predicted: no curve has been fitted on testbeds here. An error is the share of a layer's routed "
        "output that changes, and says which ratio is worse, but not by how much. Measure the ratio that you choose."
    )


def header(told: Facts) -> tuple[str, ...]:
    """Columns of the table."""
    units = tuple(told["proxy"]["units"]) if told["proxy"] else ()
    rises = tuple(f"rise, {unit}" for unit in units)
    return ("keep", "experts", "size", "mean error", "max error", "worst layer", *rises)


def lines(told: Facts) -> list[tuple[str, ...]]:
    """Rows of the table."""
    return [_line(row, list(told["proxy"]["units"]) if told["proxy"] else []) for row in told["ratios"]]


def _line(row: Facts, units: Sequence[str]) -> tuple[str, ...]:
    least, most, error = min(row["experts"]), max(row["experts"]), row["error"]
    return (
        f"{row['keep']}",
        f"{most}" if least == most else f"{least} to {most}",
        f"{row['bytes'] / 1e6:,.1f} MB ({row['size']:.0%})",
        _number(error["mean"]),
        _number(error["max"]),
        "-" if error["worst_layer"] is None else str(error["worst_layer"]),
        *(_range(row["rise"].get(unit)) for unit in units),
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _range(predicted: Facts | None) -> str:
    if predicted is None:
        return "-"
    beyond = ", beyond the testbeds" if predicted["beyond_testbeds"] else ""
    return f"{_number(predicted['expected'])} ({_number(predicted['low'])} to {_number(predicted['high'])}{beyond})"
