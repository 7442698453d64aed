"""Activations of neurons as vectors over the sampled inputs, ready to be compared: their cosines are correlations."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from dernkit.kernel.matching import BUDGET, rows_in_cache
from dernkit.kernel.outputs import segment_activations
from dernkit.types import Activation

NOISE = 1e-6
"""What remains of a row beside its mean below this share of it is rounding, and correlates with nothing."""


def activation_rows(
    segments: Float32[Tensor, "neurons parts features"], act: Activation, inputs: Float[Tensor, "sampled hidden"]
) -> Float32[Tensor, "neurons sampled"]:
    """One row for each neuron, its activations; no temporary of all neurons beside the result."""
    step = max(1, BUDGET // (4 * max(len(inputs), 1)))
    inputs = inputs.to(segments.device)
    return torch.cat([segment_activations(part, act, inputs).T for part in segments.split(step)])


def centred(rows: Float32[Tensor, "rows sampled"]) -> Float32[Tensor, "rows sampled"]:
    """Each row less its mean, so that cosines are Pearson correlations; exactly 0 where a row is constant."""
    return torch.cat([_centred(part.to(torch.float64)) for part in rows.split(rows_in_cache(rows))])


def _centred(rows: Tensor) -> Tensor:
    left = rows - rows.mean(1, keepdim=True)
    constant = torch.linalg.vector_norm(left, dim=1) <= NOISE * torch.linalg.vector_norm(rows, dim=1)
    return torch.where(constant[:, None], 0.0, left).to(torch.float32)
