import pytest
import torch

from dernkit.builtin.scorers import GateMass, Random, Reap, RouterFrequency
from dernkit.kernel.planning import score_layer
from dernkit.testing.banks import random_bank
from dernkit.types import LayerStats

BANK = random_bank(3)


def stats(tokens: int, **values: list[float]) -> LayerStats:
    return LayerStats(tokens, {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()})


def test_router_frequency_is_a_share_of_all_tokens() -> None:
    assert RouterFrequency().score(BANK, stats(10, routed=[5, 10, 0])).tolist() == [0.5, 1.0, 0.0]


def test_gate_mass_divides_by_all_tokens_not_by_routed_ones() -> None:
    seen = stats(10, routed=[1, 10, 0], gate_sum=[1.0, 4.0, 0.0])
    assert GateMass().score(BANK, seen).tolist() == [0.1, 0.4, 0.0]


def test_reap_divides_by_routed_tokens() -> None:
    seen = stats(10, routed=[1, 10, 0], reap_sum=[1.0, 4.0, 0.0])
    assert Reap().score(BANK, seen).tolist() == [1.0, 0.4, 0.0]


@pytest.mark.parametrize("scorer", [RouterFrequency(), GateMass(), Reap(), Random()])
@pytest.mark.parametrize("tokens", [0, 10])
def test_experts_without_tokens_have_finite_scores(scorer: object, tokens: int) -> None:
    dead = stats(tokens, routed=[0, 0, 0], gate_sum=[0, 0, 0], reap_sum=[0, 0, 0])
    assert bool(score_layer(BANK, dead, scorer).isfinite().all())


def test_random_depends_on_seed_and_layer_only() -> None:
    def draw(seed: int, layer: int) -> list[float]:
        return Random(seed=seed).score(random_bank(3, layer=layer), LayerStats(0)).tolist()

    assert draw(0, 0) == draw(0, 0)
    assert len({tuple(draw(seed, layer)) for seed in range(2) for layer in range(2)}) == 4
