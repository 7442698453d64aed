"""Stubs in the place of a block's experts, so that a copy of it runs without their weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dernkit.models.layout import Layout


class Sum(nn.Module):
    """In the place of an experts module: returns ``value`` and nothing else."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.value = 0.0
        self.num_experts = getattr(experts, "num_experts", 0)

    def forward(self, hidden: Tensor, *rest: Tensor) -> Tensor:
        return torch.full_like(hidden, self.value)


class One(nn.Module):
    """In the place of one expert: multiplies what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.factors: Tensor | float = 0.0

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * self.factors


@contextmanager
def stubbed(block: Any, experts: str, layout: Layout) -> Iterator[None]:
    """A MoE block with stubs: for each expert where it calls them one by one, else for the experts module.

    Args:
        experts: path of the experts module below the block.
    """
    module = block.get_submodule(experts)
    stubs: dict[str, nn.Module]
    if layout.router is None or layout.expert_modules is None:
        parent, _, leaf = experts.rpartition(".")
        owner, stubs = block.get_submodule(parent), {leaf: Sum(module)}
    else:
        owner = module.get_submodule(layout.expert_modules)
        stubs = {name: One() for name in layout.members(module)}
    own = {name: owner._modules[name] for name in stubs}
    owner._modules.update(stubs)
    try:
        yield
    finally:
        owner._modules.update(own)
