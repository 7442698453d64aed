"""A merge that looks at what neurons do on sampled inputs, not at their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, final

import torch
from annotated_types import Interval
from jaxtyping import Float32
from torch import Tensor

from dernkit.api import Pool
from dernkit.kernel.clustering import Init, choose_seeds, cluster_means, preferred_seeds, spherical_labels
from dernkit.kernel.matching import BUDGET, lengths
from dernkit.kernel.outputs import segment_activations
from dernkit.kernel.weights import Weights, pool_segments, statistics_for


@final
@dataclass(frozen=True)
class KMeansActivation:
    """Cluster the pool down to the width by the cosine of the neurons' activations on sampled inputs.

    Spherical weighted k-means on the vectors ``act(gate · x_t) (up · x_t)``, t the sampled tokens; a cluster's neuron
    is the weighted mean of its segments, as in DERN (arXiv 2509.10377) step 3. An empty cluster keeps the segment it
    began with. Neurons without any activation take what room is left, unchanged, the own ones first.
    """

    name: ClassVar[str] = "kmeans-activation"
    widens: ClassVar[bool] = False

    tokens: Annotated[int, Interval(ge=1, le=65536)] = 1024
    """How many of the sampled inputs are looked at, at most."""

    init: Init = "gate-norm"
    """First centroids: largest infinity norm of the gate part (of the up part where there is no gate), the kept
    expert's own segments, or a random choice."""

    weights: Weights = "score"
    """Whether a segment weighs the score of the expert it comes from, the number of tokens routed to that expert, or
    all weigh the same."""

    rescale: bool = True
    """Stretch each centroid to its cluster's mean norm: a gated neuron that shrinks loses the cube of the ratio."""

    equalise: bool = True
    """Give the segments of a cluster the same norm before they are averaged. Their activations always have."""

    iterations: Annotated[int, Interval(ge=1, le=1000)] = 30
    """Rounds at most; it ends sooner when no label changes."""

    @property
    def requires(self) -> frozenset[str]:
        """The sample, and what the weights are made of."""
        return frozenset({"sample"}) | statistics_for(self.weights)

    def merge(self, pool: Pool, width: int, rng: torch.Generator) -> Float32[Tensor, "merged parts features"]:
        segments, weights = pool_segments(pool, self.weights)
        vectors = self._activations(pool, segments)
        alive = lengths(vectors) > 0
        own = int(alive[: len(pool.own)].sum())
        centroids = self._centroids(segments[alive], vectors[alive], weights[alive], own, width, rng)
        silent = segments[~alive]
        silent = silent[lengths(silent.flatten(1)) > 0] if len(silent) else silent
        return torch.cat([centroids, silent[: width - len(centroids)]])

    def _activations(self, pool: Pool, segments: Tensor) -> Float32[Tensor, "pool sampled"]:
        inputs = pool.stats["sample"][: self.tokens].to(segments.device)
        step = max(1, BUDGET // (4 * len(inputs)))
        return torch.cat([segment_activations(part, pool.act, inputs).T for part in segments.split(step)])

    def _centroids(
        self, segments: Tensor, vectors: Tensor, weights: Tensor, own: int, width: int, rng: torch.Generator
    ) -> Float32[Tensor, "clusters parts features"]:
        order = preferred_seeds(segments, own, self.init, rng)
        seeds = choose_seeds(segments, order, own, width)
        labels = spherical_labels(vectors, weights, seeds, iterations=self.iterations)
        clusters, position = labels.unique(return_inverse=True)
        centroids = segments[seeds].flatten(1)
        centroids[clusters] = cluster_means(
            segments.flatten(1),
            weights,
            rows=torch.arange(len(segments), device=segments.device),
            labels=position,
            clusters=len(clusters),
            equalise=self.equalise,
            rescale=self.rescale,
        )
        return centroids.unflatten(1, segments.shape[1:])
