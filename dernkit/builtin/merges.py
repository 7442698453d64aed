"""How a kept expert's own segments and the arrivals become one expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, final

import torch
from annotated_types import Interval
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from dernkit.api import Pool, hookimpl
from dernkit.builtin.activation_merges import KMeansActivation
from dernkit.kernel.averaging import average_into_partners, slerp_into_partners
from dernkit.kernel.clustering import Init, choose_seeds, preferred_seeds, spherical_kmeans
from dernkit.kernel.matching import lengths
from dernkit.kernel.weights import Weights, pool_bias, pool_segments, pool_weights, statistics_for


@final
@dataclass(frozen=True)
class Keep:
    """Arrivals are dropped, the own neurons keep their bits: of the moves, only the router sees anything."""

    name: ClassVar[str] = "keep"
    requires: ClassVar[frozenset[str]] = frozenset()
    widens: ClassVar[bool] = False

    def merge(self, pool: Pool, width: int, rng: torch.Generator) -> Float32[Tensor, "merged parts features"]:
        return pool.own


@final
@dataclass(frozen=True)
class Adopt:
    """Own neurons that stay and arrivals, all as they are; where they are too many, those of least affinity go.

    For assigners that choose whole sets of neurons. Where nothing is left behind there is no room, and arrivals go.
    """

    name: ClassVar[str] = "adopt"
    requires: ClassVar[frozenset[str]] = frozenset()
    widens: ClassVar[bool] = False

    def merge(self, pool: Pool, width: int, rng: torch.Generator) -> Float32[Tensor, "merged parts features"]:
        room = max(width - len(pool.own), 0)
        best = pool.affinity.argsort(descending=True, stable=True)[:room].sort().values
        return torch.cat([pool.own, pool.incoming[best]])


@final
@dataclass(frozen=True)
class SphericalKMeans:
    """Cluster the pool down to the width by cosine; the centroids are the neurons. DERN (arXiv 2509.10377) step 3."""

    name: ClassVar[str] = "spherical-kmeans"
    widens: ClassVar[bool] = False

    init: Init = "gate-norm"
    """First centroids: largest infinity norm of the gate part (of the up part where there is no gate), the kept
    expert's own segments, or a random choice (which costs the paper 15 points)."""

    weights: Weights = "score"
    """Whether a segment weighs the score of the expert it comes from, the number of tokens routed to that expert, or
    all weigh the same."""

    rescale: bool = True
    """Stretch each centroid to its cluster's mean norm: a gated neuron that shrinks loses the cube of the ratio."""

    equalise: bool = True
    """Give the members of a cluster the same norm before they are averaged."""

    iterations: Annotated[int, Interval(ge=1, le=1000)] = 30
    """Rounds at most; it ends sooner when no label changes."""

    @property
    def requires(self) -> frozenset[str]:
        """What the weights are made of."""
        return statistics_for(self.weights)

    def merge(self, pool: Pool, width: int, rng: torch.Generator) -> Float32[Tensor, "merged parts features"]:
        segments, weights = pool_segments(pool, self.weights)
        # A zero segment adds nothing to the output and has no direction: the kernel pads with zeros if room is left.
        alive = lengths(segments.flatten(1)) > 0
        own = int(alive[: len(pool.own)].sum())
        if not bool(alive.all()):
            segments, weights = segments[alive], weights[alive]
        seeds = choose_seeds(segments, preferred_seeds(segments, own, self.init, rng), own, width)
        return spherical_kmeans(
            segments,
            weights,
            seeds,
            iterations=self.iterations,
            equalise=self.equalise,
            rescale=self.rescale,
        )


@final
@dataclass(frozen=True)
class WeightedAverage:
    """Each arrival is averaged into the own neuron that it matched best; the other neurons keep their bits.

    Where whole experts move, each segment to the same neuron or to the one that it was aligned with, this is the mean
    ``Σ_e f_e W_e / Σ_e f_e`` of their gate, up and down matrices: M-SMoE (arXiv 2310.01334) and HC-SMoE (2410.08589)
    with ``weights: frequency``. Down biases are averaged too, by the share of the expert that moved.
    """

    name: ClassVar[str] = "weighted-average"
    widens: ClassVar[bool] = False

    weights: Weights = "score"
    """Whether a segment weighs the score of the expert it comes from, the number of tokens routed to that expert, or
    all weigh the same."""

    rescale: bool = False
    """Stretch each average to the mean norm of what went into it."""

    @property
    def requires(self) -> frozenset[str]:
        """What the weights are made of."""
        return statistics_for(self.weights)

    def merge(self, pool: Pool, width: int, rng: torch.Generator) -> Float32[Tensor, "merged parts features"]:
        merged = average_into_partners(
            pool.own.flatten(1),
            pool.incoming.flatten(1),
            pool.partner,
            *pool_weights(pool, self.weights),
            rescale=self.rescale,
        )
        return merged.unflatten(1, pool.own.shape[1:])

    def merge_bias(self, pool: Pool) -> Float64[Tensor, " hidden"]:
        return pool_bias(pool, self.weights)


@final
@dataclass(frozen=True)
class Slerp:
    """Each own neuron goes along the arc to its arrivals, one after the other; norms are interpolated linearly.

    Spherical linear interpolation (Shoemake, SIGGRAPH 1985) by ``t = w_j / (w + w_1 + … + w_j)``, see
    :func:`dernkit.kernel.averaging.slerp` for opposite and zero vectors. The closest arrival is first, of equally close
    ones the heaviest, then the one that the plan has first. Down biases are averaged as by ``weighted-average``.
    """

    name: ClassVar[str] = "slerp"
    widens: ClassVar[bool] = False

    weights: Weights = "score"
    """Whether a segment weighs the score of the expert it comes from, the number of tokens routed to that expert, or
    all weigh the same."""

    along: Literal["part", "segment"] = "part"
    """Whether gate row, up row and down column each have an arc of their own, or the segment has one as a whole."""

    @property
    def requires(self) -> frozenset[str]:
        """What the weights are made of."""
        return statistics_for(self.weights)

    def merge(self, pool: Pool, width: int, rng: torch.Generator) -> Float32[Tensor, "merged parts features"]:
        own, incoming = pool.own, pool.incoming
        if self.along == "segment":
            own, incoming = own.flatten(1)[:, None], incoming.flatten(1)[:, None]
        own_weight, weights = pool_weights(pool, self.weights)
        order = _closest_first(pool.affinity, weights)
        merged = slerp_into_partners(own, incoming, pool.partner, order, own_weight, weights)
        return merged.reshape(pool.own.shape)

    def merge_bias(self, pool: Pool) -> Float64[Tensor, " hidden"]:
        return pool_bias(pool, self.weights)


def _closest_first(affinity: Tensor, weights: Tensor) -> Int64[Tensor, " moves"]:
    heaviest = torch.argsort(weights, descending=True, stable=True)
    return heaviest[torch.argsort(affinity[heaviest], descending=True, stable=True)]


@final
@dataclass(frozen=True)
class Concatenate:
    """Arrivals stand beside the own neurons: nothing is averaged, the expert grows wider."""

    name: ClassVar[str] = "concatenate"
    requires: ClassVar[frozenset[str]] = frozenset()
    widens: ClassVar[bool] = True

    def merge(self, pool: Pool, width: int, rng: torch.Generator) -> Float32[Tensor, "merged parts features"]:
        return torch.cat([pool.own, pool.incoming])


@hookimpl
def dernkit_merges() -> list[type]:
    return [Keep, Adopt, WeightedAverage, SphericalKMeans, KMeansActivation, Slerp, Concatenate]
