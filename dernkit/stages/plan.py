"""Plan: statistics and weights in, decisions out (integers and floats, never weights)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dernkit.api import Assigner, Block, Budget, Scorer, Selector
from dernkit.errors import CheckpointError
from dernkit.kernel import calls
from dernkit.kernel.planning import plan_from_scores, plan_layer
from dernkit.kernel.selection import kept_count, limits
from dernkit.models.groups import regrouped
from dernkit.models.source import SourceModel
from dernkit.progress import Progress, Tracker
from dernkit.sentences import reason
from dernkit.types import Assignment, LayerPlan, LayerStats

_MOVES = ("source", "target", "partner", "affinity", "scale", "left")
_OPTIONAL = ("scale", "left")
_GROUPS = ("respect", "collapse")


@runtime_checkable
class Decisions(Protocol):
    """The plan section of a recipe."""

    @property
    def keep(self) -> int | float: ...
    @property
    def scorer(self) -> Scorer: ...
    @property
    def budget(self) -> Budget: ...
    @property
    def selector(self) -> Selector: ...
    @property
    def assigner(self) -> Assigner | None: ...
    @property
    def groups(self) -> str: ...


@runtime_checkable
class Weights(Protocol):
    """Makes the parameters below a module's path real, or lets them go."""

    def load(self, prefix: str) -> Any: ...
    def unload(self, prefix: str) -> Any: ...


def check_keep(source: SourceModel, decisions: Decisions) -> None:
    """Refuse a count that the router does not allow before anything expensive starts.

    Raises:
        CheckpointError: ``keep`` is below top-k, above the count, or no multiple of the groups; or these are to become
            one and cannot; or the model's layers have different counts already.
    """
    if source.counts is not None:
        raise CheckpointError(
            f"{source.path}: every MoE layer must have the same number of experts to be compressed. Got a result of "
            f"dernkit's with {min(source.counts)} to {max(source.counts)} instead. Compress what it was made from."
        )
    store, blocks = source.outline
    for block in regrouped(store.model, blocks, collapse=decisions.groups == "collapse"):
        kept_count(decisions.keep, limits(block.dims))


def plan_checkpoint(
    source: SourceModel, decisions: Decisions, stats: Mapping[int, LayerStats], progress: Progress
) -> list[LayerPlan]:
    """Decide for every MoE block of a checkpoint, one block's weights in memory at a time.

    Raises:
        CheckpointError: ``stats`` lack what a component reads.
    """
    store, blocks = source.open(keep_dtypes=True)
    blocks = regrouped(store.model, blocks, collapse=decisions.groups == "collapse")
    return plan_blocks(blocks, decisions, stats, store, progress)


def plan_blocks(
    blocks: Sequence[Block],
    decisions: Decisions,
    stats: Mapping[int, LayerStats],
    weights: Weights,
    progress: Progress,
) -> list[LayerPlan]:
    """Score every block, divide the budget, then keep and assign. ``blocks`` are `regrouped` as decided.

    Raises:
        ContractError: a component broke its contract.
        CheckpointError: the router of some layer does not allow the count asked for.
    """
    again = decisions.assigner is not None or decisions.selector.groups or bool(decisions.selector.requires)
    passes = 1 + again
    with progress.track("plan", passes * len(blocks), "layers") as tracker:
        scores, measures = score_blocks(blocks, decisions, stats, weights, tracker)
        counts = allocate(blocks, decisions, measures)
        plans = []
        for block, score, count in zip(blocks, scores, counts, strict=True):
            if again:
                weights.load(block.path)
                tracker.advance(1, f"assign, layer {block.layer}")
            plans.append(decide(block, decisions, stats, score, count))
            if again:
                weights.unload(block.path)
    return plans


def score_blocks(
    blocks: Sequence[Block],
    decisions: Decisions,
    stats: Mapping[int, LayerStats],
    weights: Weights,
    tracker: Tracker,
) -> tuple[list[Tensor], list[Tensor]]:
    """The experts' scores in every block, and what the budget wants to know of it; one block's weights in memory."""
    scores, measures = [], []
    for block in blocks:
        weights.load(block.path)
        block.check()
        bank = block.bank()
        seen = _of(stats, block)
        scores.append(calls.score(decisions.scorer, bank, seen))
        measures.append(calls.measure(decisions.budget, bank, scores[-1], seen))
        weights.unload(block.path)
        tracker.advance(1, f"score, layer {block.layer}")
    return scores, measures


def decide(
    block: Block, decisions: Decisions, stats: Mapping[int, LayerStats], scores: Tensor, count: int
) -> LayerPlan:
    """Which of a block's experts stay, and where the others' segments go; its weights are loaded."""
    bank, seen = block.bank(), _of(stats, block)
    plan = plan_from_scores(bank, seen, scores, count, decisions.selector, decisions.assigner)
    return replace(plan, one_group=decisions.groups == "collapse")


def known_counts(blocks: Sequence[Block], decisions: Decisions) -> list[int]:
    """The counts of a budget that needs no measures; ``blocks`` are `regrouped` as decided."""
    return allocate(blocks, decisions, [])


