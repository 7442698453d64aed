"""The original model with some experts out of the router's reach: what pruning must be equal to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.nn import functional

from dernkit.types import LayerPlan


@contextmanager
def masked_experts(model: Any, plans: Sequence[LayerPlan]) -> Iterator[None]:
    """Router logits (and correction biases) of dropped experts are −∞ inside the block."""
    restore = []
    for plan in plans:
        router = model.model.layers[plan.layer].mlp.gate
        restore.append((router, router.forward))
        router.forward = _masked(router.forward, plan.dropped)
        if "e_score_correction_bias" in router._buffers:
            router.e_score_correction_bias[plan.dropped] = -torch.inf
    yield
    for router, forward in restore:
        router.forward = forward


def _masked(forward: Any, dropped: list[int]) -> Any:
    linear = functional.linear

    def masked_linear(*args: Any) -> torch.Tensor:
        logits = linear(*args)
        logits[..., dropped] = -torch.inf
        return logits

    def wrapped(hidden: torch.Tensor) -> Any:
        with patch.object(functional, "linear", masked_linear):
            return forward(hidden)

    return wrapped
