"""Ridge regression in closed form, in whichever of its two forms is smaller."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor

_ROWS = 4096
"""Inputs that are converted to float64 at a time."""


def ridge_fit(
    inputs: Float[Tensor, "sampled features"], wanted: Float64[Tensor, "sampled targets"], ridge: float
) -> Float64[Tensor, "targets features"]:
    """``argmin_Δ Σ_t ‖Δ x_t − y_t‖² + λ ‖Δ‖²`` with ``λ = ridge · Σ_t ‖x_t‖² / min(n, D)``.

    λ is relative to the mean eigenvalue of the inputs that can be other than 0, so that neither their scale nor their
    number changes what ``ridge`` means. Δ is 0 where all inputs are.
    """
    sampled, features = inputs.shape
    total = sum(float(part.to(torch.float64).square().sum()) for part in inputs.split(_ROWS))
    if not total:
        return torch.zeros(wanted.shape[1], features, dtype=torch.float64, device=inputs.device)
    penalty = ridge * total / min(sampled, features)
    if sampled <= features:
        x = inputs.to(torch.float64)
        return (x.T @ _solve(x @ x.T, penalty, wanted)).T
    gram = torch.zeros(features, features, dtype=torch.float64, device=inputs.device)
    right = torch.zeros(features, wanted.shape[1], dtype=torch.float64, device=inputs.device)
    for x, y in zip(inputs.split(_ROWS), wanted.split(_ROWS), strict=True):
        x = x.to(torch.float64)
        gram += x.T @ x
        right += x.T @ y
    return _solve(gram, penalty, right).T


def _solve(gram: Tensor, penalty: float, right: Tensor) -> Tensor:
    gram.diagonal().add_(penalty)
    return torch.cholesky_solve(right, torch.linalg.cholesky(gram))
