"""Merges formula by formula, beside those of DERN: Python loops and float64. A segment is a list of its parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from tests.reference.dern import Vector, best, mean, norm

Segment = list[Vector]


def flat(segment: Segment) -> Vector:
    return [x for part in segment for x in part]


def parts_of(vector: Vector, parts: int) -> Segment:
    size = len(vector) // parts
    return [vector[i * size : (i + 1) * size] for i in range(parts)]


def expert_average(weights: Sequence[Sequence[Vector]], frequencies: Vector) -> list[Vector]:
    """Σ_e f_e W_e / Σ_e f_e, entry by entry of one matrix (arXiv 2310.01334 and 2410.08589)."""
    return [
        [
            math.fsum(f * matrix[row][column] for f, matrix in zip(frequencies, weights, strict=True))
            / math.fsum(frequencies)
            for column in range(len(weights[0][0]))
        ]
        for row in range(len(weights[0]))
    ]


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def activations(segment: Segment, inputs: Sequence[Vector], act: Callable[[float], float] = silu) -> Vector:
    """act(gate · x) (up · x) for every input, act(up · x) without a gate; a last weight more than inputs is a bias."""

    def product(row: Vector, x: Vector) -> float:
        return math.fsum(w * v for w, v in zip(row, [*x, 1.0][: len(row)], strict=True))

    gates = [1.0] * len(inputs) if len(segment) == 2 else [act(product(segment[0], x)) for x in inputs]
    ups = [product(segment[-2], x) for x in inputs]
    return [g * u if len(segment) == 3 else act(u) for g, u in zip(gates, ups, strict=True)]


def kmeans_activation(
    pool: Sequence[Segment],
    weights: Vector,
    seeds: Sequence[int],
    inputs: Sequence[Vector],
    *,
    iterations: int = 30,
    equalise: bool = True,
    rescale: bool = True,
) -> list[Vector]:
    """Spherical k-means of the activation vectors; each cluster's weighted mean of segments, its seed if empty."""
    vectors = [activations(segment, inputs) for segment in pool]
    centroids = [vectors[i] for i in seeds]
    labels: list[int] = []
    for _ in range(iterations):
        before, labels = labels, [best(vector, centroids)[1] for vector in vectors]
        if labels == before:
            break
        for c in set(labels):
            members = [i for i, label in enumerate(labels) if label == c]
            shares = [weights[i] for i in members]
            centroids[c] = mean([vectors[i] for i in members], shares, equalise=True, rescale=False)
    result = []
    for c, seed in enumerate(seeds):
        members = [i for i, label in enumerate(labels) if label == c] or [seed]
        shares = [weights[i] for i in members]
        result.append(mean([flat(pool[i]) for i in members], shares, equalise=equalise, rescale=rescale))
    return result


def slerp(a: Vector, b: Vector, t: float) -> Vector:
    """Along the arc from a to b; the norm goes linearly. Opposite: the direction of the nearer end, of a in the middle.
    A zero vector takes the other's direction."""
    length = (1 - t) * norm(a) + t * norm(b)
    if not norm(a) or not norm(b):
        other = b if norm(b) else a
        return [length * x / norm(other) for x in other] if norm(other) else [0.0] * len(a)
    unit_a, unit_b = [x / norm(a) for x in a], [x / norm(b) for x in b]
    cosine = max(-1.0, min(1.0, math.fsum(x * y for x, y in zip(unit_a, unit_b, strict=True))))
    angle = math.acos(cosine)
    if cosine <= -1 + 1e-12:
        return [length * x for x in (unit_b if t > 0.5 else unit_a)]
    if angle < 1e-6:
        return [length * x for x in unit_a]
    first, second = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    return [length * (first * x + second * y) for x, y in zip(unit_a, unit_b, strict=True)]


def slerp_merge(
    own: Sequence[Segment],
    own_weight: float,
    incoming: Sequence[Segment],
    weights: Vector,
    partner: Sequence[int],
    affinity: Vector,
    *,
    whole: bool = False,
) -> list[Vector]:
    """Own neuron by own neuron: the closest arrival first, of equally close ones the heaviest, then the first."""
    result = []
    for neuron, segment in enumerate(own):
        arrivals = [i for i, p in enumerate(partner) if p == neuron]
        arrivals.sort(key=lambda i: (-affinity[i], -weights[i], i))
        shares = [own_weight] + [weights[i] for i in arrivals]
        if not any(shares):
            shares = [1.0] * len(shares)
        merged = [flat(segment)] if whole else [list(part) for part in segment]
        total = shares[0]
        for i, w in zip(arrivals, shares[1:], strict=True):
            total += w
            t = w / total if total else 0.0
            arrival = [flat(incoming[i])] if whole else incoming[i]
            merged = [slerp(part, other, t) for part, other in zip(merged, arrival, strict=True)]
        result.append(flat(merged))
    return result


def mean_bias(biases: Sequence[Vector], expert: int, givers: Sequence[int], weights: Vector, width: int) -> Vector:
    """(w_r b_r + Σ_o s_o w_o b_o) / (w_r + Σ_o s_o w_o) with s_o = n_o / W; ``givers``: the expert of each arrival."""
    share = {e: givers.count(e) / width for e in set(givers)} | {expert: 1.0}
    if not any(weights[e] for e in share):
        weights = [1.0] * len(weights)
    total = math.fsum(share[e] * weights[e] for e in share)
    return [math.fsum(share[e] * weights[e] * biases[e][d] for e in share) / total for d in range(len(biases[0]))]
