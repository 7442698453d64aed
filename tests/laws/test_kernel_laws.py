"""The laws of the method, on banks of every kind. They hold for every layer, so small layers prove them."""

from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dernkit.builtin.assigners import Affinity, NoMoves
from dernkit.builtin.merges import Concatenate, Keep, KMeansActivation, Slerp, SphericalKMeans, WeightedAverage
from dernkit.builtin.routers import Additive, Average, LogMass, Slice
from dernkit.builtin.scorers import GateMass, Reap, RouterFrequency
from dernkit.builtin.selectors import TopScore
from dernkit.builtin.similarities import Cosine
from dernkit.kernel.compress import compress_layer, target_width
from dernkit.kernel.planning import plan_from_scores, plan_layer
from dernkit.testing.banks import (
    as_bank,
    copy_expert,
    permute_experts,
    permute_neurons,
    permute_stats,
    random_bank,
    random_stats,
)
from dernkit.types import CompressedLayer, ExpertBank, LayerPlan, LayerStats

few = settings(max_examples=25, deadline=None)
merges = st.sampled_from(
    [
        SphericalKMeans(),
        SphericalKMeans(init="own", weights="uniform", rescale=False),
        SphericalKMeans(init="random", equalise=False),
        WeightedAverage(),
        WeightedAverage(weights="uniform", rescale=True),
        WeightedAverage(weights="frequency"),
        KMeansActivation(),
        Slerp(),
        Slerp(weights="frequency", along="segment"),
        Keep(),
        Concatenate(),
    ]
)
routers = st.sampled_from([Slice(), Additive(), Average(), Average(weights="frequency"), LogMass()])
scorers = st.sampled_from([GateMass(), Reap(), RouterFrequency()])
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
orders = st.integers(0, 10**6)


@st.composite
def banks(draw: st.DrawFn, experts: int = 4, dtype: st.SearchStrategy = dtypes) -> ExpertBank:
    return random_bank(
        experts,
        draw(st.integers(3, 9)),
        draw(st.integers(2, 6)),
        gated=draw(st.booleans()),
        bias=draw(st.booleans()),
        dtype=draw(dtype),
        seed=draw(st.integers(0, 1000)),
    )


exact = st.just(torch.float32)


def permutation(size: int, seed: int) -> torch.Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def assert_same_bits(layer: CompressedLayer, bank: ExpertBank, kept: torch.Tensor) -> None:
    for field in fields(CompressedLayer):
        mine = getattr(layer, field.name)
        if isinstance(mine, torch.Tensor):
            theirs = getattr(bank, field.name)[kept]
            assert mine.dtype == theirs.dtype and torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))
    for name, mine in layer.per_expert.items():
        assert torch.equal(mine, bank.per_expert[name][kept])


def assert_same_neurons(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-6) -> None:
    """Equal as sets of segments: the nearest neighbours are a bijection, and near."""
    distance, nearest = torch.cdist(one.flatten(1), other.flatten(1), compute_mode="donot_use_mm_for_euclid_dist").min(
        1
    )
    assert len(one) == len(other) and sorted(nearest.tolist()) == list(range(len(other)))
    assert float(distance.max()) <= tolerance


@few
@given(banks(), merges, routers, scorers, st.floats(-1, 1))
def test_keeping_all_experts_changes_no_bit(bank, merge, router, scorer, threshold) -> None:
    stats = random_stats(bank)
    plan = plan_layer(bank, stats, scorer, 4, TopScore(), Affinity(threshold=threshold))
    width = target_width([plan], merge)
    assert_same_bits(compress_layer(bank, plan, merge, router, width, 0, stats), bank, torch.arange(4))


@few
@given(banks(), merges, routers, scorers, st.integers(2, 3))
def test_a_threshold_of_1_is_plain_pruning_bit_for_bit(bank, merge, router, scorer, keep) -> None:
    stats = random_stats(bank)
    plan = plan_layer(bank, stats, scorer, keep, TopScore(), Affinity(threshold=1.0))
    pruned = plan_layer(bank, stats, scorer, keep, TopScore(), NoMoves())
    assert torch.equal(plan.kept, pruned.kept)
    layer = compress_layer(bank, plan, merge, router, target_width([plan], merge), 0, stats)
    assert_same_bits(layer, bank, plan.kept)


