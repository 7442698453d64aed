"""SHAPE (arXiv 2606.09886): experts are worth what they add to the sets in which the router chooses them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, final

import torch
from annotated_types import Interval
from jaxtyping import Float64, Int64
from torch import Tensor

from dernkit.api import CheckpointError, ExpertBank, KeepLimits, LayerStats, hookimpl
from dernkit.kernel.selection import kept_count


@final
@dataclass(frozen=True)
class CoalitionShapley:
    """``φ_i = Σ_j (v(A_j) − α_i n(A_j ∖ i)) / T`` over the observed coalitions A_j with i, SHAPE (arXiv 2606.09886).

    A coalition is the set of experts that the router chooses for a token, v(A) the number of sampled tokens with that
    set. n(S) is the number of tokens whose set is S and one more, and ``α_i = min_j v(A_j) / n(A_j ∖ i)``: what S is
    worth without i, so that i never adds less than nothing. The Shapley weight of the sets' size, the same for all
    experts of a layer, is left out. 0 for an expert that is never chosen, and for one that completes each set of
    partners equally often (always, if nobody else completes them).
    """

    name: ClassVar[str] = "coalition-shapley"
    requires: ClassVar[frozenset[str]] = frozenset({"sample"})

    subtract: Annotated[float, Interval(ge=0, le=1)] = 1.0
    """How much of the partners' own worth is taken away: 1 as published, 0 leaves the routing frequency. Just below 1,
    frequency decides among the experts that the published rule gives 0."""

    def score(self, bank: ExpertBank, stats: LayerStats) -> Float64[Tensor, " experts"]:
        """float64 [E], from 0 to 1; higher stays."""
        experts, where = bank.dims.experts, f"scorer 'coalition-shapley', layer {bank.dims.layer}"
        if bank.route is None:
            raise CheckpointError(
                f"{where}: sampled tokens must be routed again. Got an adapter that does not offer it instead. "
                "Use another scorer."
            )
        if bank.dims.top_k < 2:
            raise CheckpointError(
                f"{where}: the router must choose at least 2 experts for a token, else there are no coalitions. "
                f"Got {bank.dims.top_k} instead. Use another scorer."
            )
        routing = bank.route(stats.router_inputs, None)
        absent = (routing.coefficients == 0) | (routing.chosen >= experts)
        sets, tokens = coalitions(routing.chosen.masked_fill(absent, experts).cpu())
        alone, partners, share = _contributions(sets, tokens, experts)
        return (alone - self.subtract * (partners * share[0] / share[1])).clamp(min=0) / len(routing.chosen)


def coalitions(chosen: Int64[Tensor, "sampled top_k"]) -> tuple[Int64[Tensor, "sets top_k"], Int64[Tensor, " sets"]]:
    """The different sets of experts, ascending and filled up with E, and how many tokens have each."""
    return chosen.sort(dim=1).values.unique(dim=0, return_counts=True)


def _contributions(
    sets: Int64[Tensor, "sets top_k"], tokens: Int64[Tensor, " sets"], experts: int
) -> tuple[Float64[Tensor, " experts"], Float64[Tensor, " experts"], Float64[Tensor, "two experts"]]:
    """``Σ_j v(A_j)``, ``Σ_j n(A_j ∖ i)`` and numerator and denominator of α_i; all are integers, hence exact."""
    top_k = sets.shape[1]
    rest = torch.stack([torch.cat([sets[:, :i], sets[:, i + 1 :]], dim=1) for i in range(top_k)], dim=1)
    member, worth = sets.flatten(), tokens.repeat_interleave(top_k)
    present = member < experts
    member, worth, rest = member[present], worth[present], rest.flatten(0, 1)[present]
    same = rest.unique(dim=0, return_inverse=True)[1]
    without = torch.zeros(len(rest), dtype=torch.int64).index_add_(0, same, worth)[same]
    # The first pair of an expert, in the order of the ratio, is where its minimum is.
    order = torch.argsort(worth / without.to(torch.float64), stable=True)
    first = torch.full((experts,), len(order)).scatter_reduce_(0, member[order], torch.arange(len(order)), "amin")
    chosen = first < len(order)
    share = torch.stack([torch.zeros(experts), torch.ones(experts)]).to(torch.float64)
    best = order[first[chosen]]
    share[:, chosen] = torch.stack([worth[best], without[best]]).to(torch.float64)
    sums = torch.zeros(2, experts, dtype=torch.float64)
    sums.index_add_(1, member, torch.stack([worth, without]).to(torch.float64))
    return sums[0], sums[1], share


@final
@dataclass(frozen=True)
class Coverage:
    """Each layer keeps the fewest experts that hold the share α of its scores; α so that the total is as asked for.

    SHAPE's quality coverage (arXiv 2606.09886), for any scorer: layers whose worth lies in a few experts keep few.
    Scores below 0 count as 0. The authors look for α by bisection; here experts are taken in the order in which a
    rising α needs them, so that the total is exact. Ties go to the layer that keeps fewer so far, then to the lower.
    """

    name: ClassVar[str] = "coverage"
    requires: ClassVar[frozenset[str]] = frozenset()
    needs_measures: ClassVar[bool] = True

    def measure(self, bank: ExpertBank, scores: Float64[Tensor, " experts"], stats: LayerStats) -> Tensor:
        """Share of the layer's scores that the best 0, 1, … experts of every router group hold together, float64."""
        ranked = scores.clamp(min=0).view(bank.dims.groups, -1).sort(dim=1, descending=True).values.sum(0)
        steps = ranked if bool(ranked.sum() > 0) else torch.ones_like(ranked)
        held = torch.cat([steps.new_zeros(1), steps.cumsum(0)])
        return held / held[-1]

    def allocate(self, measures: Sequence[Tensor], keep: int | float, limits: Sequence[KeepLimits]) -> list[int]:
        total = sum(kept_count(keep, limit) for limit in limits)
        counts = [-(-limit.smallest // limit.multiple) * limit.multiple for limit in limits]
        needed = [
            (float(held[step]), step, layer)
            for layer, (held, limit) in enumerate(zip(measures, limits, strict=True))
            for step in range(counts[layer] // limit.multiple, limit.experts // limit.multiple)
        ]
        for _, _, layer in sorted(needed):
            if sum(counts) + limits[layer].multiple <= total:
                counts[layer] += limits[layer].multiple
        return counts


@hookimpl
def dernkit_scorers() -> list[type]:
    """One scorer: recipes write ``score: {use: coalition-shapley}``."""
    return [CoalitionShapley]


@hookimpl
def dernkit_budgets() -> list[type]:
    """One budget: recipes write ``budget: {use: coverage}``."""
    return [Coverage]
