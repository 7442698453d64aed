"""Similarities formula by formula: Python loops and float64, nothing clever. The fast code must match it.

Vectors and segments as in `tests.reference.dern`. The experts are those of `dernkit.testing.banks`, with SiLU.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from dernkit.types import ExpertBank
from tests.reference.dern import Vector, cosine, norm

Matrix = list[Vector]


def parts(bank: ExpertBank, expert: int) -> list[dict[str, Vector]]:
    """Gate, up and down part of every neuron."""
    names = ["up", "down"] if bank.gate is None else ["gate", "up", "down"]
    return [dict(zip(names, row, strict=True)) for row in bank.segments(expert).double().tolist()]


def dot(u: Vector, v: Vector) -> float:
    return math.fsum(x * y for x, y in zip(u, v, strict=True))


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def changed(neuron: dict[str, Vector], c: float) -> dict[str, Vector]:
    """(g, u, d) → (g, c u, d / c)"""
    return neuron | {"up": [c * x for x in neuron["up"]], "down": [x / c for x in neuron["down"]]}


def balanced(neuron: dict[str, Vector]) -> dict[str, Vector]:
    """The c that makes ‖c u‖ = ‖d / c‖."""
    up, down = norm(neuron["up"]), norm(neuron["down"])
    return changed(neuron, math.sqrt(down / up)) if up and down else neuron


def weight_cosine(
    one: dict[str, Vector], other: dict[str, Vector], names: Sequence[str], *, sign: bool, balance: bool
) -> float:
    if balance:
        one, other = balanced(one), balanced(other)
    vector = [x for name in names for x in other[name]]
    signs = (1.0, -1.0) if sign else (1.0,)
    return max(cosine([x for name in names for x in changed(one, c)[name]], vector) for c in signs)


def likest(one: dict[str, Vector], other: dict[str, Vector], *, sign: bool, balance: bool) -> float:
    """The c for which (c u, d / c) has the partner's ratio of norms, and of both signs the one that is nearer to it."""
    norms = [norm(neuron[name]) for neuron in (one, other) for name in ("up", "down")]
    c = math.sqrt(norms[1] * norms[2] / (norms[0] * norms[3])) if balance and all(norms) else 1.0

    def distance(c: float) -> float:
        new = changed(one, c)
        return math.fsum((x - y) ** 2 for name in ("up", "down") for x, y in zip(new[name], other[name], strict=True))

    return min((c, -c), key=distance) if sign else c


def activation(neuron: dict[str, Vector], x: Vector) -> float:
    """act(g · x) (u · x), or act(u · x) without a gate; a bias is the last feature of its part."""
    if len(neuron["up"]) == len(x) + 1:
        x = [*x, 1.0]
    if "gate" not in neuron:
        return silu(dot(neuron["up"], x))
    return silu(dot(neuron["gate"], x)) * dot(neuron["up"], x)


def pearson(u: Vector, v: Vector) -> float:
    """Correlation coefficient; 0 with a constant."""
    if len(set(u)) < 2 or len(set(v)) < 2:
        return 0.0
    means = [math.fsum(w) / len(w) for w in (u, v)]
    return cosine([x - means[0] for x in u], [x - means[1] for x in v])


def contribution(neuron: dict[str, Vector], inputs: Matrix) -> Vector:
    """What a neuron adds to the output of every input, one after the other."""
    return [activation(neuron, x) * y for x in inputs for y in neuron["down"]]


def correlation_pairs(bank: ExpertBank, one: int, other: int, inputs: Matrix) -> Matrix:
    rows, columns = ([[activation(n, x) for x in inputs] for n in parts(bank, e)] for e in (one, other))
    return [[pearson(row, column) for column in columns] for row in rows]


def contribution_pairs(bank: ExpertBank, one: int, other: int, inputs: Matrix) -> Matrix:
    rows, columns = ([contribution(n, inputs) for n in parts(bank, e)] for e in (one, other))
    return [[cosine(row, column) for column in columns] for row in rows]


def cosine_pairs(
    bank: ExpertBank, one: int, other: int, names: Sequence[str], *, sign: bool = False, balance: bool = False
) -> Matrix:
    rows, columns = parts(bank, one), parts(bank, other)
    return [[weight_cosine(row, column, names, sign=sign, balance=balance) for column in columns] for row in rows]


def best(pairs: Matrix) -> list[tuple[float, int]]:
    """Best value of every row and the first column that has it."""
    return [(max(row), row.index(max(row))) for row in pairs]


def hungarian(pairs: Matrix) -> list[tuple[float, int]]:
    """Of all permutations the one with the greatest sum."""
    columns = max(
        itertools.permutations(range(len(pairs))),
        key=lambda order: math.fsum(row[column] for row, column in zip(pairs, order, strict=True)),
    )
    return [(row[column], column) for row, column in zip(pairs, columns, strict=True)]


def output_likeness(sums: Matrix, routed: Vector, one: int, other: int, metric: str) -> float:
    """Of mean outputs over the routed tokens; 0 where there are none."""
    if not routed[one] or not routed[other]:
        return 0.0
    means = [[x / routed[e] for x in sums[e]] for e in (one, other)]
    return cosine(*means) if metric == "cosine" else 1 / (1 + math.dist(*means))


def logit_likeness(bank: ExpertBank, one: int, other: int, inputs: Matrix, metric: str) -> float:
    logits = [[dot(row, x) for x in inputs] for row in bank.router.double()[[one, other]].tolist()]
    return cosine(*logits) if metric == "cosine" else pearson(*logits)


def weight_likeness(bank: ExpertBank, one: int, other: int) -> float:
    return cosine(*([x for n in parts(bank, e) for part in n.values() for x in part] for e in (one, other)))
