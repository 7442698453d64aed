"""HC-SMoE (arXiv 2410.08589): which experts belong together, by agglomerative clustering."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import pdist
from torch import Tensor

from dernkit.api import CheckpointError, ExpertBank, LayerStats, Retention, hookimpl

Features = Literal["sampled-outputs", "routed-outputs", "weights", "router-logits"]
Linkage = Literal["average", "complete", "ward", "single"]
READS: dict[Features, frozenset[str]] = {
    "sampled-outputs": frozenset({"sample"}),
    "routed-outputs": frozenset({"routed", "output_sum"}),
    "weights": frozenset(),
    "router-logits": frozenset({"sample"}),
}
TOKENS = 1024
"""Sampled inputs that go through an expert at a time."""

COLUMNS = 2**18
"""Weights of each expert that are compared at a time."""


@final
@dataclass(frozen=True)
class Agglomerative:
    """Bottom-up hierarchical clusters of experts; the highest score of each stays. HC-SMoE (arXiv 2410.08589).

    Each expert starts alone, and the two nearest clusters are joined until as many are left as experts are to be kept,
    in each of the router's groups. Distances are Euclidean. Of several pairs at the same distance the one with the
    higher scores is joined first, so that the order of the experts decides only between equal scores.
    """

    name: ClassVar[str] = "agglomerative"
    groups: ClassVar[bool] = True

    linkage: Linkage = "average"
    """Distance of two clusters: the mean, largest or smallest distance of their members, or by how much joining them
    raises the sum of squares (ward)."""

    features: Features = "sampled-outputs"
    """What is compared: mean outputs over all sampled tokens (the paper's) or over the tokens that the router sent to
    the expert, all weights in their stored order, or router logits over the sampled tokens."""

    @property
    def requires(self) -> frozenset[str]:
        """What the features are made of."""
        return READS[self.features]

    def select(self, bank: ExpertBank, scores: Float64[Tensor, " experts"], count: int, stats: LayerStats) -> Retention:
        experts, groups = bank.dims.experts, bank.dims.groups
        order = torch.argsort(scores, descending=True, stable=True)
        heads = torch.empty(experts, dtype=torch.int64)
        for members in torch.arange(experts).view(groups, -1):
            ranked = order[torch.isin(order, members)]
            distances = self._distances(bank, ranked, stats)
            for cluster in clusters(distances, self.linkage, len(ranked), count // groups):
                heads[ranked[cluster]] = ranked[min(cluster)]
        kept, group = heads.unique(return_inverse=True)
        return Retention(scores, kept, group)

    def _distances(
        self, bank: ExpertBank, experts: Int64[Tensor, " n"], stats: LayerStats
    ) -> Float64[Tensor, " pairs"]:
        """Euclidean distances of all pairs, in scipy's condensed order."""
        total = np.zeros(len(experts) * (len(experts) - 1) // 2)
        for columns in self._features(bank, experts, stats):
            if not bool(columns.isfinite().all()):
                raise CheckpointError(
                    f"selector 'agglomerative', layer {bank.dims.layer}: {self.features} must be finite to be "
                    "compared. Got NaN or infinity instead. Check the checkpoint, or compare something else."
                )
            total += pdist(columns.to("cpu", torch.float64).numpy(), "sqeuclidean")
        return torch.from_numpy(np.sqrt(total))

    def _features(
        self, bank: ExpertBank, experts: Int64[Tensor, " n"], stats: LayerStats
    ) -> Iterator[Float[Tensor, "n columns"]]:
        """The features of some experts, in parts."""
        if self.features == "weights":
            yield from _weights(bank, experts)
        elif self.features == "router-logits":
            yield _logits(bank, stats)[experts]
        elif self.features == "routed-outputs":
            yield (stats["output_sum"] / stats["routed"].clamp(min=1)[:, None])[experts]
        else:
            yield torch.stack([_mean_output(bank, expert, stats["sample"]) for expert in experts.tolist()])


def clusters(distances: Float64[Tensor, " pairs"], method: Linkage, points: int, count: int) -> list[list[int]]:
    """Exactly ``count`` clusters of the points 0, 1, …: scipy's joins in their order, until that many are left."""
    found = {point: [point] for point in range(points)}
    if count < points:
        for join, (one, other) in enumerate(linkage(distances.numpy(), method)[: points - count, :2].astype(int)):
            found[points + join] = found.pop(one) + found.pop(other)
    return list(found.values())


def _weights(bank: ExpertBank, experts: Int64[Tensor, " n"]) -> Iterator[Float[Tensor, "n columns"]]:
    tensors = (bank.gate, bank.up, bank.down, bank.gate_bias, bank.up_bias, bank.down_bias)
    for tensor in (tensor for tensor in tensors if tensor is not None):
        step = max(1, COLUMNS // tensor[0, 0].numel())
        for part in tensor.split(step, dim=1):
            yield part[experts.to(part.device)].flatten(1)


def _mean_output(bank: ExpertBank, expert: int, inputs: Float[Tensor, "sampled hidden"]) -> Float64[Tensor, " hidden"]:
    total = torch.zeros(inputs.shape[1], dtype=torch.float64, device=inputs.device)
    for part in inputs.split(TOKENS):
        total += bank.output(expert, part).to(torch.float64).sum(0)
    return total / len(inputs)


def _logits(bank: ExpertBank, stats: LayerStats) -> Float[Tensor, "experts sampled"]:
    if bank.route is None:
        raise CheckpointError(
            f"selector 'agglomerative', layer {bank.dims.layer}: tokens must be routed again for router-logits. "
            "Got an adapter that does not offer it instead. Compare sampled-outputs."
        )
    return bank.route(stats.router_inputs, None).logits.T


@hookimpl
def dernkit_selectors() -> list[type]:
    """One selector: recipes write ``select: {use: agglomerative}``."""
    return [Agglomerative]
