"""What a layer's output loses when only some of its experts are left and the model's router chooses among these."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from dernkit.errors import CheckpointError
from dernkit.kernel.outputs import layer_output
from dernkit.types import ExpertBank, LayerStats, Routing

_CHUNK = 2**26
"""Float32 numbers of expert outputs that are held at once (256 MiB, and twice that in float64)."""


def reroute(
    bank: ExpertBank, router_inputs: Float[Tensor, "sampled router_hidden"], experts: Sequence[int] | None = None
) -> Routing:
    """The model's own routing of sampled tokens, among ``experts`` only (None: all).

    Raises:
        CheckpointError: there is no router to ask.
    """
    if bank.route is None:
        raise CheckpointError(
            f"layer {bank.dims.layer}: the model's router must be at hand for tokens to be routed again. "
            "Got none instead. Use components that do not route again, such as scorer 'reap'."
        )
    return bank.route(router_inputs, None if experts is None else torch.tensor(experts))


def subset_loss(bank: ExpertBank, stats: LayerStats, tokens: int) -> Callable[[Sequence[int]], float]:
    """``L(S) = Σ_t ‖Y(x_t) − Y_S(x_t)‖² / Σ_t ‖Y(x_t)‖²`` as a function of the experts S that are left.

    Y is the routed experts' sum (`layer_output`), Y_S the same after routing among S: NAEE's reconstruction loss
    (arXiv 2402.14800, the Frobenius norm there), as a share of the output's energy so that layers compare. Exactly 0
    where no token is routed another way.

    Holds ``8 tokens E²`` bytes, the inner products of all experts' outputs for each token, so that a subset costs one
    routing and no expert. Where coefficients come before the experts, experts run again for tokens that changed.

    Args:
        stats: of the layer, with a `sample`.
        tokens: the first so many of the sample, a uniform sample themselves.

    Raises:
        CheckpointError: there is no router to ask, or outputs are not finite.
    """
    inputs, seen = stats["sample"][:tokens], stats.router_inputs[:tokens]
    whole = reroute(bank, seen)
    error = (_error_of_runs if bank.coefficient_on_input else _error_of_products)(bank, inputs, whole)
    energy = _finite(error(None), bank)

    def loss(experts: Sequence[int]) -> float:
        found = _finite(error(reroute(bank, seen, experts)), bank)
        return found / energy if energy > 0 else found

    return loss


def without_each(loss: Callable[[Sequence[int]], float], left: Sequence[int], candidates: Sequence[int]) -> list[float]:
    """The loss of the experts that are ``left`` less one, for each of the candidates to be that one."""
    return [loss([other for other in left if other != expert]) for expert in candidates]


_Error = Callable[[Routing | None], float]
"""Summed squared error of another routing's output (None: of an output of zeros)."""


def _error_of_products(bank: ExpertBank, inputs: Float[Tensor, "sampled hidden"], whole: Routing) -> _Error:
    """``‖Σ_e a_e E_e(x)‖² = Σ_ef a_e a_f ⟨E_e(x), E_f(x)⟩``, where a are the changes of the coefficients."""
    products, experts = _products(bank, inputs), bank.dims.experts

    def error(other: Routing | None) -> float:
        chosen, change = whole.chosen, whole.coefficients.to(torch.float64)
        if other is not None:
            chosen = torch.cat([chosen, other.chosen], dim=1)
            change = torch.cat([change, -other.coefficients.to(torch.float64)], dim=1)
        change = change.masked_fill(chosen >= experts, 0)  # identity experts
        chosen = chosen.clamp(max=experts - 1)
        total = change.new_zeros(len(change), experts).scatter_add_(1, chosen, change)
        rows = total.any(dim=1).nonzero().flatten()
        chosen, change = chosen[rows], change[rows]
        pairs = products[rows[:, None, None], chosen[:, :, None], chosen[:, None, :]]
        return max(float(torch.einsum("ti,tij,tj->", change, pairs, change)), 0.0)

    return error


def _products(bank: ExpertBank, inputs: Float[Tensor, "sampled hidden"]) -> Float64[Tensor, "sampled experts experts"]:
    """Inner products of what all experts make of each token."""
    experts = bank.dims.experts
    size = max(1, _CHUNK // (experts * inputs.shape[1]))
    found = []
    for rows in inputs.split(size):
        outputs = torch.stack([bank.output(expert, rows) for expert in range(experts)], dim=1).to(torch.float64)
        found.append(outputs @ outputs.mT)
    return torch.cat(found)


def _error_of_runs(bank: ExpertBank, inputs: Float[Tensor, "sampled hidden"], whole: Routing) -> _Error:
    """For ``E_e(c x)``, where outputs for one coefficient say nothing about those for another."""
    expected = layer_output(bank, inputs, whole)

    def error(other: Routing | None) -> float:
        if other is None:
            return float(expected.square().sum(dtype=torch.float64))
        differs = (whole.chosen != other.chosen) | (whole.coefficients != other.coefficients)
        rows = differs.any(dim=1).nonzero().flatten()
        found = layer_output(bank, inputs[rows], _rows(other, rows))
        return float((found - expected[rows]).square().sum(dtype=torch.float64))

    return error


def _rows(routing: Routing, rows: Int64[Tensor, " n"]) -> Routing:
    return Routing(routing.chosen[rows], routing.coefficients[rows], routing.logits[rows])


def _finite(value: float, bank: ExpertBank) -> float:
    if not math.isfinite(value):
        raise CheckpointError(
            f"layer {bank.dims.layer}: what the experts make of the sampled inputs must be finite. "
            "Got NaN or infinity instead. Check the download of the checkpoint, or repair it."
        )
    return value
