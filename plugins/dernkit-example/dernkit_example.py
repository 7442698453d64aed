"""The smallest dernkit plugin: a scorer that measures how much energy an expert adds to the model."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch

from dernkit.api import ExpertBank, LayerStats, hookimpl


@final
@dataclass(frozen=True, slots=True)
class OutputEnergy:
    """Mean squared output norm times frequency: the expert's output energy per token of the calibration text."""

    name: ClassVar[str] = "output-energy"
    requires: ClassVar[frozenset[str]] = frozenset({"output_sq_sum", "routed"})
    frequency: bool = True
    """Off: the mean over the tokens that the router sent to the expert, however few they are."""

    def score(self, bank: ExpertBank, stats: LayerStats) -> torch.Tensor:
        """float64 [E]; an expert that saw no token scores 0."""
        tokens = torch.full_like(stats["output_sq_sum"], stats.tokens) if self.frequency else stats["routed"]
        return stats["output_sq_sum"] / tokens.to(torch.float64).clamp(min=1)


@hookimpl
def dernkit_scorers() -> list[type]:
    """One scorer: recipes write ``score: {use: output-energy}``."""
    return [OutputEnergy]
