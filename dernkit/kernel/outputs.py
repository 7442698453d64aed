"""What experts and their neurons do on sampled inputs, in float32."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from dernkit.types import Activation, ExpertBank, Routing


def layer_output(
    bank: ExpertBank, inputs: Float[Tensor, "sampled hidden"], routing: Routing
) -> Float32[Tensor, "sampled hidden"]:
    """``Y(x) = Σ_{e∈topk} g_e(x) E_e(x)``, the routed experts' sum; identity and shared experts are left out.

    Args:
        inputs: ``stats["sample"]``, or some rows of it.
        routing: of the same tokens.
    """
    total = torch.zeros(inputs.shape, dtype=torch.float32, device=inputs.device)
    for expert in routing.chosen.unique().tolist():
        if expert >= bank.dims.experts:
            continue
        rows, columns = torch.where(routing.chosen == expert)
        coefficients = routing.coefficients[rows, columns, None].to(torch.float32)
        seen = inputs[rows].to(torch.float32)
        if bank.coefficient_on_input:
            total.index_add_(0, rows, bank.output(expert, seen * coefficients))
        else:
            total.index_add_(0, rows, coefficients * bank.output(expert, seen))
    return total


def segment_activations(
    segments: Float32[Tensor, "neurons parts features"], act: Activation, inputs: Float[Tensor, "sampled hidden"]
) -> Float32[Tensor, "sampled neurons"]:
    """Each neuron's activation ``act(gate · x) (up · x)``; where segments carry biases (D = H + 1), these are added."""
    x = inputs.to(torch.float32)
    if segments.shape[2] == x.shape[1] + 1:
        x = torch.nn.functional.pad(x, (0, 1), value=1.0)
    gate = x @ segments[:, 0].T if segments.shape[1] == 3 else None
    return act(gate, x @ segments[:, -2].T)
