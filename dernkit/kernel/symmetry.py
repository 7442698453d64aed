"""Changes of a neuron that its expert's output does not notice: ``(u, d) → (c u, d / c)`` for up row u, down column d.

They hold where the activation is proportional to the up part, ``act(g, c u) = c act(g, u)``: for c < 0 in gated experts
without a clamp or an offset, for c > 0 also in plain ones with ReLU. Whether they do is found by trying.
"""

from __future__ import annotations

import torch
from jaxtyping import Float32
from torch import Tensor

from dernkit.kernel.matching import dots, lengths
from dernkit.kernel.seeding import generator
from dernkit.types import ExpertBank

MAGNITUDES = (0.1, 1.0, 10.0, 100.0, 1000.0)
"""Of what the activation is tried with: clamps are at 7 and above."""


def proportional(bank: ExpertBank, factor: float) -> bool:
    """Whether the layer's activation takes ``factor`` from its up part to its result."""
    shape = (len(MAGNITUDES), bank.dims.width)
    gate, up = torch.randn(2, *shape, generator=generator(bank.dims.layer)).to(bank.up.device)
    up = up * torch.tensor(MAGNITUDES, device=up.device)[:, None]
    given = None if bank.gate is None else gate
    return torch.allclose(bank.act(given, factor * up), factor * bank.act(given, up), rtol=1e-4, atol=1e-6)


def balanced(segments: Float32[Tensor, "width parts features"]) -> Float32[Tensor, "width parts features"]:
    """The same neurons with ``‖u‖ = ‖d‖``; those with either of them zero stay as they are."""
    up, down = lengths(segments[:, -2]), lengths(segments[:, -1])
    return rescaled(segments, _ratio(down, up).sqrt().to(torch.float32))


def facing(
    segments: Float32[Tensor, "width parts features"],
    partners: Float32[Tensor, "width other_parts other_features"],
    *,
    sign: bool,
    balance: bool,
) -> Float32[Tensor, " width"]:
    """The factor c that makes each neuron most like its partner; exactly 1 where nothing is to be changed.

    Args:
        sign: c takes the sign for which up and down point the way the partner's do.
        balance: c takes the size for which ``‖u‖ / ‖d‖`` is that of the partner.
    """
    factor = torch.ones(len(segments), dtype=torch.float64, device=segments.device)
    if balance:
        (up, down), (other_up, other_down) = (
            (lengths(one[:, -2]), lengths(one[:, -1])) for one in (segments, partners)
        )
        factor = _ratio(down * other_up, up * other_down).sqrt()
    if sign:
        up, down = (dots(segments[:, part], partners[:, part]) for part in (-2, -1))
        factor = torch.where(factor * up + down / factor < 0, -factor, factor)
    return factor.to(torch.float32)


def rescaled(
    segments: Float32[Tensor, "neurons parts features"], factor: Float32[Tensor, " neurons"]
) -> Float32[Tensor, "neurons parts features"]:
    """``(g, u, d) → (g, c u, d / c)``: a copy; the same bits where the factor is 1."""
    new = segments.clone()
    new[:, -2] *= factor[:, None]
    new[:, -1] /= factor[:, None]
    return new


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """1 where either is 0: such a neuron adds nothing, whatever it is scaled with."""
    return torch.where((above > 0) & (below > 0), above / below, 1.0)
