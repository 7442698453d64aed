"""Decisions for one layer: run a scorer and an assigner, and hold them to their contracts."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from dernkit.api import Assigner, Budget, Scorer, Selector
from dernkit.errors import ContractError
from dernkit.types import Assignment, ExpertBank, LayerDims, LayerPlan, LayerStats, Retention


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
    """The scorer's float64 scores on the CPU, from no statistics but those that it declares.

    Raises:
        ContractError: they are not E finite float64 numbers.
    """
    scores = scorer.score(bank, stats.only(scorer.requires))
    where = f"scorer '{scorer.name}', layer {bank.dims.layer}"
    experts = bank.dims.experts
    if scores.shape != (experts,) or scores.dtype != torch.float64:
        raise ContractError(
            f"{where}: score must return a float64 tensor of shape [{experts}], one score for each expert. "
            f"Got {_describe(scores)} instead. Fix the scorer."
        )
    wrong = (~scores.isfinite()).nonzero().flatten().tolist()
    if wrong:
        raise ContractError(
            f"{where}: score must be finite, also for an expert that saw no token. "
            f"Got {scores[wrong[0]].item()} for expert {wrong[0]} instead. Let the scorer divide by no count of 0."
        )
    return scores.cpu()


def measure_layer(bank: ExpertBank, stats: LayerStats, scores: Float64[Tensor, " experts"], budget: Budget) -> Tensor:
    """What a budget wants to know of this layer, on the CPU.

    Raises:
        ContractError: it is not a finite tensor.
    """
    measured = budget.measure(bank, scores, stats.only(budget.requires))
    if not bool(measured.isfinite().all()):
        raise ContractError(
            f"budget '{budget.name}', layer {bank.dims.layer}: measure must return a finite tensor. "
            f"Got NaN or infinity instead. Fix the budget."
        )
    return measured.cpu()


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
    retention = selector.select(bank, scores, kept_count, stats.only(selector.requires))
    where = f"selector '{selector.name}', layer {dims.layer}"
    _check_retention(retention, dims, scores, kept_count, where)
    _check_groups(retention, dims, selector.groups, where)
    assignment = Assignment.empty()
    if assigner is not None:
        assignment = assigner.assign(bank, retention, stats.only(assigner.requires))
        _check_assignment(assignment, bank, retention.kept, f"assigner '{assigner.name}', layer {dims.layer}")
    return LayerPlan(dims.layer, dims.experts, dims.width, scores, retention.kept, assignment)


def _check_retention(found: Retention, dims: LayerDims, scores: Tensor, count: int, where: str) -> None:
    kept, size = found.kept, dims.experts // dims.groups
    proper = kept.dtype == torch.int64 and kept.shape == (count,) and kept.device.type == "cpu"
    per_group = torch.bincount(kept // size, minlength=dims.groups) if proper and bool((kept >= 0).all()) else None
    if (
        per_group is None
        or not bool((kept[1:] > kept[:-1]).all() and kept[-1] < dims.experts)
        or bool((per_group != count // dims.groups).any())
    ):
        groups = f", {count // dims.groups} of each group of {size}" if dims.groups > 1 else ""
        raise ContractError(
            f"{where}: kept must be {count} different experts from 0 to {dims.experts - 1}, int64, ascending{groups}. "
            f"Got {kept.tolist()} instead. Fix the selector."
        )
    if not torch.equal(found.scores, scores):
        raise ContractError(
            f"{where}: must hand on the scores that it was given. Got others instead. Fix the selector."
        )


def _check_groups(found: Retention, dims: LayerDims, wanted: bool, where: str) -> None:
    group, count = found.group, len(found.kept)
    if (group is not None) != wanted:
        must, got = ("groups", "none") if wanted else ("no groups", "some")
        raise ContractError(f"{where}: must return {must}, as its `groups` says. Got {got} instead. Fix the selector.")
    if group is not None and (
        group.shape != (dims.experts,)
        or group.dtype != torch.int64
        or not torch.equal(group[found.kept], torch.arange(count))
        or bool(((group < -1) | (group >= count)).any())
    ):
        raise ContractError(
            f"{where}: group must be an int64 [{dims.experts}] of positions among the {count} kept experts (-1: none), "
            f"each kept one's own. Got {group.tolist()} instead. Fix the selector."
        )


def _check_assignment(moves: Assignment, bank: ExpertBank, kept: Int64[Tensor, " kept"], where: str) -> None:
    """One segment may go to several experts, so repeated sources are legal."""
    experts, width = bank.dims.experts, bank.dims.width
    indices = {"source": moves.source, "target": moves.target, "partner": moves.partner}
    for name, value in (indices | {"affinity": moves.affinity}).items():
        dtype_fits = value.is_floating_point() if name == "affinity" else value.dtype == torch.int64
        if value.shape != (len(moves),) or not dtype_fits or value.device.type != "cpu":
            kind = "a float" if name == "affinity" else "an int64"
            raise ContractError(
                f"{where}: {name} must be {kind} CPU tensor with one entry for each move. "
                f"Got {_describe(value)} for {len(moves)} moves instead. Fix the assigner."
            )
    bounds = {"source": experts * width, "target": len(kept), "partner": width}
    for name, bound in bounds.items():
        _check(indices[name], (indices[name] >= 0) & (indices[name] < bound), where, name, f"in [0, {bound})")
    from_dropped = ~torch.isin(moves.source // width, kept)
    _check(moves.source, from_dropped, where, "source", "a segment of a dropped expert")
    _check(moves.affinity, moves.affinity.isfinite(), where, "affinity", "finite")


def _check(values: Float[Tensor, " n"] | Int64[Tensor, " n"], legal: Tensor, where: str, name: str, rule: str) -> None:
    wrong = (~legal).nonzero().flatten().tolist()
    if wrong:
        raise ContractError(
            f"{where}: {name} must be {rule}. Got {values[wrong[0]].item()} in move {wrong[0]} instead. "
            "Fix the assigner."
        )


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device.type}"
