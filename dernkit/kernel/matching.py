"""The best cosine of every segment among others, in bounded memory and with exact ties; or all cosines."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from dernkit.errors import ContractError

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
    candidates: Float32[Tensor, "candidates candidate_flat"],
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

    Raises:
        ContractError: queries and candidates do not have the same length.
    """
    return best_product((queries,), (candidates,), rows=rows, chunk=chunk)


def best_product(
    queries: Sequence[Float32[Tensor, "queries _"]],
    candidates: Sequence[Float32[Tensor, "candidates _"]],
    *,
    rows: Int64[Tensor, " rows"] | None = None,
    chunk: int | None = None,
) -> tuple[Float32[Tensor, " rows"], Int64[Tensor, " rows"]]:
    """As :func:`best_match`, for the product of several cosines: one for each place in the two sequences."""
    for query, candidate in zip(queries, candidates, strict=True):
        _check_alike(query, candidate)
    if rows is None:
        rows = torch.arange(len(queries[0]), device=queries[0].device)
    if not len(rows):
        return torch.empty(0, device=rows.device), rows
    if chunk is None:
        chunk = max(1, BUDGET // (4 * len(queries) * len(candidates[0])))
    norms = [lengths(candidate) for candidate in candidates]
    scale = reduce(torch.mul, norms)
    live = _without_repeated_zeros(scale)
    everything = len(live) == len(scale)
    units = [_unit(one if everything else one[live], norm[live]) for one, norm in zip(candidates, norms, strict=True)]
    parts = [
        _match_chunk([query[part] for query in queries], candidates, scale, live, units) for part in rows.split(chunk)
    ]
    values, indices = zip(*parts, strict=True)
    return torch.cat(values), torch.cat(indices)


def cosines(
    queries: Float32[Tensor, "queries flat"], candidates: Float32[Tensor, "candidates candidate_flat"]
) -> Float32[Tensor, "queries candidates"]:
    """Cosine of every query with every candidate in [-1, 1], from float64 products; 0 with a zero vector.

    Raises:
        ContractError: queries and candidates do not have the same length.
    """
    _check_alike(queries, candidates)
    step = max(1, BUDGET // (8 * max(queries.shape[1], 1)))
    inverse = [torch.where(norm > 0, 1 / norm, 0.0) for norm in (lengths(queries), lengths(candidates))]
    out = torch.empty(len(queries), len(candidates), device=queries.device)
    for rows in torch.arange(len(queries), device=out.device).split(step):
        left = queries[rows].to(torch.float64) * inverse[0][rows, None]
        for columns in torch.arange(len(candidates), device=out.device).split(step):
            right = candidates[columns].to(torch.float64) * inverse[1][columns, None]
            out[rows[:, None], columns] = (left @ right.T).clamp(-1, 1).to(torch.float32)
    return out


def lengths(rows: Float32[Tensor, "rows flat"]) -> Float64[Tensor, " rows"]:
    """Euclidean norm of every row, without a float64 copy of the whole; 0 below ``TINY``."""
    norms = dots(rows, rows).sqrt()
    return torch.where(norms < TINY, 0.0, norms)


def dots(left: Float32[Tensor, "rows flat"], right: Float32[Tensor, "rows other_flat"]) -> Float64[Tensor, " rows"]:
    """Inner product of every row with the same row of the other, in float64, without a float64 copy of the whole.

    Raises:
        ContractError: the rows do not have the same length.
    """
    _check_alike(left, right)
    step = rows_in_cache(left)
    return torch.cat([_dots(one, other) for one, other in zip(left.split(step), right.split(step), strict=True)])


def _check_alike(left: Tensor, right: Tensor) -> None:
    if left.shape[1] != right.shape[1]:
        raise ContractError(
            f"matching: segments that are compared must have the same parts and features. Got {left.shape[1]} and "
            f"{right.shape[1]} numbers each instead. Compare experts of the same kind."
        )


def _match_chunk(
    queries: Sequence[Tensor], candidates: Sequence[Tensor], norms: Tensor, live: Tensor, units: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    each = [lengths(query) for query in queries]
    query_norms = reduce(torch.mul, each)
    unit_queries = [_unit(query, norm) for query, norm in zip(queries, each, strict=True)]
    query, candidate = _close(unit_queries, units, query_norms > 0)
    candidate = live[candidate]
    products = reduce(torch.mul, [_paired(*both, query, candidate) for both in zip(queries, candidates, strict=True)])
    scale = query_norms[query] * norms[candidate]
    found = torch.where(scale > 0, products / scale, 0.0).clamp(-1, 1).to(torch.float32)
    value = torch.zeros(len(query_norms), device=norms.device)
    value.scatter_reduce_(0, query, found, "amax", include_self=False)
    index = torch.zeros(len(query_norms), dtype=torch.int64, device=norms.device)
    best = found == value[query]
    index.scatter_reduce_(0, query[best], candidate[best], "amin", include_self=False)
    return value, index


def _paired(queries: Tensor, candidates: Tensor, query: Tensor, candidate: Tensor) -> Tensor:
    """Inner products of chosen pairs, in float64."""
    step = rows_in_cache(queries)
    pairs = zip(query.split(step), candidate.split(step), strict=True)
    return torch.cat([_dots(queries[one], candidates[other]) for one, other in pairs])


def _close(queries: Sequence[Tensor], candidates: Sequence[Tensor], nonzero: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of unit vectors that may be a query's best, ordered by query; none for a zero query."""
    screen = reduce(torch.mul, [one @ other.T for one, other in zip(queries, candidates, strict=True)])
    close = screen >= screen.amax(1, keepdim=True) - SCREEN
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
    return max(1, CACHE // (8 * max(rows.shape[1], 1)))
