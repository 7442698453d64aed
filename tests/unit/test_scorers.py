from typing import Any

import pytest
import torch

from dernkit.builtin.scorers import Ean, GateMass, Man, Msan, Random, Reap, RouterFrequency
from dernkit.kernel import calls
from dernkit.testing.banks import permute_experts, permute_stats, random_bank, random_stats
from dernkit.types import LayerStats

BANK = random_bank(3)
STATISTICS = ("routed", "gate_sum", "output_norm_sum", "output_sq_sum", "reap_sum")
MEANS = [scorer(normalise=normalise) for scorer in (GateMass, Man, Msan, Reap) for normalise in ("routed", "all")]
SCORERS = [RouterFrequency(), Ean(), *MEANS]


def name(scorer: Any) -> str:
    return f"{scorer.name}-{getattr(scorer, 'normalise', 'as it is')}"


def stats(tokens: int, **values: list[float]) -> LayerStats:
    return LayerStats(tokens, {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()})


def test_router_frequency_is_a_share_of_all_tokens() -> None:
    assert RouterFrequency().score(BANK, stats(10, routed=[5, 10, 0])).tolist() == [0.5, 1.0, 0.0]


def test_gate_mass_divides_by_all_tokens_not_by_routed_ones() -> None:
    seen = stats(10, routed=[1, 10, 0], gate_sum=[1.0, 4.0, 0.0])
    assert GateMass().score(BANK, seen).tolist() == [0.1, 0.4, 0.0]


@pytest.mark.parametrize(("scorer", "total"), [(Reap, "reap_sum"), (Man, "output_norm_sum"), (Msan, "output_sq_sum")])
def test_reap_man_and_msan_divide_by_routed_tokens(scorer: Any, total: str) -> None:
    seen = stats(10, routed=[1, 10, 0], **{total: [1.0, 4.0, 0.0]})
    assert scorer().score(BANK, seen).tolist() == [1.0, 0.4, 0.0]


def test_ean_is_a_sum() -> None:
    assert Ean().score(BANK, stats(10, output_norm_sum=[1.0, 4.0, 0.0])).tolist() == [1.0, 4.0, 0.0]


@pytest.mark.parametrize("scorer", MEANS, ids=name)
def test_normalise_says_what_the_sum_is_divided_by(scorer: Any) -> None:
    seen = stats(10, **{key: [2.0, 8.0, 0.0] for key in STATISTICS} | {"routed": [1, 4, 0]})
    assert scorer.score(BANK, seen).tolist() == ([0.2, 0.8, 0.0] if scorer.normalise == "all" else [2.0, 2.0, 0.0])


def test_gate_mass_counts_routed_tokens_only_where_it_divides_by_them() -> None:
    assert GateMass().requires == {"gate_sum"}
    assert GateMass(normalise="routed").requires == {"gate_sum", "routed"}


@pytest.mark.parametrize("scorer", [*SCORERS, Random()], ids=name)
@pytest.mark.parametrize("tokens", [0, 10])
def test_experts_without_tokens_have_finite_scores(scorer: Any, tokens: int) -> None:
    dead = stats(tokens, **{key: [0, 0, 0] for key in STATISTICS})
    assert bool(calls.score(scorer, BANK, dead).isfinite().all())


@pytest.mark.parametrize("scorer", SCORERS, ids=name)
def test_scores_follow_the_experts_when_these_are_permuted(scorer: Any) -> None:
    bank, order = random_bank(5), torch.tensor([3, 0, 4, 1, 2])
    shuffled = calls.score(scorer, permute_experts(bank, order), permute_stats(random_stats(bank), order))
    assert torch.equal(shuffled, calls.score(scorer, bank, random_stats(bank))[order])


def test_random_depends_on_seed_and_layer_only() -> None:
    def draw(seed: int, layer: int) -> list[float]:
        return Random(seed=seed).score(random_bank(3, layer=layer), LayerStats(0)).tolist()

    assert draw(0, 0) == draw(0, 0)
    assert len({tuple(draw(seed, layer)) for seed in range(2) for layer in range(2)}) == 4
