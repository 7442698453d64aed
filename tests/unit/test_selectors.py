from itertools import combinations

import pytest
import torch

from dernkit.builtin.selectors import BestSubset
from dernkit.kernel.elimination import eliminate
from dernkit.kernel.planning import plan_from_scores
from dernkit.kernel.subsets import subset_loss
from dernkit.testing.banks import permute_experts, permute_stats, random_bank, random_stats
from tests.unit.test_output_scorers import voters

WAYS = [0, 2000]
"""`exhaustive`: one by one, all subsets."""


@pytest.mark.parametrize("exhaustive", WAYS)
def test_the_experts_that_tokens_choose_stay_and_ties_go_to_the_lowest(exhaustive: int) -> None:
    bank, stats = voters(random_bank(7, hidden=7), [[2, 5], [5, 2], [2, 5]])
    scores = torch.arange(7, dtype=torch.float64)
    assert BestSubset(exhaustive=exhaustive).select(bank, scores, 4, stats).kept.tolist() == [0, 1, 2, 5]


def test_no_subset_is_better_and_one_by_one_is_no_better() -> None:
    bank = random_bank(7, seed=5)
    stats, scores = random_stats(bank, sample=50), torch.zeros(7, dtype=torch.float64)
    loss = subset_loss(bank, stats, 50)
    best, greedy = (BestSubset(exhaustive=way).select(bank, scores, 3, stats).kept.tolist() for way in (35, 34))
    assert loss(best) == min(map(loss, combinations(range(7), 3))) <= loss(greedy)


@pytest.mark.parametrize("exhaustive", WAYS)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_as_many_of_each_group_stay(exhaustive: int, groups: int) -> None:
    bank = random_bank(8, groups=groups, top_k=1)
    stats, scores = random_stats(bank), torch.rand(8, dtype=torch.float64)
    plan = plan_from_scores(bank, stats, scores, 4, BestSubset(exhaustive=exhaustive), None)
    assert torch.bincount(plan.kept * groups // 8, minlength=groups).tolist() == [4 // groups] * groups


@pytest.mark.parametrize("exhaustive", WAYS)
def test_the_choice_follows_the_experts_when_these_are_permuted(exhaustive: int) -> None:
    bank, order = random_bank(6), torch.tensor([3, 0, 5, 4, 1, 2])
    stats, scores = random_stats(bank, sample=40), torch.rand(6, dtype=torch.float64)
    selector = BestSubset(exhaustive=exhaustive)
    kept = selector.select(bank, scores, 3, stats).kept
    shuffled = selector.select(permute_experts(bank, order), scores[order], 3, permute_stats(stats, order)).kept
    assert order[shuffled].sort().values.tolist() == kept.tolist()


def test_groups_shrink_in_turn() -> None:
    """Group 0 is cheaper throughout, and still gives up no more experts than group 1."""
    dims = random_bank(8, groups=2, top_k=2).dims
    gone = eliminate(dims, 4, lambda left, candidates: [float(expert) for expert in candidates])
    assert gone == [(0, 0.0), (4, 4.0), (1, 1.0), (5, 5.0)]
