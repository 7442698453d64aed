"""What an expert is worth is what a hand would count, whatever the order of experts and tokens."""

from fractions import Fraction

import pytest
import reference
import torch
from dernkit_shape import CoalitionShapley

from dernkit.errors import CheckpointError
from dernkit.kernel import calls
from dernkit.testing.banks import permute_experts, random_bank, random_stats
from dernkit.types import ExpertBank, LayerStats, Routing


def routed(chosen: list[list[int]], experts: int = 4, weights: list[list[float]] | None = None) -> ExpertBank:
    """A bank whose router chooses these experts for the tokens of the sample, in their order."""
    picks = torch.tensor(chosen)
    given = torch.ones(picks.shape) if weights is None else torch.tensor(weights)
    bank = random_bank(experts, 3, 2, top_k=picks.shape[1], layer=7)
    object.__setattr__(bank, "route", lambda inputs, among: Routing(picks, given, torch.zeros(len(picks), experts)))
    return bank


def scored(bank: ExpertBank, scorer: CoalitionShapley | None = None, tokens: int = 64) -> torch.Tensor:
    return calls.score(scorer or CoalitionShapley(), bank, random_stats(bank, sample=tokens))


def test_the_worth_of_four_experts_as_a_hand_counts_it() -> None:
    # v: 01 three times, 02 once, 12 twice, 13 once. n: of 0 four, of 1 six, of 2 three, of 3 one.
    tokens = [[0, 1]] * 3 + [[2, 0]] + [[1, 2]] * 2 + [[3, 1]]
    # 0: ratios 3/6 and 1/3, so 3 - 2 + 1 - 1. 1: 3/4, 2/3 and 1/1, so 3 - 8/3 + 2 - 2 + 1 - 2/3.
    # 2: 1/4 and 2/6, so 1 - 1 + 2 - 6/4. 3: 1/6 alone.
    assert (scored(routed(tokens)) * 7).tolist() == pytest.approx([1, 2 / 3, 1 / 2, 0], abs=1e-15)


@pytest.mark.parametrize("top_k", [2, 3, 4])
@pytest.mark.parametrize("tokens", [1, 30, 500])
@pytest.mark.parametrize("subtract", [1.0, 0.75, 0.0])
def test_the_worth_is_that_of_the_definition(top_k: int, tokens: int, subtract: float) -> None:
    rng = torch.Generator().manual_seed(top_k)
    chosen = torch.rand(tokens, 7, generator=rng).argsort(dim=1)[:, :top_k].tolist()
    found = scored(routed(chosen, experts=9), CoalitionShapley(subtract=subtract))
    slow = reference.contributions(chosen, 9, Fraction(subtract))
    torch.testing.assert_close(
        found, torch.tensor([float(x) for x in slow], dtype=torch.float64), rtol=1e-12, atol=1e-12
    )
    assert found[7:].tolist() == [0, 0], "never chosen"


def test_the_models_own_router_says_what_the_coalitions_are() -> None:
    bank = random_bank(8, 3, 4, top_k=3)
    stats = random_stats(bank, sample=200)
    chosen = (stats["sample"] @ bank.router.T).argsort(dim=1, descending=True)[:, :3].tolist()
    slow = [float(x) for x in reference.contributions(chosen, 8)]
    assert calls.score(CoalitionShapley(), bank, stats).tolist() == pytest.approx(slow, abs=1e-12)


def test_without_subtraction_it_is_the_routing_frequency() -> None:
    tokens = [[0, 1]] * 3 + [[2, 0]] + [[1, 2]] * 2 + [[3, 1]]
    assert (scored(routed(tokens), CoalitionShapley(subtract=0.0)) * 7).tolist() == pytest.approx([4, 6, 3, 1])


def test_an_expert_whose_partners_nobody_else_completes_is_worth_nothing_as_published() -> None:
    tokens = [[0, 1]] * 5 + [[2, 3]]
    assert scored(routed(tokens)).tolist() == [0, 0, 0, 0]
    almost = scored(routed(tokens), CoalitionShapley(subtract=0.5))
    assert almost[0] == almost[1] > almost[2] == almost[3] > 0


def test_choices_without_a_weight_and_identity_experts_are_in_no_coalition() -> None:
    tokens, weights = [[0, 1, 2], [0, 1, 3], [0, 4, 1], [2, 3, 0]], [[1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 1, 1]]
    found = scored(routed(tokens, weights=weights))
    slow = reference.contributions([[0, 1], [0, 1, 3], [0, 1], [2, 3, 0]], 4)
    assert found.tolist() == pytest.approx([float(x) for x in slow], abs=1e-15)


def test_experts_and_tokens_in_another_order_are_worth_the_same() -> None:
    bank, order = random_bank(8, 3, 4), torch.tensor([5, 2, 7, 0, 3, 6, 1, 4])
    stats = random_stats(bank, sample=300)
    scores = calls.score(CoalitionShapley(), bank, stats)
    assert torch.equal(calls.score(CoalitionShapley(), permute_experts(bank, order), stats), scores[order])
    turned = LayerStats(stats.tokens, {name: value.flip(0) for name, value in stats.values.items()}, 300)
    assert torch.equal(calls.score(CoalitionShapley(), bank, turned), scores)
    assert float(scores.min()) >= 0 and float(scores.max()) > 0


def test_routers_without_coalitions_are_refused() -> None:
    with pytest.raises(CheckpointError) as caught:
        scored(random_bank(4, 3, 2, top_k=1, layer=7))
    assert str(caught.value) == (
        "scorer 'coalition-shapley', layer 7: the router must choose at least 2 experts for a token, else there are "
        "no coalitions. Got 1 instead. Use another scorer."
    )
    bank = random_bank(4, 3, 2, layer=7)
    object.__setattr__(bank, "route", None)
    with pytest.raises(CheckpointError, match=r"layer 7: sampled tokens must be routed again\. Got an adapter that"):
        scored(bank)
