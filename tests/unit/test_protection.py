from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dernkit.builtin.output_scorers import RankedChoice
from dernkit.builtin.protection import Protect
from dernkit.builtin.scorers import GateMass, Random, RouterFrequency
from dernkit.builtin.weight_scorers import WeightNorm
from dernkit.errors import CheckpointError, ContractError, RecipeError
from dernkit.kernel import calls
from dernkit.recipe import load_recipe
from dernkit.registry import Registry
from dernkit.testing.banks import copy_expert, permute_experts, permute_stats, random_bank, random_stats
from dernkit.types import ExpertBank, LayerStats, Routing


def frequency(*experts: str, **options: Any) -> Protect:
    return Protect(scorer=RouterFrequency(), experts=experts, **{"super_experts": False, **options})


def lifted(scorer: Protect, routed: list[float], layer: int = 3) -> list[float]:
    """Scores by how often experts are chosen, in a layer of 10 tokens."""
    bank = random_bank(len(routed), layer=layer)
    stats = LayerStats(10, {"routed": torch.tensor(routed, dtype=torch.float64)})
    return [10 * score for score in calls.score(scorer, bank, stats).tolist()]


def loud(expert: int, factor: float) -> ExpertBank:
    bank = random_bank(6)
    bank.down[expert] *= factor
    return bank


def test_a_named_expert_is_just_above_the_best_of_the_others() -> None:
    assert lifted(frequency("3:1"), [5, 1, 9, 7]) == pytest.approx([5, 9, 9, 7])
    assert lifted(frequency("3:1"), [5, 1, 9, 7])[1] > 9


def test_protected_experts_keep_their_own_order_and_what_is_high_enough_stays() -> None:
    scores = lifted(frequency("3:0", "3:1", "3:3", "3:4"), [5, 1, 7, 9, 1])
    assert scores[2:4] == [7, 9]
    assert 7 < scores[1] == scores[4] < scores[0] < 9


def test_other_layers_are_left_alone() -> None:
    assert lifted(frequency("3:1"), [5, 1, 9, 7], layer=4) == [5, 1, 9, 7]


def test_where_all_are_protected_nothing_changes() -> None:
    assert lifted(frequency("3:0", "3:1"), [5, 1]) == [5, 1]


def test_a_loud_expert_is_a_super_expert() -> None:
    bank = loud(4, 100)
    stats = random_stats(bank, sample=64)
    assert int(Protect(scorer=WeightNorm(parts=("up",))).score(bank, stats).argmax()) == 4
    plain = WeightNorm(parts=("up",)).score(bank, stats)
    assert torch.equal(Protect(scorer=WeightNorm(parts=("up",)), factor=1e6).score(bank, stats), plain)


def test_what_an_expert_would_make_of_other_experts_tokens_does_not_count() -> None:
    bank, scorer = loud(4, 100), WeightNorm(parts=("up",))
    sample = random_stats(bank, sample=64)["sample"]
    others = sample[(bank.route(sample).chosen != 4).all(dim=1)]
    plain = scorer.score(bank, LayerStats(0))
    assert torch.equal(Protect(scorer=scorer).score(bank, LayerStats(64, {"sample": others})), plain)
    assert not torch.equal(Protect(scorer=scorer).score(bank, LayerStats(64, {"sample": sample})), plain)


def test_coefficients_that_come_before_the_experts_count() -> None:
    """Of a twin pair the one that sees inputs 100 times as large is loud."""
    bank = copy_expert(random_bank(4, top_k=1), 1, 3, torch.arange(8))
    coefficients = torch.tensor([1.0, 1.0, 1.0, 100.0])
    chosen = torch.arange(8)[:, None] % 4
    routing = Routing(chosen, coefficients[chosen], torch.zeros(8, 4))
    stats = LayerStats(8, {"sample": random_stats(bank, sample=1)["sample"].expand(8, -1)})
    for on_input, best in ((True, 3), (False, 0)):
        bank = replace(bank, coefficient_on_input=on_input, route=lambda inputs, experts=None: routing)
        assert int(Protect(scorer=Falling()).score(bank, stats).argmax()) == best


