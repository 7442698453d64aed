"""DERN (arXiv 2509.10377) formula by formula: Python loops and float64, nothing clever. The fast code must match it.

A vector is a list of floats, a segment too (gate row, up row, down column end to end, as ``ExpertBank.segments``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from dernkit.types import ExpertBank

Vector = list[float]
Move = tuple[int, int, int, float]
"""source, target, partner, affinity"""
Event = tuple[int, float, float]
"""One routed expert of one token: its index, its coefficient g, the norm of its output."""


def norm(v: Vector) -> float:
    return math.sqrt(math.fsum(x * x for x in v))


def cosine(u: Vector, v: Vector) -> float:
    lengths = norm(u) * norm(v)
    return math.fsum(x * y for x, y in zip(u, v, strict=True)) / lengths if lengths else 0.0


def best(query: Vector, candidates: Sequence[Vector]) -> tuple[float, int]:
    """Highest cosine and the first candidate that has it."""
    cosines = [cosine(query, candidate) for candidate in candidates]
    return max(cosines), cosines.index(max(cosines))


def frequency(tokens: Sequence[Sequence[Event]], experts: int) -> Vector:
    """(1/T) Σ_t 1[e ∈ TopK(x_t)]"""
    return [sum(any(e == i for i, _, _ in token) for token in tokens) / len(tokens) for e in range(experts)]


def gate_mass(tokens: Sequence[Sequence[Event]], experts: int) -> Vector:
    """S_e = (1/T) Σ_t 1[e ∈ TopK(x_t)] · g_e(x_t)"""
    return [math.fsum(g for token in tokens for i, g, _ in token if i == e) / len(tokens) for e in range(experts)]


def reap(tokens: Sequence[Sequence[Event]], experts: int) -> Vector:
    """Mean over the routed tokens of g_e · ‖E_e(x)‖; 0 without tokens (arXiv 2510.13999)."""
    terms = [[g * n for token in tokens for i, g, n in token if i == e] for e in range(experts)]
    return [math.fsum(term) / len(term) if term else 0.0 for term in terms]


def vectors(bank: ExpertBank, expert: int, parts: Sequence[str]) -> list[Vector]:
    names = ["up", "down"] if bank.gate is None else ["gate", "up", "down"]
    rows = bank.segments(expert).double().tolist()
    return [[x for part in parts for x in row[names.index(part)]] for row in rows]


def affinities(bank: ExpertBank, kept: Sequence[int], parts: Sequence[str]) -> list[Move]:
    """For every dropped segment: r* = argmax_r sim(s, r), the neuron that gives it, and sim(s, r*)."""
    found = []
    for expert in sorted(set(range(bank.dims.experts)) - set(kept)):
        for neuron, vector in enumerate(vectors(bank, expert, parts)):
            matches = [best(vector, vectors(bank, r, parts)) for r in kept]
            target = max(range(len(kept)), key=lambda r: (matches[r][0], -r))
            found.append((expert * bank.dims.width + neuron, target, matches[target][1], matches[target][0]))
    return found


def above_threshold(found: Sequence[Move], threshold: float) -> list[Move]:
    return [move for move in found if move[3] > threshold]


def best_share(found: Sequence[Move], quantile: float) -> list[Move]:
    count = int(Fraction(str(quantile)) * len(found))
    return sorted(sorted(found, key=lambda move: (-move[3], move[0]))[:count])


def seeds_by_gate(pool: Sequence[Vector], features: int, width: int) -> list[int]:
    """The distinct segments with the largest infinity norm of their first part, ascending."""
    distinct = [i for i, segment in enumerate(pool) if segment not in pool[:i]]
    ranked = sorted(distinct, key=lambda i: (-max(abs(x) for x in pool[i][:features]), i))
    return sorted(ranked[:width])


def mean(members: Sequence[Vector], weights: Vector, *, equalise: bool, rescale: bool) -> Vector:
    """μ_c = Σ w_j (n_c / ‖s_j‖) s_j / Σ w_j, then stretched to norm n_c."""
    if not any(weights):
        weights = [1.0] * len(members)
    n_c = sum(map(norm, members)) / len(members)
    factors = [n_c / norm(s) if equalise and norm(s) else 1.0 for s in members]
    mu = [
        math.fsum(w * f * s[d] for w, f, s in zip(weights, factors, members, strict=True)) / math.fsum(weights)
        for d in range(len(members[0]))
    ]
    return [x * n_c / norm(mu) for x in mu] if rescale and norm(mu) else mu


def kmeans(
    pool: Sequence[Vector],
    weights: Vector,
    seeds: Sequence[int],
    *,
    iterations: int = 30,
    equalise: bool = True,
    rescale: bool = True,
) -> list[Vector]:
    centroids = [pool[i] for i in seeds]
    labels: list[int] = []
    for _ in range(iterations):
        before, labels = labels, [best(segment, centroids)[1] for segment in pool]
        if labels == before:
            break
        for c in set(labels):
            members = [i for i, label in enumerate(labels) if label == c]
            centroids[c] = mean(
                [pool[i] for i in members], [weights[i] for i in members], equalise=equalise, rescale=rescale
            )
    return centroids


def weighted_average(
    own: Sequence[Vector],
    own_weight: float,
    incoming: Sequence[Vector],
    weights: Vector,
    partner: Sequence[int],
    *,
    rescale: bool = False,
) -> list[Vector]:
    result = []
    for neuron, segment in enumerate(own):
        arrivals = [i for i, p in enumerate(partner) if p == neuron]
        members = [segment] + [incoming[i] for i in arrivals]
        shares = [own_weight] + [weights[i] for i in arrivals]
        result.append(mean(members, shares, equalise=False, rescale=rescale))
    return result


def additive_router(
    rows: Sequence[Vector], kept: Sequence[int], moves: Sequence[tuple[int, int]], width: int
) -> list[Vector]:
    """G_r + Σ_{o dropped} (n_{o→r} / W) · G_o, for moves (source, target)."""
    result = []
    for target, expert in enumerate(kept):
        row = list(rows[expert])
        for dropped in set(range(len(rows))) - set(kept):
            n = sum(1 for source, to in moves if to == target and source // width == dropped)
            row = [x + n / width * y for x, y in zip(row, rows[dropped], strict=True)]
        result.append(row)
    return result
