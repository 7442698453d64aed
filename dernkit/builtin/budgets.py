"""How many experts each layer keeps: the same number, or more where the experts of a layer matter more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from math import gcd
from typing import Annotated, ClassVar, Literal, final

import torch
from annotated_types import Interval
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from dernkit.api import CheckpointError, ExpertBank, KeepLimits, LayerStats, RecipeError, hookimpl
from dernkit.kernel.outputs import layer_output
from dernkit.kernel.selection import fewest, kept_count, select, total_count


@final
@dataclass(frozen=True)
class Uniform:
    """The same share (or number) of experts in every layer, as in DERN and most of its relatives."""

    name: ClassVar[str] = "uniform"
    requires: ClassVar[frozenset[str]] = frozenset()
    needs_measures: ClassVar[bool] = False

    def measure(self, bank: ExpertBank, scores: Float[Tensor, " experts"], stats: LayerStats) -> Tensor:
        return torch.empty(0)

    def allocate(self, measures: Sequence[Tensor], keep: int | float, limits: Sequence[KeepLimits]) -> list[int]:
        return [kept_count(keep, limit) for limit in limits]


@final
@dataclass(frozen=True)
class Global:
    """One threshold for all layers: the experts with the highest scores of the whole model stay.

    Every layer keeps its smallest legal number first. A router with groups gains one expert of each group at a time,
    at the mean of their scores. Of equal scores the one that ranks higher in its own layer stays, so that experts that
    are all alike are kept as `uniform` keeps them.
    """

    name: ClassVar[str] = "global"
    needs_measures: ClassVar[bool] = True
    requires: ClassVar[frozenset[str]] = frozenset()

    normalise: Literal["none", "sum", "max", "rank"] = "sum"
    """What makes scores of different layers comparable: the layer's ``sum`` or ``max`` of absolute values, or the
    ``rank`` within the layer (the share of its experts that score lower); ``none`` compares them as they are."""
    minimum: Annotated[float, Interval(ge=0, le=1)] = 0.0
    """Share of its experts that every layer keeps at least; rounded up."""

    def measure(
        self, bank: ExpertBank, scores: Float64[Tensor, " experts"], stats: LayerStats
    ) -> Float64[Tensor, " steps"]:
        """What the best expert of each group is worth, then the second best, and so on: never rising."""
        best = _comparable(scores.to(torch.float64), self.normalise).view(bank.dims.groups, -1)
        return best.sort(dim=1, descending=True).values.sort(dim=0).values.mean(dim=0)

    def allocate(self, measures: Sequence[Tensor], keep: int | float, limits: Sequence[KeepLimits]) -> list[int]:
        counts = [fewest(limit, self.minimum) for limit in limits]
        left = _total(self.name, keep, limits, counts) - sum(counts)
        steps = [
            (-value, step * limit.multiple / limit.experts, place)
            for place, (measure, limit) in enumerate(zip(measures, limits, strict=True))
            for step, value in enumerate(measure.tolist())
            if step * limit.multiple >= counts[place]
        ]
        for _, _, place in sorted(steps):
            if limits[place].multiple <= left:
                counts[place] += limits[place].multiple
                left -= limits[place].multiple
        return counts


def _comparable(scores: Float64[Tensor, " experts"], how: str) -> Float64[Tensor, " experts"]:
    if how == "rank":
        return (scores[None, :] < scores[:, None]).to(torch.float64).mean(dim=1)
    ordered = scores.abs().sort().values  # sums must not depend on the experts' order
    size = {"none": torch.ones(()), "sum": ordered.sum(), "max": ordered[-1]}[how]
    return scores / size if bool(size > 0) else scores


@final
@dataclass(frozen=True)
class ReconstructionAware:
    """Experts go where the layer's output changes least: the sum of all layers' relative errors is minimal.

    The error of a layer that keeps its best ``count`` experts is ``Σ ‖Y(x) − Y'(x)‖² / Σ ‖Y(x)‖²`` over sampled inputs,
    Y' after the router has chosen again among the kept. It is the pruned layer's, whatever merging makes of it after.
    """

    name: ClassVar[str] = "reconstruction-aware"
    needs_measures: ClassVar[bool] = True
    requires: ClassVar[frozenset[str]] = frozenset({"sample"})

    tokens: Annotated[int, Interval(ge=1, le=1_000_000)] = 1024
    """Sampled inputs that are looked at, at most."""
    points: Annotated[int, Interval(ge=2, le=4096)] = 9
    """Counts between the smallest and all that are tried, at most; the error between two of them is interpolated."""
    minimum: Annotated[float, Interval(ge=0, le=1)] = 0.0
    """Share of its experts that every layer keeps at least; rounded up."""

    def measure(
        self, bank: ExpertBank, scores: Float64[Tensor, " experts"], stats: LayerStats
    ) -> Float64[Tensor, " counts"]:
        """Relative error for 1, 2, 3, ... experts of each group; counts below the smallest get that one's."""
        dims = bank.dims
        if bank.route is None:
            raise CheckpointError(
                f"budget '{self.name}', layer {dims.layer}: the adapter must give a route, so that tokens can be "
                f"routed again. Got none instead. Use the budget 'global'."
            )
        inputs, seen = stats["sample"][: self.tokens], stats.router_inputs[: self.tokens]
        if not len(inputs):
            return torch.zeros(dims.experts // dims.groups, dtype=torch.float64)
        whole = layer_output(bank, inputs, bank.route(seen, None))
        energy = _energy(whole)
        tried = _tried(-(-dims.smallest_keep // dims.groups), dims.experts // dims.groups, self.points)
        errors = []
        for steps in tried[:-1].tolist():
            kept = select(scores, steps * dims.groups, dims.groups)
            rest = layer_output(bank, inputs, bank.route(seen, kept))
            errors.append(_energy(whole - rest) / energy if energy else 0.0)
        return _between(tried, torch.tensor([*errors, 0.0], dtype=torch.float64), dims.experts // dims.groups)

    def allocate(self, measures: Sequence[Tensor], keep: int | float, limits: Sequence[KeepLimits]) -> list[int]:
        lowest = [fewest(limit, self.minimum) for limit in limits]
        total = _total(self.name, keep, limits, lowest)
        options = [
            [(count, float(measure[count // limit.multiple - 1])) for count in _legal(limit, least)]
            for measure, limit, least in zip(measures, limits, lowest, strict=True)
        ]
        return _cheapest(options, total, reduce(gcd, (limit.multiple for limit in limits)))


def _energy(vectors: Float[Tensor, "sampled hidden"]) -> float:
    return float(vectors.to(torch.float64).square().sum())


def _tried(first: int, last: int, points: int) -> Int64[Tensor, " tried"]:
    """At most ``points`` different whole numbers from ``first`` to ``last``, both included, evenly spaced."""
    spaced = torch.linspace(first, last, min(points, last - first + 1), dtype=torch.float64)
    return spaced.round().to(torch.int64).unique()


def _between(
    tried: Int64[Tensor, " tried"], errors: Float64[Tensor, " tried"], last: int
) -> Float64[Tensor, " counts"]:
    """The errors at 1 to ``last``: straight lines between those that were measured."""
    wanted = torch.arange(1, last + 1)
    right = torch.searchsorted(tried, wanted).clamp(1, max(len(tried) - 1, 1)).clamp(max=len(tried) - 1)
    left = (right - 1).clamp(min=0)
    share = ((wanted - tried[left]) / (tried[right] - tried[left]).clamp(min=1)).clamp(0, 1).to(torch.float64)
    return torch.lerp(errors[left], errors[right], share)


def _legal(limit: KeepLimits, least: int) -> range:
    return range(least, limit.experts + 1, limit.multiple)


def _cheapest(options: Sequence[Sequence[tuple[int, float]]], total: int, unit: int) -> list[int]:
    """One count of each layer: the smallest sum of costs among all choices with the largest sum up to ``total``.

    Exact, by dynamic programming over the sum; of equal costs the most even choice (smallest sum of squares).
    """
    size = total // unit + 1
    cost = torch.full((size,), torch.inf, dtype=torch.float64)
    squares = torch.zeros(size, dtype=torch.int64)
    cost[0] = 0
    chosen = []
    for layer in options:
        best, even, choice = torch.full_like(cost, torch.inf), torch.zeros_like(squares), torch.zeros_like(squares)
        for count, price in layer:
            step = count // unit
            if step >= size:
                break
            new, squared = cost[: size - step] + price, squares[: size - step] + step**2
            old, before = best[step:], even[step:]
            better = (new < old) | ((new == old) & new.isfinite() & (squared < before))
            best[step:], even[step:] = torch.where(better, new, old), torch.where(better, squared, before)
            choice[step:] = torch.where(better, step, choice[step:])
        cost, squares = best, even
        chosen.append(choice)
    at = int(cost.isfinite().nonzero().max())
    counts = []
    for choice in reversed(chosen):
        counts.append(int(choice[at]) * unit)
        at -= int(choice[at])
    return counts[::-1]


def _total(name: str, keep: int | float, limits: Sequence[KeepLimits], lowest: Sequence[int]) -> int:
    """Experts of all layers, at most.

    Raises:
        RecipeError: the layers' minima alone are more.
    """
    total = total_count(keep, limits)
    if sum(lowest) > total:
        raise RecipeError(
            f"plan.keep: must leave the budget '{name}' at least {sum(lowest)} experts in {len(limits)} layers, their "
            f"minimum. Got {keep}, which is {total}, instead. Keep more, or take a smaller plan.budget.minimum."
        )
    return min(total, sum(limit.experts for limit in limits))


@hookimpl
def dernkit_budgets() -> list[type]:
    return [Uniform, Global, ReconstructionAware]
