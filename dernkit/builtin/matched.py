"""One-to-one matching of the neurons of two experts, by any similarity that compares all pairs of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, final

import torch
from jaxtyping import Int64
from torch import Tensor

from dernkit.api import ExpertBank, LayerStats, Match, Pairwise, Rescaling, Similarity, hookimpl
from dernkit.builtin.similarities import Cosine
from dernkit.kernel import calls
from dernkit.kernel.one_to_one import one_to_one_each

MEMORY = 4 * 2**30
"""Bytes that the matrices in work may take: a float32 one and the solver's float64 copy of it, 2.5 GB for Mixtral."""


@final
@dataclass(frozen=True)
class Hungarian:
    """Every neuron of a dropped expert has its own partner in each kept one, so that affinities add up to the most.

    The permutation alignment of Git Re-Basin (arXiv 2209.04836, section 3.2) as a linear sum assignment, which scipy
    solves. Among several matchings of the same total it takes the one that scipy finds first.
    """

    name: ClassVar[str] = "hungarian"

    base: Similarity = field(default_factory=Cosine)
    """What says how well two neurons fit; it must be able to compare all pairs of them."""

    def __post_init__(self) -> None:
        if not isinstance(self.base, Pairwise):
            raise ValueError(
                "base: must be a similarity that compares all pairs of neurons (one with `pairs`). "
                f"Got '{self.base.name}' instead. Take cosine, activation-correlation or output-contribution."
            )

    @property
    def requires(self) -> frozenset[str]:
        """What the nested similarity reads."""
        return self.base.requires

    def match(self, bank: ExpertBank, dropped: int, kept: Int64[Tensor, " kept"], stats: LayerStats) -> Match:
        experts, seen = kept.tolist(), stats.only(self.requires)
        workers = max(1, min(len(experts), torch.get_num_threads(), MEMORY // (12 * bank.dims.width**2)))
        matrices = (calls.pairs(self.base, bank, dropped, expert, stats) for expert in experts)
        affinity, partner = zip(*one_to_one_each(matrices, workers), strict=True)
        scales: list[Tensor] = []
        if isinstance(self.base, Rescaling):
            each = (self.base.scale(bank, dropped, *pair, seen) for pair in zip(experts, partner, strict=True))
            scales = [scale for scale in each if scale is not None]
        scale = torch.stack(scales, dim=1) if scales else None
        return Match(torch.stack(affinity, dim=1), torch.stack(partner, dim=1), scale)


@hookimpl
def dernkit_similarities() -> list[type]:
    return [Hungarian]
