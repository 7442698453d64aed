"""Laws of assigners."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dernkit.testing.banks import permute_experts, permute_neurons, permute_stats
from dernkit.testing.cases import Case, cases, expert_order, inverse, neuron_order, retentions, unequal
from dernkit.testing.law import Check, require
from dernkit.types import Assignment, Retention


@dataclass(frozen=True, slots=True)
class Given:
    """A layer and what stays of it."""

    what: str
    case: Case
    retention: Retention


def move_columns(assigner: Any, given: Given) -> None:
    """Moves are four columns of one length: int64 source, target and partner, floating affinity."""
    moves = _moves(assigner, given)
    for name in ("source", "target", "partner", "affinity"):
        column = getattr(moves, name)
        typed = column.is_floating_point() if name == "affinity" else column.dtype == torch.int64
        require(
            typed and column.shape == (len(moves.source),),
            f"return {name} as {'floating' if name == 'affinity' else 'int64'} [{len(moves.source)}]",
            f"{column.dtype} {list(column.shape)}",
            "Make the columns of an Assignment equally long.",
        )


def dropped_sources(assigner: Any, given: Given) -> None:
    """Only segments of dropped experts move."""
    moves, dims = _moves(assigner, given), given.case.bank.dims
    legal = torch.isin(moves.source // dims.width, torch.tensor(given.case.dropped))
    _all_legal(legal, moves.source, "move segments of dropped experts only", "source is expert * W + neuron.")


def in_range(assigner: Any, given: Given) -> None:
    """Targets are positions among the kept experts, partners are neurons."""
    moves = _moves(assigner, given)
    bounds = {"target": len(given.case.kept), "partner": given.case.bank.dims.width}
    for name, bound in bounds.items():
        column = getattr(moves, name)
        legal = (column >= 0) & (column < bound)
        _all_legal(legal, column, f"return {name}s from 0 to {bound - 1}", "Positions, not numbers of experts.")


def nothing_dropped(assigner: Any, given: Given) -> None:
    """Where every expert stays, nothing moves."""
    everyone = torch.arange(given.case.bank.dims.experts)
    group = None if given.retention.group is None else everyone
    moves = assigner.assign(given.case.bank, Retention(given.case.scores, everyone, group), given.case.stats)
    require(len(moves) == 0, "move nothing where all experts stay", f"{len(moves)} moves", "Return Assignment.empty().")


def expert_permutation(assigner: Any, given: Given) -> None:
    """Of experts in another order the same segments move to the same experts."""
    case, order = given.case, expert_order(given.case.bank)
    place, width = inverse(order), case.bank.dims.width
    kept, rank = place[case.kept].sort()
    group = given.retention.group
    if group is not None:
        group = torch.where(group[order] >= 0, inverse(rank)[group[order]], group[order])
    other = assigner.assign(
        permute_experts(case.bank, order),
        Retention(case.scores[order], kept, group),
        permute_stats(case.stats, order),
    )
    back = order[other.source // width] * width + other.source % width
    after = _table(back, case.kept[rank[other.target]], other)
    moves = _moves(assigner, given)
    before = _table(moves.source, case.kept[moves.target], moves)
    require(before.shape == after.shape and torch.equal(before, after), *_MOVED, "Use no expert's number.")


def neuron_permutation(assigner: Any, given: Given) -> None:
    """Of neurons in another order the same ones move to the same ones."""
    case, bank, width = given.case, given.case.bank, given.case.bank.dims.width
    orders = torch.stack([neuron_order(width, expert) for expert in range(bank.dims.experts)])
    for expert, order in enumerate(orders):
        bank = permute_neurons(bank, expert, order)
    other = assigner.assign(bank, given.retention, case.stats)
    expert, target = other.source // width, case.kept[other.target]
    back = replace(other, partner=orders[target, other.partner])
    after = _table(expert * width + orders[expert, other.source % width], target, back)
    moves = _moves(assigner, given)
    before = _table(moves.source, case.kept[moves.target], moves)
    require(before.shape == after.shape and torch.equal(before, after), *_MOVED, "Use no neuron's number.")


_MOVED = ("move the same segments to the same neurons in any order", "other moves")


def _moves(assigner: Any, given: Given) -> Assignment:
    return assigner.assign(given.case.bank, given.retention, given.case.stats)


def _table(source: Tensor, target: Tensor, moves: Assignment) -> Tensor:
    """int64 [M, 3]: source, kept expert, partner; by source and target."""
    rows = torch.stack([source, target, moves.partner], dim=1)
    return torch.tensor(sorted(rows.tolist()), dtype=torch.int64).view(-1, 3)


def _all_legal(legal: Tensor, values: Tensor, must: str, fix: str) -> None:
    wrong = (~legal).nonzero().flatten().tolist()
    require(not wrong, must, lambda: f"{values[wrong[0]].item()} in move {wrong[0]}", fix)


def _given(found: Sequence[Case]) -> list[Given]:
    names = ("", ", grouped")
    return [
        Given(f"{case.what}{name}", case, retention)
        for case in found
        for name, retention in zip(names, retentions(case), strict=True)
    ]


def _all() -> list[Given]:
    return _given(cases())


def _unequal() -> list[Given]:
    return _given(unequal())


def laws() -> list[Check]:
    """Of assigners."""
    everywhere = (move_columns, dropped_sources, in_range, nothing_dropped)
    checks = [Check("assigner", law, _all) for law in everywhere]
    return checks + [Check("assigner", law, _unequal) for law in (expert_permutation, neuron_permutation)]
