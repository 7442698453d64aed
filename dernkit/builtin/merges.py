"""How a kept expert's own segments and the arrivals become one expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, final

import torch
from annotated_types import Interval
from jaxtyping import Float32, Int64
from torch import Tensor

from dernkit.api import Pool, hookimpl
from dernkit.kernel.clustering import choose_seeds, cluster_means, spherical_kmeans
from dernkit.kernel.matching import lengths

Weights = Literal["score", "uniform"]


@final
@dataclass(frozen=True)
class SphericalKMeans:
    """Cluster the pool down to the width by cosine; the centroids are the neurons. DERN (arXiv 2509.10377) step 3."""

    name: ClassVar[str] = "spherical-kmeans"
    requires: ClassVar[frozenset[str]] = frozenset()
    widens: ClassVar[bool] = False

    init: Literal["gate-norm", "own", "random"] = "gate-norm"
    """First centroids: largest infinity norm of the gate part (of the up part where there is no gate), the kept
    expert's own segments, or a random choice (which costs the paper 15 points)."""

    weights: Weights = "score"
    """Whether a segment weighs the score of the expert it comes from, or all weigh the same."""

    rescale: bool = True
    """Stretch each centroid to its cluster's mean norm: a gated neuron that shrinks loses the cube of the ratio."""

    equalise: bool = True
    """Give the members of a cluster the same norm before they are averaged."""

    iterations: Annotated[int, Interval(ge=1, le=1000)] = 30
    """Rounds at most; it ends sooner when no label changes."""

    def merge(self, pool: Pool, width: int, rng: torch.Generator) -> Float32[Tensor, "merged parts features"]:
        segments, weights = _together(pool, self.weights)
        # A zero segment adds nothing to the output and has no direction: the kernel pads with zeros if room is left.
        alive = lengths(segments.flatten(1)) > 0
        own = int(alive[: len(pool.own)].sum())
        if not bool(alive.all()):
            segments, weights = segments[alive], weights[alive]
        seeds = choose_seeds(segments, self._order(segments, own, rng), own, width)
        return spherical_kmeans(
            segments,
            weights,
            seeds,
            iterations=self.iterations,
            equalise=self.equalise,
            rescale=self.rescale,
        )

    def _order(self, segments: Tensor, own: int, rng: torch.Generator) -> Int64[Tensor, " preferred"]:
        """Segments that may become first centroids, the preferred ones first."""
        if self.init == "own":
            return torch.arange(own, device=segments.device)
        if self.init == "random":
            return torch.randperm(len(segments), generator=rng).to(segments.device)
        peaks = segments[:, 0].abs().amax(1)
        return torch.argsort(peaks, descending=True, stable=True)


@final
@dataclass(frozen=True)
class WeightedAverage:
    """Each arrival is averaged into the own neuron that it matched best; the other neurons keep their bits."""

    name: ClassVar[str] = "weighted-average"
    requires: ClassVar[frozenset[str]] = frozenset()
    widens: ClassVar[bool] = False

    weights: Weights = "score"
    """Whether a segment weighs the score of the expert it comes from, or all weigh the same."""

    rescale: bool = False
    """Stretch each average to the mean norm of what went into it."""

    def merge(self, pool: Pool, width: int, rng: torch.Generator) -> Float32[Tensor, "merged parts features"]:
        segments, weights = _together(pool, self.weights)
        own = torch.arange(len(pool.own), device=segments.device)
        means = cluster_means(
            segments.flatten(1),
            weights,
            rows=torch.arange(len(segments), device=segments.device),
            labels=torch.cat([own, pool.partner]),
            clusters=len(pool.own),
            equalise=False,
            rescale=self.rescale,
        )
        return means.unflatten(1, segments.shape[1:])


@final
@dataclass(frozen=True)
class Concatenate:
    """Arrivals stand beside the own neurons: nothing is averaged, the expert grows wider."""

    name: ClassVar[str] = "concatenate"
    requires: ClassVar[frozenset[str]] = frozenset()
    widens: ClassVar[bool] = True

    def merge(self, pool: Pool, width: int, rng: torch.Generator) -> Float32[Tensor, "merged parts features"]:
        return torch.cat([pool.own, pool.incoming])


def _together(pool: Pool, weights: Weights) -> tuple[Tensor, Tensor]:
    """Own segments, then arrivals, and the weight of each."""
    segments = torch.cat([pool.own, pool.incoming])
    if weights == "uniform":
        return segments, torch.ones(len(segments), device=segments.device)
    own = pool.incoming_weight.new_full((len(pool.own),), pool.own_weight)
    return segments, torch.cat([own, pool.incoming_weight])


@hookimpl
def dernkit_merges() -> list[type]:
    return [SphericalKMeans, WeightedAverage, Concatenate]
