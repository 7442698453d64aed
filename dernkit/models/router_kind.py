"""What a router does with its logits, in words, from one run of it on random weights: no table of families."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional

_SCALES = {
    "softmax": lambda logits: logits.softmax(dim=-1),
    "sigmoid": torch.sigmoid,
    "square root of softplus": lambda logits: functional.softplus(logits).sqrt(),
}


def router_kind(candidates: Iterable[Tensor], coefficients: Tensor, chosen: Tensor) -> str:
    """The scoring function, whether the top-k are renormalised, the scaling.

    Args:
        candidates: tensors [n, E or more] that may be the logits.
        coefficients: [n, top_k].
        chosen: [n, top_k].
    """
    real = coefficients.sum(dim=1) != 0  # the others went to an expert that computes nothing
    for logits in candidates:
        for name, scale in _SCALES.items():
            picked = scale(logits[real].double()).gather(1, chosen[real])
            if (words := _described(coefficients[real].double(), picked)) is not None:
                return f"{name}, {words}"
    return "neither a softmax nor a sigmoid of the logits"


def _described(coefficients: Tensor, picked: Tensor) -> str | None:
    for renormalised in (False, True):
        if renormalised and picked.shape[1] == 1:
            continue
        ratio = coefficients / (picked / picked.sum(dim=1, keepdim=True) if renormalised else picked)
        factor = float(ratio[0, 0])
        if bool((ratio - factor).abs().max() < 1e-3 * factor):
            scaled = "" if abs(factor - 1) < 1e-3 else f", scaled by {factor:.4g}"
            return f"top-k {'renormalised' if renormalised else 'not renormalised'}{scaled}"
    return None
