"""Whether an adapter's block and the experiment say the same: compared on numbers, not on names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dernkit.api import Block
from dernkit.models.explain.explanation import Explanation, Weight


def contradictions(block: Block, module: Any, found: Explanation) -> list[str]:
    """What an adapter's answer and the experiment's do not agree on, in words; empty when they agree.

    Args:
        module: the MoE block at ``block.path``; it is filled with random weights.
    """
    _fill(module)
    return [*_sizes(block, found), *_experts(block, module, found), *_routing(block, module, found)]


def _fill(module: Any) -> None:
    rng = torch.Generator().manual_seed(0)
    module.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=rng))
            else:
                tensor.zero_()


def _sizes(block: Block, found: Explanation) -> Iterator[str]:
    dims = block.dims
    pairs = {
        "expert count": (dims.experts, found.experts),
        "top-k": (dims.top_k, found.top_k),
        "width": (dims.width, found.width),
    }
    for what, (adapter, experiment) in pairs.items():
        if experiment and adapter != experiment:
            yield f"the {what} must be {experiment}, as the block computes. Got {adapter} instead."


def _experts(block: Block, module: Any, found: Explanation) -> Iterator[str]:
    bank = block.bank()
    for role, mine in unpacked(module, found).items():
        theirs = getattr(bank, role.replace(" ", "_"))
        if theirs is None or theirs.shape != mine.shape or not torch.equal(theirs, mine):
            weight = found.weight(role) or found.weight("gate and up" + role.removeprefix("gate").removeprefix("up"))
            name = weight.name if weight else "nothing"
            yield f"the {role} must be what the block uses as such, in '{name}'. Got other numbers instead."
    if found.order == "no gate" and bank.gate is not None:
        yield "the experts must have no gate, as the block computes. Got one instead."


def _routing(block: Block, module: Any, found: Explanation) -> Iterator[str]:
    state = dict(module.named_parameters()) | dict(module.named_buffers())
    if found.router is not None:
        rows = state[found.router].data
        theirs = block.bank().router
        if not any(theirs.shape == some.shape and torch.equal(theirs, some) for some in (rows, rows[: found.experts])):
            yield f"the router's matrix must be '{found.router}', as the block computes. Got another one instead."
    touched = {name.removeprefix(f"{block.path}.") for name in block.tensors()}
    for name in (*found.choice_biases, *found.logit_biases, *found.scales, *found.tables):
        if name not in touched:
            yield f"'{name}' must be cut with the experts, whose routing it decides. Got an adapter without it instead."


def unpacked(module: Any, found: Explanation) -> dict[str, Tensor]:
    """gate, up [E, W, H], down [E, H, W] and their biases, as far as they were found."""
    tensors: dict[str, Tensor] = {}
    for weight in found.weights:
        whole = canonical(module, weight, found.experts)
        kind = " bias" if weight.role.endswith(" bias") else ""
        if weight.role != "gate and up" + kind:
            tensors[weight.role] = whole
        elif found.order != "unknown":
            halves = whole.chunk(2, dim=1) if "concatenated" in found.order else (whole[:, ::2], whole[:, 1::2])
            names = ("up", "gate") if found.order.startswith("up first") else ("gate", "up")
            tensors |= {name + kind: half for name, half in zip(names, halves, strict=True)}
    return tensors


def canonical(module: Any, weight: Weight, experts: int) -> Tensor:
    """A weight of a live module as [experts, outputs, inputs], a bias as [experts, outputs]."""
    state = dict(module.named_parameters()) | dict(module.named_buffers())
    parts = [state[name].data for name in weight.names]
    whole = torch.stack(parts) if weight.stacked else parts[0]
    if weight.each > 1:
        whole = whole.unflatten(weight.dim, (-1, weight.each))
    whole = whole.movedim(weight.dim, 0)[:experts]
    if weight.role.endswith("bias"):
        return whole.reshape(experts, -1)
    whole = whole[:, None] if whole.ndim == 2 else whole
    return whole.transpose(1, 2) if weight.transposed else whole
