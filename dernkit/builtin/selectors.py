"""Which experts of one layer stay, once it is known how many."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, combinations, product
from typing import Annotated, ClassVar, final

import torch
from annotated_types import Interval
from jaxtyping import Float64
from torch import Tensor

from dernkit.api import ExpertBank, LayerDims, LayerStats, Retention, hookimpl
from dernkit.kernel.elimination import eliminate
from dernkit.kernel.selection import select
from dernkit.kernel.subsets import subset_loss, without_each


@final
@dataclass(frozen=True)
class TopScore:
    """The experts with the highest scores, as many from each of the router's groups; ties to the lowest index."""

    name: ClassVar[str] = "top-score"
    requires: ClassVar[frozenset[str]] = frozenset()
    groups: ClassVar[bool] = False

    def select(self, bank: ExpertBank, scores: Float64[Tensor, " experts"], count: int, stats: LayerStats) -> Retention:
        return Retention(scores, select(scores, count, bank.dims.groups))


@final
@dataclass(frozen=True)
class BestSubset:
    """The experts that together give the layer's output best, after routing among them: NAEE (arXiv 2402.14800).

    Best is the least squared error of the routed experts' sum on sampled inputs; scores are handed on and not looked
    at. Of equal subsets the lexicographically smallest. Memory: as the scorer `reconstruction`.
    """

    name: ClassVar[str] = "best-subset"
    requires: ClassVar[frozenset[str]] = frozenset({"sample"})
    groups: ClassVar[bool] = False

    exhaustive: Annotated[int, Interval(ge=0, le=1_000_000)] = 2000
    """Up to so many subsets are all tried, as in the paper, one routing each. Where there are more, experts go one by
    one, the one that costs least first: about E²/2 routings for E experts, a minute or two a layer for 64."""

    tokens: Annotated[int, Interval(ge=1, le=2**20)] = 1024
    """At most so many of the sampled inputs."""

    def select(self, bank: ExpertBank, scores: Float64[Tensor, " experts"], count: int, stats: LayerStats) -> Retention:
        dims, loss = bank.dims, subset_loss(bank, stats, self.tokens)
        if math.comb(dims.experts // dims.groups, count // dims.groups) ** dims.groups <= self.exhaustive:
            kept = min(subsets(dims, count), key=lambda subset: loss(subset))  # of equal ones the first
        else:
            gone = {expert for expert, _ in eliminate(dims, count, partial(without_each, loss))}
            kept = tuple(expert for expert in range(dims.experts) if expert not in gone)
        return Retention(scores, torch.tensor(kept))


def subsets(dims: LayerDims, count: int) -> Iterator[tuple[int, ...]]:
    """Subsets with as many experts of each of the router's groups, in lexicographical order."""
    size = dims.experts // dims.groups
    members = [range(start, start + size) for start in range(0, dims.experts, size)]
    for chosen in product(*(combinations(group, count // dims.groups) for group in members)):
        yield tuple(chain.from_iterable(chosen))


@hookimpl
def dernkit_selectors() -> list[type]:
    return [TopScore, BestSubset]
