from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from dernkit.api import Budget, KeepLimits
from dernkit.builtin.budgets import Global, ReconstructionAware, Uniform
from dernkit.errors import CheckpointError, RecipeError
from dernkit.testing.banks import permute_experts, random_bank, random_stats
from dernkit.types import LayerStats

SCORES = [torch.arange(8, dtype=torch.float64)] * 2
LIMITS = [KeepLimits(layer, 8, 2, 1) for layer in range(3)]
GROUPS = [KeepLimits(layer, 8, 4, 2) for layer in range(3)]
BUDGETS = [Global(), Global(normalise="none"), Global(normalise="max"), Global(normalise="rank"), ReconstructionAware()]
every_budget = pytest.mark.parametrize("budget", BUDGETS, ids=str)


def measured(budget: Budget, scores: Tensor, groups: int = 1, seed: int = 0) -> Tensor:
    bank = random_bank(len(scores), groups=groups, seed=seed)
    return budget.measure(bank, scores, random_stats(bank).only(budget.requires))


@pytest.mark.parametrize(("keep", "counts"), [(0.5, [4, 8]), (4, [4, 4]), (1.0, [8, 16])])
def test_uniform_keeps_the_same_share_or_count_in_every_layer(keep: int | float, counts: list[int]) -> None:
    assert Uniform().allocate(SCORES, keep, [KeepLimits(0, 8, 2, 1), KeepLimits(1, 16, 2, 1)]) == counts


def test_uniform_names_the_layer_that_does_not_allow_it() -> None:
    with pytest.raises(CheckpointError, match="layer 1: must be from 6"):
        Uniform().allocate(SCORES, 4, [KeepLimits(0, 8, 2, 1), KeepLimits(1, 8, 6, 1)])


@every_budget
@pytest.mark.parametrize("limits", [LIMITS, GROUPS], ids=["plain", "groups"])
@pytest.mark.parametrize("keep", [0.5, 0.75, 6, 1.0])
def test_layers_that_are_alike_are_kept_as_uniform_keeps_them(
    budget: Budget, limits: list[KeepLimits], keep: int | float
) -> None:
    measures = [measured(budget, torch.ones(8, dtype=torch.float64), limits[0].multiple)] * 3
    if isinstance(budget, ReconstructionAware):  # its law needs errors that fall ever more slowly
        measures = [torch.linspace(1, 0, len(measures[0]), dtype=torch.float64) ** 2] * 3
    assert budget.allocate(measures, keep, limits) == Uniform().allocate([], keep, limits)


@every_budget
def test_a_layer_whose_experts_matter_more_keeps_more(budget: Budget) -> None:
    flat, steep = torch.ones(8, dtype=torch.float64), torch.tensor([8, 1, 1, 0, 0, 0, 0, 0], dtype=torch.float64)
    if isinstance(budget, ReconstructionAware):
        needed, spared = (torch.linspace(top, 0, 8, dtype=torch.float64) for top in (1.0, 0.1))
        assert budget.allocate([spared, needed, spared], 0.5, LIMITS) == [2, 8, 2]
    elif budget.normalise in ("max", "none"):
        assert budget.allocate([measured(budget, x) for x in (flat, steep / 8, flat)], 0.5, LIMITS) == [5, 2, 5]
    else:
        counts = budget.allocate([measured(budget, x) for x in (flat, steep, flat)], 0.5, LIMITS)
        assert sum(counts) == 12 and (counts[0] > counts[1] or budget.normalise == "rank")


@every_budget
@given(data=st.data())
def test_totals_are_exact_and_never_above_what_was_asked_for(budget: Budget, data: st.DataObject) -> None:
    layers, per_group, groups = (data.draw(st.integers(1, top)) for top in (5, 9, 3))
    experts = per_group * groups
    limits = [KeepLimits(layer, experts, groups, groups) for layer in range(layers)]
    keep = data.draw(st.one_of(st.integers(groups, experts), st.floats(1 / per_group, 1.0)))
    assume(isinstance(keep, int) or Fraction(str(keep)) * layers * experts >= layers * groups)
    values = st.lists(st.floats(0, 1e6), min_size=per_group, max_size=per_group)
    measures = [torch.tensor(sorted(data.draw(values), reverse=True), dtype=torch.float64) for _ in limits]
    counts = budget.allocate(measures, keep, limits)
    asked = Fraction(str(keep)) * layers * (experts if isinstance(keep, float) else 1)
    assert asked - groups < sum(counts) <= asked
    assert all(groups <= count <= experts and count % groups == 0 for count in counts)


@every_budget
def test_the_order_of_experts_changes_no_bit_of_a_measure(budget: Budget) -> None:
    bank = random_bank(7)
    scores = torch.rand(7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    stats = random_stats(bank).only(budget.requires)
    before = budget.measure(bank, scores, stats)
    order = torch.tensor([3, 6, 0, 2, 5, 1, 4])
    after = budget.measure(permute_experts(bank, order), scores[order], stats)
    if isinstance(budget, ReconstructionAware):  # experts' outputs are summed in another order
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-7)
    else:
        assert torch.equal(after, before)
    assert torch.equal(budget.measure(bank, scores, stats), before)


@every_budget
def test_dead_layers_are_finite(budget: Budget) -> None:
    bank = random_bank(4)
    empty = LayerStats(0, {"sample": torch.empty(0, 6), "sample_key": torch.empty(0, dtype=torch.float64)})
    assert budget.measure(bank, torch.zeros(4, dtype=torch.float64), empty).isfinite().all()
    silent = random_bank(4)
    silent.down.zero_()
    assert budget.measure(silent, torch.zeros(4, dtype=torch.float64), random_stats(silent)).isfinite().all()


@pytest.mark.parametrize("make", [Global, ReconstructionAware])
def test_every_layer_keeps_its_minimum(make: Callable[..., Budget]) -> None:
    steep = [torch.linspace(top, 0, 8, dtype=torch.float64) for top in (1, 100, 1)]
    assert min(make().allocate(steep, 0.5, LIMITS)) == 2
    assert make(minimum=0.375).allocate(steep, 0.5, LIMITS) == [3, 6, 3]


@pytest.mark.parametrize("make", [Global, ReconstructionAware])
def test_minima_above_the_total_are_one_sentence(make: Callable[..., Budget]) -> None:
    flat = [torch.linspace(1, 0, 8, dtype=torch.float64)] * 3
    with pytest.raises(RecipeError, match=r"at least 18 experts in 3 layers, their minimum\. Got 0.5, which is 12"):
        make(minimum=0.75).allocate(flat, 0.5, LIMITS)
    with pytest.raises(CheckpointError, match="layer 0: must have a count of experts that its router allows"):
        make().allocate(flat[:1], 0.5, [KeepLimits(0, 8, 7, 3)])


def test_a_bank_without_a_route_is_refused_in_one_sentence() -> None:
    bank = replace(random_bank(4), route=None)
    with pytest.raises(CheckpointError, match="layer 0: the adapter must give a route"):
        ReconstructionAware().measure(bank, torch.ones(4, dtype=torch.float64), random_stats(bank))


def test_a_longer_curve_is_found_in_steps_of_groups() -> None:
    curve = measured(ReconstructionAware(), torch.rand(8, dtype=torch.float64), groups=2)
    assert curve.shape == (4,) and curve[-1] == 0 and bool((curve >= 0).all())
