"""Refits: down projections in closed form, so that the layer gives what it gave before surgery."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, final

import torch
from annotated_types import Interval
from jaxtyping import Float32
from torch import Tensor

from dernkit.api import CheckpointError, ExpertBank, LayerPlan, LayerStats, hookimpl
from dernkit.kernel.function_space import features, turns
from dernkit.kernel.least_squares import by_part, chosen_ridge, damping, parts, total
from dernkit.kernel.outputs import layer_output

RIDGES = (0.001, 0.01, 0.1, 1.0)
"""What λ is chosen from, relative to the mean of the Gram matrix' diagonal."""


@final
@dataclass(frozen=True)
class LeastSquares:
    """``min Σ_x ‖Y(x) − Σ_r g_r(x) D_r φ_r(x)‖² + Σ_r λ_r ‖D_r − D_r⁰‖²`` over the down projections D_r, one by one.

    Y is what the routed experts gave before, D⁰ the projections that surgery left. The error on the sampled inputs
    never rises. Gate rows, up rows, biases and the router stay. Each expert's λ is the one that does best on parts of
    the text that are left out in turn; an expert that no λ makes better on them stays as it is.
    """

    name: ClassVar[str] = "least-squares"
    requires: ClassVar[frozenset[str]] = frozenset({"sample"})

    ridge: Annotated[float, Interval(ge=1e-8, le=1e6)] | None = None
    """λ_r relative to the mean of the diagonal of expert r's Gram matrix: larger keeps the projections nearer; null:
    chosen from 0.001, 0.01, 0.1 and 1."""
    parts: Annotated[int, Interval(ge=2, le=100)] = 4
    """Parts of the calibration text that are left out in turn to choose λ."""
    passes: Annotated[int, Interval(ge=1, le=100)] = 3
    """How often each expert has its turn."""
    tokens: Annotated[int, Interval(ge=1, le=16_777_216)] | None = None
    """At most so many of the sampled inputs; null: all."""

    def refit(
        self, bank: ExpertBank, after: ExpertBank, plan: LayerPlan, stats: LayerStats
    ) -> Float32[Tensor, "kept hidden width"]:
        refuse_unfittable(bank, f"refit '{self.name}', layer {plan.layer}")
        assert bank.route is not None and after.route is not None
        inputs, seen = stats["sample"][: self.tokens].to(torch.float32), stats.router_inputs[: self.tokens]
        part = parts(stats, self.parts)[: self.tokens]
        routing = after.route(seen)
        residual = layer_output(bank, inputs, bank.route(seen)) - layer_output(after, inputs, routing)
        change = torch.zeros(after.down.transpose(1, 2).shape, dtype=torch.float64)
        ridges: dict[int, float | None] = {}
        for _ in range(self.passes):
            for expert, rows, coefficients in turns(routing, range(len(change))):
                hidden = features(after, after.segments(expert), inputs[rows], coefficients)
                # What D⁰ gives is not wanted again: the penalty is on the change.
                wanted = residual[rows] + hidden @ change[expert].to(torch.float32)
                found = by_part(hidden, wanted, part[rows], self.parts)
                if expert not in ridges:  # later passes go on with it, so that every turn lowers the same objective
                    ridges[expert] = self.ridge or chosen_ridge(found, RIDGES)
                ridge = ridges[expert]
                if ridge is None:
                    continue
                whole = total(found)
                change[expert] = whole.solve(damping(whole, ridge))
                residual[rows] = wanted - hidden @ change[expert].to(torch.float32)
        return (after.down.to(torch.float64) + change.transpose(1, 2)).to(torch.float32)


def refuse_unfittable(bank: ExpertBank, where: str) -> None:
    """Layers whose output is not linear in the down projections, or whose tokens cannot be routed again.

    Raises:
        CheckpointError: the layer is one of them.
    """
    if bank.finish is not None:
        raise CheckpointError(
            f"{where}: experts must end with their down projection. Got a norm behind it instead. Leave out this "
            "component for this family."
        )
    if bank.route is None or bank.tables:
        raise CheckpointError(
            f"{where}: sampled tokens must be routable again. Got a router that the adapter cannot repeat instead. "
            "Leave out this component for this family."
        )


@hookimpl
def dernkit_refits() -> list[type]:
    """The refits that come with dernkit."""
    return [LeastSquares]
