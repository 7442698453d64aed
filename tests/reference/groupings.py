"""Groups of experts, formula by formula: Python loops and float64, nothing clever. The fast code must match it.

``similarity[d][k]`` says how alike dropped expert d and kept expert k are.
"""

from __future__ import annotations

from collections.abc import Sequence

from dernkit.types import ExpertBank
from tests.reference import dern

Table = dict[int, dict[int, float]]


def top(scores: Sequence[float], count: int, groups: int) -> list[int]:
    """The highest scores, as many of each contiguous group of the router."""
    size = len(scores) // groups
    kept = []
    for start in range(0, len(scores), size):
        ranked = sorted(range(start, start + size), key=lambda e: (-scores[e], e))
        kept += ranked[: count // groups]
    return sorted(kept)


def cosine_similarity(bank: ExpertBank, kept: Sequence[int], parts: Sequence[str]) -> Table:
    """Mean over the neurons of the dropped expert of their best cosine in the kept one."""
    table: Table = {}
    for dropped in set(range(bank.dims.experts)) - set(kept):
        own = dern.vectors(bank, dropped, parts)
        table[dropped] = {
            k: sum(dern.best(vector, dern.vectors(bank, k, parts))[0] for vector in own) / len(own) for k in kept
        }
    return table


def mean(tables: Sequence[Table]) -> Table:
    first = tables[0]
    return {d: {k: sum(table[d][k] for table in tables) / len(tables) for k in first[d]} for d in first}


def dominant(similarity: Table, kept: Sequence[int]) -> dict[int, int]:
    """Each dropped expert -> the kept expert that it joins; M-SMoE (arXiv 2310.01334)."""
    return {d: max(kept, key=lambda k: (row[k], -k)) for d, row in similarity.items()}


def pseudo_pruned(similarity: Table, kept: Sequence[int], scores: Sequence[float], group_size: int) -> dict[int, int]:
    """Each dropped expert -> the kept expert that takes it; REAM (arXiv 2604.04356)."""
    joined: dict[int, int] = {}
    for k in sorted(kept, key=lambda k: (-scores[k], k)):
        taken = 1
        for d in sorted(similarity, key=lambda d: (-similarity[d][k], d)):
            if d not in joined and taken < group_size:
                joined[d] = k
                taken += 1
    return joined
