"""What neurons contribute to a layer's output on sampled inputs: features, least squares, and which ones to keep.

The output of an expert is linear in its down projection: ``g(x) Σ_i d_i φ_i(x)``, φ the gated activations. So both which
neurons an expert should have, and their down columns, follow from the Gram matrix of ``h_i(x) = g(x) φ_i(x)`` over the
tokens that reach it. Accumulated and solved in float64.
"""

from __future__ import annotations

import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from dernkit.kernel.outputs import segment_activations
from dernkit.types import ExpertBank, Routing

_ROWS = 4096
"""Tokens that are converted to float64 at a time."""


def reached(routing: Routing, expert: int) -> tuple[Int64[Tensor, " tokens"], Float32[Tensor, " tokens"]]:
    """Tokens that an expert gets, and their coefficients."""
    rows, columns = torch.where(routing.chosen == expert)
    coefficients = routing.coefficients[rows, columns].to(torch.float32)
    used = coefficients != 0
    return rows[used], coefficients[used]


def features(
    bank: ExpertBank,
    segments: Float32[Tensor, "neurons parts features"],
    inputs: Float32[Tensor, "tokens hidden"],
    coefficients: Float32[Tensor, " tokens"],
) -> Float32[Tensor, "tokens neurons"]:
    """``h_i(x)``: what each neuron's down column is multiplied with."""
    if bank.coefficient_on_input:
        return segment_activations(segments, bank.act, inputs * coefficients[:, None])
    return coefficients[:, None] * segment_activations(segments, bank.act, inputs)


def normal_equations(
    hidden: Float32[Tensor, "tokens neurons"], wanted: Float32[Tensor, "tokens hidden"]
) -> tuple[Float64[Tensor, "neurons neurons"], Float64[Tensor, "neurons hidden"]]:
    """``A = hᵀh`` and ``B = hᵀy``."""
    gram = torch.zeros(hidden.shape[1], hidden.shape[1], dtype=torch.float64)
    right = torch.zeros(hidden.shape[1], wanted.shape[1], dtype=torch.float64)
    for h, y in zip(hidden.split(_ROWS), wanted.split(_ROWS), strict=True):
        h64 = h.to(torch.float64)
        gram.addmm_(h64.T, h64)
        right.addmm_(h64.T, y.to(torch.float64))
    return gram, right


def penalty(gram: Float64[Tensor, "neurons neurons"], ridge: float) -> float:
    """``λ = ridge · mean diag A``; above 0 also where no neuron is ever active."""
    mean = float(gram.diagonal().mean()) if len(gram) else 0.0
    return ridge * mean if mean > 0 else 1.0


def solve(
    gram: Float64[Tensor, "neurons neurons"], right: Float64[Tensor, "neurons hidden"], damping: float
) -> Float64[Tensor, "neurons hidden"]:
    """``(A + λI)⁻¹ B``."""
    return torch.cholesky_solve(right, _factor(gram, damping))


def saliency(
    gram: Float64[Tensor, "neurons neurons"], right: Float64[Tensor, "neurons hidden"], damping: float
) -> Float64[Tensor, " neurons"]:
    """``‖w_i‖² / [(A + λI)⁻¹]_ii``, w = (A + λI)⁻¹B: what the damped error rises by when neuron i goes and all others
    are solved again (optimal brain surgeon, Hassibi & Stork 1993)."""
    inverse = torch.cholesky_inverse(_factor(gram, damping))
    return (inverse @ right).square().sum(1) / inverse.diagonal()


def select(
    gram: Float64[Tensor, "neurons neurons"],
    right: Float64[Tensor, "neurons hidden"],
    damping: float,
    count: int,
    rounds: int,
) -> tuple[Int64[Tensor, " chosen"], Float64[Tensor, " chosen"]]:
    """``count`` neurons, ascending, with their saliency among them: those of least saliency go in a few rounds.

    Ties go to the lowest index. ``rounds``: steps in each of which about the same share of what is left goes.
    """
    left = torch.arange(len(gram))
    for number in range(rounds, 0, -1):
        if len(left) <= count:
            break
        size = count if number == 1 else max(count, round(len(left) * (count / len(left)) ** (1 / number)))
        found = saliency(gram[left][:, left], right[left], damping)
        left = left[found.argsort(descending=True, stable=True)[:size].sort().values]
    return left, saliency(gram[left][:, left], right[left], damping)


def _factor(gram: Float64[Tensor, "neurons neurons"], damping: float) -> Float64[Tensor, "neurons neurons"]:
    return torch.linalg.cholesky(gram + damping * torch.eye(len(gram), dtype=torch.float64))
