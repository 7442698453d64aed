"""Experts that stay whatever their score."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, final

import torch
from annotated_types import Interval
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from dernkit.api import ExpertBank, LayerDims, LayerStats, RecipeError, Routing, Scorer, hookimpl
from dernkit.builtin.scorers import Reap
from dernkit.kernel import calls
from dernkit.kernel.subsets import reroute


@final
@dataclass(frozen=True)
class Protect:
    """Another scorer's scores, with those of named experts and of super experts lifted just above all others.

    Super experts (arXiv 2507.23279) put out rare but extreme activations; models break without these few. Where fewer
    stay than are protected, the best of them do. Selectors that do not go by scores protect nobody.
    """

    name: ClassVar[str] = "protect"

    scorer: Scorer = field(default_factory=Reap)
    """What the scores are from."""

    experts: tuple[str, ...] = ()
    """Experts that stay, each as `layer:expert` with the numbers that plans and reports show, such as `3:17`. That a
    layer has no experts at all is not noticed."""

    super_experts: bool = True
    """Whether super experts stay: those whose largest absolute output for a sampled input that is routed to them,
    before the router's coefficient, is more than `factor` times the median of the layer's other experts. The paper
    compares with the experts of all layers: above their 99.5th percentile and above a tenth of the largest."""

    factor: Annotated[float, Interval(ge=1, le=1e9)] = 10.0
    """How far above the others a super expert's output is."""

    def __post_init__(self) -> None:
        wrong = [expert for expert in self.experts if not re.fullmatch(r"\d+:\d+", expert, re.ASCII)]
        named = [tuple(map(int, expert.split(":"))) for expert in self.experts if expert not in wrong]
        if wrong or len(set(named)) < len(named):
            found = f"'{wrong[0]}'" if wrong else "one of them twice"
            raise ValueError(
                f"experts: must be names like '3:17' (layer and expert), each once. Got {found} instead. Correct it."
            )
        if not self.experts and not self.super_experts:
            raise ValueError(
                "experts: must name someone when super_experts is false. Got nobody to protect instead. "
                "Name an expert, or use the scorer without protect."
            )

    @property
    def requires(self) -> frozenset[str]:
        """What the nested scorer reads, and the sample if super experts are looked for."""
        return self.scorer.requires | ({"sample"} if self.super_experts else set())

    def score(self, bank: ExpertBank, stats: LayerStats) -> Float64[Tensor, " experts"]:
        protected = self._named(bank.dims)
        if self.super_experts:
            routing = reroute(bank, stats.router_inputs)
            protected |= _extreme(_peaks(bank, stats["sample"], routing), self.factor)
        return _lifted(calls.score(self.scorer, bank, stats), protected)

    def _named(self, dims: LayerDims) -> Bool[Tensor, " experts"]:
        protected = torch.zeros(dims.experts, dtype=torch.bool)
        for named in self.experts:
            layer, expert = map(int, named.split(":"))
            if layer != dims.layer:
                continue
            if expert >= dims.experts:
                raise RecipeError(
                    f"scorer 'protect', layer {layer}: experts must have numbers from 0 to {dims.experts - 1}. "
                    f"Got '{named}' instead. Correct it in `experts`."
                )
            protected[expert] = True
        return protected


def _peaks(bank: ExpertBank, inputs: Float[Tensor, "sampled hidden"], routing: Routing) -> list[float | None]:
    """Largest absolute output of each expert over the tokens routed to it; None for one without tokens."""
    found: list[float | None] = []
    for expert in range(bank.dims.experts):
        rows, columns = torch.where((routing.chosen == expert) & (routing.coefficients != 0))
        seen = inputs[rows].to(torch.float32)
        if bank.coefficient_on_input:
            seen = seen * routing.coefficients[rows, columns, None]
        found.append(float(bank.output(expert, seen).abs().max()) if len(rows) else None)
    return found


def _extreme(peaks: list[float | None], factor: float) -> Bool[Tensor, " experts"]:
    """Which peaks are above ``factor`` times the median of the others; nobody is extreme alone."""
    extreme = torch.zeros(len(peaks), dtype=torch.bool)
    for expert, peak in enumerate(peaks):
        others = [other for i, other in enumerate(peaks) if i != expert and other is not None]
        if peak is not None and others:
            median = torch.tensor(others, dtype=torch.float64).quantile(0.5)
            extreme[expert] = bool(peak > factor * median)
    return extreme


def _lifted(scores: Float64[Tensor, " experts"], protected: Bool[Tensor, " experts"]) -> Float64[Tensor, " experts"]:
    """Protected scores above all others, in their own order, the ones that are high enough unchanged."""
    if bool(protected.all()) or not bool(protected.any()):
        return scores
    lifted, above = scores.clone(), float(scores[~protected].max())
    for value in scores[protected].unique().tolist():
        above = max(value, math.nextafter(above, math.inf))
        lifted[protected & (scores == value)] = above
    return lifted


@hookimpl
def dernkit_scorers() -> list[type]:
    return [Protect]
