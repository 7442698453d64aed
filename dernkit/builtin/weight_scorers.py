"""How much each expert matters, from its weights alone: nothing is calibrated; higher stays. All scores are float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, final

import torch
from annotated_types import MinLen
from jaxtyping import Float32, Float64
from torch import Tensor

from dernkit.api import CheckpointError, ExpertBank, LayerStats, hookimpl
from dernkit.kernel.segments import finite_segments

Part = Literal["gate", "up", "down"]


@final
@dataclass(frozen=True)
class WeightNorm:
    """Frobenius norm of the expert's weight matrices, without biases: magnitude pruning (1506.02626) of whole experts.

    It says how large outputs can be, not how often the router asks for them: the baseline among the scores that need
    no text. Rescaling (u, d) → (c u, d/c) changes it and leaves the expert's function as it is.
    """

    name: ClassVar[str] = "weight-norm"
    requires: ClassVar[frozenset[str]] = frozenset()

    parts: Annotated[tuple[Part, ...], MinLen(1)] | None = None
    """Which matrices count; null for all that the experts have."""

    def __post_init__(self) -> None:
        if self.parts is not None and (not self.parts or len(set(self.parts)) < len(self.parts)):
            raise ValueError(
                f"parts: must name each of gate, up and down at most once, and one at least. Got {self.parts} "
                "instead. Remove what is repeated."
            )

    def score(self, bank: ExpertBank, stats: LayerStats) -> Float64[Tensor, " experts"]:
        chosen = self._chosen(bank)
        squares = [_weights(bank, e)[:, chosen].square().sum(dtype=torch.float64) for e in range(bank.dims.experts)]
        return torch.stack(squares).sqrt()

    def _chosen(self, bank: ExpertBank) -> list[int]:
        """Positions of the parts in a segment."""
        present = ("up", "down") if bank.gate is None else ("gate", "up", "down")
        absent = [part for part in self.parts or () if part not in present]
        if absent:
            raise CheckpointError(
                f"scorer 'weight-norm', layer {bank.dims.layer}: parts must be among {', '.join(present)} for "
                f"experts without a gate. Got {', '.join(absent)} instead. Take it out of `parts`."
            )
        return [position for position, part in enumerate(present) if self.parts is None or part in self.parts]


@final
@dataclass(frozen=True)
class Aimer:
    """One minus mean absolute value over root mean square of all the expert's weights, AIMER (arXiv 2603.18492) eq. 4.

    The paper prunes experts with a large ratio ``(‖w‖₁ / N) / (‖w‖₂ / √N)``, w all entries of gate, up and down
    matrices: their weights are spread evenly, those of an expert that has specialised are concentrated. One minus it,
    so that higher stays, is in [0, 1): about 0.2 for Gaussian weights, 0 for entries of one magnitude. Unlike
    `weight-norm` it does not follow the expert's scale. Biases are left out; an expert of zeros has 0.
    """

    name: ClassVar[str] = "aimer"
    requires: ClassVar[frozenset[str]] = frozenset()

    def score(self, bank: ExpertBank, stats: LayerStats) -> Float64[Tensor, " experts"]:
        return torch.stack([self._concentration(_weights(bank, expert)) for expert in range(bank.dims.experts)])

    def _concentration(self, weights: Float32[Tensor, "width parts hidden"]) -> Float64[Tensor, ""]:
        absolute, square = weights.abs().mean(dtype=torch.float64), weights.square().mean(dtype=torch.float64)
        ratio = torch.where(square > 0, absolute / square.sqrt(), 1.0)
        return 1 - ratio.clamp(max=1)


def _weights(bank: ExpertBank, expert: int) -> Float32[Tensor, "width parts hidden"]:
    """One expert's matrices as segments without biases."""
    return finite_segments(bank, expert)[:, :, : bank.dims.hidden]


@hookimpl
def dernkit_scorers() -> list[type]:
    return [WeightNorm, Aimer]
