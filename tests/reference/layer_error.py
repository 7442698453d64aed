"""The layer error by its formula: Python loops and float64, nothing clever. The fast code must match it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from dernkit.types import CompressedLayer, ExpertBank
from tests.reference.budgets import routed_output
from tests.reference.dern import Vector


def layer_error(
    bank: ExpertBank, compressed: CompressedLayer, kept: Sequence[int], sample: Sequence[Vector]
) -> float | None:
    """Σ_x ‖Y'(x) − Y(x)‖² / Σ_x ‖Y(x)‖², Y' by the new experts among which the new rows choose."""
    after = replace(
        bank,
        dims=replace(bank.dims, experts=len(kept)),
        gate=compressed.gate,
        up=compressed.up,
        down=compressed.down,
        router=compressed.router,
    )
    error = energy = 0.0
    for x in sample:
        before, now = routed_output(bank, x, range(bank.dims.experts)), routed_output(after, x, range(len(kept)))
        error += math.fsum((a - b) ** 2 for a, b in zip(now, before, strict=True))
        energy += math.fsum(a**2 for a in before)
    return error / energy if energy else None
