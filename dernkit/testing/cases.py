"""The layers on which the kit checks laws: small, of every shape that models have, with a real routing's statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from dernkit.kernel.after import after_surgery
from dernkit.kernel.compress import compress_layer
from dernkit.kernel.selection import limits
from dernkit.kernel.statistics import Accumulator
from dernkit.testing.banks import copy_expert, random_bank, retained, softmax_route
from dernkit.types import STATISTICS, Assignment, ExpertBank, LayerPlan, LayerStats, Pool, Retention, Route

TOKENS = 48
_SEEN: dict[str, LayerStats] = {}
"""Statistics of the cases that were built: those take the time. Each case gets copies."""


@dataclass(frozen=True, slots=True)
class Case:
    """One layer, what calibration saw of it, and which experts stay."""

    what: str
    bank: ExpertBank
    stats: LayerStats
    scores: Tensor
    """float64 [E], all different."""
    kept: Int64[Tensor, " kept"]
    has_ties: bool
    """Whether experts or neurons are alike, so that results depend on which of them comes first."""

    @property
    def dropped(self) -> list[int]:
        """Experts that go, ascending."""
        return sorted(set(range(self.bank.dims.experts)) - set(self.kept.tolist()))


def case(
    what: str,
    kept: Sequence[int] = (0, 2, 5, 7),
    *,
    experts: int = 8,
    dead: Sequence[int] = (),
    twins: bool = False,
    changes: dict[str, Any] | None = None,
    seed: int = 0,
    **options: Any,
) -> Case:
    """A layer of random experts; the router sends nothing to ``dead``; with ``twins`` expert 1 is a copy of expert 0.

    Dead experts have neurons of zeros too. ``options`` are those of `random_bank`, ``changes`` fields of the bank.
    """
    bank = random_bank(experts, seed=seed, **{"width": 6, "hidden": 5, **options})
    if twins:
        bank = copy_expert(bank, 0, 1, torch.arange(bank.dims.width).flip(0))
    for expert in dead:
        bank.up[expert, :2], bank.down[expert, :, :2] = 0, 0
    bank = replace(bank, **(changes or {}))
    key = repr((what, experts, tuple(dead), twins, sorted(changes or {}), seed, sorted(options.items(), key=str)))
    if key not in _SEEN:
        _SEEN[key] = statistics(bank, dead, seed)
    seen = _SEEN[key]
    stats = replace(seen, values={name: value.clone() for name, value in seen.values.items()})
    scores = 0.1 + torch.rand(experts, generator=_rng(seed + 1), dtype=torch.float64)
    has_ties = bool(dead) or twins
    return Case(what, bank, stats, scores, torch.tensor(kept), has_ties)


def statistics(bank: ExpertBank, dead: Sequence[int] = (), seed: int = 0) -> LayerStats:
    """All statistics of random inputs routed by the bank itself; all tokens are sampled."""
    inputs = torch.randn(TOKENS, bank.dims.hidden, generator=_rng(seed + 2))
    route = _route_of(bank)
    alive = torch.tensor([expert for expert in range(bank.dims.experts) if expert not in dead])
    routing = route(inputs, alive if dead else None)
    names = frozenset(STATISTICS)
    accumulator = Accumulator(bank.dims, names, sample_size=TOKENS, seed=seed)
    accumulator.update(bank, inputs, routing.chosen, routing.coefficients)
    return accumulator.stats()


def _route_of(bank: ExpertBank) -> Route:
    """The bank's own routing, also where the case hides it."""
    return bank.route or softmax_route(bank.router, bank.dims.top_k)


def _norm(outputs: Tensor) -> Tensor:
    return outputs / (1 + outputs.square().mean(dim=-1, keepdim=True)).sqrt()


CASES: tuple[Callable[..., Case], ...] = (
    partial(case, "8 gated experts"),
    partial(case, "8 experts without a gate, with biases", gated=False, bias=True, width=7),
    partial(case, "6 gated experts with biases", (1, 2, 4), experts=6, bias=True, top_k=1),
    partial(case, "8 bfloat16 experts", dtype=torch.bfloat16),
    partial(case, "8 experts in 2 groups", (0, 2, 5, 7), groups=2, layer=3),
    partial(case, "one dropped expert", (0, 2), experts=3, width=5),
    partial(case, "coefficients on the input", changes={"coefficient_on_input": True}),
    partial(case, "a norm after the experts", changes={"finish": _norm}),
    partial(case, "experts that saw no token and neurons of zeros", dead=(1, 7)),
    partial(case, "two equal experts", twins=True),
)
"""What the kit has in stock; each is built anew for each use, so that no law sees what another one left behind."""


