"""What neurons contribute to a layer's output on sampled inputs: features, least squares, and which ones to keep.

The output of an expert is linear in its down projection: ``g(x) Σ_i d_i φ_i(x)``, φ the gated activations. So which
neurons an expert should have, and their down columns, follow from the Gram matrix of ``h_i(x) = g(x) φ_i(x)`` over the
tokens that reach it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from dernkit.kernel.least_squares import System
from dernkit.kernel.outputs import segment_activations
from dernkit.types import ExpertBank, Routing


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


def saliency(system: System, damping: float) -> Float[Tensor, " neurons"]:
    """``‖w_i‖² / [(A + λI)⁻¹]_ii``, w = (A + λI)⁻¹B: what the damped error rises by when neuron i goes and all others
    are solved again (optimal brain surgeon, Hassibi & Stork 1993)."""
    solved = system.solved(damping)
    return solved.weights.square().sum(1) / solved.diagonal


def select(
    system: System, damping: float, count: int, rounds: int
) -> tuple[Int64[Tensor, " chosen"], Float[Tensor, " chosen"]]:
    """``count`` neurons, ascending, with their saliency among them: the others go one by one, the least salient first.

    In each round about the same share of what is left goes, out of twice as many that are least salient at its
    beginning; within it saliencies follow exactly, so that of two equal neurons one stays. Ties go to the lowest index.
    """
    left = torch.arange(len(system), device=system.device)
    for number in range(rounds, 0, -1):
        if len(left) <= count:
            break
        size = count if number == 1 else max(count, round(len(left) * (count / len(left)) ** (1 / number)))
        stays = _without(system, damping, len(left) - size)
        left, system = left[stays], system.of(stays)
    return left, saliency(system, damping)


def _without(system: System, damping: float, gone: int) -> Int64[Tensor, " left"]:
    """Neurons that are left, ascending, when so many of the least salient go one by one."""
    solved = system.solved(damping)
    order = (solved.weights.square().sum(1) / solved.diagonal).argsort(stable=True)
    some = order[: 2 * gone].sort().values
    inverse, weights = solved.block(some), solved.weights[some]
    del solved
    stays = torch.ones(len(system), dtype=torch.bool, device=weights.device)
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
