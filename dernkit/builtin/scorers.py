"""How much each expert matters, from statistics of router and outputs; higher stays. All scores are float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, final

import torch
from annotated_types import Interval
from jaxtyping import Float64
from torch import Tensor

from dernkit.api import ExpertBank, LayerStats, hookimpl
from dernkit.kernel.seeding import generator

Tokens = Literal["routed", "all"]


@final
@dataclass(frozen=True)
class RouterFrequency:
    """Share of tokens that the router sends to the expert: ``(1/T) Σ_t 1[e ∈ TopK(x_t)]``."""

    name: ClassVar[str] = "router-frequency"
    requires: ClassVar[frozenset[str]] = frozenset({"routed"})

    def score(self, bank: ExpertBank, stats: LayerStats) -> Float64[Tensor, " experts"]:
        return stats["routed"].to(torch.float64) / max(stats.tokens, 1)


@final
@dataclass(frozen=True)
class GateMass:
    """Mean coefficient over ALL tokens: ``S_e = (1/T) Σ_t 1[e ∈ TopK(x_t)] g_e(x_t)``, DERN (2509.10377) step 1."""

    name: ClassVar[str] = "gate-mass"

    normalise: Tokens = "all"
    """Tokens that the mean is over: all of the layer (the paper's), or those routed to the expert."""

    @property
    def requires(self) -> frozenset[str]:
        """The sum, and for a mean over routed tokens their count."""
        return frozenset({"gate_sum", "routed"} if self.normalise == "routed" else {"gate_sum"})

    def score(self, bank: ExpertBank, stats: LayerStats) -> Float64[Tensor, " experts"]:
        return _mean("gate_sum", self.normalise, stats)


@final
@dataclass(frozen=True)
class Ean:
    """Expert activation norm: the sum of ``‖E_e(x)‖₂`` over the tokens routed to e (arXiv 2510.13999)."""

    name: ClassVar[str] = "ean"
    requires: ClassVar[frozenset[str]] = frozenset({"output_norm_sum"})

    def score(self, bank: ExpertBank, stats: LayerStats) -> Float64[Tensor, " experts"]:
        return stats["output_norm_sum"].to(torch.float64)


@final
@dataclass(frozen=True)
class Man:
    """Mean activation norm: the mean of ``‖E_e(x)‖₂`` over the tokens routed to e (arXiv 2606.15716)."""

    name: ClassVar[str] = "man"
    requires: ClassVar[frozenset[str]] = frozenset({"routed", "output_norm_sum"})

    normalise: Tokens = "routed"
    """Tokens that the mean is over: those routed to the expert (the paper's), or all (EAN's order)."""

    def score(self, bank: ExpertBank, stats: LayerStats) -> Float64[Tensor, " experts"]:
        return _mean("output_norm_sum", self.normalise, stats)


@final
@dataclass(frozen=True)
class Msan:
    """Mean squared activation norm: the mean of ``‖E_e(x)‖₂²`` over the tokens routed to e (arXiv 2606.15716)."""

    name: ClassVar[str] = "msan"
    requires: ClassVar[frozenset[str]] = frozenset({"routed", "output_sq_sum"})

    normalise: Tokens = "routed"
    """Tokens that the mean is over: those routed to the expert (the paper's), or all."""

    def score(self, bank: ExpertBank, stats: LayerStats) -> Float64[Tensor, " experts"]:
        return _mean("output_sq_sum", self.normalise, stats)


@final
@dataclass(frozen=True)
class Reap:
    """Mean of ``g_e(x) ‖E_e(x)‖₂`` over the tokens routed to e, REAP (arXiv 2510.13999); 0 for one without tokens."""

    name: ClassVar[str] = "reap"
    requires: ClassVar[frozenset[str]] = frozenset({"routed", "reap_sum"})

    normalise: Tokens = "routed"
    """Tokens that the mean is over: those routed to the expert (the paper's), or all, where rare experts go first."""

    def score(self, bank: ExpertBank, stats: LayerStats) -> Float64[Tensor, " experts"]:
        return _mean("reap_sum", self.normalise, stats)


@final
@dataclass(frozen=True)
class Random:
    """Uniform numbers in [0, 1): the baseline that every other scorer has to beat."""

    name: ClassVar[str] = "random"
    requires: ClassVar[frozenset[str]] = frozenset()

    seed: Annotated[int, Interval(ge=0, le=2**32 - 1)] = 0
    """Each layer draws its own numbers from this seed and its layer number."""

    def score(self, bank: ExpertBank, stats: LayerStats) -> Float64[Tensor, " experts"]:
        rng = generator(self.seed, bank.dims.layer)
        return torch.rand(bank.dims.experts, generator=rng, dtype=torch.float64)


def _mean(total: str, normalise: Tokens, stats: LayerStats) -> Float64[Tensor, " experts"]:
    """0 for an expert that saw no token."""
    summed = stats[total].to(torch.float64)
    if normalise == "all":
        return summed / max(stats.tokens, 1)
    return summed / stats["routed"].to(torch.float64).clamp(min=1)


@hookimpl
def dernkit_scorers() -> list[type]:
    return [RouterFrequency, GateMass, Ean, Man, Msan, Reap, Random]