class Falling:
    """Scores that fall with the index."""

    name, requires = "falling", frozenset()

    def score(self, bank: ExpertBank, stats: LayerStats) -> torch.Tensor:
        return torch.arange(bank.dims.experts, 0, -1, dtype=torch.float64)


@pytest.mark.parametrize("factor", [1.0, 1.2])
def test_super_experts_follow_when_experts_are_permuted(factor: float) -> None:
    bank, order = random_bank(6), torch.tensor([3, 0, 5, 4, 1, 2])
    stats = random_stats(bank, sample=64)
    scores = calls.score(Protect(factor=factor), bank, stats)
    shuffled = calls.score(Protect(factor=factor), permute_experts(bank, order), permute_stats(stats, order))
    assert torch.equal(shuffled, scores[order])


def test_it_reads_what_the_other_scorer_reads_and_the_sample_for_super_experts() -> None:
    assert frequency("0:1").requires == {"routed"}
    assert Protect(scorer=GateMass()).requires == {"gate_sum", "sample"}
    assert Protect(scorer=RankedChoice(), experts=("0:1",), super_experts=False).requires == {"sample"}


def test_the_other_scorer_sees_no_more_than_it_asked_for() -> None:
    class Greedy:
        name, requires = "greedy", frozenset({"routed"})

        def score(self, bank: ExpertBank, stats: LayerStats) -> torch.Tensor:
            return stats["sample"][:, 0].double()

    bank = random_bank()
    with pytest.raises(ContractError, match="statistic 'sample': must be declared"):
        Protect(scorer=Greedy()).score(bank, random_stats(bank))


def test_a_broken_other_scorer_is_named() -> None:
    class Short:
        name, requires = "short", frozenset()

        def score(self, bank: ExpertBank, stats: LayerStats) -> torch.Tensor:
            return torch.ones(1)

    with pytest.raises(ContractError, match=r"^scorer 'short', layer 0: score must "):
        Protect(scorer=Short(), experts=("0:1",), super_experts=False).score(random_bank(), LayerStats(0))


@pytest.mark.parametrize(
    ("experts", "found"),
    [
        (("3:1", "3-2"), r"'3-2'"),
        (("3:-1",), r"'3:-1'"),
        (("17",), r"'17'"),
        (("",), r"''"),
        (("3:٣",), r"'3:٣'"),
        (("3:17", "03:017"), "one of them twice"),
    ],
)
def test_names_of_experts_are_layer_and_expert(experts: tuple, found: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^experts: must be names like '3:17' .* Got {found} instead\. Correct it\.$"
    ):
        Protect(experts=experts)


def test_nobody_to_protect_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^experts: must name someone .* Got nobody to protect instead\. Name an"):
        Protect(super_experts=False)


def test_an_expert_that_the_layer_does_not_have_is_refused() -> None:
    with pytest.raises(
        RecipeError,
        match=r"^scorer 'protect', layer 3: experts must have numbers from 0 to 3\. Got '3:4' instead\. "
        r"Correct it in `experts`\.$",
    ):
        lifted(frequency("3:4"), [5, 1, 9, 7])


def test_super_experts_need_a_router_to_ask_and_named_ones_do_not() -> None:
    bank = replace(random_bank(), route=None)
    with pytest.raises(CheckpointError, match=r"^layer 0: the model's router must be at hand"):
        Protect(scorer=Random()).score(bank, random_stats(bank))
    named = Protect(scorer=Random(), experts=("0:2",), super_experts=False)
    assert int(named.score(bank, LayerStats(0)).argmax()) == 2


def test_recipes_name_the_other_scorer_and_the_experts(tmp_path: Path) -> None:
    text = "{dernkit: 1, plan: {keep: 2, score: {use: protect, scorer: {use: random}, experts: ['3:1', '3:0'], %s}}}"
    (tmp_path / "recipe.yaml").write_text(text % "super_experts: false")
    recipe = load_recipe(tmp_path / "recipe.yaml", Registry.load(entry_points=False))
    assert recipe.plan.scorer == Protect(scorer=Random(), experts=("3:1", "3:0"), super_experts=False)
    (tmp_path / "recipe.yaml").write_text(text % "factor: 20")
    with pytest.raises(RecipeError, match="calibrate: must be given"):
        load_recipe(tmp_path / "recipe.yaml", Registry.load(entry_points=False))
