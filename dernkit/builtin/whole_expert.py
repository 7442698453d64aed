"""Whole experts move to the kept expert of their group: merging methods as the same list of moves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dernkit.api import (
    Assignment,
    ExpertBank,
    LayerStats,
    RecipeError,
    Retention,
    Similarity,
    hookimpl,
)
from dernkit.kernel import calls


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
                f"assigner 'whole-expert', layer {bank.dims.layer}: must have a selector that groups experts. "
                "Got experts without groups instead. Set plan.select to one that groups, such as 'dominant-expert'."
            )
        moving = [expert for expert in retention.dropped if group[expert] >= 0]
        if not moving:
            return Assignment.empty()
        matches = [self._match(bank, expert, retention.kept[group[expert], None], stats) for expert in moving]
        partner, affinity, scale = (torch.cat(column) for column in zip(*matches, strict=True))
        source = torch.cat([torch.arange(expert * width, (expert + 1) * width) for expert in moving])
        scaled = scale if bool((scale != 1).any()) else None
        return Assignment(source, group[moving].repeat_interleave(width), partner, affinity, scaled)

    def _match(
        self, bank: ExpertBank, expert: int, kept: Int64[Tensor, " 1"], stats: LayerStats
    ) -> tuple[Int64[Tensor, " width"], Float[Tensor, " width"], Float[Tensor, " width"]]:
        """Partner, affinity and scale of every neuron of one expert; the last two are 1 without an alignment."""
        ones = torch.ones(bank.dims.width)
        if self.alignment is None:
            return torch.arange(bank.dims.width), ones, ones
        match = calls.match(self.alignment, bank, expert, kept, stats)
        scale = ones if match.scale is None else match.scale[:, 0].cpu()
        return match.partner[:, 0].cpu(), match.affinity[:, 0].cpu(), scale


@hookimpl
def dernkit_assigners() -> list[type]:
    return [WholeExpert]
