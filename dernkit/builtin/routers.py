"""How the kept experts' router rows follow from the moves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float32
from torch import Tensor

from dernkit.api import LayerPlan, LayerStats, hookimpl


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
        moves, kept = plan.assignment, len(plan.kept)
        cells = moves.target * plan.experts + moves.source // plan.width
        counts = torch.bincount(cells, minlength=kept * plan.experts).view(kept, plan.experts)
        shares = (counts.to(torch.float64) / plan.width).to(rows)
        new = rows[plan.kept.to(rows.device)]
        receives = shares.sum(1) > 0
        new[receives] += shares[receives] @ rows
        return new


@hookimpl
def dernkit_routers() -> list[type]:
    return [Slice, Additive]
