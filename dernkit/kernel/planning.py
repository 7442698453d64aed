"""Decisions for one layer: scores, the experts that stay, and where the others' segments go."""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor

from dernkit.api import Assigner, Narrowing, Scorer, Selector
from dernkit.kernel import calls
from dernkit.types import Assignment, ExpertBank, LayerPlan, LayerStats, Retention


def plan_layer(
    bank: ExpertBank,
    stats: LayerStats,
    scorer: Scorer,
    kept_count: int,
    selector: Selector,
    assigner: Assigner | None,
) -> LayerPlan:
    """Score the experts, keep ``kept_count``, assign the other experts' segments (None: discard them)."""
    scores = calls.score(scorer, bank, stats)
    return plan_from_scores(bank, stats, scores, kept_count, selector, assigner)


def narrows(assigner: Assigner | None) -> bool:
    """Whether it is also asked where no expert is dropped: `Narrowing`."""
    return isinstance(assigner, Narrowing) and assigner.narrows


def plan_from_scores(
    bank: ExpertBank,
    stats: LayerStats,
    scores: Float64[Tensor, " experts"],
    kept_count: int,
    selector: Selector,
    assigner: Assigner | None,
) -> LayerPlan:
    """As :func:`plan_layer`, for scores that are known (a budget needs those of all layers first)."""
    dims = bank.dims
    if kept_count < dims.experts:
        retention = calls.select(selector, bank, scores, kept_count, stats)
    else:
        retention = Retention(scores, torch.arange(dims.experts))
        assigner = assigner if narrows(assigner) else None
    assignment = Assignment.empty() if assigner is None else calls.assign(assigner, bank, retention, stats)
    return LayerPlan(dims.layer, dims.experts, dims.width, scores, retention.kept, assignment)
