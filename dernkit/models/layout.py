"""What a layout says about the experts of a model: the base class of all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dernkit.types import ExpertWeights

Callback = Callable[[Tensor, Tensor, Tensor], None]
"""``callback(inputs [n, H], chosen [n, k], coefficients [n, k])``."""


class Layout:
    """One experts module ⇄ canonical weights; every method gets the module. Works on meta tensors too.

    This base class holds what most experts modules have in common: they are called with ``(hidden states, chosen
    [n, k], coefficients [n, k])`` and return the sum of coefficient times expert output.

    Where each expert is a module of its own, ``expert_modules`` says where they are; after surgery the last ones are
    deleted. Where the MoE block itself calls them one by one, ``router`` and `route` say which and how much, since no
    call shows it. The layout may then claim the block itself.
    """

    coefficient_on_input = False
    """Whether the module computes ``E_e(c x)`` instead of ``c E_e(x)``."""
    expert_modules: str | None = None
    """Path below the module of the list or dict that holds one module for each expert and nothing else ("" where the
    module is that list); None where the experts lie stacked in tensors."""
    router: str | None = None
    """Path below the MoE block of the module from whose output `route` reads the routing; None where the experts module
    is called with it."""

    def claims(self, module: nn.Module) -> bool:
        """Whether the module is a collection of experts in this layout."""
        raise NotImplementedError

    def unpack(self, module: Any) -> ExpertWeights:
        """Views of the module's weights."""
        raise NotImplementedError

    def pack(self, module: Any, weights: ExpertWeights) -> dict[str, Tensor]:
        """Parameter names below the module -> tensors that hold ``weights`` (of any count and width)."""
        raise NotImplementedError

    def activation(self, module: Any, gate: Tensor | None, up: Tensor) -> Tensor:
        """Neuron activations [n, W] of pre-activations [n, W]."""
        return module.act_fn(up) if gate is None else module.act_fn(gate) * up

    def finish(self, module: Any) -> Callable[[Tensor], Tensor] | None:
        """What follows the down projection inside every expert, if anything does."""
        return None

    def routing(self, module: Any, args: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs [n, H], chosen [n, k] and coefficients [n, k] of one call of the module."""
        hidden, chosen, coefficients = args
        return hidden.reshape(-1, hidden.shape[-1]), chosen, coefficients

    def route(self, block: Any, output: Any) -> tuple[Tensor, Tensor]:
        """Chosen [n, k] and coefficients [n, k], as the block makes them of what its ``router`` module returned."""
        raise NotImplementedError(f"{type(self).__name__} has a router and no route()")

    def top_k(self, block: Any) -> int | None:
        """How many experts a token uses; None where `top_k` of the router or the block, or the config, says it."""
        return None

    def listen(self, block: nn.Module, module: nn.Module, callback: Callback) -> RemovableHandle:
        """Report the routing of every forward call."""
        if self.router is None:
            return module.register_forward_pre_hook(lambda _, args: callback(*self.routing(module, args)))

        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
            chosen, coefficients = (part.reshape(-1, part.shape[-1]) for part in self.route(block, output))
            callback(args[0].reshape(-1, args[0].shape[-1]), chosen, coefficients)

        return block.get_submodule(self.router).register_forward_hook(hook)

    def run(self, module: Any, hidden: Tensor, chosen: Tensor, coefficients: Tensor) -> Tensor:
        """The module's own routed output [n, H] for a routing."""
        if self.router is None:
            return module(hidden, chosen, coefficients)
        total = torch.zeros_like(hidden)
        for expert, own in enumerate(self.members(module).values()):
            token, place = torch.where(chosen == expert)
            total.index_add_(0, token, coefficients[token, place, None] * own(hidden[token]))
        return total

    def members(self, module: nn.Module) -> dict[str, Any]:
        """The experts that are modules of their own, by their names in ``expert_modules``; empty without it."""
        if self.expert_modules is None:
            return {}
        return {name: own for name, own in module.get_submodule(self.expert_modules).named_children()}

    def shrink(self, module: nn.Module, kept: int) -> None:
        """Delete the experts that are modules of their own behind the first ``kept``, which hold the results."""
        for name in list(self.members(module))[kept:]:
            del module.get_submodule(str(self.expert_modules))._modules[name]


def halves(fused: Tensor, *, concatenated: bool = True) -> tuple[Tensor, Tensor]:
    """Rows [E, 2W, ...] as gate and up [E, W, ...]."""
    if concatenated:
        return fused.chunk(2, dim=1)  # type: ignore[return-value]
    return fused[:, ::2], fused[:, 1::2]


def joined(gate: Tensor, up: Tensor, *, concatenated: bool = True) -> Tensor:
    """The inverse of `halves`."""
    return torch.cat([gate, up], dim=1) if concatenated else torch.stack([gate, up], dim=2).flatten(1, 2)
