"""The fast merges against the slow formulas, and whole experts against averages by hand."""

from dataclasses import replace

import pytest
import torch

from dernkit.builtin.merges import KMeansActivation, Slerp, SphericalKMeans, WeightedAverage
from dernkit.builtin.routers import Slice
from dernkit.kernel.averaging import slerp
from dernkit.kernel.compress import compress_layer
from dernkit.testing.banks import as_bank, copy_expert, permute_neurons, random_bank, random_pool, random_stats
from dernkit.types import Assignment, ExpertBank, LayerPlan, Pool
from tests.reference import dern, merges
from tests.reference.test_dern import BANKS, close, rows

WIDTH = 8


def pool_with_stats(seed: int = 0, arrivals: int = 12, parts: int = 3, features: int = 6) -> Pool:
    stats = random_stats(random_bank(4, WIDTH, 6), seed=seed, sample=16)
    return random_pool(WIDTH, arrivals, parts, features, seed=seed, stats=stats)


def weights_of(pool: Pool, weights: str) -> tuple[float, list[float]]:
    if weights == "score":
        return pool.own_weight, pool.incoming_weight.double().tolist()
    if weights == "uniform":
        return 1.0, [1.0] * len(pool.incoming)
    routed = pool.stats["routed"].tolist()
    return routed[pool.expert], [routed[expert] for expert in pool.incoming_expert.tolist()]


every_weight = pytest.mark.parametrize("weights", ["score", "uniform", "frequency"])


@every_weight
@pytest.mark.parametrize("rescale", [True, False])
def test_weighted_average(weights: str, rescale: bool) -> None:
    pool = pool_with_stats(4)
    merged = WeightedAverage(weights=weights, rescale=rescale).merge(pool, WIDTH, torch.Generator())
    own, incoming = weights_of(pool, weights)
    partner = pool.partner.tolist()
    close(
        merged.flatten(1),
        dern.weighted_average(rows(pool.own), own, rows(pool.incoming), incoming, partner, rescale=rescale),
    )


@every_weight
@pytest.mark.parametrize("seed", range(2))
def test_spherical_kmeans(weights: str, seed: int) -> None:
    pool = pool_with_stats(seed)
    own, incoming = weights_of(pool, weights)
    segments = rows(pool.own) + rows(pool.incoming)
    merged = SphericalKMeans(weights=weights).merge(pool, WIDTH, torch.Generator())
    close(merged.flatten(1), dern.kmeans(segments, [own] * WIDTH + incoming, dern.seeds_by_gate(segments, 6, WIDTH)))


@every_weight
@pytest.mark.parametrize("options", [{}, {"equalise": False}, {"rescale": False}, {"iterations": 1}, {"init": "own"}])
@pytest.mark.parametrize(("parts", "features"), [(3, 6), (2, 6), (3, 7), (2, 7)])
def test_kmeans_activation(weights: str, options: dict, parts: int, features: int) -> None:
    pool = pool_with_stats(3, parts=parts, features=features)
    own, incoming = weights_of(pool, weights)
    merged = KMeansActivation(weights=weights, tokens=11, **options).merge(pool, WIDTH, torch.Generator())
    segments = torch.cat([pool.own, pool.incoming])
    seeds = dern.seeds_by_gate(rows(segments), features, WIDTH) if "init" not in options else list(range(WIDTH))
    slow = merges.kmeans_activation(
        segments.double().tolist(),
        [own] * WIDTH + incoming,
        seeds,
        pool.stats["sample"][:11].double().tolist(),
        **{name: value for name, value in options.items() if name != "init"},
    )
    close(merged.flatten(1), slow)


@every_weight
@pytest.mark.parametrize("along", ["part", "segment"])
@pytest.mark.parametrize("seed", range(3))
def test_slerp_merge(weights: str, along: str, seed: int) -> None:
    pool = pool_with_stats(seed, arrivals=20)
    own, incoming = weights_of(pool, weights)
    merged = Slerp(weights=weights, along=along).merge(pool, WIDTH, torch.Generator())
    slow = merges.slerp_merge(
        pool.own.double().tolist(),
        own,
        pool.incoming.double().tolist(),
        incoming,
        pool.partner.tolist(),
        pool.affinity.tolist(),
        whole=along == "segment",
    )
    close(merged.flatten(1), slow)


@pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 0.7, 1.0])
@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([1.0, 2.0, 0.5], [-0.5, 1.0, 3.0]),
        ([1.0, 2.0, 0.5], [-2.0, -4.0, -1.0]),
        ([1.0, 2.0, 0.5], [3.0, 6.0, 1.5]),
        ([0.0, 0.0, 0.0], [1.0, 2.0, 0.5]),
        ([1.0, 2.0, 0.5], [0.0, 0.0, 0.0]),
        ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0]),
        ([1.0, 0.0, 0.0], [1.0, 1e-7, 0.0]),
        ([1.0, 0.0, 0.0], [-1.0, 1e-3, 0.0]),
        ([1e-20, 0.0, 0.0], [0.0, 1e15, 0.0]),
    ],
)
def test_slerp_of_two_vectors(a: list[float], b: list[float], t: float) -> None:
    fast = slerp(torch.tensor(a), torch.tensor(b), torch.tensor(t, dtype=torch.float64))
    slow = merges.slerp([float(x) for x in torch.tensor(a)], [float(x) for x in torch.tensor(b)], t)
    torch.testing.assert_close(fast.double(), torch.tensor(slow, dtype=torch.float64), rtol=1e-6, atol=1e-6)


