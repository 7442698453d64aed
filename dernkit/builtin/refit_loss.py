"""Which experts stay, judged by what the layer gives once their down projections are fitted anew."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, final

import torch
from annotated_types import Interval
from jaxtyping import Float64
from torch import Tensor

from dernkit.api import ExpertBank, LayerStats, Retention, hookimpl
from dernkit.builtin.refits import sampled_outputs
from dernkit.builtin.selectors import BestSubset, subsets
from dernkit.kernel.function_space import features, turns
from dernkit.kernel.least_squares import by_part, damping, parts
from dernkit.kernel.outputs import layer_output

_Loss = Callable[[Sequence[int]], float]


@final
@dataclass(frozen=True)
class RefitLoss:
    """The experts that give the layer's output best when their down projections are fitted to it.

    Sampled tokens are routed among the experts; each projection is fitted once, the expert with most weight first, on
    the first half of the calibration text, and the squared error on the second half is the loss. All subsets are tried
    where there are few. Where there are many, the selector `best-subset` has the first word, and then experts of low
    score are exchanged for dropped ones of high score as long as the loss falls. Use it with the refit `least-squares`.
    """

    name: ClassVar[str] = "refit-loss"
    requires: ClassVar[frozenset[str]] = frozenset({"sample"})
    groups: ClassVar[bool] = False

    exhaustive: Annotated[int, Interval(ge=0, le=1_000_000)] = 200
    """Up to so many subsets are all tried; of equal ones the lexicographically smallest stays."""
    swaps: Annotated[int, Interval(ge=0, le=1_000_000)] = 64
    """Where there are more: exchanges that are tried, those with the largest difference of scores first."""
    ridge: Annotated[float, Interval(ge=1e-8, le=1e6)] = 0.1
    """λ relative to the mean of the diagonal of each expert's Gram matrix."""
    tokens: Annotated[int, Interval(ge=2, le=2**24)] = 4096
    """At most so many of the sampled inputs."""

    def select(self, bank: ExpertBank, scores: Float64[Tensor, " experts"], count: int, stats: LayerStats) -> Retention:
        dims, loss = bank.dims, refit_loss(bank, stats, self.tokens, self.ridge)
        if math.comb(dims.experts // dims.groups, count // dims.groups) ** dims.groups <= self.exhaustive:
            first = min(subsets(dims, count), key=loss)  # of equal ones
            kept = list(first)
        else:
            start = BestSubset(exhaustive=0).select(bank, scores, count, stats).kept.tolist()
            kept = self._exchanged(start, scores, dims.experts // dims.groups, loss)
        return Retention(scores, torch.tensor(kept))

    def _exchanged(
        self,
        kept: Sequence[int],
        scores: Float64[Tensor, " experts"],
        group: int,
        loss: Callable[[Sequence[int]], float],
    ) -> list[int]:
        """Experts change places with others of their group."""
        now = set(kept)
        others = [expert for expert in range(len(scores)) if expert not in now]
        pairs = [(out, new) for out in kept for new in others if out // group == new // group]
        pairs.sort(key=lambda pair: float(scores[pair[0]] - scores[pair[1]]))
        least, tried = loss(sorted(now)), 0
        for out, new in pairs:
            if out not in now or new in now:
                continue
            if tried == self.swaps:
                break
            tried += 1
            changed = now - {out} | {new}
            if (found := loss(sorted(changed))) < least:
                now, least = changed, found
        return sorted(now)


def refit_loss(bank: ExpertBank, stats: LayerStats, tokens: int, ridge: float) -> _Loss:
    """Squared error on the second half of the text after projections are fitted on the first, by kept experts.

    Raises:
        CheckpointError: the layer cannot be refitted, see `sampled_outputs`.
    """
    where = f"selector '{RefitLoss.name}', layer {bank.dims.layer}"
    inputs, seen, whole = sampled_outputs(bank, stats, tokens, 2, where)
    half, route = parts(stats, 2)[:tokens], bank.route
    assert route is not None

    def loss(kept: Sequence[int]) -> float:
        routing = route(seen, torch.tensor(kept))
        residual = whole - layer_output(bank, inputs, routing)
        for expert, rows, coefficients in turns(routing, kept):
            segments = bank.segments(expert)
            hidden = features(bank, segments, inputs[rows], coefficients)
            target = residual[rows] + hidden @ segments[:, -1, : whole.shape[1]]
            first = by_part(hidden, target, half[rows], 2)[0]
            weights = first.solve(damping(first, ridge))
            residual[rows] = target - hidden @ weights.to(torch.float32)
        return float(residual[half == 1].square().sum(dtype=torch.float64))

    return loss


@hookimpl
def dernkit_selectors() -> list[type]:
    """The selector that knows of the refit."""
    return [RefitLoss]
