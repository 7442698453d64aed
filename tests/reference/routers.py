"""Router updates formula by formula, beside DERN's: Python loops and float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tests.reference.dern import Vector

Moves = Sequence[tuple[int, int]]
"""source, target"""


def share(moves: Moves, giver: int, target: int, width: int) -> float:
    """s_{o→r} = n_{o→r} / W"""
    return sum(1 for source, to in moves if to == target and source // width == giver) / width


def average(rows: Sequence[Vector], kept: Sequence[int], moves: Moves, width: int, weights: Vector) -> list[Vector]:
    """(w_r G_r + Σ_o s w_o G_o) / (w_r + Σ_o s w_o)"""
    result = []
    for target, expert in enumerate(kept):
        parts = {o: share(moves, o, target, width) for o in range(len(rows))} | {expert: 1.0}
        mass = {o: s * weights[o] for o, s in parts.items()}
        if not any(mass.values()):
            mass = parts
        total = math.fsum(mass.values())
        result.append([math.fsum(mass[o] * rows[o][d] for o in parts) / total for d in range(len(rows[0]))])
    return result


def logit(row: Vector, x: Vector) -> float:
    return math.fsum(w * v for w, v in zip(row, x, strict=True))


def wanted_logit(rows: Sequence[Vector], expert: int, target: int, moves: Moves, width: int, x: Vector) -> float:
    """log( exp l_r(x) + Σ_o s_{o→r} exp l_o(x) )"""
    terms = [math.exp(logit(rows[expert], x))]
    for giver in range(len(rows)):
        terms.append(share(moves, giver, target, width) * math.exp(logit(rows[giver], x)))
    return math.log(math.fsum(terms))


def solve(matrix: list[Vector], right: Vector) -> Vector:
    """Gaussian elimination with the largest pivot."""
    rows = [[*row, y] for row, y in zip(matrix, right, strict=True)]
    size = len(rows)
    for i in range(size):
        pivot = max(range(i, size), key=lambda r: abs(rows[r][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        for r in range(size):
            if r != i:
                factor = rows[r][i] / rows[i][i]
                rows[r] = [a - factor * b for a, b in zip(rows[r], rows[i], strict=True)]
    return [rows[i][size] / rows[i][i] for i in range(size)]


def ridge(inputs: Sequence[Vector], wanted: Vector, penalty: float) -> Vector:
    """(XᵀX + λI)⁻¹ Xᵀy with λ = penalty · Σ‖x‖² / min(n, D)"""
    features = len(inputs[0])
    size = penalty * math.fsum(v * v for x in inputs for v in x) / min(len(inputs), features)
    gram = [
        [math.fsum(x[i] * x[j] for x in inputs) + (size if i == j else 0.0) for j in range(features)]
        for i in range(features)
    ]
    right = [math.fsum(x[i] * y for x, y in zip(inputs, wanted, strict=True)) for i in range(features)]
    return solve(gram, right)


def log_mass_rows(
    rows: Sequence[Vector], kept: Sequence[int], moves: Moves, width: int, inputs: Sequence[Vector], penalty: float
) -> list[Vector]:
    result = []
    for target, expert in enumerate(kept):
        rises = [wanted_logit(rows, expert, target, moves, width, x) - logit(rows[expert], x) for x in inputs]
        change = ridge(inputs, rises, penalty)
        receives = any(to == target for _, to in moves)
        result.append([a + b for a, b in zip(rows[expert], change, strict=True)] if receives else list(rows[expert]))
    return result


def log_mass_biases(
    biases: Vector, kept: Sequence[int], moves: Moves, width: int, mass: Vector, tokens: int
) -> list[float]:
    """b_r + log(1 + Σ_o s m_o / m_r), m_r at least what one token gives"""
    one = math.fsum(mass) / tokens
    result = []
    for target, expert in enumerate(kept):
        arriving = math.fsum(share(moves, o, target, width) * mass[o] for o in range(len(biases)))
        result.append(biases[expert] + (math.log1p(arriving / max(mass[expert], one)) if one else 0.0))
    return result
