"""One-to-one matchings of the greatest total affinity, several at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from jaxtyping import Float, Int64
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from dernkit.errors import ContractError


def one_to_one(affinity: Float[Tensor, "rows columns"]) -> Int64[Tensor, " rows"]:
    """The column of each row in a one-to-one matching whose affinities add up to the most.

    Raises:
        ContractError: there are not as many rows as columns, or an affinity is not finite.
    """
    if affinity.shape[0] != affinity.shape[1]:
        raise ContractError(
            f"one-to-one matching: both experts must have the same number of neurons. Got {affinity.shape[0]} and "
            f"{affinity.shape[1]} instead. Match experts of one width."
        )
    if not bool(affinity.isfinite().all()):
        raise ContractError(
            "one-to-one matching: affinities must be finite. Got NaN or infinity instead. Fix the similarity."
        )
    # A float64 copy is made anyway; negated, it spares scipy a second one.
    cost = affinity.to(torch.float64, copy=True).neg_()
    _, columns = linear_sum_assignment(cost.cpu().numpy())
    return torch.from_numpy(columns).to(affinity.device)


def one_to_one_each(
    affinities: Iterable[Float[Tensor, "rows columns"]], workers: int
) -> list[tuple[Float[Tensor, " rows"], Int64[Tensor, " rows"]]]:
    """Affinities and columns of :func:`one_to_one` for each matrix, in their order.

    ``workers`` threads solve (scipy lets go of the interpreter) while the next matrix is made; at most as many
    matrices as threads, and the next one, are in memory.
    """
    found: list[tuple[Tensor, Tensor]] = []
    running: deque[Future[tuple[Tensor, Tensor]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for affinity in affinities:
            if len(running) == workers:
                found.append(running.popleft().result())
            running.append(pool.submit(_solve, affinity))
            del affinity
        return found + [future.result() for future in running]


def _solve(affinity: Tensor) -> tuple[Tensor, Tensor]:
    partner = one_to_one(affinity)
    return affinity.gather(1, partner[:, None])[:, 0], partner
