"""The layout of a plain PyTorch MoE: a list or dict of experts, each of them an MLP of `nn.Linear`s."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dernkit.errors import CheckpointError
from dernkit.models.layout import Layout
from dernkit.types import ExpertWeights

_FIELDS = ("gate", "up", "down")


class ModuleExperts(Layout):
    """Experts that compute ``down(act_fn(gate(x)) * up(x))``, or ``down(act_fn(up(x)))``, with `nn.Linear`s.

    A subclass says what its model calls things. Where the MoE block calls the experts in a loop, ``class_name`` is the
    block's, and ``router`` and `route` say how it routes::

        class MyLayout(ModuleExperts):
            class_name = "MyMoE"
            gate, up, down = "w1", "w3", "w2"
            router = "gate"

            def route(self, block, logits):
                coefficients, chosen = logits.softmax(dim=-1).topk(block.top_k)
                return chosen, coefficients

    Where a module around the experts is called with the routing, ``class_name`` is that module's, and neither is
    needed. An expert without a module ``act_fn`` needs `activation`. `unpack` stacks the experts: copies, not views.
    """

    class_name: str
    """Of the module that the layout claims."""
    expert_modules = "experts"
    gate: str | None = "gate_proj"
    """Name of the gate in an expert; None without gates."""
    up: str = "up_proj"
    down: str = "down_proj"

    def claims(self, module: nn.Module) -> bool:
        return type(module).__name__ == self.class_name

    def unpack(self, module: Any) -> ExpertWeights:
        tensors: dict[str, Any] = {"gate": None}
        for field, name in self._linears():
            tensors[field] = self._stacked(module, name, "weight")
            tensors[f"{field}_bias"] = self._stacked(module, name, "bias")
        return ExpertWeights(**tensors)

    def pack(self, module: Any, weights: ExpertWeights) -> dict[str, Tensor]:
        prefix = f"{self.expert_modules}." if self.expert_modules else ""
        packed = {}
        for place, expert in enumerate(list(self.members(module))[: len(weights.up)]):
            for field, name in self._linears():
                packed[f"{prefix}{expert}.{name}.weight"] = getattr(weights, field)[place]
                if (bias := getattr(weights, f"{field}_bias")) is not None:
                    packed[f"{prefix}{expert}.{name}.bias"] = bias[place]
        return packed

    def activation(self, module: Any, gate: Tensor | None, up: Tensor) -> Tensor:
        act_fn = getattr(next(iter(self.members(module).values())), "act_fn", None)
        if act_fn is None:
            raise CheckpointError(
                f"{self.class_name}: an expert must have its activation in 'act_fn'. Got none instead. "
                f"Write `activation` in {type(self).__name__}."
            )
        return act_fn(up) if gate is None else act_fn(gate) * up

    def _linears(self) -> list[tuple[str, str]]:
        """Field of the canonical weights, and what the model calls it."""
        return [(field, name) for field in _FIELDS if (name := getattr(self, field)) is not None]

    def _stacked(self, module: nn.Module, linear: str, kind: str) -> Tensor | None:
        """[E, rows, columns] of weights, [E, rows] of biases; None where the experts have no bias."""
        linears = [expert.get_submodule(linear) for expert in self.members(module).values()]
        parts = [getattr(one, kind) for one in linears]
        return None if any(part is None for part in parts) else torch.stack([part.data for part in parts])