@few
@given(banks(dtype=exact), st.integers(2, 3))
def test_pruning_is_the_original_layer_with_the_dropped_logits_masked(bank, keep) -> None:
    plan = plan_layer(bank, random_stats(bank), GateMass(), keep, TopScore(), None)
    x = torch.randn(10, bank.dims.hidden, generator=torch.Generator().manual_seed(0))
    mask = torch.full((4,), -torch.inf)
    mask[plan.kept] = 0
    pruned = as_bank(compress_layer(bank, plan, None, Slice(), bank.dims.width, 0), bank)
    torch.testing.assert_close(moe(pruned, x, torch.zeros(keep)), moe(bank, x, mask), rtol=1e-5, atol=1e-5)


def moe(bank: ExpertBank, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Top-2 of the softmax over x·G + bias, without normalisation of what is chosen."""
    logits = x @ bank.router.T + bank.per_expert["correction_bias"] + mask
    values, chosen = logits.softmax(1).topk(2)
    outputs = torch.stack([bank.output(expert, x) for expert in range(bank.dims.experts)], dim=1)
    return (values[:, :, None] * outputs.gather(1, chosen[:, :, None].expand(-1, -1, x.shape[1]))).sum(1)


def compress_with_twins(bank: ExpertBank, merge: object, seed: int) -> tuple[LayerPlan, CompressedLayer, ExpertBank]:
    """Expert 3 is a permuted copy of expert 1 and is dropped."""
    bank = copy_expert(bank, 1, 3, permutation(bank.dims.width, seed))
    scores = torch.tensor([3, 2, 4, 1], dtype=torch.float64)
    plan = plan_from_scores(bank, LayerStats(0), scores, 3, TopScore(), Affinity())
    return plan, compress_layer(bank, plan, merge, Slice(), target_width([plan], merge), 0, random_stats(bank)), bank


@few
@given(banks(dtype=exact), merges, orders)
def test_a_permuted_copy_of_a_kept_expert_finds_its_twins_and_merges_into_it(bank, merge, seed) -> None:
    plan, layer, bank = compress_with_twins(bank, merge, seed)
    width = bank.dims.width
    assert len(plan.assignment) == width and plan.assignment.affinity.tolist() == [1.0] * width
    assert plan.assignment.target.tolist() == [1] * width
    assert plan.assignment.partner.tolist() == permutation(width, seed).tolist()
    after = as_bank(layer, bank)
    for untouched in (0, 2):
        assert torch.equal(after.segments(untouched)[:width], bank.segments(untouched))
    if not merge.widens:
        assert_same_neurons(after.segments(1), bank.segments(1))


@pytest.mark.parametrize("init", ["gate-norm", "own", "random"])
@pytest.mark.parametrize("gated", [True, False])
def test_twins_merge_also_where_the_expert_has_repeated_and_zero_neurons(init: str, gated: bool) -> None:
    bank = random_bank(4, 9, 5, gated=gated)
    for tensor in (bank.up,) if bank.gate is None else (bank.gate, bank.up):
        tensor[1, 2], tensor[1, 7:] = tensor[1, 0], 0
    bank.down[1, :, 2], bank.down[1, :, 7:] = bank.down[1, :, 0], 0
    _, layer, bank = compress_with_twins(bank, SphericalKMeans(init=init), seed=1)
    before, after = bank.segments(1).flatten(1), as_bank(layer, bank).segments(1).flatten(1)
    torch.testing.assert_close(before.sort(0).values, after.sort(0).values, rtol=1e-6, atol=1e-6)
    x = torch.randn(10, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(as_bank(layer, bank).output(1, x), bank.output(1, x), rtol=1e-4, atol=1e-4)


deterministic = merges.filter(lambda merge: getattr(merge, "init", None) != "random")


@few
@given(banks(dtype=exact), deterministic, routers, scorers, orders, st.sampled_from([0.3, 0.8]))
def test_permuting_experts_permutes_the_result(bank, merge, router, scorer, seed, quantile) -> None:
    order = permutation(4, seed)
    stats = random_stats(bank)
    one = run(bank, stats, merge, router, scorer, quantile)
    other = run(permute_experts(bank, order), permute_stats(stats, order), merge, router, scorer, quantile)
    assert torch.equal(order[other[0].kept].sort().values, one[0].kept)
    places = [one[0].kept.tolist().index(expert) for expert in order[other[0].kept].tolist()]
    torch.testing.assert_close(other[1].router, one[1].router[places])
    for position, place in enumerate(places):
        assert_same_function(as_bank(other[1], bank), position, as_bank(one[1], bank), place)


@few
@given(banks(dtype=exact), deterministic, st.integers(0, 3), orders, st.sampled_from([0.3, 0.8]))
def test_permuting_neurons_changes_no_function(bank, merge, expert, seed, quantile) -> None:
    stats = random_stats(bank)
    shuffled = permute_neurons(bank, expert, permutation(bank.dims.width, seed))
    plan, layer = run(bank, stats, merge, Additive(), GateMass(), quantile)
    other_plan, other = run(shuffled, stats, merge, Additive(), GateMass(), quantile)
    assert sorted(plan.assignment.affinity.tolist()) == sorted(other_plan.assignment.affinity.tolist())
    assert torch.equal(layer.router, other.router)
    for position in range(len(plan.kept)):
        assert_same_function(as_bank(other, bank), position, as_bank(layer, bank), position)


def run(bank, stats, merge, router, scorer, quantile) -> tuple[LayerPlan, CompressedLayer]:
    plan = plan_layer(bank, stats, scorer, 2, TopScore(), Affinity(similarity=Cosine(), quantile=quantile))
    return plan, compress_layer(bank, plan, merge, router, target_width([plan], merge, multiple=4), 0, stats)


def assert_same_function(one: ExpertBank, first: int, other: ExpertBank, second: int) -> None:
    x = torch.randn(8, one.dims.hidden, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(one.output(first, x), other.output(second, x), rtol=1e-4, atol=1e-4)


@few
@given(banks(dtype=exact), st.floats(0, 1))
def test_concatenation_adds_the_outputs_of_what_arrives(bank, quantile) -> None:
    plan, layer = run(bank, random_stats(bank), Concatenate(), Slice(), GateMass(), quantile)
    x = torch.randn(8, bank.dims.hidden, generator=torch.Generator().manual_seed(0))
    for position, expert in enumerate(plan.kept.tolist()):
        expected = bank.output(expert, x)
        arriving = plan.assignment.source[plan.assignment.target == position]
        for source in arriving.tolist():
            expected = expected + neuron_output(bank, source // bank.dims.width, source % bank.dims.width, x)
        torch.testing.assert_close(as_bank(layer, bank).output(position, x), expected, rtol=1e-4, atol=1e-4)


def neuron_output(bank: ExpertBank, expert: int, neuron: int, x: torch.Tensor) -> torch.Tensor:
    def inner(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return x @ weight[expert, neuron][:, None] + (0 if bias is None else bias[expert, neuron])

    gate = None if bank.gate is None else inner(bank.gate, bank.gate_bias)
    return bank.act(gate, inner(bank.up, bank.up_bias)) * bank.down[expert, :, neuron]


@few
@given(banks(), merges, st.sampled_from([torch.float32, torch.bfloat16]))
def test_dead_experts_and_zero_scores_give_finite_results(bank, merge, dtype) -> None:
    stats = random_stats(bank)
    dead = LayerStats(0, {name: value * 0 for name, value in stats.values.items()}, stats.sample_size)
    for scorer in (GateMass(), Reap(), RouterFrequency()):
        plan, layer = run(bank, dead, merge, Additive(), scorer, 1.0)
        assert plan.kept.tolist() == [0, 1]
        assert bool(layer.up.isfinite().all()) and bool(layer.down.isfinite().all())
