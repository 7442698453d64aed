"""Segments back into the tensors of an expert: the inverse of ``ExpertBank.segments``."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Float32
from torch import Tensor

from dernkit.errors import CheckpointError
from dernkit.types import ExpertBank


@dataclass(frozen=True, slots=True)
class ExpertTensors:
    """The part of one expert that its segments hold; no down bias, which belongs to the expert as a whole."""

    gate: Float[Tensor, "width hidden"] | None
    up: Float[Tensor, "width hidden"]
    down: Float[Tensor, "hidden width"]
    gate_bias: Float[Tensor, " width"] | None
    up_bias: Float[Tensor, " width"] | None


def split(segments: Float[Tensor, "width parts features"], like: ExpertBank) -> ExpertTensors:
    """Views of ``segments`` as the tensors that an expert of ``like`` has; the down part's last feature is
    ignored where experts carry biases."""
    hidden = like.dims.hidden
    up, down = segments[:, -2], segments[:, -1]
    gate = None if like.gate is None else segments[:, 0]
    return ExpertTensors(
        gate=None if gate is None else gate[:, :hidden],
        up=up[:, :hidden],
        down=down[:, :hidden].T,
        gate_bias=None if gate is None or like.gate_bias is None else gate[:, hidden],
        up_bias=None if like.up_bias is None else up[:, hidden],
    )


def finite_segments(bank: ExpertBank, expert: int) -> Float32[Tensor, "width parts features"]:
    """``bank.segments(expert)``, refused where the checkpoint itself is broken: NaN would pass for cosine 0."""
    segments = bank.segments(expert)
    if not bool(segments.isfinite().all()):
        raise CheckpointError(
            f"layer {bank.dims.layer}, expert {expert}: weights must be finite to be compared and merged. "
            "Got NaN or infinity instead. Check the download of the checkpoint, or repair it."
        )
    return segments
