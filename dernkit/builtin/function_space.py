"""Neurons by what they do: which of the pool each kept expert should have for the layer to give what it gave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, final

import torch
from annotated_types import Interval
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from dernkit.api import Assignment, ExpertBank, LayerStats, Retention, hookimpl
from dernkit.builtin.refits import sampled_outputs
from dernkit.kernel.function_space import features, saliency, select, turns
from dernkit.kernel.least_squares import System, by_part, damping, parts, total
from dernkit.kernel.outputs import layer_output
from dernkit.kernel.segments import finite_segments

_LOOKED = 2048
"""Tokens on which the strongest of many candidates are found."""


@final
@dataclass(frozen=True)
class FunctionSpace:
    """Each kept expert gets the neurons, of its own and all dropped ones, that best rebuild the layer on its tokens.
    With `width` below 1 experts get narrower too; where none is dropped, that is all that happens.

    Expert after expert, those with most weight first: the target is what the layer gave less what the other kept
    experts give now; of the pool's neurons those of least optimal-brain-surgeon saliency go. A neuron may go to several
    experts, own ones may be left behind. An expert stays as it is where neurons that were chosen on most of the text do
    no better on the rest of it than its own. Use it with the merge `adopt`; the refit `least-squares` then finds the
    down projections.
    """

    name: ClassVar[str] = "function-space"
    requires: ClassVar[frozenset[str]] = frozenset({"sample"})
    needs_groups: ClassVar[bool] = False

    ridge: Annotated[float, Interval(ge=1e-8, le=1e6)] = 0.01
    """λ relative to the mean of the diagonal of the pool's Gram matrix."""
    rounds: Annotated[int, Interval(ge=1, le=1000)] = 4
    """In how many steps neurons go; after each the others are judged again."""
    pool: Annotated[float, Interval(gt=1, le=1000)] | None = None
    """At most so many times an expert's width are looked at: its own neurons, and dropped ones with most output; null:
    so many that there are two tokens to a neuron, and 1.25 to 8 times its width."""
    parts: Annotated[int, Interval(ge=1, le=100)] = 4
    """Into how many parts the calibration text is cut, of which the last is left out to see whether an expert gains; 1:
    none is, and every expert gets the neurons that are chosen."""
    width: Annotated[float, Interval(gt=0, le=1)] = 1.0
    """Share of its neurons that an expert has afterwards, rounded up to a multiple of 8."""
    tokens: Annotated[int, Interval(ge=1, le=16_777_216)] | None = None
    """At most so many of the sampled inputs; null: all."""

    @property
    def narrows(self) -> bool:
        """Every expert gets narrower, also where none is dropped."""
        return self.width < 1

    def assign(self, bank: ExpertBank, retention: Retention, stats: LayerStats) -> Assignment:
        count = self._count(bank.dims.width)
        if not retention.dropped and count == bank.dims.width:
            return Assignment.empty()
        where = f"assigner '{self.name}', layer {bank.dims.layer}"
        inputs, seen, whole = sampled_outputs(bank, stats, self.tokens, self.parts, where)
        assert bank.route is not None
        last = parts(stats, self.parts)[: self.tokens] == self.parts - 1
        routing = bank.route(seen, retention.kept)
        residual = whole - layer_output(bank, inputs, routing)
        dropped = torch.cat([bank.segments(0)[:0], *(finite_segments(bank, expert) for expert in retention.dropped)])
        choices: dict[int, _Choice] = {}
        for expert, rows, coefficients in turns(routing, retention.kept.tolist()):
            task = _Task(bank, expert, inputs[rows], coefficients, residual[rows], last[rows])
            choices[expert], residual[rows] = task.choose(dropped, count, self)
        idle = {expert: _idle(bank, expert, count) for expert in retention.kept.tolist() if expert not in choices}
        return _assignment(bank, retention, choices | idle)

    def _count(self, width: int) -> int:
        """Neurons of an expert afterwards; as many as it has where `width` is 1."""
        return min(width, -(-round(self.width * width) // 8) * 8)


@dataclass(frozen=True, slots=True)
class _Choice:
    own: Int64[Tensor, " own"]
    """Neurons that stay, ascending."""
    arrivals: Int64[Tensor, " arrivals"]
    """Places among the dropped segments."""
    saliency: Float[Tensor, " arrivals"]
    """Share of the target's energy."""
    partner: Int64[Tensor, " arrivals"]


@dataclass(frozen=True, slots=True)
class _Task:
    """One kept expert and its tokens; ``residual`` is what the layer gave less what all kept experts give now."""

    bank: ExpertBank
    expert: int
    inputs: Float32[Tensor, "tokens hidden"]
    coefficients: Float32[Tensor, " tokens"]
    residual: Float32[Tensor, "tokens hidden"]
    last: Bool[Tensor, " tokens"]
    """Which tokens are of the part that is left out."""

    def choose(
        self, dropped: Float32[Tensor, "candidates parts features"], count: int, how: FunctionSpace
    ) -> tuple[_Choice, Float32[Tensor, "tokens hidden"]]:
        """``count`` neurons for the expert, and what is left of ``residual`` when it has them."""
        width = self.bank.dims.width
        own = finite_segments(self.bank, self.expert)
        hidden = features(self.bank, own, self.inputs, self.coefficients)
        target = self.residual + hidden @ own[:, -1, : self.residual.shape[1]]
        share = how.pool or min(max(len(self.inputs) / 2 / width, 1.25), 8.0)
        places = self._strongest(dropped, round((share - 1) * width))
        pool = torch.cat([hidden, features(self.bank, dropped[places], self.inputs, self.coefficients)], dim=1)
        first, rest = by_part(pool, target, self.last.to(torch.int64), 2)
        whole = total([first, rest])
        gains = len(places) > 0 and (how.parts == 1 or _gains(first, rest, width, count, how))
        chosen, found = _best(whole if gains else whole.of(torch.arange(width, device=whole.device)), width, count, how)
        down = whole.of(chosen).solve(damping(whole, how.ridge))
        is_own = chosen < width
        choice = _Choice(
            own=chosen[is_own],
            arrivals=places[chosen[~is_own] - width],
            saliency=found[~is_own] / (whole.energy or 1.0),
            partner=_partners(whole, chosen[is_own], chosen[~is_own]),
        )
        return choice, target - pool[:, chosen] @ down.to(torch.float32)

    def _strongest(self, dropped: Float32[Tensor, "candidates parts features"], most: int) -> Int64[Tensor, " some"]:
        """The candidates with the most output on these tokens, or on 2,048 of them, ascending."""
        if len(dropped) <= most:
            return torch.arange(len(dropped), device=dropped.device)
        inputs, coefficients = self.inputs[:_LOOKED], self.coefficients[:_LOOKED]
        output = torch.cat(
            [
                features(self.bank, part, inputs, coefficients).square().sum(0, dtype=torch.float64)
                * part[:, -1].square().sum(1, dtype=torch.float64)
                for part in dropped.split(4096)
            ]
        )
        return output.argsort(descending=True, stable=True)[:most].sort().values


def _best(
    pool: System, width: int, count: int, how: FunctionSpace
) -> tuple[Int64[Tensor, " chosen"], Float[Tensor, " chosen"]]:
    """``count`` neurons, ascending, and their saliency; the first ``width`` are the expert's own, and one stays."""
    ridge = damping(pool, how.ridge)
    chosen, found = select(pool, ridge, count, how.rounds)
    if int(chosen[0]) >= width:
        most_active = pool.squares()[:width].argmax()[None]
        chosen = torch.cat([most_active, chosen[found.argsort()[1:]].sort().values])
        found = saliency(pool.of(chosen), ridge)
    return chosen, found


def _gains(first: System, rest: System, width: int, count: int, how: FunctionSpace) -> bool:
    """Whether neurons of the pool that are chosen and solved on the one part of the text do better than own ones on the
    other."""
    ridge = damping(first, how.ridge)
    errors = []
    for pool in (first, first.of(torch.arange(width, device=first.device))):
        chosen = _best(pool, width, count, how)[0]
        errors.append(rest.of(chosen).error(first.of(chosen).solve(ridge)))
    return errors[0] < errors[1]


def _idle(bank: ExpertBank, expert: int, count: int) -> _Choice:
    """An expert without tokens keeps its neurons with the largest down columns."""
    size = finite_segments(bank, expert)[:, -1].norm(dim=1)
    none = torch.empty(0, dtype=torch.int64, device=size.device)
    own = size.argsort(descending=True, stable=True)[:count].sort().values
    return _Choice(own, none, none.to(torch.float64), none)


def _partners(
    pool: System, own: Int64[Tensor, " own"], arrivals: Int64[Tensor, " arrivals"]
) -> Int64[Tensor, " arrivals"]:
    """For each arrival the own neuron that stays whose activations are most like its own, by cosine."""
    if not len(arrivals):
        return arrivals
    size = pool.squares().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    cosine = pool.products(arrivals, own).abs() / size[arrivals, None] / size[own]
    return own[cosine.argmax(1)]


def _numbers(bank: ExpertBank, expert: int) -> Int64[Tensor, " width"]:
    """expert · W + neuron of all its segments."""
    return expert * bank.dims.width + torch.arange(bank.dims.width, device=bank.up.device)


def _assignment(bank: ExpertBank, retention: Retention, choices: Mapping[int, _Choice]) -> Assignment:
    """Choices by expert as one record."""
    origin = torch.cat([_numbers(bank, expert) for expert in [*retention.dropped, *retention.kept.tolist()]])
    neurons = torch.arange(bank.dims.width, device=bank.up.device)
    found = [choices[expert] for expert in retention.kept.tolist()]
    gone = [_numbers(bank, expert)[~torch.isin(neurons, choices[expert].own)] for expert in retention.kept.tolist()]
    return Assignment(
        source=torch.cat([origin[each.arrivals] for each in found]),
        target=torch.cat([torch.full_like(each.arrivals, position) for position, each in enumerate(found)]),
        partner=torch.cat([each.partner for each in found]),
        affinity=torch.cat([each.saliency.to(torch.float32) for each in found]),
        left=torch.cat(gone),
    )


@hookimpl
def dernkit_assigners() -> list[type]:
    """Assigners that look at what neurons do."""
    return [FunctionSpace]
