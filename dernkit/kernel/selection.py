"""Which experts stay, and how many may: stable, ties to the lowest index."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dernkit.api import KeepLimits
from dernkit.errors import CheckpointError, RecipeError
from dernkit.types import LayerDims


def select(scores: Float[Tensor, " experts"], count: int, groups: int = 1) -> Int64[Tensor, " kept"]:
    """The ``count`` highest scores as ascending int64 indices, ``count / groups`` from each contiguous group.

    A router with groups (DeepSeek-V2/V3) masks whole groups, so all of them must stay equally large.
    """
    if count % groups or len(scores) % groups:
        raise ValueError(f"count: must be a multiple of the {groups} groups. Got {count} instead.")
    by_group = scores.view(groups, -1)
    best = torch.argsort(by_group, dim=1, descending=True, stable=True)[:, : count // groups]
    starts = torch.arange(groups, device=scores.device)[:, None] * by_group.shape[1]
    return (best + starts).flatten().sort().values


def limits(dims: LayerDims) -> KeepLimits:
    """What the router of one layer allows."""
    return KeepLimits(dims.layer, dims.experts, dims.smallest_keep, dims.groups)


def kept_count(keep: int | float, limits: KeepLimits) -> int:
    """Experts to keep: a float in (0, 1] is a fraction of E (nearest count, half up), an integer is a count.

    So ``1`` is one expert and ``1.0`` is all of them.

    Raises:
        RecipeError: ``keep`` is neither a fraction in (0, 1] nor a positive count.
        CheckpointError: the router of this layer does not work with that count.
    """
    count = _requested(keep, limits.experts)
    if limits.smallest <= count <= limits.experts and count % limits.multiple == 0:
        return count
    steps = f" in steps of {limits.multiple} (the router's groups)" if limits.multiple > 1 else ""
    asked = f"{keep} ({count} of {limits.experts})" if isinstance(keep, float) else f"{count}"
    raise CheckpointError(
        f"keep, layer {limits.layer}: must be from {limits.smallest} (what the router's top-k needs) to "
        f"{limits.experts} of {limits.experts} experts{steps}. Got {asked} instead. "
        f"Use {_nearest(count, limits)}."
    )


def total_count(keep: int | float, limits: Sequence[KeepLimits]) -> int:
    """Experts of all layers together, at most: a fraction of them all (rounded down), or a count times the layers.

    Raises:
        RecipeError: ``keep`` is neither a fraction in (0, 1] nor a positive count.
    """
    experts = sum(limit.experts for limit in limits)
    if isinstance(keep, float) and 0 < keep <= 1:
        return math.floor(Fraction(str(keep)) * experts)
    return _requested(keep, experts) * len(limits)


def fewest(limits: KeepLimits, share: float) -> int:
    """The smallest legal count that is at least ``share`` of the layer's experts.

    Raises:
        CheckpointError: there is no legal count at all.
    """
    least = max(limits.smallest, math.ceil(Fraction(str(share)) * limits.experts))
    count = -(-least // limits.multiple) * limits.multiple
    if count > limits.experts:
        raise CheckpointError(
            f"layer {limits.layer}: must have a count of experts that its router allows. Got {limits.experts} experts "
            f"in steps of {limits.multiple} from {limits.smallest} instead. Take a smaller minimum."
        )
    return count


def _requested(keep: int | float, experts: int) -> int:
    if isinstance(keep, float) and 0 < keep <= 1:
        # Exact on the decimal that was written: 0.145 of 100 is 14.5, which floats would round down.
        return math.floor(Fraction(str(keep)) * experts + Fraction(1, 2))
    if isinstance(keep, int) and not isinstance(keep, bool) and keep > 0:
        return keep
    raise RecipeError(
        f"keep: must be a fraction above 0 and up to 1.0, or a positive count of experts. Got {keep} instead. "
        "Write 0.5 for half of the experts, 4 for four of them."
    )


def _nearest(count: int, limits: KeepLimits) -> str:
    """The legal counts next to an illegal one."""
    legal = range(-(-limits.smallest // limits.multiple) * limits.multiple, limits.experts + 1, limits.multiple)
    below = [value for value in legal if value < count][-1:]
    above = [value for value in legal if value > count][:1]
    return " or ".join(map(str, below + above))
