"""Agglomerative clustering as it is defined: Python loops and float64, distances computed again at every step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

Vector = Sequence[float]


def euclidean(one: Vector, other: Vector) -> float:
    return math.sqrt(math.fsum((x - y) ** 2 for x, y in zip(one, other, strict=True)))


def squares(points: Sequence[Vector]) -> float:
    """Sum of the squared distances from their mean."""
    mean = [math.fsum(column) / len(points) for column in zip(*points, strict=True)]
    return math.fsum(euclidean(point, mean) ** 2 for point in points)


def apart(one: Sequence[Vector], other: Sequence[Vector], linkage: str) -> float:
    distances = [euclidean(x, y) for x in one for y in other]
    if linkage == "average":
        return math.fsum(distances) / len(distances)
    if linkage == "ward":
        return squares([*one, *other]) - squares(one) - squares(other)
    return {"single": min, "complete": max}[linkage](distances)


def agglomerative(points: Sequence[Vector], linkage: str, count: int) -> set[frozenset[int]]:
    """``count`` clusters: the two nearest ones are joined until no more are left."""
    clusters = [[i] for i in range(len(points))]
    while len(clusters) > count:
        one, other = min(
            combinations(clusters, 2),
            key=lambda pair: apart([points[i] for i in pair[0]], [points[i] for i in pair[1]], linkage),
        )
        clusters = [cluster for cluster in clusters if cluster not in (one, other)] + [one + other]
    return {frozenset(cluster) for cluster in clusters}


def frequency_average(members: Sequence[Vector], frequencies: Vector) -> list[float]:
    """``Σ f_e θ_e / Σ f_e``: the merged expert's parameters."""
    total = math.fsum(frequencies)
    return [
        math.fsum(f * theta[i] for f, theta in zip(frequencies, members, strict=True)) / total
        for i in range(len(members[0]))
    ]
