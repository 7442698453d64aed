"""Refits: down projections in closed form, so that the layer gives what it gave before surgery."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, final

import torch
from annotated_types import Interval
from jaxtyping import Float32, Int64
from torch import Tensor

from dernkit.api import CheckpointError, ExpertBank, LayerPlan, LayerStats, RecipeError, hookimpl
from dernkit.kernel.function_space import features, turns
from dernkit.kernel.least_squares import System, by_part, chosen_ridge, damping, parts, total
from dernkit.kernel.outputs import layer_output

_KEPT = 2**25
"""Numbers of one expert's features that are kept between passes (128 MiB)."""
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
        where = f"refit '{self.name}', layer {plan.layer}"
        inputs, seen, whole = sampled_outputs(bank, stats, self.tokens, self.parts, where)
        assert after.route is not None
        part = parts(stats, self.parts)[: self.tokens]
        routing = after.route(seen)
        residual = whole - layer_output(after, inputs, routing)
        change = torch.zeros(after.down.transpose(1, 2).shape, dtype=torch.float64, device=after.down.device)
        tasks = [_Turn(after, expert, inputs, rows, c) for expert, rows, c in turns(routing, range(len(change)))]
        fits: dict[int, tuple[float, System] | None] = {}
        for _ in range(self.passes):
            for task in tasks:
                hidden, rows = task.features(), task.rows
                # What D⁰ gives is not wanted again: the penalty is on the change.
                wanted = residual[rows] + hidden @ change[task.expert].to(torch.float32)
                if task.expert not in fits:  # later passes go on with λ, so that every turn lowers the same objective
                    fits[task.expert] = self._fit(by_part(hidden, wanted, part[rows], self.parts))
                if (fit := fits[task.expert]) is None:
                    continue
                change[task.expert] = fit[1].towards(hidden, wanted).solve(fit[0])
                residual[rows] = wanted - hidden @ change[task.expert].to(torch.float32)
        return (after.down.to(torch.float64) + change.transpose(1, 2)).to(torch.float32)

    def _fit(self, found: Sequence[System]) -> tuple[float, System] | None:
        """λ and the system of all parts; None: the expert stays as it is."""
        ridge = self.ridge or chosen_ridge(found, RIDGES)
        whole = total(found)
        return None if ridge is None else (damping(whole, ridge), whole)


@dataclass(slots=True)
class _Turn:
    """One kept expert and its tokens."""

    after: ExpertBank
    expert: int
    inputs: Float32[Tensor, "sampled hidden"]
    rows: Int64[Tensor, " tokens"]
    coefficients: Float32[Tensor, " tokens"]
    _kept: Float32[Tensor, "tokens width"] | None = None

    def features(self) -> Float32[Tensor, "tokens width"]:
        """They are the same in every pass, and kept where they are small."""
        if self._kept is not None:
            return self._kept
        segments = self.after.segments(self.expert)
        found = features(self.after, segments, self.inputs[self.rows], self.coefficients)
        if found.numel() <= _KEPT:
            self._kept = found
        return found


def sampled_outputs(
    bank: ExpertBank, stats: LayerStats, tokens: int | None, least: int, where: str
) -> tuple[Float32[Tensor, "sampled hidden"], Tensor, Float32[Tensor, "sampled hidden"]]:
    """The experts' inputs of at most so many sampled tokens, the router's, and what the layer makes of them.

    Raises:
        CheckpointError: the output is not linear in the down projections, tokens cannot be routed again, or outputs are
            not finite.
        RecipeError: there are fewer than ``least`` tokens.
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
    inputs, seen = stats["sample"][:tokens].to(torch.float32), stats.router_inputs[:tokens]
    if len(inputs) < least:
        raise RecipeError(
            f"{where}: must have {least} sampled inputs at least. Got {len(inputs)} instead. Raise calibrate.sample, "
            "calibrate.sequences or calibrate.length."
        )
    whole = layer_output(bank, inputs, bank.route(seen))
    if not bool(whole.isfinite().all()):
        raise CheckpointError(
            f"{where}: what the experts make of the sampled inputs must be finite. Got NaN or infinity instead. Check "
            "the download of the checkpoint, or repair it."
        )
    return inputs, seen, whole


@hookimpl
def dernkit_refits() -> list[type]:
    """The refits that come with dernkit."""
    return [LeastSquares]
