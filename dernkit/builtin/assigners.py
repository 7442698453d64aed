"""Which segments of the dropped experts go to which kept expert."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Annotated, ClassVar, final

import torch
from annotated_types import Interval
from jaxtyping import Float, Int64
from torch import Tensor

from dernkit.api import (
    Assignment,
    ExpertBank,
    LayerStats,
    Retention,
    Similarity,
    hookimpl,
)
from dernkit.builtin.similarities import Cosine
from dernkit.kernel import calls

DEFAULT_THRESHOLD = 0.6
"""Where DERN's results stop rising (arXiv 2509.10377)."""


@final
@dataclass(frozen=True)
class NoMoves:
    """All segments of dropped experts are discarded: plain pruning."""

    name: ClassVar[str] = "none"
    requires: ClassVar[frozenset[str]] = frozenset()
    needs_groups: ClassVar[bool] = False

    def assign(self, bank: ExpertBank, retention: Retention, stats: LayerStats) -> Assignment:
        return Assignment.empty()


@final
@dataclass(frozen=True)
class Affinity:
    """Each segment goes to the kept expert with its best match, if that is good enough; DERN (2509.10377) step 2."""

    name: ClassVar[str] = "affinity"
    needs_groups: ClassVar[bool] = False

    similarity: Similarity = field(default_factory=Cosine)
    """How well a segment fits to the neurons of a kept expert."""

    threshold: Annotated[float, Interval(ge=-1, le=1)] | None = None
    """A segment moves if and only if its affinity is above this; 0.6 (the paper's) if neither rule is given."""

    quantile: Annotated[float, Interval(ge=0, le=1)] | None = None
    """This share of all dropped segments of the layer moves, the best first. For experts trained apart, whose
    cosines are far below any threshold that makes sense for upcycled ones."""

    def __post_init__(self) -> None:
        if self.threshold is not None and self.quantile is not None:
            raise ValueError(
                "threshold and quantile: only one of the two may be given. "
                f"Got threshold {self.threshold} and quantile {self.quantile} instead. Remove one."
            )

    @property
    def requires(self) -> frozenset[str]:
        """What the nested similarity reads."""
        return self.similarity.requires

    def assign(self, bank: ExpertBank, retention: Retention, stats: LayerStats) -> Assignment:
        kept, dropped = retention.kept, retention.dropped
        if not dropped:
            return Assignment.empty()
        width = bank.dims.width
        best = [self._best(bank, expert, kept, stats) for expert in dropped]
        target, partner, affinity, scale = (torch.cat(column) for column in zip(*best, strict=True))
        source = torch.cat([torch.arange(expert * width, (expert + 1) * width) for expert in dropped])
        moving = self._moving(affinity)
        scaled = scale[moving] if bool((scale[moving] != 1).any()) else None
        return Assignment(source[moving], target[moving], partner[moving], affinity[moving], scaled)

    def _best(
        self, bank: ExpertBank, expert: int, kept: Tensor, stats: LayerStats
    ) -> tuple[Int64[Tensor, " width"], Int64[Tensor, " width"], Float[Tensor, " width"], Float[Tensor, " width"]]:
        """Target, partner, affinity and scale of every segment of one dropped expert; ties to the lowest target."""
        match = calls.match(self.similarity, bank, expert, kept, stats)
        affinity, target = match.affinity.max(dim=1)
        partner = match.partner.gather(1, target[:, None])[:, 0]
        scale = torch.ones_like(affinity) if match.scale is None else match.scale.gather(1, target[:, None])[:, 0]
        return target.cpu(), partner.cpu(), affinity.cpu(), scale.cpu()

    def _moving(self, affinity: Float[Tensor, " segments"]) -> Int64[Tensor, " moves"]:
        """Positions of the segments that move, ascending."""
        if self.quantile is None:
            threshold = DEFAULT_THRESHOLD if self.threshold is None else self.threshold
            return (affinity > threshold).nonzero().flatten()
        # Exact on the decimal that was written: 0.29 of 100 is 29, which floats would round down to 28.
        count = math.floor(Fraction(str(self.quantile)) * len(affinity))
        return torch.argsort(affinity, descending=True, stable=True)[:count].sort().values


@hookimpl
def dernkit_assigners() -> list[type]:
    return [NoMoves, Affinity]
