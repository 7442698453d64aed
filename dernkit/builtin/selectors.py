"""Which experts of one layer stay, once it is known how many."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from jaxtyping import Float64
from torch import Tensor

from dernkit.api import ExpertBank, LayerStats, Retention, hookimpl
from dernkit.kernel.selection import select


@final
@dataclass(frozen=True)
class TopScore:
    """The experts with the highest scores, as many from each of the router's groups; ties to the lowest index."""

    name: ClassVar[str] = "top-score"
    requires: ClassVar[frozenset[str]] = frozenset()
    groups: ClassVar[bool] = False

    def select(self, bank: ExpertBank, scores: Float64[Tensor, " experts"], count: int, stats: LayerStats) -> Retention:
        return Retention(scores, select(scores, count, bank.dims.groups))


@hookimpl
def dernkit_selectors() -> list[type]:
    return [TopScore]
