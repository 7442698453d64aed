"""Arrivals averaged into the own neurons that they matched: linearly, or along the arc between them."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from dernkit.kernel.clustering import ratio, shares
from dernkit.kernel.matching import lengths, rows_in_cache

NEARLY_OPPOSITE = 1e-6
"""Radians short of π from which on the arc between two float32 vectors is rounding noise."""


def average_into_partners(
    own: Float32[Tensor, "width flat"],
    incoming: Float32[Tensor, "moves flat"],
    partner: Int64[Tensor, " moves"],
    own_weight: float,
    incoming_weight: Float[Tensor, " moves"],
    *,
    rescale: bool = False,
) -> Float32[Tensor, "width flat"]:
    """``(w s + Σ w_j s_j) / (w + Σ w_j)`` for each own neuron and its arrivals; equal weights where all are 0.

    Summed in float64, a cache's worth of neurons at a time: the mean of equal vectors is that vector bit for bit, and
    neurons without arrivals keep their bits.

    Args:
        rescale: stretch each mean to the mean norm of what went into it.
    """
    merged = own.clone()
    receivers, cluster = partner.unique(return_inverse=True)
    own_share, share = _partner_shares(own_weight, incoming_weight, cluster, len(receivers))
    by_cluster = torch.argsort(cluster, stable=True)
    ends = torch.bincount(cluster, minlength=len(receivers)).cumsum(0)
    step = rows_in_cache(own)
    for first in range(0, len(receivers), step):
        block = receivers[first : first + step]
        begin = int(ends[first - 1]) if first else 0
        arrivals = by_cluster[begin : int(ends[min(first + step, len(receivers)) - 1])]
        place = cluster[arrivals] - first
        total = own[block].to(torch.float64) * own_share[first : first + step, None]
        for part in range(0, len(arrivals), step):
            rows = arrivals[part : part + step]
            total.index_add_(0, place[part : part + step], incoming[rows].to(torch.float64) * share[rows, None])
        if rescale:
            total *= ratio(_mean_norm(own[block], incoming, arrivals, place), total.norm(dim=1))[:, None]
        merged[block] = total.to(torch.float32)
    return merged


def _partner_shares(
    own_weight: float, incoming_weight: Tensor, cluster: Tensor, clusters: int
) -> tuple[Float64[Tensor, " clusters"], Float64[Tensor, " moves"]]:
    """Each member's part of its cluster's weight: of the own neurons, and of the arrivals."""
    own = incoming_weight.new_full((clusters,), own_weight, dtype=torch.float64)
    labels = torch.cat([torch.arange(clusters, device=cluster.device), cluster])
    found = shares(torch.cat([own, incoming_weight.to(torch.float64)]), labels, clusters)
    return found[:clusters], found[clusters:]


def _mean_norm(own: Tensor, incoming: Tensor, arrivals: Tensor, place: Tensor) -> Float64[Tensor, " block"]:
    step = rows_in_cache(own)
    norms = torch.cat([lengths(incoming[rows]) for rows in arrivals.split(step)])
    total = lengths(own).index_add_(0, place, norms)
    return total / (1 + torch.bincount(place, minlength=len(own)))


def slerp_into_partners(
    own: Float32[Tensor, "width parts features"],
    incoming: Float32[Tensor, "moves parts features"],
    partner: Int64[Tensor, " moves"],
    order: Int64[Tensor, " moves"],
    own_weight: float,
    incoming_weight: Float[Tensor, " moves"],
) -> Float32[Tensor, "width parts features"]:
    """Each own neuron moves along the arc to its first arrival, from there to the next, part by part.

    The step to arrival j is ``t = w_j / (w + w_1 + … + w_j)``, so that every arrival ends up with its share of the
    weight; equal weights where all of a neuron are 0.

    Args:
        order: of the arrivals.
    """
    merged = own.clone()
    receivers, cluster = partner.unique(return_inverse=True)
    so_far, share = _partner_shares(own_weight, incoming_weight, cluster, len(receivers))
    in_order = order[torch.argsort(cluster[order], stable=True)]
    sizes = torch.bincount(cluster, minlength=len(receivers))
    starts = sizes.cumsum(0) - sizes
    step = rows_in_cache(own.flatten(1))
    for turn in range(int(sizes.max()) if len(sizes) else 0):
        for active in (sizes > turn).nonzero().flatten().split(step):
            arrival, place = in_order[starts[active] + turn], receivers[active]
            so_far[active] += share[arrival]
            t = torch.where(so_far[active] > 0, share[arrival] / so_far[active], 0.0)
            merged[place] = slerp(merged[place], incoming[arrival], t[:, None])
    return merged


def slerp(
    start: Float32[Tensor, "*batch flat"], end: Float32[Tensor, "*batch flat"], t: Float64[Tensor, "*#batch"]
) -> Float32[Tensor, "*batch flat"]:
    """``(sin((1−t)θ) a/‖a‖ + sin(tθ) b/‖b‖) / sin θ``, with the norm ``(1−t) ‖a‖ + t ‖b‖``; t is the way from a to b.

    Between opposite vectors there are many arcs and none is taken: the direction is that of b if t is above 1/2, else
    that of a. A zero vector has no direction: the other one's is taken. Equal vectors give their bits back.
    """
    a, b = start.to(torch.float64), end.to(torch.float64)
    norm_a, norm_b = a.norm(dim=-1), b.norm(dim=-1)
    unit_a, unit_b = a * ratio(1.0, norm_a)[..., None], b * ratio(1.0, norm_b)[..., None]
    # Exact for small angles too, where the arc cosine is not.
    angle = 2 * torch.atan2((unit_a - unit_b).norm(dim=-1), (unit_a + unit_b).norm(dim=-1))
    t = t.expand_as(angle)
    share_a, share_b = _arc_shares(angle, t)
    share_a = torch.where(norm_b == 0, 1.0, share_a)
    share_b = torch.where(norm_a == 0, 1.0, share_b)
    length = (1 - t) * norm_a + t * norm_b
    return ((unit_a * share_a[..., None] + unit_b * share_b[..., None]) * length[..., None]).to(torch.float32)


def _arc_shares(
    angle: Float64[Tensor, "*batch"], t: Float64[Tensor, "*batch"]
) -> tuple[Float64[Tensor, "*batch"], Float64[Tensor, "*batch"]]:
    """How much of each unit vector is in the unit vector at t of the way."""
    sine = angle.sin()
    opposite, beyond = angle > torch.pi - NEARLY_OPPOSITE, (t > 0.5).to(t)
    share_a = torch.where(sine > 0, ((1 - t) * angle).sin() / sine, 1 - t)
    share_b = torch.where(sine > 0, (t * angle).sin() / sine, t)
    return torch.where(opposite, 1 - beyond, share_a), torch.where(opposite, beyond, share_b)