def plan_block(block: Block, decisions: Decisions, stats: LayerStats, count: int) -> LayerPlan:
    """Score one block whose weights are loaded and whose count is known, then keep and assign."""
    block.check()
    plan = plan_layer(block.bank(), stats, decisions.scorer, count, decisions.selector, decisions.assigner)
    return replace(plan, one_group=decisions.groups == "collapse")


def _of(stats: Mapping[int, LayerStats], block: Block) -> LayerStats:
    return stats.get(block.layer, LayerStats(tokens=0))


def allocate(blocks: Sequence[Block], decisions: Decisions, measures: Sequence[Tensor]) -> list[int]:
    """How many experts each block keeps; ``measures`` are those of `score_blocks`."""
    bounds = [limits(block.dims) for block in blocks]
    return calls.allocate(decisions.budget, measures, decisions.keep, bounds)


def save_plan(
    plans: Sequence[LayerPlan], folder: Path, header: Mapping[str, Any], stats: Mapping[int, LayerStats]
) -> None:
    """Write `plan.safetensors` (the moves, and between which experts) and `plan.json` (everything else, readable).

    Both carry the ``key`` of ``header``, so that files of two plans are not taken for one.
    """
    moves = {
        f"layers.{plan.layer}.{name}": value.contiguous()
        for plan in plans
        for name in _MOVES
        if (value := getattr(plan.assignment, name)) is not None
    }
    moves |= {f"layers.{plan.layer}.kept": plan.kept for plan in plans}
    save_file(moves, folder / "plan.safetensors", metadata={"key": str(header["key"])})
    groups = _GROUPS[any(plan.one_group for plan in plans)]
    document = {
        **header,
        "groups": groups,
        "layers": {str(plan.layer): summary(plan) | _unrouted(stats, plan.layer) for plan in plans},
    }
    (folder / "plan.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def summary(plan: LayerPlan) -> dict[str, Any]:
    """One layer of `plan.json`: scores, kept experts, and where the dropped experts' segments go."""
    moved = torch.unique(plan.assignment.source)
    flows: dict[str, dict[str, int]] = {str(expert): {} for expert in plan.dropped}
    origin = plan.assignment.source // plan.width
    for expert in plan.dropped:
        targets = torch.bincount(plan.assignment.target[origin == expert], minlength=len(plan.kept))
        flows[str(expert)] = {str(int(plan.kept[i])): int(n) for i, n in enumerate(targets) if n}
    return {
        "experts": plan.experts,
        "width": plan.width,
        "scores": plan.scores.tolist(),
        "kept": plan.kept.tolist(),
        "moves": len(plan.assignment),
        "moved_segments": len(moved),
        "discarded_segments": len(plan.dropped) * plan.width - len(moved),
        "left_segments": 0 if plan.assignment.left is None else len(plan.assignment.left),
        "moved_from_to": flows,
    }


def _unrouted(stats: Mapping[int, LayerStats], layer: int) -> dict[str, list[int]]:
    """Experts that no calibration token was routed to, where that was counted."""
    if layer not in stats or "routed" not in stats[layer].values:
        return {}
    return {"unrouted": (stats[layer]["routed"] == 0).nonzero().flatten().tolist()}


def load_plan(folder: Path) -> list[LayerPlan]:
    """Read what `save_plan` wrote (and a person may have edited).

    Raises:
        CheckpointError: the two files do not fit together.
    """
    try:
        document = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        one_group = bool(_GROUPS.index(document["groups"]))
        with safe_open(folder / "plan.safetensors", "pt") as file:
            layers = [_layer_plan(int(layer), item, file) for layer, item in document["layers"].items()]
        return [replace(layer, one_group=one_group) for layer in layers]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder / 'plan.json'}: must be a plan with its plan.safetensors beside it. "
            f"Got '{type(error).__name__}: {reason(error)}' instead. Correct it, or delete both and run again."
        ) from None


def _layer_plan(layer: int, item: Mapping[str, Any], file: Any) -> LayerPlan:
    names = {name: f"layers.{layer}.{name}" for name in _MOVES}
    stored = set(file.keys())
    moves = Assignment(
        **{name: file.get_tensor(at) for name, at in names.items() if name not in _OPTIONAL or at in stored}
    )
    planned = file.get_tensor(f"layers.{layer}.kept").tolist()
    if len(moves) and item["kept"] != planned:
        raise CheckpointError(
            f"plan.json, layer {layer}: kept must be {planned}, for which the moves in plan.safetensors were made. "
            f"Got {item['kept']} instead. Undo the edit, or plan without plan.assign: there kept can be edited."
        )
    kept = torch.tensor(item["kept"], dtype=torch.int64)
    if kept.tolist() != item["kept"]:
        raise ValueError(f"layer {layer}: kept must be a list of integers")
    scores = torch.tensor(item["scores"], dtype=torch.float64)
    return LayerPlan(layer, item["experts"], item["width"], scores, kept, moves)
