"""How well the segments of one dropped expert fit to the neurons of each kept expert, by what they do on inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, final

import torch
from annotated_types import Interval
from jaxtyping import Float32, Int64
from torch import Tensor

from dernkit.api import ExpertBank, LayerStats, Match, hookimpl
from dernkit.kernel.clustering import first_of_kind
from dernkit.kernel.correlation import activation_rows, centred
from dernkit.kernel.matching import best_match, best_product, cosines
from dernkit.kernel.segments import finite_segments
from dernkit.kernel.symmetry import facing, proportional

Tokens = Annotated[int, Interval(ge=2, le=1_048_576)]


@final
@dataclass(frozen=True)
class ActivationCorrelation:
    """``sim(s, r) = max_j corr(a_s(x), a_j(x))``: Pearson correlation of activations over the sampled inputs.

    The correlation by which ZipIt! (arXiv 2305.03053) matches features. Constant neurons have 0. No router stands
    between: every neuron sees every sampled input, also those that its expert was not chosen for.
    """

    name: ClassVar[str] = "activation-correlation"
    requires: ClassVar[frozenset[str]] = frozenset({"sample"})

    tokens: Tokens = 1024
    """Sampled inputs to compare on at most; the sample is in random order, its first ones are taken."""

    def match(self, bank: ExpertBank, dropped: int, kept: Int64[Tensor, " kept"], stats: LayerStats) -> Match:
        queries = self._rows(bank, finite_segments(bank, dropped), stats)
        return _match(self._best(bank, queries, expert, stats) for expert in kept.tolist())

    def pairs(self, bank: ExpertBank, dropped: int, other: int, stats: LayerStats) -> Float32[Tensor, "width width"]:
        one, two = (self._rows(bank, finite_segments(bank, expert), stats) for expert in (dropped, other))
        return cosines(one, two)

    def _best(self, bank: ExpertBank, queries: Tensor, expert: int, stats: LayerStats) -> tuple[Tensor, Tensor]:
        segments = finite_segments(bank, expert)
        first = _distinct(segments[:, :-1])
        value, index = best_match(queries, self._rows(bank, segments[first], stats))
        return value, first[index]

    def _rows(self, bank: ExpertBank, segments: Tensor, stats: LayerStats) -> Float32[Tensor, "neurons sampled"]:
        return centred(activation_rows(segments, bank.act, stats["sample"][: self.tokens]))


@final
@dataclass(frozen=True)
class OutputContribution:
    """``sim(s, r) = max_j cos(a_s d_sᵀ, a_j d_jᵀ)``: what two neurons add to the output, over all sampled inputs.

    A neuron with activations a ∈ R^n and down column d ∈ R^H adds the matrix a dᵀ, and the cosine of two such matrices
    is exactly ``cos(a_s, a_j) cos(d_s, d_j)``. It does not see how a neuron divides its norm and sign among up and
    down; where the activation allows it, arrivals are merged with the division of their partners. Inputs are those of
    the expert, without the router's coefficient; a norm after the down projection is left out.
    """

    name: ClassVar[str] = "output-contribution"
    requires: ClassVar[frozenset[str]] = frozenset({"sample"})

    tokens: Tokens = 1024
    """Sampled inputs to compare on at most; the sample is in random order, its first ones are taken."""

    def match(self, bank: ExpertBank, dropped: int, kept: Int64[Tensor, " kept"], stats: LayerStats) -> Match:
        queries = self._factors(bank, finite_segments(bank, dropped), stats)
        found = _match(self._best(bank, queries, expert, stats) for expert in kept.tolist())
        pairs = zip(kept.tolist(), found.partner.unbind(1), strict=True)
        scales = [scale for pair in pairs if (scale := self.scale(bank, dropped, *pair, stats)) is not None]
        return Match(found.affinity, found.partner, torch.stack(scales, dim=1) if scales else None)

    def pairs(self, bank: ExpertBank, dropped: int, other: int, stats: LayerStats) -> Float32[Tensor, "width width"]:
        one, two = (self._factors(bank, finite_segments(bank, expert), stats) for expert in (dropped, other))
        return cosines(one[0], two[0]) * cosines(one[1], two[1])

    def scale(
        self, bank: ExpertBank, dropped: int, other: int, partner: Int64[Tensor, " width"], stats: LayerStats
    ) -> Float32[Tensor, " width"] | None:
        sign, balance = proportional(bank, -1.0), proportional(bank, 3.0)
        if not (sign or balance):
            return None
        partners = finite_segments(bank, other)[partner]
        return facing(finite_segments(bank, dropped), partners, sign=sign, balance=balance)

    def _best(
        self, bank: ExpertBank, queries: tuple[Tensor, Tensor], expert: int, stats: LayerStats
    ) -> tuple[Tensor, Tensor]:
        segments = finite_segments(bank, expert)
        first = _distinct(segments)
        value, index = best_product(queries, self._factors(bank, segments[first], stats))
        return value, first[index]

    def _factors(self, bank: ExpertBank, segments: Tensor, stats: LayerStats) -> tuple[Tensor, Tensor]:
        """Activations [neurons, n] and down columns [neurons, D]."""
        return activation_rows(segments, bank.act, stats["sample"][: self.tokens]), segments[:, -1].contiguous()


def _distinct(segments: Float32[Tensor, "width some_parts features"]) -> Int64[Tensor, " distinct"]:
    """Neurons that are bitwise unlike those before them: a matrix product may give equal ones unequal activations."""
    return first_of_kind(segments.flatten(1)).nonzero().flatten()


def _match(columns: Iterator[tuple[Tensor, Tensor]]) -> Match:
    affinity, partner = zip(*columns, strict=True)
    return Match(torch.stack(affinity, dim=1), torch.stack(partner, dim=1))


@hookimpl
def dernkit_similarities() -> list[type]:
    return [ActivationCorrelation, OutputContribution]
