"""How much the loss rises at a layer error: a power law fitted on the testbeds' cells, and how far it was off."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

FILE = Path(__file__).parent.parent / "data" / "profile.json"
UNITS = {"perplexity/loss": "nats per token", "perplexity/bits_per_byte": "bits per byte"}
"""Metric of a comparison -> its unit."""
NATS = "nats per token"
FEWEST = 12
"""Cells without which nothing is fitted."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One compressed testbed."""

    model: str
    error: float
    """Mean of the MoE layers' errors."""
    rise: float
    """Of the metric over the original's."""


@dataclass(frozen=True, slots=True)
class Curve:
    """``rise = scale · error^power``. How far it is off is taken on models that it was not fitted on."""

    scale: float
    power: float
    typical: float
    """Factor within which half of the cells lie."""
    factor: float
    """Factor within which nine cells of ten lie."""
    highest: float
    """Largest error that was seen."""
    cells: int
    left_out: int
    """Cells whose error or rise is 0 or less: a logarithm has no place for them."""
    spearman: Mapping[str, float]
    """By model: rank correlation of error and rise, cells that are left out of the fit included."""

    def rise(self, error: float) -> float:
        """What to expect at a mean layer error; 0 at 0."""
        return self.scale * error**self.power


@dataclass(frozen=True, slots=True)
class Curves:
    """One curve a unit."""

    by_unit: Mapping[str, Curve]
    models: tuple[str, ...]
    commit: str
    """Of the code that made the comparison."""


def fit(cells: Sequence[Cell]) -> Curve | None:
    """Least squares on the logarithms, each cell counting the same.

    Returns:
        None where there are fewer than `FEWEST` cells or two models, or where the rise does not grow with the error.
    """
    used = [cell for cell in cells if cell.error > 0 and cell.rise > 0]
    models = sorted({cell.model for cell in used})
    if len(used) < FEWEST or len(models) < 2:
        return None
    power, scale = _line(used)
    off = np.concatenate([_off(used, model) for model in models])
    if power <= 0:
        return None
    return Curve(
        scale=float(np.exp(scale)),
        power=float(power),
        typical=float(np.exp(np.quantile(off, 0.5))),
        factor=float(np.exp(np.quantile(off, 0.9))),
        highest=max(cell.error for cell in used),
        cells=len(used),
        left_out=len(cells) - len(used),
        spearman={model: _spearman([cell for cell in cells if cell.model == model]) for model in models},
    )


def _line(cells: Sequence[Cell]) -> NDArray[np.float64]:
    """Slope and intercept in log space; where all errors are the same the slope is 0."""
    x, y = _logs(cells)
    if np.ptp(x) == 0:
        return np.array([0.0, y.mean()])
    return np.polyfit(x, y, 1)


def _off(cells: Sequence[Cell], model: str) -> NDArray[np.float64]:
    """|log of the rise − log of what the other models' line says| of a model's cells."""
    slope, intercept = _line([cell for cell in cells if cell.model != model])
    x, y = _logs([cell for cell in cells if cell.model == model])
    return np.abs(y - (slope * x + intercept))


def _logs(cells: Sequence[Cell]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return np.log([cell.error for cell in cells]), np.log([cell.rise for cell in cells])


def _spearman(cells: Sequence[Cell]) -> float:
    """NaN-free: 0 where errors or rises are all the same."""
    errors, rises = [cell.error for cell in cells], [cell.rise for cell in cells]
    if len(set(errors)) < 2 or len(set(rises)) < 2:
        return 0.0
    return float(spearmanr(errors, rises).statistic)


def as_json(curves: Curves) -> str:
    """The text of `FILE`."""
    return json.dumps(_rounded(asdict(curves)), indent=1) + "\n"


def _rounded(value: Any) -> Any:
    """Numbers to six digits: the rest is noise, and differs between machines."""
    if isinstance(value, Mapping):
        return {name: _rounded(item) for name, item in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


def load_curves(file: Path = FILE) -> Curves | None:
    """What `as_json` wrote; None where nothing has been fitted."""
    if not file.exists():
        return None
    data = json.loads(file.read_text(encoding="utf-8"))
    by_unit = {unit: Curve(**curve) for unit, curve in data["by_unit"].items()}
    return Curves(by_unit, tuple(data["models"]), data["commit"]) if by_unit else None
