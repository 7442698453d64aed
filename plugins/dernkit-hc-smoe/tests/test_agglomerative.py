"""The clusters are those of the definition, and the representatives are the best of each."""

from typing import Any

import pytest
import reference
import torch
from dernkit_hc_smoe import Agglomerative

from dernkit.errors import CheckpointError
from dernkit.kernel.planning import plan_from_scores
from dernkit.testing.banks import permute_experts, permute_stats, random_bank, random_stats
from dernkit.types import ExpertBank, LayerStats, Retention

LINKAGES = ("average", "complete", "ward", "single")
FEATURES = ("sampled-outputs", "routed-outputs", "weights", "router-logits")
every_linkage = pytest.mark.parametrize("linkage", LINKAGES)
every_feature = pytest.mark.parametrize("features", FEATURES)


def seen(bank: ExpertBank, stats: LayerStats, features: str) -> list[list[float]]:
    """What is compared, by its definition."""
    if features == "sampled-outputs":
        return [bank.output(e, stats["sample"]).double().mean(0).tolist() for e in range(bank.dims.experts)]
    if features == "routed-outputs":
        return (stats["output_sum"] / stats["routed"][:, None]).tolist()
    if features == "router-logits":
        return (stats["sample"].double() @ bank.router.double().T).T.tolist()
    return [bank.segments(e).flatten().double().tolist() for e in range(bank.dims.experts)]


def scored(experts: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def clusters(retention: Retention) -> dict[int, frozenset[int]]:
    """Kept expert -> all experts of its group."""
    assert retention.group is not None
    members = [(retention.group == i).nonzero().flatten().tolist() for i in range(len(retention.kept))]
    return dict(zip(retention.kept.tolist(), map(frozenset, members), strict=True))


@every_linkage
@every_feature
@pytest.mark.parametrize("kind", [{}, {"gated": False}], ids=["gated", "plain"])
@pytest.mark.parametrize("count", [1, 3, 6, 9])
def test_the_clusters_are_those_of_the_definition(linkage: Any, features: Any, kind: dict, count: int) -> None:
    bank = random_bank(10, 3, 4, seed=count, **kind)
    stats = random_stats(bank, seed=count)
    found = clusters(Agglomerative(linkage, features).select(bank, scored(10), count, stats))
    assert set(found.values()) == reference.agglomerative(seen(bank, stats, features), linkage, count)
    assert len(found) == count


@every_linkage
def test_the_highest_score_of_each_cluster_stays_and_of_a_tie_the_lowest_index(linkage: Any) -> None:
    bank = random_bank(8, 3, 4)
    for score in (scored(8), torch.zeros(8, dtype=torch.float64)):
        for kept, members in clusters(Agglomerative(linkage).select(bank, score, 3, random_stats(bank))).items():
            assert kept == min(members, key=lambda e: (-score[e], e))


@every_feature
def test_clusters_stay_inside_the_routers_groups_and_are_equally_many_in_each(features: Any) -> None:
    bank = random_bank(8, 3, 4, groups=2)
    stats = random_stats(bank)
    found = clusters(Agglomerative(features=features).select(bank, scored(8), 4, stats))
    points = seen(bank, stats, features)
    first = reference.agglomerative(points[:4], "average", 2)
    second = {frozenset(4 + i for i in members) for members in reference.agglomerative(points[4:], "average", 2)}
    assert set(found.values()) == first | second


def test_router_groups_of_one_expert_each_can_be_kept_as_they_are() -> None:
    bank = random_bank(4, 3, 4, groups=4)
    retention = Agglomerative().select(bank, scored(4), 4, random_stats(bank))
    assert retention.kept.tolist() == retention.group.tolist() == [0, 1, 2, 3]


@every_linkage
@every_feature
def test_experts_in_another_order_make_the_same_clusters_even_where_distances_tie(linkage: Any, features: Any) -> None:
    bank, order, score = random_bank(8, 3, 4), torch.tensor([5, 2, 7, 0, 3, 6, 1, 4]), scored(8)
    stats = random_stats(bank)
    for tensor in (bank.gate, bank.up, bank.down, bank.router, stats["output_sum"]):
        tensor[[1, 2, 6]] = tensor[[4]]
    stats["routed"].fill_(7)
    selector = Agglomerative(linkage, features)
    here = clusters(selector.select(bank, score, 6, stats))
    there = clusters(selector.select(permute_experts(bank, order), score[order], 6, permute_stats(stats, order)))
    names = order.tolist()
    assert {names[kept]: frozenset(names[e] for e in members) for kept, members in there.items()} == here


@every_feature
def test_only_what_is_required_is_read_and_nothing_is_changed(features: Any) -> None:
    bank, score = random_bank(6, 3, 4), scored(6)
    stats = random_stats(bank)
    before = [tensor.clone() for tensor in (bank.gate, bank.up, bank.down, score, *stats.values.values())]
    plan_from_scores(bank, stats, score, 3, Agglomerative(features=features), None)
    assert all(map(torch.equal, before, (bank.gate, bank.up, bank.down, score, *stats.values.values())))


def test_experts_without_tokens_are_compared_as_if_they_put_out_nothing() -> None:
    bank = random_bank(4, 3, 2)
    values = {"routed": torch.tensor([0.0, 5, 0, 5], dtype=torch.float64), "output_sum": torch.zeros(4, 2).double()}
    values["output_sum"][[1, 3]] = torch.tensor([[9.0, 1.0], [1.0, 9.0]], dtype=torch.float64)
    found = clusters(Agglomerative(features="routed-outputs").select(bank, scored(4), 3, LayerStats(5, values)))
    assert frozenset({0, 2}) in found.values()


def test_what_cannot_be_compared_is_refused() -> None:
    bank = random_bank(4, 3, 2, layer=7)
    stats = random_stats(bank)
    bank.up[2, 1, 0] = torch.nan
    with pytest.raises(CheckpointError, match=r"^selector .*, layer 7: weights must be finite to be compared\."):
        Agglomerative(features="weights").select(bank, scored(4), 2, stats)
    object.__setattr__(bank, "route", None)
    with pytest.raises(CheckpointError, match=r"layer 7: tokens must be routed again for router-logits\."):
        Agglomerative(features="router-logits").select(bank, scored(4), 2, stats)
