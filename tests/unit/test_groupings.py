"""Selectors that group: the groups are those that a hand would make, in any order of the experts."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from dernkit.api import Match
from dernkit.builtin.groupings import DominantExpert, PseudoPruning
from dernkit.builtin.selectors import TopScore
from dernkit.errors import ContractError, RecipeError
from dernkit.kernel.planning import plan_from_scores
from dernkit.testing.banks import permute_experts, random_bank, random_stats
from dernkit.types import ExpertBank, LayerStats, Retention

BANK = random_bank(6, 3, 2, layer=7)
STATS = random_stats(BANK)
SCORES = torch.tensor([0.1, 0.9, 0.2, 0.8, 0.3, 0.4], dtype=torch.float64)
# Rows: dropped expert 0, 2, 4 and 5. Columns: kept expert 1 and 3.
AFFINITY = {0: (0.9, 0.1), 2: (0.8, 0.7), 4: (0.3, 0.6), 5: (0.5, 0.5)}


@dataclass(frozen=True)
class Written:
    """A similarity whose mean affinities are written down; the neurons of an expert differ around them."""

    rows: tuple = tuple(AFFINITY.items())
    name: ClassVar[str] = "written"
    requires: ClassVar[frozenset[str]] = frozenset({"routed"})

    def match(self, bank: ExpertBank, dropped: int, kept: torch.Tensor, stats: LayerStats) -> Match:
        assert set(stats.values) == {"routed"}
        around = torch.tensor([[-0.1], [0.0], [0.1]])
        affinity = torch.tensor([dict(self.rows)[dropped]]) + around
        return Match(affinity, torch.zeros_like(affinity, dtype=torch.int64))


def named(retention: Retention) -> dict[int, list[int]]:
    """Kept expert -> the others of its group."""
    assert retention.group is not None
    groups = {kept: (retention.group == i).nonzero().flatten() for i, kept in enumerate(retention.kept.tolist())}
    return {kept: [expert for expert in members.tolist() if expert != kept] for kept, members in groups.items()}


def test_each_expert_joins_the_dominant_one_with_the_highest_mean_affinity() -> None:
    retention = DominantExpert(similarity=Written()).select(BANK, SCORES, 2, STATS)
    assert retention.kept.tolist() == [1, 3]
    assert named(retention) == {1: [0, 2, 5], 3: [4]}, "5 is a tie, which goes to the lowest index"


def test_the_best_expert_fills_its_group_before_the_next_one_takes_any() -> None:
    size = {limit: PseudoPruning(similarity=Written(), group_size=limit) for limit in (3, 4, 5)}
    found = {limit: named(selector.select(BANK, SCORES, 2, STATS)) for limit, selector in size.items()}
    assert found == {3: {1: [0, 2], 3: [4, 5]}, 4: {1: [0, 2, 5], 3: [4]}, 5: {1: [0, 2, 4, 5], 3: []}}


def test_experts_can_be_compared_by_the_mean_of_two_similarities() -> None:
    other = Written(tuple({0: (0.0, 1.0), 2: (0.0, 0.0), 4: (1.0, 0.0), 5: (0.0, 0.0)}.items()))
    selector = PseudoPruning(similarity=Written(), second_similarity=other, group_size=3)
    assert named(selector.select(BANK, SCORES, 2, STATS)) == {1: [0, 4], 3: [2, 5]}


def test_a_group_size_that_leaves_experts_without_a_group_is_refused() -> None:
    with pytest.raises(RecipeError) as caught:
        PseudoPruning(group_size=2).select(BANK, SCORES, 2, STATS)
    assert str(caught.value) == (
        "selector 'pseudo-pruning', layer 7: group_size must be at least 3 for 6 experts in 2 groups. "
        "Got 2 instead. Raise it, or keep more experts."
    )


@pytest.mark.parametrize("selector", [DominantExpert(), PseudoPruning()], ids=lambda selector: selector.name)
def test_the_kept_ones_are_equally_many_in_each_of_the_routers_groups_and_groups_may_cross_them(selector) -> None:
    bank = random_bank(8, 3, 2, groups=2)
    bank.up[0], bank.down[0] = bank.up[7], bank.down[7]
    scores = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8], dtype=torch.float64)
    retention = selector.select(bank, scores, 4, LayerStats(0))
    assert retention.kept.tolist() == [2, 3, 6, 7]
    assert 0 in named(retention)[7]


@pytest.mark.parametrize("selector", [DominantExpert(), PseudoPruning()], ids=lambda selector: selector.name)
def test_experts_in_another_order_make_the_same_groups(selector) -> None:
    bank, order = random_bank(8, 3, 4), torch.tensor([5, 2, 7, 0, 3, 6, 1, 4])
    scores = torch.rand(8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    here = named(selector.select(bank, scores, 3, LayerStats(0)))
    there = named(selector.select(permute_experts(bank, order), scores[order], 3, LayerStats(0)))
    names = order.tolist()
    assert {names[kept]: sorted(names[e] for e in members) for kept, members in there.items()} == here


@pytest.mark.parametrize("selector", [DominantExpert(), PseudoPruning()], ids=lambda selector: selector.name)
def test_nothing_that_is_read_changes(selector) -> None:
    bank, scores = random_bank(4, 3, 2), torch.rand(4, dtype=torch.float64)
    before = [tensor.clone() for tensor in (bank.up, bank.down, bank.gate, scores)]
    selector.select(bank, scores, 2, LayerStats(0))
    assert all(map(torch.equal, before, (bank.up, bank.down, bank.gate, scores)))


@pytest.mark.parametrize(("affinity", "law"), [(torch.zeros(3, 1), "shape"), (torch.full((3, 2), torch.nan), "finite")])
def test_similarities_are_held_to_their_contract(affinity: torch.Tensor, law: str) -> None:
    @dataclass(frozen=True)
    class Broken:
        name: ClassVar[str] = "broken"
        requires: ClassVar[frozenset[str]] = frozenset()

        def match(self, bank: ExpertBank, dropped: int, kept: torch.Tensor, stats: LayerStats) -> Match:
            return Match(affinity, torch.zeros(affinity.shape, dtype=torch.int64))

    with pytest.raises(ContractError, match=rf"^similarity 'broken', layer 7: affinity must be .*law {law}\)"):
        DominantExpert(similarity=Broken()).select(BANK, SCORES, 2, STATS)


def test_a_selector_requires_what_its_similarities_require() -> None:
    assert DominantExpert(similarity=Written()).requires == {"routed"}
    assert PseudoPruning(second_similarity=Written()).requires == {"routed"}
    assert PseudoPruning().requires == frozenset()


def test_a_selector_must_group_exactly_if_it_says_so() -> None:
    @dataclass(frozen=True)
    class Liar:
        groups: bool
        inner: object
        name: ClassVar[str] = "liar"
        requires: ClassVar[frozenset[str]] = frozenset()

        def select(self, bank: ExpertBank, scores: torch.Tensor, count: int, stats: LayerStats) -> Retention:
            return self.inner.select(bank, scores, count, stats)

    for liar, said in (
        (Liar(True, TopScore()), "groups, as .*groups_as_said.* Got none"),
        (Liar(False, DominantExpert()), "no groups"),
    ):
        with pytest.raises(ContractError, match=f"^selector 'liar', layer 7: select must return {said}"):
            plan_from_scores(BANK, STATS, SCORES, 2, liar, None)
