"""Whole experts move to the kept expert of their group: merging methods as the same list of moves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dernkit.api import (
    Assignment,
    ContractError,
    ExpertBank,
    LayerStats,
    RecipeError,
    Retention,
    Similarity,
    hookimpl,
)


@final
@dataclass(frozen=True)
class WholeExpert:
    """Every neuron of each dropped expert that is in a group goes to the group's kept expert.

    M-SMoE (arXiv 2310.01334), HC-SMoE (2410.08589) and REAM (2604.04356) merge groups of experts in this way. An expert
    in no group is discarded, and a kept expert to whose group nobody belongs stays as it is, bit for bit.
    """

    name: ClassVar[str] = "whole-expert"
    needs_groups: ClassVar[bool] = True

    alignment: Similarity | None = None
    """Which neuron of the kept expert each neuron belongs to: a one-to-one similarity such as ``hungarian`` permutes
    the neurons first, as M-SMoE and REAM do. Without one, neuron i belongs to neuron i, as in HC-SMoE."""

    @property
    def requires(self) -> frozenset[str]:
        """What the nested similarity reads."""
        return frozenset() if self.alignment is None else self.alignment.requires

    def assign(self, bank: ExpertBank, retention: Retention, stats: LayerStats) -> Assignment:
        group, width = retention.group, bank.dims.width
        if group is None:
            raise RecipeError(
                f"assigner 'whole-expert', layer {bank.dims.layer}: needs a selector that groups experts. "
                "Got experts without groups instead. Set plan.select to 'dominant-expert' or 'pseudo-pruning'."
            )
        moving = [expert for expert in retention.dropped if group[expert] >= 0]
        if not moving:
            return Assignment.empty()
        matches = [self._match(bank, expert, retention.kept[group[expert], None], stats) for expert in moving]
        partner, affinity = (torch.cat(column) for column in zip(*matches, strict=True))
        source = torch.cat([torch.arange(expert * width, (expert + 1) * width) for expert in moving])
        return Assignment(source, group[moving].repeat_interleave(width), partner, affinity)

    def _match(
        self, bank: ExpertBank, expert: int, kept: Int64[Tensor, " 1"], stats: LayerStats
    ) -> tuple[Int64[Tensor, " width"], Float[Tensor, " width"]]:
        """Partner and affinity (1 without an alignment) of every neuron of one expert."""
        width = bank.dims.width
        if self.alignment is None:
            return torch.arange(width), torch.ones(width)
        match = self.alignment.match(bank, expert, kept, stats.only(self.alignment.requires))
        if match.affinity.shape != (width, 1) or match.partner.shape != (width, 1):
            raise ContractError(
                f"similarity '{self.alignment.name}', layer {bank.dims.layer}: must return affinities and partners of "
                f"shape [{width}, 1]. Got {list(match.affinity.shape)} and {list(match.partner.shape)} instead. "
                "Fix the similarity."
            )
        return match.partner[:, 0].cpu(), match.affinity[:, 0].cpu()


@hookimpl
def dernkit_assigners() -> list[type]:
    return [WholeExpert]
