"""Decisions for one layer: scores, the experts that stay, and where the others' segments go."""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor

from dernkit.api import Assigner, Budget, Scorer, Selector
from dernkit.kernel import calls
from dernkit.types import Assignment, ExpertBank, LayerPlan, LayerStats


def plan_layer(
    bank: ExpertBank,
    stats: LayerStats,
    scorer: Scorer,
    kept_count: int,
    selector: Selector,
    assigner: Assigner | None,
) -> LayerPlan:
    """Score the experts, keep ``kept_count``, assign the other experts' segments (None: discard them)."""
    scores = score_layer(bank, stats, scorer)
    return plan_from_scores(bank, stats, scores, kept_count, selector, assigner)


def score_layer(bank: ExpertBank, stats: LayerStats, scorer: Scorer) -> Float64[Tensor, " experts"]:
    """The scorer's float64 scores on the CPU, from no statistics but those that it declares."""
    return calls.score(scorer, bank, stats)


def measure_layer(bank: ExpertBank, stats: LayerStats, scores: Float64[Tensor, " experts"], budget: Budget) -> Tensor:
    """What a budget wants to know of this layer, on the CPU."""
    return calls.measure(budget, bank, scores, stats)


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
    if kept_count == dims.experts:
        return LayerPlan(dims.layer, dims.experts, dims.width, scores, torch.arange(dims.experts), Assignment.empty())
    retention = calls.select(selector, bank, scores, kept_count, stats)
    assignment = Assignment.empty() if assigner is None else calls.assign(assigner, bank, retention, stats)
    return LayerPlan(dims.layer, dims.experts, dims.width, scores, retention.kept, assignment)
