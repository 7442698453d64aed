"""Budgets formula by formula: Python loops and float64, every allocation tried. The fast code must match it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import product

from dernkit.api import KeepLimits
from dernkit.types import ExpertBank
from tests.reference.dern import Vector


def total(keep: int | float, limits: Sequence[KeepLimits]) -> int:
    """keep · Σ E, rounded down; a count is one of each layer."""
    if isinstance(keep, float):
        return int(Fraction(str(keep)) * sum(limit.experts for limit in limits))
    return keep * len(limits)


def legal(limit: KeepLimits, minimum: float) -> list[int]:
    least = max(limit.smallest, minimum * limit.experts)
    return [count for count in range(1, limit.experts + 1) if count >= least and count % limit.multiple == 0]


def allocations(keep: int | float, limits: Sequence[KeepLimits], minimum: float) -> list[tuple[int, ...]]:
    """All legal ones whose sum is the largest that is possible and not above the total."""
    every = [c for c in product(*(legal(limit, minimum) for limit in limits)) if sum(c) <= total(keep, limits)]
    return [counts for counts in every if sum(counts) == max(map(sum, every))]


def comparable(scores: Vector, how: str) -> Vector:
    if how == "rank":
        return [sum(other < score for other in scores) / len(scores) for score in scores]
    size = {"none": 1.0, "sum": math.fsum(map(abs, scores)), "max": max(map(abs, scores))}[how]
    return [score / size if size else score for score in scores]


def worth(scores: Vector, count: int, groups: int) -> float:
    """Sum of the best ``count`` scores, as many from each group."""
    size = len(scores) // groups
    runs = [sorted(scores[i : i + size], reverse=True) for i in range(0, len(scores), size)]
    return math.fsum(score for run in runs for score in run[: count // groups])


def most_worth(
    scores: Sequence[Vector], keep: int | float, limits: Sequence[KeepLimits], minimum: float, how: str
) -> float:
    """max Σ_l Σ_{kept} score, over all legal allocations: what one threshold over all layers keeps."""
    layers = [comparable(layer, how) for layer in scores]
    return max(kept_worth(layers, counts, limits) for counts in allocations(keep, limits, minimum))


def kept_worth(layers: Sequence[Vector], counts: Sequence[int], limits: Sequence[KeepLimits]) -> float:
    terms = zip(layers, counts, limits, strict=True)
    return math.fsum(worth(layer, count, limit.multiple) for layer, count, limit in terms)


def least_error(curves: Sequence[Vector], keep: int | float, limits: Sequence[KeepLimits], minimum: float) -> float:
    """min Σ_l error_l(count_l), over all legal allocations."""
    return min(summed(curves, counts, limits) for counts in allocations(keep, limits, minimum))


def summed(curves: Sequence[Vector], counts: Sequence[int], limits: Sequence[KeepLimits]) -> float:
    terms = zip(curves, counts, limits, strict=True)
    return math.fsum(curve[count // limit.multiple - 1] for curve, count, limit in terms)


def routed_output(bank: ExpertBank, x: Vector, among: Sequence[int]) -> Vector:
    """Softmax over the top-k logits among some experts (as `dernkit.testing.banks` routes), times the outputs."""
    rows = bank.router.double().tolist()
    logits = {e: math.fsum(a * b for a, b in zip(rows[e], x, strict=True)) for e in among}
    chosen = sorted(among, key=lambda e: (-logits[e], e))[: bank.dims.top_k]
    shares = [math.exp(logits[e] - logits[chosen[0]]) for e in chosen]
    out = [0.0] * bank.dims.hidden
    for expert, share in zip(chosen, shares, strict=True):
        for i, value in enumerate(_output(bank, expert, x)):
            out[i] += share / math.fsum(shares) * value
    return out


def _output(bank: ExpertBank, expert: int, x: Vector) -> Vector:
    """Σ_j down_j · silu(gate_j · x) (up_j · x)"""
    out = [0.0] * bank.dims.hidden
    for gate, up, down in bank.segments(expert).double().tolist():
        g, u = (math.fsum(a * b for a, b in zip(row, x, strict=True)) for row in (gate, up))
        neuron = g / (1 + math.exp(-g)) * u
        out = [value + neuron * weight for value, weight in zip(out, down, strict=True)]
    return out


def relative_error(bank: ExpertBank, sample: Sequence[Vector], kept: Sequence[int]) -> float:
    """Σ_x ‖Y(x) − Y'(x)‖² / Σ_x ‖Y(x)‖²"""
    error = energy = 0.0
    for x in sample:
        whole, rest = routed_output(bank, x, range(bank.dims.experts)), routed_output(bank, x, kept)
        error += math.fsum((a - b) ** 2 for a, b in zip(whole, rest, strict=True))
        energy += math.fsum(a**2 for a in whole)
    return error / energy