def cases() -> list[Case]:
    """All of them."""
    return [build() for build in CASES]


def different() -> list[Case]:
    """Those without ties: results do not depend on which expert or neuron comes first."""
    return [found for found in cases() if not found.has_ties]


def unequal() -> list[Case]:
    """`different` without bfloat16, in which sums in another order differ too much to be compared."""
    return [found for found in different() if found.bank.up.dtype == torch.float32]


def expert_order(bank: ExpertBank) -> Int64[Tensor, " experts"]:
    """Another order of the experts; the router's groups stay together."""
    size = bank.dims.experts // bank.dims.groups
    inner = torch.randperm(size, generator=_rng(5))
    inner = inner.roll(1) if torch.equal(inner, torch.arange(size)) else inner
    outer = torch.arange(bank.dims.groups).flip(0)
    return (outer[:, None] * size + inner).flatten()


def neuron_order(width: int, seed: int = 7) -> Int64[Tensor, " width"]:
    """Another order of neurons."""
    return torch.randperm(width, generator=_rng(seed))


def inverse(order: Tensor) -> Tensor:
    """Where each one went."""
    return torch.argsort(order)


def retentions(found: Case) -> list[Retention]:
    """Without groups, and with all dropped experts in one."""
    kept = found.kept.tolist()
    group = [kept.index(expert) if expert in kept else expert % len(kept) for expert in range(len(found.scores))]
    return [replace(retained(found.bank, kept, each), scores=found.scores) for each in (None, group)]


def plan_of(found: Case) -> LayerPlan:
    """Every second segment of the dropped experts goes to one of the kept experts but the last, which gets nothing."""
    dims, rng = found.bank.dims, _rng(11)
    source = torch.cat([torch.arange(expert * dims.width, (expert + 1) * dims.width, 2) for expert in found.dropped])
    target = torch.randint(max(len(found.kept) - 1, 1), (len(source),), generator=rng)
    partner = torch.randint(dims.width, (len(source),), generator=rng)
    moves = Assignment(source, target, partner, torch.rand(len(source), generator=rng))
    return LayerPlan(dims.layer, dims.experts, dims.width, found.scores, found.kept, moves)


def after_of(found: Case) -> ExpertBank:
    """What surgery makes of the layer by `plan_of`: the kept experts and their router rows as they were."""
    from dernkit.builtin.merges import Keep
    from dernkit.builtin.routers import Slice

    plan, width = plan_of(found), found.bank.dims.width
    compressed = compress_layer(found.bank, plan, Keep(), Slice(), width, 0, found.stats)
    return after_surgery(compressed, found.bank, plan.kept)


def rows_of(found: Case) -> Tensor:
    """The router's rows in float32; a bias as last feature for the cases with biases."""
    rows = found.bank.router.to(torch.float32, copy=True)
    if not found.bank.has_bias:
        return rows
    return torch.cat([rows, found.bank.per_expert["correction_bias"].to(torch.float32)[:, None]], dim=1)


def pool_of(found: Case, donors: Sequence[int], every: int = 1) -> Pool:
    """What arrives at the first kept expert: every so manieth segment of the donors."""
    width, expert = found.bank.dims.width, int(found.kept[0])
    neurons = torch.arange(0, width, every)
    incoming = torch.cat([found.bank.segments(donor)[neurons] for donor in donors])
    partner = torch.cat([neuron_order(width, donor)[neurons] for donor in donors])
    owner = torch.tensor(donors).repeat_interleave(len(neurons))
    weights = found.scores.to(torch.float32)
    return Pool(
        own=found.bank.segments(expert),
        own_weight=float(weights[expert]),
        incoming=incoming,
        incoming_weight=weights[owner],
        partner=partner,
        affinity=torch.rand(len(owner), generator=_rng(13)),
        expert=expert,
        incoming_expert=owner,
        act=found.bank.act,
        stats=found.stats,
    )


def layers(build: Callable[..., Case]) -> list[Case]:
    """Three layers of the same make, each with weights of its own."""
    return [build(seed=17 * number, layer=number) for number in range(3)]


def limits_of(found: Sequence[Case]) -> list[Any]:
    """What each layer's router allows."""
    return [limits(each.bank.dims) for each in found]


def _rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
