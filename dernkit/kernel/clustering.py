"""Spherical weighted k-means over segments: DERN (arXiv 2509.10377), step 3."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor

from dernkit.kernel.matching import best_match, lengths, rows_in_cache

Init = Literal["gate-norm", "own", "random"]
"""First centroids: by the infinity norm of the first part (the gate's), the expert's own segments, or by chance."""


def spherical_kmeans(
    segments: Float32[Tensor, "pool parts features"],
    weights: Float[Tensor, " pool"],
    seeds: Int64[Tensor, " clusters"],
    *,
    iterations: int = 30,
    equalise: bool = True,
    rescale: bool = True,
    chunk: int | None = None,
) -> Float32[Tensor, "clusters parts features"]:
    """Centroids of the pool by cosine on [gate; up; down], begun at the segments ``seeds``.

    Stops when no label changes. An empty cluster keeps its centroid; the only member of a cluster is its
    centroid bit for bit. What an iteration leaves as it was is not compared again: the result is the same.

    Args:
        weights: at least 0; members of a cluster whose weights are all 0 count equally.
        equalise, rescale: see :func:`cluster_means`.
        chunk: segments per matrix product, see :func:`dernkit.kernel.matching.best_match`.
    """
    flat = segments.flatten(1)
    means = partial(cluster_means, flat, weights, equalise=equalise, rescale=rescale)
    centroids, _ = _clusters(flat, seeds, means, iterations, chunk)
    return centroids.unflatten(1, segments.shape[1:])


def spherical_labels(
    vectors: Float32[Tensor, "pool flat"],
    weights: Float[Tensor, " pool"],
    seeds: Int64[Tensor, " clusters"],
    *,
    iterations: int = 30,
    chunk: int | None = None,
) -> Int64[Tensor, " pool"]:
    """Which cluster each vector ends up in; as :func:`spherical_kmeans`, members of equal norm."""
    means = partial(cluster_means, vectors, weights, equalise=True, rescale=False)
    return _clusters(vectors, seeds, means, iterations, chunk)[1]


def _clusters(
    flat: Tensor, seeds: Tensor, means: Callable[..., Tensor], iterations: int, chunk: int | None
) -> tuple[Tensor, Tensor]:
    """Centroids, and the labels that they are the means of."""
    centroids = flat[seeds]
    labels = torch.full((len(flat),), -1, device=flat.device)
    cosines = torch.zeros(len(flat), device=flat.device)
    changed = torch.ones(len(seeds), dtype=torch.bool, device=flat.device)
    for _ in range(iterations if len(seeds) else 0):
        before = labels
        cosines, labels = _assign(flat, centroids, cosines, labels, changed, chunk)
        moved = labels != before
        if not bool(moved.any()):
            break
        touched = torch.cat([labels[moved], before[moved]])
        changed = _update(centroids, labels, touched[touched >= 0], means)
    return centroids, labels


def _assign(
    flat: Tensor, centroids: Tensor, cosines: Tensor, labels: Tensor, changed: Tensor, chunk: int | None
) -> tuple[Tensor, Tensor]:
    """Best cosine and label of every segment; only what the changed centroids can have altered is computed."""
    cosines, labels = cosines.clone(), labels.clone()
    is_loose = (labels < 0) | changed[labels]
    loose, settled = is_loose.nonzero().flatten(), (~is_loose).nonzero().flatten()
    cosines[loose], labels[loose] = best_match(flat, centroids, rows=loose, chunk=chunk)
    if len(settled) and bool(changed.any()):
        value, index = best_match(flat, centroids[changed], rows=settled, chunk=chunk)
        label = changed.nonzero().flatten()[index]
        ties = (value == cosines[settled]) & (label < labels[settled])
        closer = (value > cosines[settled]) | ties
        cosines[settled[closer]], labels[settled[closer]] = value[closer], label[closer]
    return cosines, labels


def _update(centroids: Tensor, labels: Tensor, touched: Tensor, means: Callable[..., Tensor]) -> Tensor:
    """Recompute the ``touched`` centroids in place, unless they are empty; which of all are now different."""
    different = torch.zeros(len(centroids), dtype=torch.bool, device=labels.device)
    different[touched] = True
    members = different[labels].nonzero().flatten()
    clusters, position = torch.unique(labels[members], return_inverse=True)
    new = means(rows=members, labels=position, clusters=len(clusters))
    different[touched] = False
    different[clusters] = (new != centroids[clusters]).any(1)
    centroids[clusters] = new
    return different


def cluster_means(
    flat: Float32[Tensor, "pool flat"],
    weights: Float[Tensor, " pool"],
    *,
    rows: Int64[Tensor, " rows"],
    labels: Int64[Tensor, " rows"],
    clusters: int,
    equalise: bool,
    rescale: bool,
) -> Float32[Tensor, "clusters flat"]:
    """Weighted mean of each cluster: ``μ_c = Σ w_j s_j / Σ w_j`` over the segments ``rows`` with these ``labels``.

    A cluster of one is its member bit for bit: its share and both norm ratios are exactly 1.

    Args:
        equalise: members count with the cluster's mean norm n_c: ``w_j (n_c / ‖s_j‖) s_j`` (DERN).
        rescale: stretch μ_c to norm n_c; averages of unlike vectors are short.
    """
    step = rows_in_cache(flat)
    norms = torch.cat([lengths(flat[row]) for row in rows.split(step)])
    share = shares(weights[rows].to(torch.float64), labels, clusters)
    mean_norm = _sum(norms, labels, clusters) / torch.bincount(labels, minlength=clusters)
    if equalise:
        share = share * ratio(mean_norm[labels], norms)
    means = torch.zeros(clusters, flat.shape[1], device=flat.device)
    pieces = zip(rows.split(step), labels.split(step), share.to(torch.float32).split(step), strict=True)
    for row, label, part in pieces:
        means.index_add_(0, label, flat[row] * part[:, None])
    if rescale:
        means *= ratio(mean_norm, lengths(means)).to(torch.float32)[:, None]
    return means


def shares(
    weights: Float64[Tensor, " rows"], labels: Int64[Tensor, " rows"], clusters: int
) -> Float64[Tensor, " rows"]:
    """Weights divided by their cluster's sum; equal where that is 0."""
    weights = torch.where(_sum(weights, labels, clusters)[labels] > 0, weights, 1.0)
    return weights / _sum(weights, labels, clusters)[labels]


def _sum(values: Tensor, labels: Tensor, clusters: int) -> Tensor:
    return torch.zeros(clusters, dtype=values.dtype, device=values.device).index_add_(0, labels, values)


def ratio(above: Tensor | float, below: Tensor) -> Tensor:
    """``above / below``, 1 where the divisor is 0: a zero vector has no length to change."""
    return torch.where(below > 0, above / below, 1.0)


def preferred_seeds(
    segments: Float32[Tensor, "pool parts features"], own: int, init: Init, rng: torch.Generator
) -> Int64[Tensor, " preferred"]:
    """Segments that may become first centroids, the preferred ones first; the ``own`` first ones are the expert's."""
    if init == "own":
        return torch.arange(own, device=segments.device)
    if init == "random":
        return torch.randperm(len(segments), generator=rng).to(segments.device)
    peaks = segments[:, 0].abs().amax(1)
    return torch.argsort(peaks, descending=True, stable=True)


def choose_seeds(
    segments: Float32[Tensor, "pool parts features"],
    order: Int64[Tensor, " preferred"],
    own: int,
    count: int,
) -> Int64[Tensor, " clusters"]:
    """The first ``count`` distinct segments in ``order``, ascending; at most ``count``.

    Bitwise equal segments are taken once: were both twins seeds, the second one's cluster would stay empty but
    keep its centroid, and push a real neuron out. Only if that leaves room do repeats among the ``own`` first
    segments of the pool come in (an expert that has a neuron twice needs it twice); repeats that arrived do not.
    """
    first = first_of_kind(segments.flatten(1))
    distinct = order[first[order]][:count]
    repeats = order[~first[order] & (order < own)][: count - len(distinct)]
    return torch.cat([distinct, repeats]).sort().values


def first_of_kind(flat: Float32[Tensor, "pool flat"]) -> Bool[Tensor, " pool"]:
    """True for rows that are bitwise unlike all rows before them (0 and -0 are alike)."""
    fingerprints = _fingerprints(flat)
    order = torch.argsort(fingerprints, stable=True)
    alike = fingerprints[order[:-1]] == fingerprints[order[1:]]
    repeated = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    step = rows_in_cache(flat)
    # The sort is stable, so each row of a kind follows the one before it in the pool.
    for left, right in zip(order[:-1][alike].split(step), order[1:][alike].split(step), strict=True):
        repeated[right] = (flat[left] == flat[right]).all(1)
    return ~repeated


def _fingerprints(flat: Tensor) -> Tensor:
    """One int64 per row, equal for equal rows: integer sums wrap around exactly, in any order."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**63), 2**63 - 1, (flat.shape[1],), generator=generator).to(flat.device)
    pieces = ((piece + 0.0).view(torch.int32).to(torch.int64) for piece in flat.split(rows_in_cache(flat)))
    return torch.cat([(bits * factors).sum(1) for bits in pieces])
