"""Least squares from sums: Gram matrices that can be added, solved with a ridge, and judged on text that was left out.

Accumulated and solved in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from dernkit.types import LayerStats

_ROWS = 4096
"""Tokens that are converted to float64 at a time."""


@dataclass(frozen=True, slots=True)
class Equations:
    """``A = hᵀh``, ``B = hᵀy`` and ``Σ‖y‖²`` of some tokens: all that the squared error of any solution needs."""

    gram: Float64[Tensor, "neurons neurons"]
    right: Float64[Tensor, "neurons hidden"]
    energy: float

    def __len__(self) -> int:
        return len(self.gram)

    def __add__(self, other: Equations) -> Equations:
        return Equations(self.gram + other.gram, self.right + other.right, self.energy + other.energy)

    def __sub__(self, other: Equations) -> Equations:
        return Equations(self.gram - other.gram, self.right - other.right, self.energy - other.energy)

    def of(self, neurons: Int64[Tensor, " some"]) -> Equations:
        """Those of some neurons."""
        return Equations(self.gram[neurons][:, neurons], self.right[neurons], self.energy)

    def damping(self, ridge: float) -> float:
        """``λ = ridge · mean diag A``; above 0 also where no neuron is ever active."""
        mean = float(self.gram.diagonal().mean()) if len(self) else 0.0
        return ridge * mean if mean > 0 else 1.0

    def factor(self, damping: float) -> Float64[Tensor, "neurons neurons"]:
        """Cholesky factor of ``A + λI``."""
        return torch.linalg.cholesky(self.gram + damping * torch.eye(len(self), dtype=torch.float64))

    def solve(self, damping: float) -> Float64[Tensor, "neurons hidden"]:
        """``w = (A + λI)⁻¹ B``."""
        return torch.cholesky_solve(self.right, self.factor(damping))

    def error(self, weights: Float64[Tensor, "neurons hidden"]) -> float:
        """``Σ‖y − wᵀh‖²``."""
        return self.energy - 2 * float((weights * self.right).sum()) + float((weights * (self.gram @ weights)).sum())


def equations(hidden: Float32[Tensor, "tokens neurons"], wanted: Float32[Tensor, "tokens hidden"]) -> Equations:
    """Of features h and what they should give, y."""
    gram = torch.zeros(hidden.shape[1], hidden.shape[1], dtype=torch.float64)
    right = torch.zeros(hidden.shape[1], wanted.shape[1], dtype=torch.float64)
    energy = 0.0
    for h, y in zip(hidden.split(_ROWS), wanted.split(_ROWS), strict=True):
        h64, y64 = h.to(torch.float64), y.to(torch.float64)
        gram.addmm_(h64.T, h64)
        right.addmm_(h64.T, y64)
        energy += float(y64.square().sum())
    return Equations(gram, right, energy)


def parts(stats: LayerStats, count: int) -> Int64[Tensor, " sampled"]:
    """Which of ``count`` consecutive parts of the calibration text each sampled token comes from.

    Neighbours stay together, so that leaving out a part leaves out whole documents, but for those at its ends.
    """
    return stats["sample_token"] * count // max(stats.tokens, 1)


def by_part(
    hidden: Float32[Tensor, "tokens neurons"],
    wanted: Float32[Tensor, "tokens hidden"],
    part: Int64[Tensor, " tokens"],
    count: int,
) -> list[Equations]:
    """One for each part, also for those without tokens."""
    return [equations(hidden[part == number], wanted[part == number]) for number in range(count)]


def chosen_ridge(found: Sequence[Equations], ridges: Sequence[float]) -> float | None:
    """The ridge whose solutions do best on the parts that they were not fitted to; None: no solution beats w = 0.

    Ties go to the larger ridge.
    """
    whole = sum(found[1:], found[0])
    best, least = None, sum(part.energy for part in found)
    for ridge in sorted(ridges, reverse=True):
        damping = whole.damping(ridge)
        error = sum(part.error((whole - part).solve(damping)) for part in found)
        if error < least:
            best, least = ridge, error
    return best
