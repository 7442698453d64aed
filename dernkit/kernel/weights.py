"""What experts, and the segments that come from them, weigh in averages."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from dernkit.types import LayerPlan, LayerStats, Pool

Weights = Literal["score", "uniform", "frequency"]


def statistics_for(weights: Weights) -> frozenset[str]:
    """What a component with these weights ``requires``."""
    return frozenset({"routed"}) if weights == "frequency" else frozenset()


def pool_weights(pool: Pool, weights: Weights) -> tuple[float, Float[Tensor, " moves"]]:
    """Weight of the own segments and of each arrival: score or number of routed tokens of their expert, or 1."""
    if weights == "score":
        return pool.own_weight, pool.incoming_weight
    if weights == "uniform":
        return 1.0, torch.ones_like(pool.incoming_weight)
    routed = pool.stats["routed"]
    return float(routed[pool.expert]), routed[pool.incoming_expert.to(routed.device)].to(pool.own.device)


def pool_segments(
    pool: Pool, weights: Weights
) -> tuple[Float32[Tensor, "pool parts features"], Float[Tensor, " pool"]]:
    """Own segments, then arrivals, and the weight of each."""
    own, incoming = pool_weights(pool, weights)
    together = torch.cat([incoming.new_full((len(pool.own),), own), incoming])
    return torch.cat([pool.own, pool.incoming]), together


def expert_weights(plan: LayerPlan, stats: LayerStats, weights: Weights) -> Float64[Tensor, " experts"]:
    """The same for whole experts, from a plan; scores below 0 weigh 0."""
    if weights == "score":
        return plan.scores.clamp(min=0).to(torch.float64)
    if weights == "uniform":
        return torch.ones(plan.experts, dtype=torch.float64)
    return stats["routed"].to(torch.float64).cpu()


def moved_shares(plan: LayerPlan) -> Float64[Tensor, "kept experts"]:
    """``n_{o→r} / W`` with n the segments that move from expert o (column) to kept expert r (row)."""
    moves, kept = plan.assignment, len(plan.kept)
    cells = moves.target * plan.experts + moves.source // plan.width
    counts = torch.bincount(cells, minlength=kept * plan.experts).view(kept, plan.experts)
    return counts.to(torch.float64) / plan.width


def pool_bias(pool: Pool, weights: Weights) -> Float64[Tensor, " hidden"]:
    """Mean of the down biases of an expert r and of those o that give it segments: ``Σ_e s_e w_e b_e / Σ_e s_e w_e``.

    s is 1 for r and ``n_{o→r} / W`` for o: with whole experts it is the mean of their parameters. Equal w where all
    are 0.
    """
    biases = pool.down_bias
    assert biases is not None, "only asked for where experts have a down bias"
    own, incoming = pool_weights(pool, weights)
    if not own + float(incoming.sum()):
        own, incoming = 1.0, torch.ones_like(incoming)
    total = torch.zeros(len(biases), dtype=torch.float64, device=incoming.device)
    total.index_add_(0, pool.incoming_expert, incoming.to(torch.float64) / len(pool.own))
    total[pool.expert] += own
    givers = total.nonzero().flatten()
    share = (total[givers] / total.sum()).to(biases.device)
    return share @ biases[givers.to(biases.device)].to(torch.float64)
