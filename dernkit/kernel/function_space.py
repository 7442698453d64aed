"""What neurons contribute to a layer's output on sampled inputs: features, least squares, and which ones to keep.

The output of an expert is linear in its down projection: ``g(x) Σ_i d_i φ_i(x)``, φ the gated activations. So which
neurons an expert should have, and their down columns, follow from the Gram matrix of ``h_i(x) = g(x) φ_i(x)`` over the
tokens that reach it. Accumulated and solved in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from dernkit.kernel.outputs import segment_activations
from dernkit.types import ExpertBank, Routing

_ROWS = 4096
"""Tokens that are converted to float64 at a time."""


def turns(routing: Routing, experts: Sequence[int]) -> list[tuple[int, Tensor, Tensor]]:
    """Experts with the tokens that they get [t] and their coefficients [t], float32; those with most weight first.

    The order is the experts' own, not that of their numbers; an expert that gets no token has no turn.
    """
    found = []
    for expert in experts:
        rows, columns = torch.where(routing.chosen == expert)
        coefficients = routing.coefficients[rows, columns].to(torch.float32)
        used = coefficients != 0
        if bool(used.any()):
            found.append((expert, rows[used], coefficients[used]))
    return sorted(found, key=lambda turn: -float(turn[2].abs().sum(dtype=torch.float64)))


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
    """``count`` neurons, ascending, with their saliency among them: the others go one by one, the least salient first.

    In each round about the same share of what is left goes, out of twice as many that are least salient at its
    beginning; within it saliencies follow exactly, so that of two equal neurons one stays. Ties go to the lowest index.
    """
    left = torch.arange(len(gram))
    for number in range(rounds, 0, -1):
        if len(left) <= count:
            break
        size = count if number == 1 else max(count, round(len(left) * (count / len(left)) ** (1 / number)))
        left = left[_without(gram[left][:, left], right[left], damping, len(left) - size)]
    return left, saliency(gram[left][:, left], right[left], damping)


def _without(
    gram: Float64[Tensor, "neurons neurons"], right: Float64[Tensor, "neurons hidden"], damping: float, gone: int
) -> Int64[Tensor, " left"]:
    """Neurons that are left, ascending, when so many of the least salient go one by one."""
    inverse = torch.cholesky_inverse(_factor(gram, damping))
    weights = inverse @ right
    order = (weights.square().sum(1) / inverse.diagonal()).argsort(stable=True)
    some = order[: 2 * gone].sort().values
    inverse, weights = inverse[some][:, some], weights[some]
    stays = torch.ones(len(gram), dtype=torch.bool)
    for _ in range(gone):
        diagonal = inverse.diagonal()
        found = torch.where(stays[some], weights.square().sum(1) / diagonal, torch.inf)
        least = int(found.argmin())
        stays[some[least]] = False
        # The inverse and the solution of what is left, by a block of the one with it.
        column, share = inverse[:, least].clone(), inverse[:, least] / diagonal[least]
        weights.addr_(share, weights[least].clone(), alpha=-1)
        inverse.addr_(share, column, alpha=-1)
        inverse[least, least] = 1.0  # gone: never looked at again
    return stays.nonzero().flatten()


def _factor(gram: Float64[Tensor, "neurons neurons"], damping: float) -> Float64[Tensor, "neurons neurons"]:
    return torch.linalg.cholesky(gram + damping * torch.eye(len(gram), dtype=torch.float64))
