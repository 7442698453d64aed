"""How like whole experts are: the same affinity for all neurons of one, which match those at their own places."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from dernkit.api import CheckpointError, ExpertBank, LayerStats, Match, hookimpl
from dernkit.kernel.correlation import centred
from dernkit.kernel.matching import cosines, dots
from dernkit.kernel.segments import finite_segments


@final
@dataclass(frozen=True)
class ExpertOutput:
    """Likeness of mean outputs ``o_e = (1/n_e) Σ E_e(x)`` over the tokens routed to e, HC-SMoE (arXiv 2410.08589).

    0 for an expert without tokens.
    """

    name: ClassVar[str] = "expert-output"
    requires: ClassVar[frozenset[str]] = frozenset({"routed", "output_sum"})

    metric: Literal["cosine", "euclidean"] = "cosine"
    """``cos(o_e, o_r)``, or ``1 / (1 + ‖o_e − o_r‖)``, which falls with the distance."""

    def match(self, bank: ExpertBank, dropped: int, kept: Int64[Tensor, " kept"], stats: LayerStats) -> Match:
        routed = stats["routed"].to(torch.float64)
        means = stats["output_sum"].to(torch.float64) / routed.clamp(min=1)[:, None]
        one, others = means[dropped], means[kept.to(means.device)]
        if self.metric == "euclidean":
            affinity = 1 / (1 + (others - one).norm(dim=1))
        else:
            affinity = _cosine((others * one).sum(1), others.norm(dim=1), one.norm())
        seen = (routed[kept.to(routed.device)] > 0) & (routed[dropped] > 0)
        return _whole(torch.where(seen, affinity, 0.0), bank.dims.width)


@final
@dataclass(frozen=True)
class RouterLogits:
    """Likeness of the experts' router logits over the sampled tokens, M-SMoE (arXiv 2310.01334)."""

    name: ClassVar[str] = "router-logits"
    requires: ClassVar[frozenset[str]] = frozenset({"sample"})

    metric: Literal["cosine", "pearson"] = "cosine"
    """Cosine of the logits, or of what they differ from their mean by."""

    def match(self, bank: ExpertBank, dropped: int, kept: Int64[Tensor, " kept"], stats: LayerStats) -> Match:
        logits = self._logits(bank, stats)
        if self.metric == "pearson":
            logits = centred(logits)
        return _whole(cosines(logits[[dropped]], logits[kept.to(logits.device)])[0], bank.dims.width)

    def _logits(self, bank: ExpertBank, stats: LayerStats) -> Float32[Tensor, "experts sampled"]:
        where = f"similarity 'router-logits', layer {bank.dims.layer}"
        if bank.route is None:
            raise CheckpointError(
                f"{where}: tokens must be routed again for logits. Got an adapter that does not offer it instead. "
                "Take 'expert-output' or 'expert-weights'."
            )
        logits = bank.route(stats.router_inputs, None).logits.T.to(torch.float32).contiguous()
        if not bool(logits.isfinite().all()):
            raise CheckpointError(
                f"{where}: the router's logits must be finite. Got NaN or infinity instead. "
                "Take 'expert-output' or 'expert-weights'."
            )
        return logits


@final
@dataclass(frozen=True)
class ExpertWeights:
    """``cos(θ_e, θ_r)`` of all weights and biases of two experts' neurons, in the order in which these are stored."""

    name: ClassVar[str] = "expert-weights"
    requires: ClassVar[frozenset[str]] = frozenset()

    def match(self, bank: ExpertBank, dropped: int, kept: Int64[Tensor, " kept"], stats: LayerStats) -> Match:
        one = finite_segments(bank, dropped).flatten(1)
        own = dots(one, one).sum().sqrt()
        affinity = []
        for expert in kept.tolist():
            other = finite_segments(bank, expert).flatten(1)
            affinity.append(_cosine(dots(one, other).sum(), dots(other, other).sum().sqrt(), own))
        return _whole(torch.stack(affinity), bank.dims.width)


def _cosine(products: Tensor, lengths: Tensor, length: Tensor) -> Float64[Tensor, "*kept"]:
    scale = lengths * length
    return torch.where(scale > 0, products / scale, 0.0).clamp(-1, 1)


def _whole(affinity: Float[Tensor, " kept"], width: int) -> Match:
    rows = affinity.to(torch.float32).repeat(width, 1)
    own = torch.arange(width, device=rows.device)
    return Match(rows, own[:, None].repeat(1, rows.shape[1]))


@hookimpl
def dernkit_similarities() -> list[type]:
    return [ExpertOutput, RouterLogits, ExpertWeights]
