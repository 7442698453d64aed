from dataclasses import replace

import pytest
import torch

from dernkit.builtin.expert_similarities import ExpertOutput, ExpertWeights, RouterLogits
from dernkit.errors import CheckpointError
from dernkit.testing.banks import copy_expert, random_bank, random_stats
from dernkit.types import Routing

KEPT = torch.tensor([0, 2])
WIDTH = 5


def test_every_neuron_has_its_experts_affinity_and_its_own_place() -> None:
    bank = random_bank(3, WIDTH, 4)
    for similarity in (ExpertOutput(), RouterLogits(), ExpertWeights()):
        match = similarity.match(bank, 1, KEPT, random_stats(bank))
        assert torch.equal(match.affinity, match.affinity[:1].repeat(WIDTH, 1))
        assert torch.equal(match.partner, torch.arange(WIDTH)[:, None].repeat(1, 2))
        assert match.affinity[0, 0] != match.affinity[0, 1]


def test_equal_experts_have_affinity_1() -> None:
    bank = copy_expert(random_bank(3, WIDTH, 4), 2, 1, torch.arange(WIDTH))
    bank.router[1] = 3 * bank.router[2]
    stats = random_stats(bank)
    stats["output_sum"][1], stats["routed"][1] = 2 * stats["output_sum"][2], 2 * stats["routed"][2]
    every = [ExpertWeights()]
    every += [RouterLogits(metric=metric) for metric in ("cosine", "pearson")]
    every += [ExpertOutput(metric=metric) for metric in ("cosine", "euclidean")]
    for similarity in every:
        affinity = similarity.match(bank, 1, KEPT, stats).affinity
        assert torch.equal(affinity[:, 1], torch.ones(WIDTH)) and bool((affinity[:, 0] < 1).all())


def test_euclidean_affinity_falls_with_the_distance() -> None:
    bank = random_bank(4, WIDTH, 4)
    stats = random_stats(bank)
    means = stats["output_sum"] / stats["routed"][:, None]
    affinity = ExpertOutput(metric="euclidean").match(bank, 0, torch.tensor([1, 2, 3]), stats).affinity[0]
    assert torch.equal((means[1:] - means[0]).norm(dim=1).argsort(), affinity.argsort(descending=True))


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("dead", [0, 1])
def test_an_expert_without_tokens_is_like_no_other(metric: str, dead: int) -> None:
    bank = random_bank(3, WIDTH, 4)
    stats = random_stats(bank)
    stats["routed"][dead] = stats["output_sum"][dead] = 0
    affinity = ExpertOutput(metric=metric).match(bank, 1, KEPT, stats).affinity[0]
    assert affinity[0] == 0 and (affinity[1] == 0) == (dead == 1)


def test_logits_are_those_of_all_experts_on_the_routers_inputs() -> None:
    bank = random_bank(3, WIDTH, 4)
    stats = random_stats(bank)
    asked = []
    route = bank.route

    def watched(inputs, experts):
        asked.append((inputs, experts))
        return route(inputs, experts)

    other = torch.randn(16, 4, generator=torch.Generator().manual_seed(9))
    stats = replace(stats, values={**stats.values, "router_sample": other})
    RouterLogits().match(replace(bank, route=watched), 1, KEPT, stats)
    assert len(asked) == 1 and asked[0][0] is other and asked[0][1] is None


def test_a_router_that_cannot_route_again_is_refused() -> None:
    bank = replace(random_bank(layer=7), route=None)
    with pytest.raises(CheckpointError, match="'router-logits', layer 7: tokens must be routed again for logits"):
        RouterLogits().match(bank, 1, KEPT, random_stats(bank))


def test_logits_must_be_finite() -> None:
    bank = random_bank(layer=7)

    def route(inputs, experts):
        return Routing(torch.zeros(16, 2, dtype=torch.int64), torch.ones(16, 2), torch.full((16, 4), -torch.inf))

    with pytest.raises(CheckpointError, match="'router-logits', layer 7: the router's logits must be finite"):
        RouterLogits().match(replace(bank, route=route), 1, KEPT, random_stats(bank))


def test_broken_weights_are_refused() -> None:
    bank = random_bank(layer=7)
    bank.up[2, 0, 0] = torch.nan
    with pytest.raises(CheckpointError, match="layer 7, expert 2: weights must be finite"):
        ExpertWeights().match(bank, 1, KEPT, random_stats(bank))
