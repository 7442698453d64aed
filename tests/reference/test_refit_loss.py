"""Selection by the loss after refit against loops in float64."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch

from dernkit.builtin.refit_loss import RefitLoss, refit_loss
from dernkit.builtin.selectors import BestSubset
from dernkit.errors import CheckpointError
from dernkit.kernel import calls
from dernkit.testing.banks import copy_expert, random_bank
from dernkit.testing.cases import statistics
from dernkit.types import ExpertBank, LayerStats
from tests.reference import function_space as reference


def layer(experts: int = 4, **options: int) -> tuple[ExpertBank, LayerStats]:
    bank = random_bank(experts, 3, 4, **options)
    return bank, statistics(bank)


@pytest.mark.parametrize("kept", [[0, 2], [1, 2, 3]])
def test_the_loss_is_that_of_projections_fitted_on_the_first_half(kept: list[int]) -> None:
    bank, stats = layer()
    assert bank.route is not None
    before, now = bank.route(stats.router_inputs), bank.route(stats.router_inputs, torch.tensor(kept))
    half = (stats["sample_token"] * 2 >= stats.tokens).tolist()
    expected = reference.refit_loss(bank, stats["sample"], before, now, kept, half, 0.1)
    assert refit_loss(bank, stats, 10_000, 0.1)(kept) == pytest.approx(expected, rel=1e-3)


def test_of_few_subsets_the_one_with_the_least_loss_stays() -> None:
    bank, stats = layer(5)
    loss = refit_loss(bank, stats, 10_000, 0.1)
    best = min(combinations(range(5), 2), key=loss)
    scores = torch.arange(5, dtype=torch.float64)
    assert calls.select(RefitLoss(), bank, scores, 2, stats).kept.tolist() == list(best)


def test_exchanges_never_raise_the_loss_and_nearly_always_lower_it() -> None:
    lower = 0
    for seed in range(6):
        bank, stats = layer(8, seed=seed)
        scores = stats["gate_sum"]
        loss = refit_loss(bank, stats, 10_000, 0.1)
        start = BestSubset(exhaustive=0).select(bank, scores, 4, stats).kept.tolist()
        found = calls.select(RefitLoss(exhaustive=0), bank, scores, 4, stats).kept.tolist()
        assert calls.select(RefitLoss(exhaustive=0, swaps=0), bank, scores, 4, stats).kept.tolist() == start
        assert loss(found) <= loss(start)
        lower += loss(found) < loss(start)
    assert lower >= 3


def test_a_copy_goes() -> None:
    bank = copy_expert(random_bank(3, 5, 4, top_k=1), 0, 2, torch.tensor([3, 1, 4, 0, 2]))
    stats = statistics(bank)
    scores = torch.ones(3, dtype=torch.float64)
    assert 1 in calls.select(RefitLoss(ridge=1e-6), bank, scores, 2, stats).kept.tolist()


def test_exchanges_stay_within_the_routers_groups() -> None:
    bank, stats = layer(8, groups=2)
    kept = calls.select(RefitLoss(exhaustive=0), bank, stats["gate_sum"], 4, stats).kept.tolist()
    assert sum(expert < 4 for expert in kept) == 2


def test_a_layer_that_cannot_be_routed_again_is_refused() -> None:
    bank, stats = layer()
    with pytest.raises(CheckpointError, match="selector 'refit-loss', layer 0: sampled tokens must be routable again"):
        RefitLoss().select(replace(bank, route=None), stats["gate_sum"], 2, stats)
