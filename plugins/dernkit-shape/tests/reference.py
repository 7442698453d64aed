"""SHAPE as it is defined: Python loops over coalitions, fractions instead of floats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction


def contributions(chosen: Sequence[Sequence[int]], experts: int, subtract: Fraction = Fraction(1)) -> list[Fraction]:
    """``φ_i`` for tokens with these chosen experts, divided by the number of tokens."""
    worth = Counter(frozenset(token) for token in chosen)
    without: Counter[frozenset[int]] = Counter()
    for coalition, tokens in worth.items():
        for expert in coalition:
            without[coalition - {expert}] += tokens
    found = []
    for expert in range(experts):
        mine = [(Fraction(v), Fraction(without[a - {expert}])) for a, v in worth.items() if expert in a]
        alpha = min((v / n for v, n in mine), default=Fraction(0))
        found.append(sum((v - subtract * alpha * n for v, n in mine), Fraction(0)) / len(chosen))
    return found


def covering(scores: Sequence[float], alpha: float, least: int) -> int:
    """Fewest experts that hold the share alpha of the scores of one layer."""
    ranked = sorted((max(score, 0.0) for score in scores), reverse=True)
    held, count = 0.0, 0
    while count < least or (held < alpha * sum(ranked) and count < len(ranked)):
        held += ranked[count]
        count += 1
    return count
