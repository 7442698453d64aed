"""What is decided for one layer, and what components see of it; `test_contracts` has those that break a law."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch

from dernkit.builtin.assigners import Affinity
from dernkit.builtin.scorers import GateMass
from dernkit.builtin.selectors import TopScore
from dernkit.errors import ContractError
from dernkit.kernel import calls
from dernkit.kernel.planning import plan_from_scores, plan_layer
from dernkit.testing.banks import random_bank, random_stats
from dernkit.types import Assignment, ExpertBank, LayerStats, Retention

BANK = random_bank(4, 5, 3, layer=7)
STATS = random_stats(BANK)


@dataclass(frozen=True)
class Scripted:
    """A scorer and an assigner that do what they are told."""

    result: Callable[[LayerStats], object]
    name: ClassVar[str] = "scripted"
    needs_groups: ClassVar[bool] = False
    requires: frozenset[str] = field(default=frozenset())

    def score(self, bank: ExpertBank, stats: LayerStats) -> torch.Tensor:
        return self.result(stats)

    def assign(self, bank: ExpertBank, retention: Retention, stats: LayerStats) -> Assignment:
        return self.result(stats)


def test_components_see_only_the_statistics_that_they_declare() -> None:
    with pytest.raises(ContractError, match="statistic 'routed': must be declared"):
        calls.score(Scripted(lambda stats: stats["routed"]), BANK, STATS)
    scorer = Scripted(lambda stats: stats["routed"], requires=frozenset({"routed"}))
    assert torch.equal(calls.score(scorer, BANK, STATS), STATS["routed"])
    with pytest.raises(ContractError, match="statistic 'sample': must be declared"):
        plan_layer(BANK, STATS, GateMass(), 2, TopScore(), Scripted(lambda stats: stats["sample"]))


def moves(source: list, target: list, partner: list, affinity: list) -> Assignment:
    return Assignment(
        torch.tensor(source, dtype=torch.int64),
        torch.tensor(target, dtype=torch.int64),
        torch.tensor(partner, dtype=torch.int64),
        torch.tensor(affinity),
    )


def test_one_segment_may_go_to_several_experts() -> None:
    scores = torch.tensor([4, 3, 2, 1], dtype=torch.float64)
    both = moves([10, 10], [0, 1], [0, 0], [1.0, 1.0])
    plan = plan_from_scores(BANK, STATS, scores, 2, TopScore(), Scripted(lambda stats: both))
    assert plan.pool_sizes() == [6, 6]


def test_a_plan_holds_the_decisions() -> None:
    plan = plan_layer(BANK, STATS, GateMass(), 2, TopScore(), Affinity(quantile=0.5))
    assert (plan.layer, plan.experts, plan.width) == (7, 4, 5)
    assert plan.kept.tolist() == torch.topk(plan.scores, 2).indices.sort().values.tolist()
    assert len(plan.assignment) == 5


def test_no_assigner_discards_and_keeping_all_asks_none() -> None:
    assert len(plan_layer(BANK, STATS, GateMass(), 2, TopScore(), None).assignment) == 0
    assert (
        len(plan_layer(BANK, STATS, GateMass(), 4, TopScore(), Scripted(lambda stats: pytest.fail("asked"))).assignment)
        == 0
    )


def test_groups_are_respected() -> None:
    bank = random_bank(8, 3, 3, groups=2)
    plan = plan_layer(bank, random_stats(bank), GateMass(), 4, TopScore(), None)
    assert int((plan.kept < 4).sum()) == 2
