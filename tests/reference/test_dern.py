"""The fast code against the slow formulas."""

import random

import pytest
import torch

from dernkit.builtin.assigners import Affinity
from dernkit.builtin.merges import SphericalKMeans, WeightedAverage
from dernkit.builtin.routers import Additive
from dernkit.builtin.scorers import GateMass, Reap, RouterFrequency
from dernkit.builtin.similarities import Cosine
from dernkit.kernel.clustering import spherical_kmeans
from dernkit.kernel.matching import best_match
from dernkit.testing.banks import random_bank, random_pool, retained
from dernkit.types import LayerPlan, LayerStats
from tests.reference import dern

BANKS = [
    pytest.param({"gated": gated, "bias": bias}, id=f"{'gated' if gated else 'plain'}-{'bias' if bias else 'nobias'}")
    for gated in (True, False)
    for bias in (True, False)
]
KEPT = torch.tensor([1, 3])


def close(fast: torch.Tensor, slow: list) -> None:
    torch.testing.assert_close(fast.double(), torch.tensor(slow, dtype=torch.float64), rtol=1e-5, atol=1e-5)


def rows(segments: torch.Tensor) -> list[list[float]]:
    return segments.flatten(1).double().tolist()


def test_cosine_matching() -> None:
    queries, candidates = torch.randn(2, 30, 9, generator=torch.Generator().manual_seed(0))
    queries[3] = candidates[7] = candidates[8] = 0
    value, index = best_match(queries, candidates)
    slow = [dern.best(query, candidates.double().tolist()) for query in queries.double().tolist()]
    close(value, [cosine for cosine, _ in slow])
    assert index.tolist() == [index for _, index in slow]


@pytest.mark.parametrize("kind", BANKS)
@pytest.mark.parametrize("parts", [("up", "down"), ("up",), ("down", "up")])
@pytest.mark.parametrize("rule", [{"threshold": 0.3}, {}, {"quantile": 0.37}, {"quantile": 1.0}])
def test_assignment(kind: dict, parts: tuple, rule: dict) -> None:
    bank = random_bank(4, 6, 3, **kind)
    moves = Affinity(similarity=Cosine(parts=parts), **rule).assign(bank, retained(bank, KEPT.tolist()), LayerStats(0))
    found = dern.affinities(bank, KEPT.tolist(), sorted(parts, reverse=True))
    slow = (
        dern.best_share(found, rule["quantile"])
        if "quantile" in rule
        else dern.above_threshold(found, rule.get("threshold", 0.6))
    )
    assert slow, "the case must move something"
    assert moves.source.tolist() == [move[0] for move in slow]
    assert moves.target.tolist() == [move[1] for move in slow]
    assert moves.partner.tolist() == [move[2] for move in slow]
    close(moves.affinity, [move[3] for move in slow])


@pytest.mark.parametrize("equalise", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_kmeans_merge(equalise: bool, rescale: bool, seed: int) -> None:
    pool = random_pool(features=4, seed=seed, arrivals=12)
    merged = SphericalKMeans(equalise=equalise, rescale=rescale).merge(pool, 8, torch.Generator())
    segments = rows(pool.own) + rows(pool.incoming)
    weights = [pool.own_weight] * 8 + pool.incoming_weight.double().tolist()
    seeds = dern.seeds_by_gate(segments, 4, 8)
    slow = dern.kmeans(segments, weights, seeds, equalise=equalise, rescale=rescale)
    close(merged.flatten(1), slow)


@pytest.mark.parametrize("iterations", [1, 2, 3, 30])
def test_kmeans_compares_again_only_what_changed_and_gives_the_same(iterations: int) -> None:
    rng = torch.Generator().manual_seed(iterations)
    segments, weights = torch.randn(60, 2, 3, generator=rng), torch.rand(60, generator=rng)
    seeds = torch.arange(0, 60, 6)
    fast = spherical_kmeans(segments, weights, seeds, iterations=iterations)
    close(
        fast.flatten(1), dern.kmeans(rows(segments), weights.double().tolist(), seeds.tolist(), iterations=iterations)
    )


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("weights", ["score", "uniform"])
def test_weighted_average(rescale: bool, weights: str) -> None:
    pool = random_pool(features=4, seed=4)
    merged = WeightedAverage(weights=weights, rescale=rescale).merge(pool, 8, torch.Generator())
    own_weight, incoming = pool.own_weight, pool.incoming_weight.double().tolist()
    if weights == "uniform":
        own_weight, incoming = 1.0, [1.0] * len(incoming)
    partner = pool.partner.tolist()
    slow = dern.weighted_average(rows(pool.own), own_weight, rows(pool.incoming), incoming, partner, rescale=rescale)
    close(merged.flatten(1), slow)


def test_additive_router() -> None:
    bank = random_bank(5, 6, 4)
    kept = torch.tensor([0, 4])
    moves = Affinity(quantile=0.6).assign(bank, retained(bank, kept.tolist()), LayerStats(0))
    plan = LayerPlan(0, 5, 6, torch.ones(5, dtype=torch.float64), kept, moves)
    pairs = list(zip(moves.source.tolist(), moves.target.tolist(), strict=True))
    slow = dern.additive_router(bank.router.double().tolist(), [0, 4], pairs, 6)
    close(Additive().update(bank.router, plan, LayerStats(0)), slow)


def test_scores() -> None:
    draw = random.Random(0)
    experts, top_k = 6, 2
    tokens = [[(e, draw.random(), draw.random()) for e in draw.sample(range(5), top_k)] for _ in range(50)]
    sums = {name: torch.zeros(experts, dtype=torch.float64) for name in ("routed", "gate_sum", "reap_sum")}
    for expert, gate, norm in (event for token in tokens for event in token):
        sums["routed"][expert] += 1
        sums["gate_sum"][expert] += gate
        sums["reap_sum"][expert] += gate * norm
    bank, stats = random_bank(experts), LayerStats(len(tokens), sums)
    close(RouterFrequency().score(bank, stats), dern.frequency(tokens, experts))
    close(GateMass().score(bank, stats), dern.gate_mass(tokens, experts))
    close(Reap().score(bank, stats), dern.reap(tokens, experts))
