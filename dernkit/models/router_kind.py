"""What a router does with its logits, found by running it on random weights: no table of families."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

_SCALES = {"softmax": lambda logits: logits.softmax(dim=-1), "sigmoid": torch.sigmoid}


def router_kind(router: Any, hidden: int) -> str:
    """In words: the scoring function, whether the top-k are renormalised, the scaling, the correction bias.

    Args:
        router: the router module (on the meta device or real; a random copy is run).
        hidden: H.
    """
    rng = torch.Generator().manual_seed(0)
    module = copy.deepcopy(router).to_empty(device="cpu").to(torch.float32).eval()
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=rng))
        try:
            logits, weights, chosen = module(torch.randn(64, hidden, generator=rng))
        except (TypeError, ValueError, RuntimeError):
            return "not the usual (logits, weights, indices) of hidden states alone"
    return _describe(logits.double(), weights.double(), chosen) + _bias(module, logits.shape[1])


def _bias(module: Any, experts: int) -> str:
    """A correction bias takes part in the choice alone; a plain one is in the logits."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    names = [name for name, tensor in tensors if tensor.numel() == experts]
    if any("correction" in name for name in names):
        return " + correction bias"
    return " + bias" if any(name.endswith("bias") for name in names) else ""


def _describe(logits: Tensor, weights: Tensor, chosen: Tensor) -> str:
    for name, scale in _SCALES.items():
        picked = scale(logits).gather(1, chosen)
        for renormalised in (False, True):
            expected = picked / picked.sum(dim=1, keepdim=True) if renormalised else picked
            ratio = weights / expected
            if bool((ratio - ratio[0, 0]).abs().max() < 1e-3 * ratio[0, 0]):
                factor = float(ratio[0, 0])
                scaled = "" if abs(factor - 1) < 1e-3 else f", scaled by {factor:.4g}"
                return f"{name}, top-k {'renormalised' if renormalised else 'not renormalised'}{scaled}"
    return "a function of the logits that is neither softmax nor sigmoid"
