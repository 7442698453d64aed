"""How well the segments of one dropped expert fit to the neurons of each kept expert, by their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, final

import torch
from annotated_types import MinLen
from jaxtyping import Float32, Int64
from torch import Tensor

from dernkit.api import CheckpointError, ExpertBank, LayerStats, Match, hookimpl
from dernkit.kernel.matching import best_match, cosines
from dernkit.kernel.segments import finite_segments
from dernkit.kernel.symmetry import balanced, facing, proportional

Part = Literal["gate", "up", "down"]


@final
@dataclass(frozen=True)
class Cosine:
    """``sim(s, r) = max_j cos(v(s), v(segment j of r))`` on weights alone, DERN (arXiv 2509.10377) step 2."""

    name: ClassVar[str] = "cosine"
    requires: ClassVar[frozenset[str]] = frozenset()

    parts: Annotated[tuple[Part, ...], MinLen(1)] = ("up", "down")
    """What v(·) concatenates; the paper finds leaving the gate out slightly better."""

    sign: bool = False
    """Take the better cosine of (u, d) and (−u, −d), the same neuron of a gated expert, and merge the better one."""

    balance: bool = False
    """Compare at ‖u‖ = ‖d‖, as (c u, d / c) is the same neuron, and merge with the c that its partner has."""

    def __post_init__(self) -> None:
        if not self.parts or len(set(self.parts)) < len(self.parts):
            raise ValueError(
                f"parts: must name each of gate, up and down at most once, and one at least. Got {self.parts} "
                "instead. Remove what is repeated."
            )
        if (self.sign or self.balance) and not {"up", "down"} <= set(self.parts):
            raise ValueError(
                "parts: must have both up and down for sign and balance, which change the two together. "
                f"Got {self.parts} instead. Add what is missing."
            )

    def match(self, bank: ExpertBank, dropped: int, kept: Int64[Tensor, " kept"], stats: LayerStats) -> Match:
        queries = self._vectors(bank, dropped)
        columns = [self._best(queries, self._vectors(bank, expert)) for expert in kept.tolist()]
        affinity, partner = (torch.stack(column, dim=1) for column in zip(*columns, strict=True))
        if not (self.sign or self.balance):
            return Match(affinity, partner)
        pairs = zip(kept.tolist(), partner.unbind(1), strict=True)
        return Match(affinity, partner, torch.stack([self._facing(bank, dropped, *pair) for pair in pairs], dim=1))

    def pairs(self, bank: ExpertBank, dropped: int, other: int, stats: LayerStats) -> Float32[Tensor, "width width"]:
        queries, candidates = self._vectors(bank, dropped), self._vectors(bank, other)
        found = cosines(queries.flatten(1), candidates.flatten(1))
        return found.maximum(cosines(_turned(queries), candidates.flatten(1))) if self.sign else found

    def scale(
        self, bank: ExpertBank, dropped: int, other: int, partner: Int64[Tensor, " width"], stats: LayerStats
    ) -> Float32[Tensor, " width"] | None:
        return self._facing(bank, dropped, other, partner) if self.sign or self.balance else None

    def _best(
        self, queries: Float32[Tensor, "width chosen features"], candidates: Float32[Tensor, "width chosen features"]
    ) -> tuple[Float32[Tensor, " width"], Int64[Tensor, " width"]]:
        value, index = best_match(queries.flatten(1), candidates.flatten(1))
        if not self.sign:
            return value, index
        turned, turned_index = best_match(_turned(queries), candidates.flatten(1))
        first = torch.where(turned == value, index.minimum(turned_index), index)
        return value.maximum(turned), torch.where(turned > value, turned_index, first)

    def _facing(
        self, bank: ExpertBank, dropped: int, other: int, partner: Int64[Tensor, " width"]
    ) -> Float32[Tensor, " width"]:
        partners = finite_segments(bank, other)[partner]
        return facing(finite_segments(bank, dropped), partners, sign=self.sign, balance=self.balance)

    def _vectors(self, bank: ExpertBank, expert: int) -> Float32[Tensor, "width chosen features"]:
        present = ("up", "down") if bank.gate is None else ("gate", "up", "down")
        absent = [part for part in self.parts if part not in present]
        if absent:
            raise CheckpointError(
                f"similarity 'cosine', layer {bank.dims.layer}: parts must be among {', '.join(present)} for "
                f"experts without a gate. Got {', '.join(absent)} instead. Take it out of `parts`."
            )
        self._check_symmetry(bank)
        chosen = [position for position, part in enumerate(present) if part in self.parts]
        segments = finite_segments(bank, expert)
        return (balanced(segments) if self.balance else segments)[:, chosen]

    def _check_symmetry(self, bank: ExpertBank) -> None:
        for option, factor, change in (("sign", -1.0, "(−u, −d)"), ("balance", 3.0, "(c u, d / c)")):
            if getattr(self, option) and not proportional(bank, factor):
                raise CheckpointError(
                    f"similarity 'cosine', layer {bank.dims.layer}: {option} must be false where {change} is another "
                    "neuron than (u, d). Got experts whose activation is not proportional to the up part instead. "
                    f"Leave `{option}` out."
                )


def _turned(vectors: Float32[Tensor, "width chosen features"]) -> Float32[Tensor, "width flat"]:
    """(g, −u, −d): the last two of the chosen parts."""
    turned = vectors.clone()
    turned[:, -2:] *= -1
    return turned.flatten(1)


@hookimpl
def dernkit_similarities() -> list[type]:
    return [Cosine]
