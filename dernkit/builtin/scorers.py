"""How much each expert matters, from router statistics; higher stays. All scores are float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, final

import torch
from annotated_types import Interval
from jaxtyping import Float64
from torch import Tensor

from dernkit.api import ExpertBank, LayerStats, hookimpl
from dernkit.kernel.seeding import generator


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
    requires: ClassVar[frozenset[str]] = frozenset({"gate_sum"})

    def score(self, bank: ExpertBank, stats: LayerStats) -> Float64[Tensor, " experts"]:
        return stats["gate_sum"].to(torch.float64) / max(stats.tokens, 1)


@final
@dataclass(frozen=True)
class Reap:
    """Mean of ``g_e(x) ‖E_e(x)‖₂`` over the tokens routed to e, REAP (arXiv 2510.13999); 0 for one without tokens."""

    name: ClassVar[str] = "reap"
    requires: ClassVar[frozenset[str]] = frozenset({"routed", "reap_sum"})

    def score(self, bank: ExpertBank, stats: LayerStats) -> Float64[Tensor, " experts"]:
        return stats["reap_sum"].to(torch.float64) / stats["routed"].to(torch.float64).clamp(min=1)


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


@hookimpl
def dernkit_scorers() -> list[type]:
    return [RouterFrequency, GateMass, Reap, Random]
