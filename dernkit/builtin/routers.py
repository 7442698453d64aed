"""How the kept experts' router rows follow from the moves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, final

import torch
from annotated_types import Interval
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from dernkit.api import CheckpointError, LayerPlan, LayerStats, hookimpl
from dernkit.kernel.ridge import ridge_fit
from dernkit.kernel.weights import Weights, expert_weights, moved_shares, statistics_for


@final
@dataclass(frozen=True)
class Slice:
    """Kept rows as they are: the original model with the dropped experts' logits masked to −∞."""

    name: ClassVar[str] = "slice"
    requires: ClassVar[frozenset[str]] = frozenset()

    def update(
        self, rows: Float32[Tensor, "experts row"], plan: LayerPlan, stats: LayerStats
    ) -> Float32[Tensor, "kept row"]:
        return rows[plan.kept.to(rows.device)]


@final
@dataclass(frozen=True)
class Additive:
    """``G_r ← G_r + Σ_o (n_{o→r} / W) G_o`` with n the segments moved from o to r; DERN (arXiv 2509.10377) step 2."""

    name: ClassVar[str] = "additive"
    requires: ClassVar[frozenset[str]] = frozenset()

    def update(
        self, rows: Float32[Tensor, "experts row"], plan: LayerPlan, stats: LayerStats
    ) -> Float32[Tensor, "kept row"]:
        shares = moved_shares(plan).to(rows)
        new = rows[plan.kept.to(rows.device)]
        receives = shares.sum(1) > 0
        new[receives] += shares[receives] @ rows
        return new


@final
@dataclass(frozen=True)
class Average:
    """``G_r ← (w_r G_r + Σ_o s_{o→r} w_o G_o) / (w_r + Σ_o s_{o→r} w_o)``, s the share of o's segments that moved to r.

    The rows as `weighted-average` has the experts, so that a logit stays as large as one expert's. Equal weights where
    all of a group are 0.
    """

    name: ClassVar[str] = "average"

    weights: Weights = "score"
    """Whether a row weighs the score of its expert, the number of tokens routed to it, or all weigh the same."""

    @property
    def requires(self) -> frozenset[str]:
        """What the weights are made of."""
        return statistics_for(self.weights)

    def update(
        self, rows: Float32[Tensor, "experts row"], plan: LayerPlan, stats: LayerStats
    ) -> Float32[Tensor, "kept row"]:
        members = moved_shares(plan)
        receives = members.sum(1) > 0
        members[torch.arange(len(plan.kept)), plan.kept] = 1
        weighted = members * expert_weights(plan, stats, self.weights)
        weighted = torch.where(weighted.sum(1, keepdim=True) > 0, weighted, members)
        means = (weighted / weighted.sum(1, keepdim=True))[receives].to(rows.device) @ rows.to(torch.float64)
        new = rows[plan.kept.to(rows.device)]
        new[receives.to(rows.device)] = means.to(rows)
        return new


@final
@dataclass(frozen=True)
class LogMass:
    """A kept expert gets the probability of all that merged into it: ``exp l_r' = exp l_r + Σ_o s_{o→r} exp l_o``.

    s is the share of o's segments that moved to r. Where the family adds a bias to the logits, this alone is raised, by
    ``log(1 + Σ_o s_{o→r} m_o / m_r)`` with m the expert's calibrated sum of coefficients (at least that of one token
    for r). Elsewhere the row moves from G_r to the ridge fit of l_r' on the sampled router inputs.

    For a softmax router, exp l is the probability but for a factor that all experts share. For a sigmoid one it is the
    odds σ(l) / (1 − σ(l)), which are what is summed: probabilities add up where they are small, and stay below 1.
    """

    name: ClassVar[str] = "log-mass"
    requires: ClassVar[frozenset[str]] = frozenset({"gate_sum", "sample"})

    ridge: Annotated[float, Interval(ge=1e-6, le=1e6)] = 0.1
    """How much a change of the row costs, relative to the mean square of the inputs along a direction."""

    def update(
        self, rows: Float32[Tensor, "experts row"], plan: LayerPlan, stats: LayerStats
    ) -> Float32[Tensor, "kept row"]:
        shares = moved_shares(plan)
        receives = (shares.sum(1) > 0).nonzero().flatten()
        new = rows[plan.kept.to(rows.device)]
        if not len(receives):
            return new
        shares, kept = shares[receives], plan.kept[receives]
        if plan.biased_rows:
            new[receives, -1] += _raises(shares, kept, stats).to(new)
        else:
            new[receives] += self._changes(rows, shares, kept, plan.layer, stats).to(new)
        return new

    def _changes(
        self, rows: Tensor, shares: Tensor, kept: Tensor, layer: int, stats: LayerStats
    ) -> Float64[Tensor, "receivers row"]:
        inputs = stats.router_inputs.to(rows)
        if inputs.shape[1] != rows.shape[1]:
            raise CheckpointError(
                f"router 'log-mass', layer {layer}: rows must be as wide as the sampled router inputs, "
                f"{inputs.shape[1]} features. Got {rows.shape[1]} instead. Use the router 'additive' or 'average'."
            )
        logits = inputs.to(torch.float64) @ rows.to(torch.float64).T
        return ridge_fit(inputs, _rises(logits, shares.to(rows.device), kept.to(rows.device)), self.ridge)


def _raises(
    shares: Float64[Tensor, "receivers experts"], kept: Int64[Tensor, " receivers"], stats: LayerStats
) -> Float64[Tensor, " receivers"]:
    """By how much a bias rises; 0 where nothing that arrives has mass."""
    mass = stats["gate_sum"].to("cpu", torch.float64).clamp(min=0)
    one_token = mass.sum() / max(stats.tokens, 1)
    if not bool(one_token > 0):
        return torch.zeros(len(kept), dtype=torch.float64)
    return torch.log1p(shares @ mass / mass[kept].clamp(min=one_token))


def _rises(
    logits: Float64[Tensor, "sampled experts"],
    shares: Float64[Tensor, "receivers experts"],
    kept: Int64[Tensor, " receivers"],
) -> Float64[Tensor, "sampled receivers"]:
    """``l_r'(x) − l_r(x)`` for every sampled token."""
    columns = []
    for share, expert in zip(shares, kept.tolist(), strict=True):
        givers = share.nonzero().flatten()
        arriving = torch.logsumexp(logits[:, givers] + share[givers].log(), dim=1)
        columns.append(torch.logaddexp(logits[:, expert], arriving) - logits[:, expert])
    return torch.stack(columns, dim=1)


@hookimpl
def dernkit_routers() -> list[type]:
    return [Slice, Additive, Average, LogMass]
