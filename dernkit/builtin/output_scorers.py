"""How much each expert matters, by what the layer is without it on sampled inputs; higher stays. Scores are float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, Literal, final

import torch
from annotated_types import Interval
from jaxtyping import Float64
from torch import Tensor

from dernkit.api import ExpertBank, LayerDims, LayerStats, hookimpl
from dernkit.kernel.elimination import eliminate
from dernkit.kernel.subsets import reroute, subset_loss, without_each


@final
@dataclass(frozen=True)
class Reconstruction:
    """Loss of the layer's output without the expert, after routing among the others (NAEE's loss, arXiv 2402.14800).

    The loss is ``Σ_t ‖Y(x_t) − Y_S(x_t)‖² / Σ_t ‖Y(x_t)‖²`` over sampled inputs; Y is the routed experts' sum, S those
    that are left. 1 where the router needs all experts, as without it nothing would be left.
    Memory: ``8 tokens E²`` bytes a layer (512 MiB for 256 experts and 1,024 tokens) besides 768 MiB of outputs.
    """

    name: ClassVar[str] = "reconstruction"
    requires: ClassVar[frozenset[str]] = frozenset({"sample"})

    order: Literal["leave-one-out", "greedy"] = "leave-one-out"
    """Whether each expert is judged while all others are there, E routings; or the one that costs least goes first,
    the next is judged without it, and so on: about E²/2 routings, minutes a layer for hundreds of experts. The score
    is then the loss when the expert went, and no less than that of those which went before."""

    tokens: Annotated[int, Interval(ge=1, le=2**20)] = 1024
    """At most so many of the sampled inputs."""

    def score(self, bank: ExpertBank, stats: LayerStats) -> Float64[Tensor, " experts"]:
        dims = bank.dims
        if dims.experts - dims.groups < dims.smallest_keep:
            return torch.ones(dims.experts, dtype=torch.float64)
        loss = subset_loss(bank, stats, self.tokens)
        if self.order == "leave-one-out":
            everyone = range(dims.experts)
            return torch.tensor(without_each(loss, everyone, everyone), dtype=torch.float64)
        return _greedy(dims, loss)


def _greedy(dims: LayerDims, loss: Callable[[Sequence[int]], float]) -> Float64[Tensor, " experts"]:
    """Losses in the order of elimination, where need be raised by one unit in the last place above those before."""
    gone = eliminate(dims, dims.smallest_keep, partial(without_each, loss))
    last, raised = 0.0, {}
    for expert, cost in gone:
        last = cost if cost >= last else math.nextafter(last, math.inf)
        raised[expert] = last
    needed = max(1.0, math.nextafter(last, math.inf))
    return torch.tensor([raised.get(expert, needed) for expert in range(dims.experts)], dtype=torch.float64)


@final
@dataclass(frozen=True)
class RankedChoice:
    """Order of elimination in a ranked-choice vote: the expert with the fewest votes goes, its tokens choose again.

    Sampled tokens vote for the experts that the model's own router chooses among those that are left, so that a token
    whose favourite is gone counts for its next choice: unlike `router-frequency`, an expert to which the tokens of
    dropped ones would go stays (instant-runoff voting, no paper's). Of equal votes the smaller sum of coefficients
    goes. The score is the number of experts that went before, the same for experts without any difference in votes;
    those that the router cannot do without share the highest. E routings.
    """

    name: ClassVar[str] = "ranked-choice"
    requires: ClassVar[frozenset[str]] = frozenset({"sample"})

    ballot: Literal["all", "first"] = "all"
    """Whether each of a token's choices has a vote, or only that with the largest coefficient, as in elections."""

    tokens: Annotated[int, Interval(ge=1, le=2**24)] = 4096
    """At most so many of the sampled inputs."""

    def score(self, bank: ExpertBank, stats: LayerStats) -> Float64[Tensor, " experts"]:
        dims, seen = bank.dims, stats.router_inputs[: self.tokens]

        def votes(left: Sequence[int], candidates: Sequence[int]) -> list[tuple[int, float]]:
            counted = self._count(bank, seen, left)
            return [counted[expert] for expert in candidates]

        scores, last = {}, None
        for place, (expert, cost) in enumerate(eliminate(dims, dims.smallest_keep, votes)):
            scores[expert] = scores[last[0]] if last is not None and last[1] == cost else place
            last = expert, cost
        needed = dims.experts - dims.smallest_keep
        return torch.tensor([scores.get(expert, needed) for expert in range(dims.experts)], dtype=torch.float64)

    def _count(self, bank: ExpertBank, seen: Tensor, left: Sequence[int]) -> list[tuple[int, float]]:
        """Votes and sum of coefficients of every expert; identity experts are no candidates."""
        routing, experts = reroute(bank, seen, left), bank.dims.experts
        chosen, weights = routing.chosen, routing.coefficients.to(torch.float64)
        if self.ballot == "first":
            first = weights.argmax(dim=1, keepdim=True)
            chosen, weights = chosen.gather(1, first), weights.gather(1, first)
        chosen = chosen.masked_fill((chosen >= experts) | (weights == 0), experts).flatten()
        votes = torch.bincount(chosen, minlength=experts + 1)[:experts]
        mass = weights.new_zeros(experts + 1).index_add_(0, chosen, weights.flatten())[:experts]
        return list(zip(votes.tolist(), mass.tolist(), strict=True))


@hookimpl
def dernkit_scorers() -> list[type]:
    return [Reconstruction, RankedChoice]
