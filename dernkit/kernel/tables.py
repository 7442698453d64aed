"""Tables of expert numbers (DeepSeek-V4 routes some layers by token id): rewritten for the experts that stay."""

from __future__ import annotations

import torch
from jaxtyping import Int64
from torch import Tensor

from dernkit.errors import CheckpointError
from dernkit.types import LayerPlan


def remap(table: Int64[Tensor, "tokens top_k"], plan: LayerPlan) -> Int64[Tensor, "tokens top_k"]:
    """The same choices in the numbering of the kept experts; every row still names different experts.

    A dropped expert is replaced by its heir: the kept expert to which most of its segments go, and where none goes, or
    the row has that one already, the next one by segments, then by score, then by index.

    Raises:
        CheckpointError: the table does not hold the numbers of experts, or a row names one twice.
    """
    _check(table, plan)
    device, table = table.device, table.cpu()
    position = torch.full((plan.experts,), -1, dtype=torch.int64)
    position[plan.kept] = torch.arange(len(plan.kept))
    new = position[table]
    rank = _heirs(plan)
    taken = torch.zeros(len(table), len(plan.kept), dtype=torch.bool)
    rows, columns = torch.where(new >= 0)
    taken[rows, new[rows, columns]] = True
    for column in range(table.shape[1]):
        gone = torch.where(new[:, column] < 0)[0]
        ranks = rank[table[gone, column]].masked_fill(taken[gone], len(plan.kept))
        new[gone, column] = ranks.argmin(dim=1)
        taken[gone, new[gone, column]] = True
    return new.to(device, table.dtype)


def _heirs(plan: LayerPlan) -> Int64[Tensor, "experts kept"]:
    """Rank of every kept position as the heir of every expert, 0 is best."""
    origin = plan.assignment.source // plan.width
    received = torch.zeros(plan.experts, len(plan.kept), dtype=torch.int64)
    received.index_put_((origin, plan.assignment.target), torch.ones_like(origin), accumulate=True)
    by_score = torch.argsort(plan.scores[plan.kept], descending=True, stable=True)
    order = by_score[torch.argsort(received[:, by_score], dim=1, descending=True, stable=True)]
    return torch.argsort(order, dim=1, stable=True)


def _check(table: Tensor, plan: LayerPlan) -> None:
    rows = table.sort(dim=1).values
    if bool((rows < 0).any() or (rows >= plan.experts).any() or (rows[:, 1:] == rows[:, :-1]).any()):
        raise CheckpointError(
            f"layer {plan.layer}: each row of a routing table must name {table.shape[1]} different experts from 0 to "
            f"{plan.experts - 1}. Got other numbers, or one twice, instead. Download the checkpoint again."
        )
