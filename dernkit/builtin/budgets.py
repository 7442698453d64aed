"""How many experts each layer keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from dernkit.api import ExpertBank, KeepLimits, LayerStats, hookimpl
from dernkit.kernel.selection import kept_count


@final
@dataclass(frozen=True)
class Uniform:
    """The same share (or number) of experts in every layer, as in DERN and most of its relatives."""

    name: ClassVar[str] = "uniform"
    requires: ClassVar[frozenset[str]] = frozenset()
    needs_measures: ClassVar[bool] = False

    def measure(self, bank: ExpertBank, scores: Float[Tensor, " experts"], stats: LayerStats) -> Tensor:
        return torch.empty(0)

    def allocate(self, measures: Sequence[Tensor], keep: int | float, limits: Sequence[KeepLimits]) -> list[int]:
        return [kept_count(keep, limit) for limit in limits]


@hookimpl
def dernkit_budgets() -> list[type]:
    return [Uniform]
