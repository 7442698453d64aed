"""Experts go one by one, the cheapest first, in an order that the router's groups allow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from dernkit.types import LayerDims

Cost = TypeVar("Cost", float, tuple[int, float])


def eliminate(
    dims: LayerDims, count: int, costs: Callable[[Sequence[int], Sequence[int]], Sequence[Cost]]
) -> list[tuple[int, Cost]]:
    """Backward elimination until ``count`` experts are left; of equal ones the highest index goes.

    Args:
        dims: the layer's sizes; a router's groups shrink in turn, so that they stay equally large.
        count: at least ``dims.smallest_keep``, a multiple of the groups.
        costs: (experts that are left, those of them that may go next) -> what it costs when each of the latter goes.

    Returns:
        The experts that went and their costs, in the order in which they went.
    """
    left = list(range(dims.experts))
    gone = []
    while len(left) > count:
        candidates = _in_largest_groups(left, dims)
        found = costs(left, candidates)
        lowest = min(found)
        expert = max(expert for expert, cost in zip(candidates, found, strict=True) if cost == lowest)
        left.remove(expert)
        gone.append((expert, lowest))
    return gone


def _in_largest_groups(left: Sequence[int], dims: LayerDims) -> list[int]:
    size = dims.experts // dims.groups
    members = [sum(expert // size == group for expert in left) for group in range(dims.groups)]
    return [expert for expert in left if members[expert // size] == max(members)]
