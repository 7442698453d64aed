"""The best cosine of every segment among others, in bounded memory and with exact ties."""

from __future__ import annotations

import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

BUDGET = 64 * 2**20
"""Bytes that a product of this module may take (a W×W matrix of a Mixtral layer would take 822 MB)."""

CACHE = 2 * 2**20
"""Bytes of a float64 temporary: what fits into a core's cache is four times as fast as what does not."""

SCREEN = 1e-5
"""Far above the error of a float32 product of unit vectors, far below the gap between distinct best cosines."""

TINY = 1e-30
"""A shorter vector counts as zero: float32 cannot bring it to unit length."""


def best_match(
    queries: Float32[Tensor, "queries flat"],
    candidates: Float32[Tensor, "candidates flat"],
    *,
    rows: Int64[Tensor, " rows"] | None = None,
    chunk: int | None = None,
) -> tuple[Float32[Tensor, " rows"], Int64[Tensor, " rows"]]:
    """Highest cosine of each query (of the ``rows`` of them) in [-1, 1], and the lowest candidate that has it.

    A float32 matrix product screens; whatever comes within ``SCREEN`` of a query's best is scored again, alone,
    in float64, and rounded to float32. The last bits of a matrix product depend on its shape, the sum over one
    row does not. So neither the values nor the ties (bitwise equal candidates among them) depend on ``chunk``,
    on ``rows`` or on the order of queries and candidates. A zero vector has cosine 0 with everything.

    Args:
        rows: compare only these queries, without a copy of them all.
        chunk: queries per matrix product; by default as many as ``BUDGET`` allows.
    """
    if rows is None:
        rows = torch.arange(len(queries), device=queries.device)
    if not len(rows):
        return torch.empty(0, device=queries.device), rows
    if chunk is None:
        chunk = max(1, BUDGET // (4 * len(candidates)))
    norms = lengths(candidates)
    live = _without_repeated_zeros(norms)
    unit = _unit(candidates if len(live) == len(candidates) else candidates[live], norms[live])
    parts = [_match_chunk(queries[part], candidates, norms, live, unit) for part in rows.split(chunk)]
    values, indices = zip(*parts, strict=True)
    return torch.cat(values), torch.cat(indices)


def lengths(rows: Float32[Tensor, "rows flat"]) -> Float64[Tensor, " rows"]:
    """Euclidean norm of every row, without a float64 copy of the whole; 0 below ``TINY``."""
    norms = torch.cat([_dots(part, part) for part in rows.split(rows_in_cache(rows))]).sqrt()
    return torch.where(norms < TINY, 0.0, norms)


def _match_chunk(
    queries: Tensor, candidates: Tensor, norms: Tensor, live: Tensor, unit: Tensor
) -> tuple[Tensor, Tensor]:
    query_norms = lengths(queries)
    query, candidate = _close(_unit(queries, query_norms), unit, query_norms > 0)
    candidate = live[candidate]
    step = rows_in_cache(queries)
    pairs = zip(query.split(step), candidate.split(step), strict=True)
    dots = torch.cat([_dots(queries[one], candidates[other]) for one, other in pairs])
    scale = query_norms[query] * norms[candidate]
    cosines = torch.where(scale > 0, dots / scale, 0.0).clamp(-1, 1).to(torch.float32)
    value = torch.zeros(len(queries), device=queries.device)
    value.scatter_reduce_(0, query, cosines, "amax", include_self=False)
    index = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    best = cosines == value[query]
    index.scatter_reduce_(0, query[best], candidate[best], "amin", include_self=False)
    return value, index


def _close(queries: Tensor, candidates: Tensor, nonzero: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of unit vectors that may be a query's best, ordered by query; none for a zero query."""
    cosines = queries @ candidates.T
    close = cosines >= cosines.amax(1, keepdim=True) - SCREEN
    query, candidate = (close & nonzero[:, None]).nonzero(as_tuple=True)
    return query, candidate


def _without_repeated_zeros(norms: Tensor) -> Tensor:
    """Indices of the candidates without all zero vectors but the first: they tie, and the first one wins."""
    zeros = (norms == 0).nonzero().flatten()
    live = torch.ones(len(norms), dtype=torch.bool, device=norms.device)
    live[zeros[1:]] = False
    return live.nonzero().flatten()


def _unit(rows: Tensor, norms: Tensor) -> Tensor:
    divisors = torch.where(norms > 0, norms, torch.inf).to(torch.float32)
    return rows / divisors[:, None]


def _dots(left: Tensor, right: Tensor) -> Tensor:
    """Row by row, in float64."""
    return (left.to(torch.float64) * right.to(torch.float64)).sum(1)


def rows_in_cache(rows: Float32[Tensor, "rows flat"]) -> int:
    """How many rows to convert to a 64-bit type at a time."""
    return max(1, CACHE // (8 * rows.shape[1]))