@every_weight
@pytest.mark.parametrize("merge", [WeightedAverage, Slerp])
def test_merged_bias(weights: str, merge: type) -> None:
    pool = replace(pool_with_stats(1), down_bias=torch.randn(4, 6, generator=torch.Generator().manual_seed(0)))
    pool = replace(pool, incoming_weight=torch.tensor([0.0, 0.4, 0.9])[pool.incoming_expert])
    own, incoming = weights_of(pool, weights)
    givers = pool.incoming_expert.tolist()
    by_expert = [own, *(incoming[givers.index(expert)] for expert in (1, 2)), 0.0]
    close(
        merge(weights=weights).merge_bias(pool),
        merges.mean_bias(pool.down_bias.double().tolist(), 0, givers, by_expert, WIDTH),
    )


KEPT = [1, 3, 4]
GROUPS = {1: [0, 2], 3: [5], 4: []}
"""Kept expert -> the whole experts that merge into it."""


def whole_experts(bank: ExpertBank, aligned: dict[int, torch.Tensor]) -> LayerPlan:
    """All segments of a group's experts go to its kept one: to the same neuron, or the one they are aligned with."""
    width = bank.dims.width
    moves = [(giver, KEPT.index(kept)) for kept, givers in GROUPS.items() for giver in givers]
    same = torch.arange(width)
    assignment = Assignment(
        source=torch.cat([giver * width + same for giver, _ in moves]),
        target=torch.cat([torch.full((width,), target) for _, target in moves]),
        partner=torch.cat([aligned.get(giver, same) for giver, _ in moves]),
        affinity=torch.ones(len(moves) * width),
    )
    scores = torch.arange(6, dtype=torch.float64)
    return LayerPlan(0, 6, width, scores, torch.tensor(KEPT), assignment)


MATRICES = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")


@pytest.mark.parametrize("kind", BANKS)
@pytest.mark.parametrize("is_aligned", [True, False])
def test_whole_experts_become_the_frequency_weighted_average_of_their_parameters(kind: dict, is_aligned: bool) -> None:
    bank = random_bank(6, 5, 4, **kind)
    stats = random_stats(bank)
    aligned = {giver: torch.randperm(5, generator=torch.Generator().manual_seed(giver)) for giver in (0, 2, 5)}
    plan = whole_experts(bank, aligned if is_aligned else {})
    out = compress_layer(bank, plan, WeightedAverage(weights="frequency"), Slice(), 5, 0, stats)
    # Neuron i of the giver lies on neuron aligned[i] of the kept one: put it there first.
    straight = bank
    for giver, order in aligned.items() if is_aligned else ():
        straight = permute_neurons(straight, giver, torch.argsort(order))
    routed = stats["routed"].tolist()
    for position, (kept, givers) in enumerate(GROUPS.items()):
        members = [kept, *givers]
        for name in MATRICES:
            weights = getattr(straight, name)
            if weights is None:
                continue
            matrices = [weights[e].double().view(len(weights[e]), -1).tolist() for e in members]
            hand = merges.expert_average(matrices, [routed[e] for e in members])
            close(getattr(out, name)[position].view(len(hand), -1), hand)


@pytest.mark.parametrize("kind", BANKS)
@pytest.mark.parametrize("merge", [WeightedAverage(weights="frequency"), Slerp(), Slerp(along="segment")])
def test_one_member_groups_are_untouched_and_an_expert_merged_with_its_copies_keeps_its_bits(
    kind: dict, merge: object
) -> None:
    bank = random_bank(6, 5, 4, **kind)
    aligned = {giver: torch.randperm(5, generator=torch.Generator().manual_seed(giver)) for giver in (0, 2, 5)}
    for kept, givers in GROUPS.items():
        for giver in givers:
            bank = copy_expert(bank, kept, giver, aligned[giver])
    out = compress_layer(bank, whole_experts(bank, aligned), merge, Slice(), 5, 0, random_stats(bank))
    for name in MATRICES:
        if getattr(bank, name) is not None:
            assert torch.equal(getattr(out, name), getattr(bank, name)[KEPT]), name


@pytest.mark.parametrize("merge", [SphericalKMeans(), KMeansActivation(), SphericalKMeans(weights="frequency")])
def test_permuted_copies_merge_to_the_same_function(merge: object) -> None:
    bank = random_bank(6, 5, 4, bias=True)
    for kept, givers in GROUPS.items():
        for giver in givers:
            bank = copy_expert(bank, kept, giver, torch.randperm(5, generator=torch.Generator().manual_seed(giver)))
    stats = random_stats(bank)
    out = compress_layer(bank, whole_experts(bank, {}), merge, Slice(), 5, 0, stats)
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(9))
    for position, kept in enumerate(KEPT):
        torch.testing.assert_close(as_bank(out, bank).output(position, x), bank.output(kept, x), rtol=1e-5, atol=1e-5)
