"""Statistics of comparisons by loops over documents, seeds and resamples, from the textbooks' formulas.

A measurement is a list of documents, each (group, value, weight); a recipe is a list of them, one a seed.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence

Document = tuple[str, float, float]
Measurement = Sequence[Document]


def group_metric(measurement: Measurement, group: str) -> float:
    value = weight = 0.0
    for name, v, w in measurement:
        if name == group:
            value, weight = value + v, weight + w
    return value / weight


def metric(measurement: Measurement) -> float:
    groups = sorted({name for name, _, _ in measurement})
    return sum(group_metric(measurement, group) for group in groups) / len(groups)


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def variance(values: Sequence[float]) -> float:
    centre = mean(values)
    return math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1)


def document_parts(terms: Sequence[tuple[float, Sequence[Measurement]]]) -> list[tuple[float, int]]:
    """Variance and degrees of freedom of each group, by Taylor's expansion of the ratios (Cochran 1977, section 6.4).

    The part of document i in a ratio's error is (v_i − ratio w_i) / mean(w); its variance over n documents is s² / n.
    """
    first = terms[0][1][0]
    groups = sorted({name for name, _, _ in first})
    parts = []
    for group in groups:
        members = [i for i, (name, _, _) in enumerate(first) if name == group]
        residuals = []
        for i in members:
            total = 0.0
            for factor, seeds in terms:
                for measurement in seeds:
                    ratio = group_metric(measurement, group)
                    weight = mean([measurement[j][2] for j in members])
                    total += factor / len(seeds) * (measurement[i][1] - ratio * measurement[i][2]) / weight
            residuals.append(total)
        parts.append((variance(residuals) / len(members) / len(groups) ** 2, len(members) - 1))
    return parts


def paired_seeds(terms: Sequence[tuple[float, Sequence[Measurement]]]) -> list[tuple[float, int]]:
    """Variance of the mean of the seeds' differences."""
    count = max(len(seeds) for _, seeds in terms)
    differences = []
    for s in range(count):
        differences.append(math.fsum(f * metric(seeds[s if len(seeds) > 1 else 0]) for f, seeds in terms))
    return [(variance(differences) / count, count - 1)] if count > 1 else []


def separate_seeds(terms: Sequence[tuple[float, Sequence[Measurement]]]) -> list[tuple[float, int]]:
    parts = []
    for factor, seeds in terms:
        if len(seeds) > 1:
            parts.append((factor**2 * variance([metric(seen) for seen in seeds]) / len(seeds), len(seeds) - 1))
    return parts


def satterthwaite(parts: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """Variance and degrees of freedom of a sum (Satterthwaite 1946)."""
    total = math.fsum(part for part, _ in parts)
    return total, total**2 / math.fsum(part**2 / freedom for part, freedom in parts)


def student_two_sided(t: float, freedom: float, steps: int = 4000) -> float:
    """Twice Student's upper tail, by Simpson's rule on x = t + (1 − u) / u for u in (0, 1]."""
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)

    def integrand(u: float) -> float:
        if u == 0:
            return constant * freedom if freedom == 1 else 0.0
        x = abs(t) + (1 - u) / u
        return constant * (1 + x * x / freedom) ** (-(freedom + 1) / 2) / (u * u)

    total = integrand(0.0) + integrand(1.0)
    for i in range(1, steps):
        total += integrand(i / steps) * (4 if i % 2 else 2)
    return 2 * total / (3 * steps)


def pigeonhole(terms: Sequence[tuple[float, Sequence[Measurement]]], resamples: int, seed: int) -> float:
    """Variance over resamples of seeds and, in each group, of documents: both at once (Owen 2007)."""
    rng = random.Random(seed)
    first = terms[0][1][0]
    groups = sorted({name for name, _, _ in first})
    members = {group: [i for i, (name, _, _) in enumerate(first) if name == group] for group in groups}
    count = max(len(seeds) for _, seeds in terms)
    estimates = []
    for _ in range(resamples):
        drawn = {group: rng.choices(members[group], k=len(members[group])) for group in groups}
        chosen = rng.choices(range(count), k=count)
        total = 0.0
        for factor, seeds in terms:
            for s in chosen:
                seen = seeds[s if len(seeds) > 1 else 0]
                for group in groups:
                    value = math.fsum(seen[i][1] for i in drawn[group])
                    total += factor * value / math.fsum(seen[i][2] for i in drawn[group]) / len(groups) / count
        estimates.append(total)
    return variance(estimates)


def ends(told_apart: Callable[[float], float], inside: float, outside: float) -> float:
    """Where ``told_apart`` (below 0 inside, above 0 outside) is 0, by halving."""
    for _ in range(200):
        middle = (inside + outside) / 2
        if told_apart(middle) < 0:
            inside = middle
        else:
            outside = middle
    return inside


def closed_bonferroni(p: Sequence[float]) -> list[float]:
    """Holm's method is this one: a hypothesis falls when Bonferroni rejects every set of hypotheses that it is in."""
    adjusted = []
    for i in range(len(p)):
        worst = 0.0
        for size in range(1, len(p) + 1):
            for family in itertools.combinations(range(len(p)), size):
                if i in family:
                    worst = max(worst, min(1.0, size * min(p[j] for j in family)))
        adjusted.append(worst)
    return adjusted


def ranks(values: Sequence[float]) -> list[float]:
    """1 is the smallest; equal values share the mean of their ranks."""
    found = []
    for value in values:
        below = sum(other < value for other in values)
        equal = sum(other == value for other in values)
        found.append(below + (equal + 1) / 2)
    return found


def friedman(blocks: Sequence[Sequence[float]]) -> float:
    """Friedman's chi-square, corrected for ties (Conover 1999, section 5.8)."""
    n, k = len(blocks), len(blocks[0])
    ranked = [ranks(block) for block in blocks]
    totals = [math.fsum(row[j] for row in ranked) for j in range(k)]
    squares = math.fsum(rank**2 for row in ranked for rank in row)
    centre = n * k * (k + 1) ** 2 / 4
    return (k - 1) * (math.fsum(total**2 for total in totals) - n * centre) / (squares - centre)


def chi_square_tail(x: float, freedom: int) -> float:
    """Upper tail, by the recurrence over degrees of freedom (Abramowitz & Stegun 26.4.4 and 26.4.5)."""
    if freedom == 1:
        return math.erfc(math.sqrt(x / 2))
    if freedom == 2:
        return math.exp(-x / 2)
    step = freedom - 2
    term = math.exp(step / 2 * math.log(x / 2) - x / 2 - math.lgamma(step / 2 + 1))
    return chi_square_tail(x, step) + term
