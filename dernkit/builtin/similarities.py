"""How well the segments of one dropped expert fit to the neurons of each kept expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, final

import torch
from annotated_types import MinLen
from jaxtyping import Float32, Int64
from torch import Tensor

from dernkit.api import CheckpointError, ExpertBank, LayerStats, Match, hookimpl
from dernkit.kernel.matching import best_match
from dernkit.kernel.segments import finite_segments

Part = Literal["gate", "up", "down"]


@final
@dataclass(frozen=True)
class Cosine:
    """``sim(s, r) = max_j cos(v(s), v(segment j of r))`` on weights alone, DERN (arXiv 2509.10377) step 2."""

    name: ClassVar[str] = "cosine"
    requires: ClassVar[frozenset[str]] = frozenset()

    parts: Annotated[tuple[Part, ...], MinLen(1)] = ("up", "down")
    """What v(·) concatenates; the paper finds leaving the gate out slightly better."""

    def __post_init__(self) -> None:
        if not self.parts or len(set(self.parts)) < len(self.parts):
            raise ValueError(
                f"parts: must name each of gate, up and down at most once, and one at least. Got {self.parts} "
                "instead. Remove what is repeated."
            )

    def match(self, bank: ExpertBank, dropped: int, kept: Int64[Tensor, " kept"], stats: LayerStats) -> Match:
        queries = self._vectors(bank, dropped)
        columns = [best_match(queries, self._vectors(bank, expert)) for expert in kept.tolist()]
        affinity, partner = zip(*columns, strict=True)
        return Match(torch.stack(affinity, dim=1), torch.stack(partner, dim=1))

    def _vectors(self, bank: ExpertBank, expert: int) -> Float32[Tensor, "width flat"]:
        present = ("up", "down") if bank.gate is None else ("gate", "up", "down")
        absent = [part for part in self.parts if part not in present]
        if absent:
            raise CheckpointError(
                f"similarity 'cosine', layer {bank.dims.layer}: parts must be among {', '.join(present)} for "
                f"experts without a gate. Got {', '.join(absent)} instead. Take it out of `parts`."
            )
        chosen = [position for position, part in enumerate(present) if part in self.parts]
        return finite_segments(bank, expert)[:, chosen].flatten(1)


@hookimpl
def dernkit_similarities() -> list[type]:
    return [Cosine]
